// multiclass_nms on CUDA: (row, class) pairs are the candidates of cuda/greedy_nms.cuh, numbered row * C + class. A
// pair with a NaN score is skipped, and one above the threshold whose box is not finite; both are noted as faults.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "cuda/faults.cuh"
#include "cuda/greedy_nms.cuh"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct RowsAndClasses {
  const Box* boxes;     // [B, N] or [B, N, C]
  const float* scores;  // [B, N, C]
  int64_t rows;
  int32_t classes;
  bool box_per_class;
  float score_threshold;
  int64_t max_detections;
  Box* out_boxes;     // [B, D]
  float* out_scores;  // [B, D]
  int64_t* labels;    // [B, D]
  int64_t* index;     // [B, D]
  int64_t* count;     // [B]
  uint64_t* fault;

  __device__ bool valid(int64_t image, int32_t i) const {
    if (score(image, i) <= score_threshold) return false;
    const bool right = !isnan(score(image, i)) && is_finite(box(image, i));
    if (!right) note_fault(fault, Fault::kMulticlassNms, image * rows + i / classes);
    return right;
  }
  __device__ float score(int64_t image, int32_t i) const { return scores[image * rows * classes + i]; }
  __device__ Box box(int64_t image, int32_t i) const {
    return box_per_class ? boxes[image * rows * classes + i] : boxes[image * rows + i / classes];
  }
  __device__ int64_t group(int64_t, int32_t i) const { return i % classes; }
  __device__ void write(int64_t image, int64_t slot, int32_t i) const {
    const int64_t out = image * max_detections + slot;
    out_boxes[out] = i < 0 ? Box{} : box(image, i);
    out_scores[out] = i < 0 ? -INFINITY : score(image, i);
    labels[out] = i < 0 ? -1 : i % classes;
    index[out] = i < 0 ? -1 : i / classes;
  }
  __device__ void write_count(int64_t image, int64_t kept) const { count[image] = kept; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiclass_nms_cuda(const Tensor& boxes,   // [B, N, 4 or C * 4]
                                                                       const Tensor& scores,  // [B, N, C]
                                                                       double score_threshold, double iou_threshold,
                                                                       int64_t max_detections) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  check_multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_detections);
  const int64_t batch = scores.size(0), rows = scores.size(1), classes = scores.size(2);
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_scores = torch::stable::contiguous(scores);
  Tensor out_boxes = torch::stable::new_empty(boxes, {batch, max_detections, 4});
  Tensor out_scores = torch::stable::new_empty(boxes, {batch, max_detections});
  Tensor labels = torch::stable::new_empty(boxes, {batch, max_detections}, ScalarType::Long);
  Tensor index = torch::stable::new_empty(boxes, {batch, max_detections}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {batch}, ScalarType::Long);
  const RowsAndClasses source{static_cast<const Box*>(dense_boxes.const_data_ptr()),
                              dense_scores.const_data_ptr<float>(),
                              rows,
                              static_cast<int32_t>(classes),
                              boxes.size(2) != 4,
                              static_cast<float>(score_threshold),
                              max_detections,
                              static_cast<Box*>(out_boxes.mutable_data_ptr()),
                              out_scores.mutable_data_ptr<float>(),
                              labels.mutable_data_ptr<int64_t>(),
                              index.mutable_data_ptr<int64_t>(),
                              count.mutable_data_ptr<int64_t>(),
                              fault_word(boxes)};
  launch_greedy_nms(source, boxes, batch, rows * classes, true, iou_threshold, max_detections);
  return {out_boxes, out_scores, labels, index, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("multiclass_nms", TORCH_BOX(&cascadeops::multiclass_nms_cuda));
}
