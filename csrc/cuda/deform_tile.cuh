// What the CUDA kernels of deform_conv2d share: a block's samples, and tiles of them in shared memory.
//
// Output pixels are numbered through the whole batch. Images are channels last; a thread moves `vector` channels (16
// bytes, or a single one where the shapes or addresses do not allow it).
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/deform.h"
#include "cuda/launch.cuh"
#include "cuda/tile_product.cuh"
#include "dispatch.h"

namespace cascadeops {

template <typename scalar_t, int vector>
struct alignas(sizeof(scalar_t) * vector) ChannelPack {
  scalar_t value[vector];
};

// One pixel's sample for the tap and offset group at hand.
template <typename real>
struct PixelSample {
  DeformSample<real> sample;
  real mask;
  int64_t image;  // its first cell

  // Its place in an array of the batch's cells; -1 if the corner lies outside.
  __device__ int64_t cell(int corner) const { return sample.cell[corner] < 0 ? -1 : image + sample.cell[corner]; }
};

// The index of (pixel, offset group, tap) among the planes of the mask.
__device__ __forceinline__ int64_t plane_index(const DeformGeometry& g, int64_t pixel, int64_t offset_group,
                                               int64_t tap) {
  return ((pixel / g.pixels() * g.offset_groups + offset_group) * g.taps() + tap) * g.pixels() + pixel % g.pixels();
}

// Pixels [first, first + count) of the batch; those from `end` on read nothing. No barrier inside.
template <typename real>
__device__ void locate(const DeformGeometry& g, const Displacements<real>& displacements, int64_t first, int64_t end,
                       int count, int64_t offset_group, int64_t tap, PixelSample<real>* samples) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    PixelSample<real> pixel{{}, real(0), 0};
    for (int corner = 0; corner < 4; ++corner) pixel.sample.cell[corner] = -1;
    if (first + i < end) {
      const int64_t image = (first + i) / g.pixels(), place = (first + i) % g.pixels();
      const int64_t plane = plane_index(g, first + i, offset_group, tap);
      const real* offset = displacements.offset + plane + (plane - place);  // two planes for each of the mask
      pixel.sample =
          DeformSample<real>(g, place / g.out_width, place % g.out_width, tap, offset[0], offset[g.pixels()]);
      pixel.mask = displacements.mask ? displacements.mask[plane] : real(1);
      pixel.image = image * g.cells();
    }
    samples[i] = pixel;
  }
}

// tile[pixel][channel] = sample * mask for `rows` pixels and `columns` channels, of which only the first `channels`
// exist; the others are 0. input: at its first channel.
template <int vector, int rows, int columns, typename scalar_t, typename real>
__device__ void gather(const DeformGeometry& g, const scalar_t* __restrict__ input, int64_t channels,
                       const PixelSample<real>* samples, scalar_t* tile) {
  using Pack = ChannelPack<scalar_t, vector>;
  constexpr int packs = columns / vector;
  for (int i = threadIdx.x; i < rows * packs; i += kProductThreads) {
    const int row = i / packs, c = i % packs * vector;
    const PixelSample<real>& pixel = samples[row];
    real sum[vector] = {};
    if (c < channels) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t cell = pixel.cell(corner);
        if (cell < 0) continue;
        const Pack pack = *reinterpret_cast<const Pack*>(input + cell * g.channels + c);
        const real weight = pixel.sample.weight(corner) * pixel.mask;
#pragma unroll
        for (int j = 0; j < vector; ++j) sum[j] += weight * static_cast<real>(pack.value[j]);
      }
    }
    Pack result;
#pragma unroll
    for (int j = 0; j < vector; ++j) result.value[j] = static_cast<scalar_t>(sum[j]);
    *reinterpret_cast<Pack*>(tile + row * kRowStride<scalar_t, columns> + c) = result;
  }
}

