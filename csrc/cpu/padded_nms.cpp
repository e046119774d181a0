// padded_nms on the CPU: rows that are no padding become candidates, images run in parallel.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/greedy_nms.h"
#include "cpu/nms_rows.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs one image; returns the first row with a NaN score or a box that is not finite, or -1.
int64_t nms_of_image(const Box* boxes, const float* scores, const int64_t* groups, int64_t rows, const IouTest& test,
                     int64_t max_output, int64_t* index, int64_t* count) {
  RowCandidates image;
  const int64_t bad_row = collect_rows(boxes, scores, groups, rows, /*skip_padding=*/true, image);
  if (bad_row >= 0) return bad_row;
  const std::vector<int32_t> kept = greedy_nms(image.candidates, test, max_output);
  std::transform(kept.begin(), kept.end(), index, [&](int32_t position) { return image.row[position]; });
  std::fill(index + kept.size(), index + max_output, -1);
  *count = static_cast<int64_t>(kept.size());
  return -1;
}

std::tuple<Tensor, Tensor> padded_nms_cpu(const Tensor& boxes,                  // [B, N, 4]
                                          const Tensor& scores,                 // [B, N]
                                          const std::optional<Tensor>& groups,  // [B, N]
                                          double iou_threshold, int64_t max_output) {
  check_padded_nms(boxes, scores, groups, iou_threshold, max_output);
  const int64_t batch = boxes.size(0), rows = boxes.size(1);
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_scores = torch::stable::contiguous(scores);
  std::optional<Tensor> dense_groups;
  if (groups) dense_groups = torch::stable::contiguous(*groups);
  Tensor index = torch::stable::new_empty(boxes, {batch, max_output}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {batch}, ScalarType::Long);

  const IouTest test = make_iou_test(iou_threshold);
  const auto* box_data = static_cast<const Box*>(dense_boxes.const_data_ptr());
  const auto* score_data = dense_scores.const_data_ptr<float>();
  const auto* group_data = dense_groups ? dense_groups->const_data_ptr<int64_t>() : nullptr;
  auto* index_data = index.mutable_data_ptr<int64_t>();
  auto* count_data = count.mutable_data_ptr<int64_t>();
  std::vector<int64_t> bad_row(batch);  // an exception may not leave parallel_for
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t offset = image * rows;
      bad_row[image] = nms_of_image(box_data + offset, score_data + offset, group_data ? group_data + offset : nullptr,
                                    rows, test, max_output, index_data + image * max_output, count_data + image);
    }
  });
  for (int64_t image = 0; image < batch; ++image) {
    check(bad_row[image] < 0, "padded_nms: boxes must be finite and scores not NaN; see image ", image, ", row ",
          bad_row[image]);
  }
  return {index, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("padded_nms", TORCH_BOX(&cascadeops::padded_nms_cpu));
}
