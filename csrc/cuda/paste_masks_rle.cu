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
#include <cub/device/device_scan.cuh>
#include <tuple>

#include "checks.h"
#include "common/paste.h"
#include "common/rle.h"
#include "cuda/launch.cuh"

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

// The part of an image that a mask reaches, one row and one column larger where the image goes on: these pixels are 0,
// so every run of ones that does not reach the end of the image ends inside.
struct Window {
  const float* probs;  // [h, w]
  PasteAxis x, y;
  Span columns, rows;
  bool full_height;

  __device__ Window(const float* mask_probs, const Box& box, int32_t h, int32_t w, int32_t height, int32_t width)
      : probs(mask_probs), x(axis_x(box, w)), y(axis_y(box, h)), columns{0, 0}, rows{0, 0} {
    if (is_finite(box) && has_area(box)) {
      columns = x.reached(width);
      rows = y.reached(height);
    }
    full_height = rows.begin == 0 && rows.end == height;
    if (columns.begin == columns.end || rows.begin == rows.end) {
      columns = rows = {0, 0};
    } else {
      columns.end += columns.end < width;
      rows.end += rows.end < height;
    }
  }

  __device__ float cell(int32_t row, int32_t column) const {
    const bool inside = row >= 0 && row < y.cells && column >= 0 && column < x.cells;
    return inside ? __ldg(probs + int64_t{row} * x.cells + column) : 0.0f;
  }

  // Bit i: whether pixel (column, row + i) belongs to the mask, for the first `count` rows.
  __device__ uint32_t word(int32_t column, int32_t row, int32_t count, float threshold) const {
    const float x_position = x.position(column);
    if (!(x_position < static_cast<float>(x.cells))) return 0;
    const PasteTaps across = paste_taps(x_position);
    uint32_t bits = 0;
    for (int32_t i = 0; i < count; ++i) {
      const float y_position = y.position(row + i);
      if (!(y_position < static_cast<float>(y.cells))) break;
      const PasteTaps down = paste_taps(y_position);
      const float value =
          bilinear(cell(down.cell, across.cell), cell(down.cell, across.cell + 1), cell(down.cell + 1, across.cell),
                   cell(down.cell + 1, across.cell + 1), across.near, across.far, down.near, down.far);
      bits |= static_cast<uint32_t>(value >= threshold) << i;
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
__global__ void __launch_bounds__(kThreads)
    encode_masks_kernel(const float* __restrict__ probs,  // [N, h, w]
                        const Box* __restrict__ boxes,    // [N]
                        int32_t h, int32_t w, int32_t height, int32_t width, float threshold,
                        const int64_t* __restrict__ offsets,  // [N + 1]
                        int64_t* __restrict__ lengths, uint8_t* __restrict__ counts) {
  using ChangeScan = cub::BlockScan<Changes, kThreads>;
  using ByteScan = cub::BlockScan<int64_t, kThreads>;
  __shared__ union {
    typename ChangeScan::TempStorage changes;
    typename ByteScan::TempStorage bytes;
  } scan;
  __shared__ uint32_t last_bits[kThreads];  // the last pixel of each word

  const int64_t mask = blockIdx.x;
  const Window window(probs + mask * h * w, boxes[mask], h, w, height, width);
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
    // The pixel before a column is the last one of the column before: outside of the window unless that is full height.
    uint32_t bit_before = threadIdx.x > 0 ? last_bits[threadIdx.x - 1] : bit_before_tile;
    if (row == 0 && !window.full_height) bit_before = 0;
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
  }
}

// offsets[0 .. N] from lengths[0 .. N); offsets[0] is zero.
void add_up(const Tensor& lengths, Tensor& offsets, cudaStream_t stream) {
  const int64_t* in = lengths.const_data_ptr<int64_t>();
  int64_t* out = offsets.mutable_data_ptr<int64_t>() + 1;
  size_t bytes = 0;
  STD_CUDA_CHECK(cub::DeviceScan::InclusiveSum(nullptr, bytes, in, out, lengths.numel(), stream));
  const Tensor storage = torch::stable::new_empty(lengths, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  STD_CUDA_CHECK(cub::DeviceScan::InclusiveSum(storage.mutable_data_ptr(), bytes, in, out, lengths.numel(), stream));
}

std::tuple<Tensor, Tensor> paste_masks_rle_cuda(const Tensor& probs,  // [N, h, w]
                                                const Tensor& boxes,  // [N, 4]
                                                int64_t height, int64_t width, double threshold) {
  const torch::stable::accelerator::DeviceGuard guard(probs.get_device_index());
  check_paste_masks_rle(probs, boxes, height, width, threshold);
  const int64_t masks = probs.size(0);
  Tensor offsets = torch::stable::new_zeros(probs, {masks + 1}, ScalarType::Long);
  if (masks == 0) return {torch::stable::new_empty(probs, {0}, ScalarType::Byte), offsets};
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  const Tensor lengths = torch::stable::new_empty(probs, {masks}, ScalarType::Long);
  const cudaStream_t stream = current_stream(probs);
  const auto encode = [&](int64_t* length_data, uint8_t* count_data) {
    encode_masks_kernel<<<static_cast<unsigned>(masks), kThreads, 0, stream>>>(
        dense_probs.const_data_ptr<float>(), static_cast<const Box*>(dense_boxes.const_data_ptr()),
        static_cast<int32_t>(probs.size(1)), static_cast<int32_t>(probs.size(2)), static_cast<int32_t>(height),
        static_cast<int32_t>(width), static_cast<float>(threshold), offsets.const_data_ptr<int64_t>(), length_data,
        count_data);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };

  encode(lengths.mutable_data_ptr<int64_t>(), nullptr);
  add_up(lengths, offsets, stream);
  int64_t total = 0;
  STD_CUDA_CHECK(
      cudaMemcpyAsync(&total, offsets.const_data_ptr<int64_t>() + masks, sizeof total, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  Tensor counts = torch::stable::new_empty(probs, {total}, ScalarType::Byte);
  encode(nullptr, counts.mutable_data_ptr<uint8_t>());
  return {counts, offsets};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("paste_masks_rle", TORCH_BOX(&cascadeops::paste_masks_rle_cuda));
}
