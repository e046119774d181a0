// paste_masks_rle on CUDA: pasting as in common/paste.h, run lengths as in common/rle.h, never an image-sized buffer.
//
// One block per mask walks the columns that the box reaches, cut into words of 32 rows, 512 words at a time, one thread
// to a word. A thread evaluates its 32 pixels into the bits of the word and finds the changes of value among them.
// Which number a change completes depends on the three changes before it, which a block scan brings; a second scan adds
// up the lengths of the encoded numbers. This runs twice: to measure, and, after a scan over the masks, to write. The
// host must know the total size in between to allocate the result: the one place where it waits for the device.
//
// Reads probs (a few KiB per mask, in L1), writes the encoded bytes; the floor is the arithmetic of the box's pixels,
// some 60 operations each, twice.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cub/block/block_scan.cuh>
#include <tuple>

#include "checks.h"
#include "common/paste.h"
#include "common/rle.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 512;
constexpr int kWordRows = 32;

// A stretch of the mask: how many changes of value it holds, and where the last three of them are, latest first.
// Positions (column * height + row) fit 32 bits, since an image holds fewer than 2^32 pixels.
struct Changes {
  uint32_t count, last[3];

  __device__ void push(uint32_t position) {
    last[2] = last[1];
    last[1] = last[0];
    last[0] = position;
    ++count;
  }

  // The number stored for the run that ends at `end`, with these changes before it.
  __device__ int64_t number(int64_t end) const {
    const int64_t run = count > 0 ? end - last[0] : end;
    return count > 2 ? run - (int64_t{last[1]} - last[2]) : run;
  }
};

struct Concatenate {
  __device__ Changes operator()(const Changes& first, const Changes& second) const {
    Changes both = second;
    both.count = first.count + second.count;
    if (second.count == 0) {
      both.last[0] = first.last[0], both.last[1] = first.last[1], both.last[2] = first.last[2];
    } else if (second.count == 1) {
      both.last[1] = first.last[0], both.last[2] = first.last[1];
    } else if (second.count == 2) {
      both.last[2] = first.last[0];
    }
    return both;
  }
};

// The part of an image that a mask reaches, made larger so that every run of ones ends inside, or at the end of the
// image: by a column after the last one, and by a row of zeros below each column or, for a mask that reaches the
// bottom, by the zeros that a run meets at the top of the next column.
template <typename scalar_t>
struct Window {
  PastedMask<scalar_t> mask;
  Span columns, rows;

  __device__ Window(const scalar_t* probs, const Box& box, int32_t h, int32_t w, int32_t height, int32_t width)
      : mask(probs, box, h, w), columns{0, 0}, rows{0, 0} {
    if (is_finite(box) && has_area(box)) {
      columns = mask.x.reached(width);
      rows = mask.y.reached(height);
    }
    if (columns.begin == columns.end || rows.begin == rows.end) {
      columns = rows = {0, 0};
    } else {
      columns.end += columns.end < width;
      if (rows.end < height) {
        ++rows.end;
      } else {
        rows.begin = 0;
      }
    }
  }

  // Bit i: whether pixel (column, row + i) belongs to the mask, for the first `count` rows.
  __device__ uint32_t word(int32_t column, int32_t row, int32_t count, float threshold) const {
    const float position = mask.x.position(column);
    if (!(position < static_cast<float>(mask.x.cells)) || !(mask.y.position(row + count - 1) > -1.0f)) return 0;
    const PasteTaps across = paste_taps(position);
    uint32_t bits = 0;
    for (int32_t i = 0; i < count; ++i) {
      const float down = mask.y.position(row + i);
      const bool inside = down > -1.0f && down < static_cast<float>(mask.y.cells);
      bits |= static_cast<uint32_t>(inside && mask.value(across, paste_taps(down)) >= threshold) << i;
    }
    return bits;
  }
};

// Encodes the runs that end at the changes of one word and returns the bytes; out = nullptr only counts them.
__device__ int64_t encode_word(uint32_t changed, uint32_t position, Changes before, uint8_t* out) {
  int64_t bytes = 0;
  for (; changed != 0; changed &= changed - 1) {
    const uint32_t end = position + __ffs(static_cast<int>(changed)) - 1;
    bytes += encode_count(before.number(end), out ? out + bytes : nullptr);
    before.push(end);
  }
  return bytes;
}

