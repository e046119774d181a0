// padded_nms on CUDA: rows are the candidates of cuda/greedy_nms.cuh. A row with a NaN score or a box that is not
// finite is skipped like padding, and noted as a fault.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda/faults.cuh"
#include "cuda/greedy_nms.cuh"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Rows {
  const Box* boxes;       // [B, N]
  const float* scores;    // [B, N]
  const int64_t* groups;  // [B, N] or nullptr
  int64_t rows;
  int64_t max_output;
  int64_t* index;  // [B, max_output]
  int64_t* count;  // [B]
  uint64_t* fault;

  __device__ bool valid(int64_t image, int32_t i) const {
    if (score(image, i) == -INFINITY) return false;
    const bool right = !isnan(score(image, i)) && is_finite(box(image, i));
    if (!right) note_fault(fault, Fault::kPaddedNms, image * rows + i);
    return right;
  }
  __device__ float score(int64_t image, int32_t i) const { return scores[image * rows + i]; }
  __device__ Box box(int64_t image, int32_t i) const { return boxes[image * rows + i]; }
  __device__ int64_t group(int64_t image, int32_t i) const { return groups ? groups[image * rows + i] : 0; }
  __device__ void write(int64_t image, int64_t slot, int32_t i) const { index[image * max_output + slot] = i; }
  __device__ void write_count(int64_t image, int64_t kept) const { count[image] = kept; }
};

std::tuple<Tensor, Tensor> padded_nms_cuda(const Tensor& boxes,                  // [B, N, 4]
                                           const Tensor& scores,                 // [B, N]
                                           const std::optional<Tensor>& groups,  // [B, N]
                                           double iou_threshold, int64_t max_output) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  check_padded_nms(boxes, scores, groups, iou_threshold, max_output);
  const int64_t batch = boxes.size(0), rows = boxes.size(1);
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_scores = torch::stable::contiguous(scores);
  std::optional<Tensor> dense_groups;
  if (groups) dense_groups = torch::stable::contiguous(*groups);
  Tensor index = torch::stable::new_empty(boxes, {batch, max_output}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {batch}, ScalarType::Long);
  const Rows source{static_cast<const Box*>(dense_boxes.const_data_ptr()),
                    dense_scores.const_data_ptr<float>(),
                    dense_groups ? dense_groups->const_data_ptr<int64_t>() : nullptr,
                    rows,
                    max_output,
                    index.mutable_data_ptr<int64_t>(),
                    count.mutable_data_ptr<int64_t>(),
                    fault_word(boxes)};
  launch_greedy_nms(source, boxes, batch, rows, groups.has_value(), iou_threshold, max_output);
  return {index, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("padded_nms", TORCH_BOX(&cascadeops::padded_nms_cuda));
}
