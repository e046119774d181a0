// nms and batched_nms on CUDA: rows are the candidates of cuda/greedy_nms.cuh. The length of the result must reach the
// host, so the host waits once; the first faulty row, if there is one, arrives with it and is an exception as on the
// CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>

#include "checks_nms.h"
#include "cuda/faults.cuh"
#include "cuda/greedy_nms.cuh"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Status {
  int64_t count;
  unsigned long long bad_row;  // kNone if there is none
};
constexpr int kStatusByte = 0x7f;
constexpr unsigned long long kNone = 0x7f7f7f7f7f7f7f7full;  // a Status of such bytes

struct Rows {
  const Box* boxes;     // [N]
  const float* scores;  // [N]
  const int64_t* idxs;  // [N] or nullptr
  int64_t* index;       // [N]
  Status* status;

  __device__ bool valid(int64_t, int32_t i) const {
    const bool right = !isnan(scores[i]) && is_finite(boxes[i]);
    if (!right) atomicMin(&status->bad_row, static_cast<unsigned long long>(i));
    return right;
  }
  __device__ float score(int64_t, int32_t i) const { return scores[i]; }
  __device__ Box box(int64_t, int32_t i) const { return boxes[i]; }
  __device__ int64_t group(int64_t, int32_t i) const { return idxs ? idxs[i] : 0; }
  __device__ void write(int64_t, int64_t slot, int32_t i) const { index[slot] = i; }
  __device__ void write_count(int64_t, int64_t kept) const { status->count = kept; }
};

Tensor kept_rows(const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  check_nms(op, boxes, scores, idxs, iou_threshold);
  const int64_t rows = boxes.size(0);
  if (rows == 0) return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_scores = torch::stable::contiguous(scores);
  std::optional<Tensor> dense_idxs;
  if (idxs != nullptr) dense_idxs = torch::stable::contiguous(*idxs);
  const cudaStream_t stream = current_stream(boxes);
  const Tensor index = torch::stable::new_empty(boxes, {rows}, ScalarType::Long);
  const Tensor status = torch::stable::new_empty(boxes, {sizeof(Status)}, ScalarType::Byte);
  STD_CUDA_CHECK(cudaMemsetAsync(status.mutable_data_ptr(), kStatusByte, sizeof(Status), stream));
  const Rows source{static_cast<const Box*>(dense_boxes.const_data_ptr()), dense_scores.const_data_ptr<float>(),
                    dense_idxs ? dense_idxs->const_data_ptr<int64_t>() : nullptr, index.mutable_data_ptr<int64_t>(),
                    static_cast<Status*>(status.mutable_data_ptr())};
  launch_greedy_nms(source, boxes, 1, rows, idxs != nullptr, iou_threshold, rows);

  Status result;
  STD_CUDA_CHECK(cudaMemcpyAsync(&result, source.status, sizeof result, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  raise_device_fault(boxes);
  check_nms_values(op, result.bad_row == kNone ? -1 : static_cast<int64_t>(result.bad_row));
  Tensor kept = torch::stable::new_empty(boxes, {result.count}, ScalarType::Long);
  STD_CUDA_CHECK(cudaMemcpyAsync(kept.mutable_data_ptr(), source.index, result.count * sizeof(int64_t),
                                 cudaMemcpyDeviceToDevice, stream));
  return kept;
}

Tensor nms_cuda(const Tensor& boxes,   // [N, 4]
                const Tensor& scores,  // [N]
                double iou_threshold) {
  return kept_rows("nms", boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_cuda(const Tensor& boxes,   // [N, 4]
                        const Tensor& scores,  // [N]
                        const Tensor& idxs,    // [N]
                        double iou_threshold) {
  return kept_rows("batched_nms", boxes, scores, &idxs, iou_threshold);
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("nms", TORCH_BOX(&cascadeops::nms_cuda));
  library.impl("batched_nms", TORCH_BOX(&cascadeops::batched_nms_cuda));
}
