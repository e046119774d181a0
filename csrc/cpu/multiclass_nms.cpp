// multiclass_nms on the CPU: (row, class) pairs above the score threshold become candidates, images run in parallel.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "cpu/greedy_nms.h"
#include "cpu/simd.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a row has a candidate, or a NaN: most rows of a detector have none.
CASCADEOPS_CLONES
bool any_above(const float* scores, int64_t count, float threshold) {
  int any = 0;
  for (int64_t i = 0; i < count; ++i) any |= !(scores[i] <= threshold);
  return any != 0;
}

// One image's part of the output.
struct Detections {
  Box* boxes;
  float* scores;
  int64_t *labels, *index, *count;
};

// Runs one image; returns the first row with a NaN score or a candidate whose box is not finite, or -1.
int64_t nms_of_image(const Box* boxes,     // [N] or [N, C]
                     const float* scores,  // [N, C]
                     int64_t rows, int64_t classes, bool box_per_class, float score_threshold, const IouTest& test,
                     int64_t max_detections, const Detections& out) {
  Candidates candidates;
  candidates.num_groups = classes;
  std::vector<int32_t> source;  // row of each candidate
  for (int64_t row = 0; row < rows; ++row) {
    if (!any_above(scores + row * classes, classes, score_threshold)) continue;
    for (int64_t label = 0; label < classes; ++label) {
      const float score = scores[row * classes + label];
      if (score <= score_threshold) continue;
      const Box& box = boxes[box_per_class ? row * classes + label : row];
      if (std::isnan(score) || !is_finite(box)) return row;
      candidates.boxes.push_back(box);
      candidates.scores.push_back(score);
      candidates.groups.push_back(static_cast<int32_t>(label));
      source.push_back(static_cast<int32_t>(row));
    }
  }

  const std::vector<int32_t> kept = greedy_nms(candidates, test, max_detections);
  const auto num_kept = static_cast<int64_t>(kept.size());
  for (int64_t i = 0; i < num_kept; ++i) {
    out.boxes[i] = candidates.boxes[kept[i]];
    out.scores[i] = candidates.scores[kept[i]];
    out.labels[i] = candidates.groups[kept[i]];
    out.index[i] = source[kept[i]];
  }
  std::fill(out.boxes + num_kept, out.boxes + max_detections, Box{});
  std::fill(out.scores + num_kept, out.scores + max_detections, -INFINITY);
  std::fill(out.labels + num_kept, out.labels + max_detections, -1);
  std::fill(out.index + num_kept, out.index + max_detections, -1);
  *out.count = num_kept;
  return -1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiclass_nms_cpu(const Tensor& boxes,   // [B, N, 4 or C * 4]
                                                                      const Tensor& scores,  // [B, N, C]
                                                                      double score_threshold, double iou_threshold,
                                                                      int64_t max_detections) {
  check_multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_detections);
  const int64_t batch = scores.size(0), rows = scores.size(1), classes = scores.size(2);
  const bool box_per_class = boxes.size(2) != 4;
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_scores = torch::stable::contiguous(scores);
  Tensor out_boxes = torch::stable::new_empty(boxes, {batch, max_detections, 4});
  Tensor out_scores = torch::stable::new_empty(boxes, {batch, max_detections});
  Tensor labels = torch::stable::new_empty(boxes, {batch, max_detections}, ScalarType::Long);
  Tensor index = torch::stable::new_empty(boxes, {batch, max_detections}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {batch}, ScalarType::Long);

  const IouTest test = make_iou_test(iou_threshold);
  const auto* box_data = static_cast<const Box*>(dense_boxes.const_data_ptr());
  const auto* score_data = dense_scores.const_data_ptr<float>();
  const Detections out{static_cast<Box*>(out_boxes.mutable_data_ptr()), out_scores.mutable_data_ptr<float>(),
                       labels.mutable_data_ptr<int64_t>(), index.mutable_data_ptr<int64_t>(),
                       count.mutable_data_ptr<int64_t>()};
  std::vector<int64_t> bad_row(batch);  // an exception may not leave parallel_for
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t offset = image * max_detections;
      bad_row[image] = nms_of_image(
          box_data + image * rows * (box_per_class ? classes : 1), score_data + image * rows * classes, rows, classes,
          box_per_class, static_cast<float>(score_threshold), test, max_detections,
          {out.boxes + offset, out.scores + offset, out.labels + offset, out.index + offset, out.count + image});
    }
  });
  for (int64_t image = 0; image < batch; ++image) {
    check(bad_row[image] < 0, "multiclass_nms: boxes must be finite and scores not NaN; see image ", image, ", row ",
          bad_row[image]);
  }
  return {out_boxes, out_scores, labels, index, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("multiclass_nms", TORCH_BOX(&cascadeops::multiclass_nms_cpu));
}