// Measuring (counts = nullptr): lengths[n] = bytes of mask n. Writing: counts from offsets[n] on.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    encode_masks_kernel(const scalar_t* __restrict__ probs,  // [N, h, w]
                        const Box* __restrict__ boxes,       // [N]
                        int32_t h, int32_t w, int32_t height, int32_t width, float threshold,
                        const int64_t* __restrict__ offsets,  // [N + 1]
                        int64_t* __restrict__ lengths, uint8_t* __restrict__ counts, uint64_t* fault) {
  using ChangeScan = cub::BlockScan<Changes, kThreads>;
  using ByteScan = cub::BlockScan<int64_t, kThreads>;
  __shared__ union {
    typename ChangeScan::TempStorage changes;
    typename ByteScan::TempStorage bytes;
  } scan;
  __shared__ uint32_t last_bits[kThreads];  // the last pixel of each word

  const int64_t mask = blockIdx.x;
  const Window<scalar_t> window(probs + mask * h * w, boxes[mask], h, w, height, width);
  const int32_t rows = window.rows.end - window.rows.begin;
  const int32_t words_per_column = (rows + kWordRows - 1) / kWordRows;
  const int64_t words = int64_t{window.columns.end - window.columns.begin} * words_per_column;
  uint8_t* const out = counts ? counts + offsets[mask] : nullptr;
  Changes before_tile{};
  int64_t bytes_before = 0;
  uint32_t bit_before_tile = 0;

  for (int64_t tile = 0; tile < words; tile += kThreads) {
    const int64_t index = tile + threadIdx.x;
    const auto column = static_cast<int32_t>(index / words_per_column);
    const auto row = static_cast<int32_t>(index - int64_t{column} * words_per_column) * kWordRows;
    const int32_t count = index < words ? min(kWordRows, rows - row) : 0;
    const int32_t image_column = window.columns.begin + column, image_row = window.rows.begin + row;
    const uint32_t bits = count > 0 ? window.word(image_column, image_row, count, threshold) : 0;
    const uint32_t last_bit = count > 0 ? bits >> (count - 1) & 1 : 0;
    last_bits[threadIdx.x] = last_bit;
    __syncthreads();
    const uint32_t bit_before = threadIdx.x > 0 ? last_bits[threadIdx.x - 1] : bit_before_tile;
    const uint32_t valid = count == kWordRows ? ~0u : (1u << count) - 1;
    const uint32_t changed = (bits ^ (bits << 1 | bit_before)) & valid;
    const auto position = static_cast<uint32_t>(int64_t{image_column} * height + image_row);

    Changes mine{};
    for (uint32_t rest = changed; rest != 0; rest &= rest - 1) {
      mine.push(position + __ffs(static_cast<int>(rest)) - 1);
    }
    Changes before, in_tile;
    ChangeScan(scan.changes).ExclusiveScan(mine, before, Changes{}, Concatenate{}, in_tile);
    before = Concatenate{}(before_tile, before);
    before_tile = Concatenate{}(before_tile, in_tile);
    __syncthreads();
    const int64_t bytes = encode_word(changed, position, before, nullptr);
    int64_t offset, bytes_in_tile;
    ByteScan(scan.bytes).ExclusiveSum(bytes, offset, bytes_in_tile);
    if (out) encode_word(changed, position, before, out + bytes_before + offset);
    bytes_before += bytes_in_tile;
    bit_before_tile = last_bits[kThreads - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const int64_t number = before_tile.number(int64_t{height} * width);
    const int32_t bytes = encode_count(number, out ? out + bytes_before : nullptr);
    if (!counts) lengths[mask] = bytes_before + bytes;
    if (!is_finite(boxes[mask])) note_fault(fault, Fault::kPasteMasksRle, mask);
  }
}

// offsets[0] = 0, offsets[n + 1] = lengths[0] + ... + lengths[n]; one block.
__global__ void __launch_bounds__(kThreads)
    add_up_kernel(const int64_t* __restrict__ lengths, int64_t masks, int64_t* __restrict__ offsets) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  int64_t before_tile = 0;
  for (int64_t tile = 0; tile < masks; tile += kThreads) {
    const int64_t mask = tile + threadIdx.x;
    int64_t sum, in_tile;
    Scan(scan).InclusiveSum(mask < masks ? lengths[mask] : 0, sum, in_tile);
    if (mask < masks) offsets[mask + 1] = before_tile + sum;
    before_tile += in_tile;
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[0] = 0;
}

std::tuple<Tensor, Tensor> paste_masks_rle_cuda(const Tensor& probs,  // [N, h, w]
                                                const Tensor& boxes,  // [N, 4]
                                                int64_t height, int64_t width, double threshold) {
  const torch::stable::accelerator::DeviceGuard guard(probs.get_device_index());
  check_paste_masks_rle(probs, boxes, height, width, threshold);
  const int64_t masks = probs.size(0);
  if (masks == 0) {
    return {torch::stable::new_empty(probs, {0}, ScalarType::Byte),
            torch::stable::new_zeros(probs, {1}, ScalarType::Long)};
  }
  Tensor offsets = torch::stable::new_empty(probs, {masks + 1}, ScalarType::Long);
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  const Tensor lengths = torch::stable::new_empty(probs, {masks}, ScalarType::Long);
  const cudaStream_t stream = current_stream(probs);
  const auto encode = [&](int64_t* length_data, uint8_t* count_data) {
    dispatch_floating(probs.scalar_type(), "paste_masks_rle", [&](auto zero) {
      using scalar_t = decltype(zero);
      encode_masks_kernel<<<static_cast<unsigned>(masks), kThreads, 0, stream>>>(
          static_cast<const scalar_t*>(dense_probs.const_data_ptr()),
          static_cast<const Box*>(dense_boxes.const_data_ptr()), static_cast<int32_t>(probs.size(1)),
          static_cast<int32_t>(probs.size(2)), static_cast<int32_t>(height), static_cast<int32_t>(width),
          static_cast<float>(threshold), offsets.const_data_ptr<int64_t>(), length_data, count_data, fault_word(probs));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  };

  encode(lengths.mutable_data_ptr<int64_t>(), nullptr);
  add_up_kernel<<<1, kThreads, 0, stream>>>(lengths.const_data_ptr<int64_t>(), masks,
                                            offsets.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  int64_t total = 0;
  STD_CUDA_CHECK(
      cudaMemcpyAsync(&total, offsets.const_data_ptr<int64_t>() + masks, sizeof total, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  raise_device_fault(probs);
  Tensor counts = torch::stable::new_empty(probs, {total}, ScalarType::Byte);
  encode(nullptr, counts.mutable_data_ptr<uint8_t>());
  return {counts, offsets};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("paste_masks_rle", TORCH_BOX(&cascadeops::paste_masks_rle_cuda));
}
