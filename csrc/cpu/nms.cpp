// nms and batched_nms on the CPU: every row is a candidate; groups are shared by the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "checks_nms.h"
#include "cpu/greedy_nms.h"
#include "cpu/nms_rows.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor kept_rows(const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  check_nms(op, boxes, scores, idxs, iou_threshold);
  const int64_t rows = boxes.size(0);
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_scores = torch::stable::contiguous(scores);
  std::optional<Tensor> dense_idxs;
  if (idxs != nullptr) dense_idxs = torch::stable::contiguous(*idxs);

  RowCandidates image;
  check_nms_values(
      op, collect_rows(static_cast<const Box*>(dense_boxes.const_data_ptr()), dense_scores.const_data_ptr<float>(),
                       dense_idxs ? dense_idxs->const_data_ptr<int64_t>() : nullptr, rows,
                       /*skip_padding=*/false, image));
  const std::vector<int32_t> kept = greedy_nms(image.candidates, make_iou_test(iou_threshold), rows);
  Tensor index = torch::stable::new_empty(boxes, {static_cast<int64_t>(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), index.mutable_data_ptr<int64_t>());  // no row was left out: positions are rows
  return index;
}

Tensor nms_cpu(const Tensor& boxes,   // [N, 4]
               const Tensor& scores,  // [N]
               double iou_threshold) {
  return kept_rows("nms", boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_cpu(const Tensor& boxes,   // [N, 4]
                       const Tensor& scores,  // [N]
                       const Tensor& idxs,    // [N]
                       double iou_threshold) {
  return kept_rows("batched_nms", boxes, scores, &idxs, iou_threshold);
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("nms", TORCH_BOX(&cascadeops::nms_cpu));
  library.impl("batched_nms", TORCH_BOX(&cascadeops::batched_nms_cpu));
}
