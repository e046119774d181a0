// paste_masks on CUDA. out[n, y, x] = bilinear(probs[n], position of pixel centre (x, y) in box n), compared with the
// threshold; arithmetic and rounding in common/paste.h.
//
// The output is cut into chunks of 16 bytes in memory order, one thread to a chunk, so that every store is a full,
// aligned vector whatever the width. A chunk outside of its box costs two position tests. Writes N * H * W bytes, which
// is the floor (107 MB and 36 us on an H100 for 100 masks of 800 x 1333); reads of probs (a few KiB per mask) hit the
// L1 cache. Packed masks are made in the same way from words of 4 bytes, which are 32 pixels: an eighth of the bytes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "common/paste.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kChunk = 16;  // bytes, the widest store
constexpr int kWord = 4;    // bytes of packed pixels

__device__ __forceinline__ void note_bad_box(const Box& box, int64_t mask, uint64_t* fault) {
  if (!is_finite(box)) note_fault(fault, Fault::kPasteMasks, mask);
}

// One row of one pasted mask.
template <typename scalar_t>
struct PastedRow {
  PastedMask<scalar_t> mask;
  PasteTaps down;
  bool reached;

  __device__ PastedRow(const scalar_t* probs, const Box& box, int32_t h, int32_t w, int32_t row)
      : mask(probs, box, h, w) {
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

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    paste_masks_kernel(const scalar_t* __restrict__ probs,  // [N, h, w]
                       const Box* __restrict__ boxes,       // [N]
                       int64_t masks, int32_t h, int32_t w, int32_t height, int32_t width, float threshold,
                       uint8_t* __restrict__ out,  // [N, H, W]
                       uint64_t* fault) {
  const int64_t rows = masks * height, bytes = rows * width;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kChunk;
  for (int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kChunk; begin < bytes; begin += stride) {
    int64_t row = begin / width;  // over all masks
    auto column = static_cast<int32_t>(begin - row * width);
    const auto count = static_cast<int32_t>(min(int64_t{kChunk}, bytes - begin));
    uint64_t low = 0, high = 0;  // the chunk; an array of bytes would live in memory
    for (int32_t i = 0; i < count; ++row, column = 0) {
      const int64_t mask = row / height;
      const PastedRow<scalar_t> pasted(probs + mask * h * w, boxes[mask], h, w,
                                       static_cast<int32_t>(row - mask * height));
      if (column == 0) note_bad_box(boxes[mask], mask, fault);
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

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    paste_packed_masks_kernel(const scalar_t* __restrict__ probs,  // [N, h, w]
                              const Box* __restrict__ boxes,       // [N]
                              int64_t masks, int32_t h, int32_t w, int32_t height, int32_t width, float threshold,
                              uint8_t* __restrict__ out,  // [N, H, ceil(W / 8)]
                              uint64_t* fault) {
  const int32_t row_bytes = (width + 7) / 8;
  const int64_t bytes = masks * height * row_bytes;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kWord;
  for (int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWord; begin < bytes; begin += stride) {
    int64_t row = begin / row_bytes;  // over all masks
    auto byte = static_cast<int32_t>(begin - row * row_bytes);
    const auto count = static_cast<int32_t>(min(int64_t{kWord}, bytes - begin));
    uint32_t word = 0;
    for (int32_t i = 0; i < count; ++row, byte = 0) {
      const int64_t mask = row / height;
      const PastedRow<scalar_t> pasted(probs + mask * h * w, boxes[mask], h, w,
                                       static_cast<int32_t>(row - mask * height));
      if (byte == 0) note_bad_box(boxes[mask], mask, fault);
      const int32_t end = min(i + row_bytes - byte, count);  // of the row's part of the word
      const int32_t last = min((byte + end - i) * 8, width);
      int32_t bit = i * 8;
      i = end;
      if (pasted.empty(byte * 8, last - 1)) continue;
      for (int32_t column = byte * 8; column < last; ++column, ++bit)
        word |= static_cast<uint32_t>(pasted.pixel(column, threshold)) << bit;
    }
    if (count == kWord) {
      *reinterpret_cast<uint32_t*>(out + begin) = word;
    } else {
      for (int32_t i = 0; i < count; ++i) out[begin + i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
}

Tensor paste_masks_cuda(const Tensor& probs,  // [N, h, w]
                        const Tensor& boxes,  // [N, 4]
                        int64_t height, int64_t width, double threshold, bool packed) {
  const torch::stable::accelerator::DeviceGuard guard(probs.get_device_index());
  check_paste_masks(probs, boxes, height, width, threshold, packed);
  const int64_t masks = probs.size(0), row_bytes = packed ? (width + 7) / 8 : width;
  Tensor out = torch::stable::new_empty(probs, {masks, height, row_bytes},
                                        packed || threshold < 0 ? ScalarType::Byte : ScalarType::Bool);
  if (masks == 0) return out;
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  const unsigned blocks = grid_blocks(masks * height * row_bytes, int64_t{kThreads} * (packed ? kWord : kChunk));
  dispatch_floating(probs.scalar_type(), "paste_masks", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto kernel = packed ? paste_packed_masks_kernel<scalar_t> : paste_masks_kernel<scalar_t>;
    kernel<<<blocks, kThreads, 0, current_stream(probs)>>>(
        static_cast<const scalar_t*>(dense_probs.const_data_ptr()),
        static_cast<const Box*>(dense_boxes.const_data_ptr()), masks, static_cast<int32_t>(probs.size(1)),
        static_cast<int32_t>(probs.size(2)), static_cast<int32_t>(height), static_cast<int32_t>(width),
        static_cast<float>(threshold), static_cast<uint8_t*>(out.mutable_data_ptr()), fault_word(probs));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("paste_masks", TORCH_BOX(&cascadeops::paste_masks_cuda));
}