// tile[row][column] = from[row * stride + column] for row < rows_there and column < columns_there, else 0.
template <int vector, int rows, int columns, typename scalar_t>
__device__ void load_tile(const scalar_t* __restrict__ from, int64_t stride, int64_t rows_there, int64_t columns_there,
                          scalar_t* tile) {
  using Pack = ChannelPack<scalar_t, vector>;
  constexpr int packs = columns / vector;
  for (int i = threadIdx.x; i < rows * packs; i += kProductThreads) {
    const int row = i / packs, column = i % packs * vector;
    Pack pack;
#pragma unroll
    for (int j = 0; j < vector; ++j) pack.value[j] = static_cast<scalar_t>(0.0f);
    if (row < rows_there && column < columns_there) pack = *reinterpret_cast<const Pack*>(from + row * stride + column);
    *reinterpret_cast<Pack*>(tile + row * kRowStride<scalar_t, columns> + column) = pack;
  }
}

// Shared memory of a block: samples first, then the tiles a and b, in whose place the sums are put in the end.
template <typename scalar_t, int pixels, int a_rows, int a_columns>
struct BlockMemory {
  using real = accumulate_t<scalar_t>;
  PixelSample<real> samples[pixels];
  union alignas(128) {
    struct {
      alignas(128) scalar_t a[a_rows * kRowStride<scalar_t, a_columns>];
      alignas(128) scalar_t b[kTileK * kRowStride<scalar_t, kTileN>];
    } tiles;
    real sums[kTileM * kSumStride<scalar_t>];
  };
};

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether channels can be moved 16 bytes at a time, without a pack that straddles groups.
template <typename scalar_t>
bool is_packable(const DeformGeometry& g) {
  constexpr int64_t vector = 16 / sizeof(scalar_t);
  return g.group_channels() % vector == 0 && g.offset_channels() % vector == 0 && g.group_outputs() % vector == 0;
}

// weight [out_channels, C / groups, kernel] -> [taps, C / groups, out_channels], or with outputs_first [taps,
// out_channels, C / groups].
template <typename scalar_t>
__global__ void __launch_bounds__(kProductThreads)
    pack_weight_kernel(const scalar_t* __restrict__ weight, int64_t output, int64_t channel, int64_t row,
                       int64_t column, DeformGeometry g, bool outputs_first, scalar_t* __restrict__ packed) {
  const int64_t channels = g.group_channels(), total = g.taps() * channels * g.out_channels;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t inner = outputs_first ? channels : g.out_channels, outer = outputs_first ? g.out_channels : channels;
    const int64_t tap = i / (inner * outer), o = outputs_first ? i / inner % outer : i % inner;
    const int64_t c = outputs_first ? i % inner : i / inner % outer;
    packed[i] = weight[o * output + c * channel + tap / g.kernel_width * row + tap % g.kernel_width * column];
  }
}

template <typename scalar_t>
torch::stable::Tensor pack_weight(const torch::stable::Tensor& weight, const DeformGeometry& g, bool outputs_first) {
  torch::stable::Tensor packed = torch::stable::new_empty(weight, {g.taps(), g.group_channels(), g.out_channels});
  pack_weight_kernel<scalar_t>
      <<<grid_blocks(packed.numel(), kProductThreads), kProductThreads, 0, current_stream(weight)>>>(
          weight.const_data_ptr<scalar_t>(), weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3), g,
          outputs_first, packed.mutable_data_ptr<scalar_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

// Launches a kernel whose only dynamic shared memory is one `Memory`.
template <typename Memory, typename... Parameters, typename... Arguments>
void launch_tiles(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, const Arguments&... arguments) {
  check(blocks < int64_t{1} << 31, "deform_conv2d: too large for CUDA, which has 2**31 blocks: needs ", blocks);
  constexpr int bytes = sizeof(Memory), without_asking = 48 * 1024;
  if (bytes > without_asking)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(blocks), kProductThreads, bytes, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace cascadeops
