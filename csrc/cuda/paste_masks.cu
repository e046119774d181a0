// paste_masks on CUDA. out[n, y, x] = bilinear(probs[n], position of pixel centre (x, y) in box n), compared with the
// threshold; arithmetic and rounding in common/paste.h.
//
// The output is cut into chunks of 16 bytes in memory order, one thread to a chunk, so that every store is a full,
// aligned vector whatever the width. A chunk outside of its box costs two position tests. Writes N * H * W bytes, which
// is the floor; reads of probs (a few KiB per mask) hit the L1 cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "common/paste.h"
#include "cuda/launch.cuh"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kChunk = 16;  // bytes, the widest store

// One row of one pasted mask.
struct PastedRow {
  PastedMask mask;
  PasteTaps down;
  bool reached;

  __device__ PastedRow(const float* probs, const Box& box, int32_t h, int32_t w, int32_t row) : mask(probs, box, h, w) {
    const float position = mask.y.position(row);
    reached = is_finite(box) && has_area(box) && position > -1.0f && position < static_cast<float>(h);
    if (reached) down = paste_taps(position);
  }

  __device__ uint8_t pixel(int32_t column, float threshold) const {
    const float position = mask.x.position(column);
    const bool inside = reached && position > -1.0f && position < static_cast<float>(mask.x.cells);
    const float value = inside ? mask.value(paste_taps(position), down) : 0.0f;
    return threshold < 0.0f ? probability_byte(value) : value >= threshold;
  }

  // Whether none of the pixels [first, last] can differ from 0.
  __device__ bool empty(int32_t first, int32_t last) const {
    return !reached || !(mask.x.position(last) > -1.0f) || !(mask.x.position(first) < static_cast<float>(mask.x.cells));
  }
};

__global__ void __launch_bounds__(kThreads)
    paste_masks_kernel(const float* __restrict__ probs,  // [N, h, w]
                       const Box* __restrict__ boxes,    // [N]
                       int64_t masks, int32_t h, int32_t w, int32_t height, int32_t width, float threshold,
                       uint8_t* __restrict__ out) {  // [N, H, W]
  const int64_t rows = masks * height, bytes = rows * width;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kChunk;
  for (int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kChunk; begin < bytes; begin += stride) {
    int64_t row = begin / width;  // over all masks
    auto column = static_cast<int32_t>(begin - row * width);
    const auto count = static_cast<int32_t>(min(int64_t{kChunk}, bytes - begin));
    uint64_t low = 0, high = 0;  // the chunk; an array of bytes would live in memory
    for (int32_t i = 0; i < count; ++row, column = 0) {
      const int64_t mask = row / height;
      const PastedRow pasted(probs + mask * h * w, boxes[mask], h, w, static_cast<int32_t>(row - mask * height));
      const int32_t end = min(i + width - column, count);  // of the row's part of the chunk
      if (pasted.empty(column, column + end - i - 1)) {
        i = end;
        continue;
      }
      for (; i < end; ++i, ++column) {
        const uint64_t byte = static_cast<uint64_t>(pasted.pixel(column, threshold)) << (8 * (i % 8));
        low |= i < 8 ? byte : 0;
        high |= i < 8 ? 0 : byte;
      }
    }
    if (count == kChunk) {
      *reinterpret_cast<ulonglong2*>(out + begin) = make_ulonglong2(low, high);
    } else {
      for (int32_t i = 0; i < count; ++i) out[begin + i] = static_cast<uint8_t>((i < 8 ? low : high) >> (8 * (i % 8)));
    }
  }
}

Tensor paste_masks_cuda(const Tensor& probs,  // [N, h, w]
                        const Tensor& boxes,  // [N, 4]
                        int64_t height, int64_t width, double threshold) {
  const torch::stable::accelerator::DeviceGuard guard(probs.get_device_index());
  check_paste_masks(probs, boxes, height, width, threshold);
  const int64_t masks = probs.size(0);
  Tensor out =
      torch::stable::new_empty(probs, {masks, height, width}, threshold < 0 ? ScalarType::Byte : ScalarType::Bool);
  if (masks == 0) return out;
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  paste_masks_kernel<<<grid_blocks(masks * height * width, kThreads * kChunk), kThreads, 0, current_stream(probs)>>>(
      dense_probs.const_data_ptr<float>(), static_cast<const Box*>(dense_boxes.const_data_ptr()), masks,
      static_cast<int32_t>(probs.size(1)), static_cast<int32_t>(probs.size(2)), static_cast<int32_t>(height),
      static_cast<int32_t>(width), static_cast<float>(threshold), static_cast<uint8_t*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("paste_masks", TORCH_BOX(&cascadeops::paste_masks_cuda));
}
