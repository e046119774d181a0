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

// The place of a thread's i-th pack in a tile in shared memory.
template <typename scalar_t, int vector, int columns>
struct PackPlace {
  static __device__ int number(int i) { return i * kProductThreads + static_cast<int>(threadIdx.x); }
  static __device__ int row(int i) { return number(i) / (columns / vector); }
  static __device__ int column(int i) { return number(i) % (columns / vector) * vector; }
  static __device__ int index(int i) { return row(i) * kRowStride<scalar_t, columns> + column(i); }
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

// A tile on its way to shared memory, in the registers of all threads: fetched before the product of the tiles before
// it, and put down after that, so that the product hides the latency of memory.

// tile[row][column] = from[row * stride + column] for row < rows_there and column < columns_there, else 0.
template <typename scalar_t, int vector, int rows, int columns>
class CopiedTile {
 public:
  __device__ void fetch(const scalar_t* __restrict__ from, int64_t stride, int rows_there, int columns_there) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int row = Place::row(i), column = Place::column(i);
      pack_[i] = row < rows_there && column < columns_there
                     ? *reinterpret_cast<const Pack*>(from + row * stride + column)
                     : Pack{};
    }
  }

  __device__ void put(scalar_t* tile) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) *reinterpret_cast<Pack*>(tile + Place::index(i)) = pack_[i];
  }

 private:
  using Pack = ChannelPack<scalar_t, vector>;
  using Place = PackPlace<scalar_t, vector, columns>;
  static constexpr int kPacks = rows * columns / vector / kProductThreads;
  Pack pack_[kPacks];
};

// tile[pixel][channel] = sample * mask for `rows` pixels and `columns` channels, of which only the first `channels`
// exist; the others are 0. Between fetch and put the samples must stay.
template <typename scalar_t, int vector, int rows, int columns>
class SampledTile {
 public:
  using real = accumulate_t<scalar_t>;

  // input: at its first channel.
  __device__ void fetch(const DeformGeometry& g, const scalar_t* __restrict__ input, int channels,
                        const PixelSample<real>* samples) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = Place::column(i);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t cell = samples[Place::row(i)].cell(corner);
        corner_[i][corner] = cell >= 0 && column < channels
                                 ? *reinterpret_cast<const Pack*>(input + cell * g.channels + column)
                                 : Pack{};
      }
    }
  }

  __device__ void put(const PixelSample<real>* samples, scalar_t* tile) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const PixelSample<real>& pixel = samples[Place::row(i)];
      real sum[vector] = {};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const real weight = pixel.sample.weight(corner) * pixel.mask;
#pragma unroll
        for (int j = 0; j < vector; ++j) sum[j] += weight * static_cast<real>(corner_[i][corner].value[j]);
      }
      Pack result;
#pragma unroll
      for (int j = 0; j < vector; ++j) result.value[j] = static_cast<scalar_t>(sum[j]);
      *reinterpret_cast<Pack*>(tile + Place::index(i)) = result;
    }
  }

 private:
  using Pack = ChannelPack<scalar_t, vector>;
  using Place = PackPlace<scalar_t, vector, columns>;
  static constexpr int kPacks = rows * columns / vector / kProductThreads;
  Pack corner_[kPacks][4];
};

// Pairs of tiles that fit into shared memory at a time: two, so that one is filled while the other is multiplied; one
// of float64, as two would be more than some devices have.
template <typename scalar_t>
constexpr int kTilePairs = sizeof(scalar_t) > 4 ? 1 : 2;

// Multiplies pairs of tiles until there are no more. fetch() -> whether there is a next pair, and reads it into
// registers; put(tiles) writes it to shared memory. `early`: fetches before the product, which holds the registers all
// the while; packs of 16 bytes have enough of them, single numbers and float64 do not. The memory may still be read by
// others when this returns.
template <bool early, typename Tiles, int pairs, typename Product, typename Fetch, typename Put>
__device__ __forceinline__ void multiply_tiles(Tiles (&tiles)[pairs], Product& product, const Fetch& fetch,
                                               const Put& put) {
  for (int turn = 0;; ++turn) {
    const Tiles& last = tiles[(turn + pairs - 1) % pairs];
    if (!early && turn > 0) product.multiply(last.a, last.b);
    const bool more = fetch();
    if (early && turn > 0) product.multiply(last.a, last.b);
    if (!more) return;
    if (pairs == 1) __syncthreads();  // the only pair is no longer read
    put(tiles[turn % pairs]);
    __syncthreads();
  }
}

template <typename scalar_t, int vector>
constexpr bool kFetchEarly = vector > 1 && sizeof(scalar_t) <= 4;

// Blocks that a multiprocessor must be able to hold, which bounds a thread's registers.
template <typename scalar_t, int vector>
constexpr int kResidentBlocks = vector > 1 && sizeof(scalar_t) == 2 ? 2 : 1;

// What is left of a tile's `most` rows or columns.
__device__ __forceinline__ int up_to(int most, int64_t left) { return static_cast<int>(min(int64_t{most}, left)); }

// Shared memory of a block: samples first, then pairs of tiles, in whose place the sums are put in the end.
template <typename scalar_t, int pixels, int a_rows, int a_columns>
struct BlockMemory {
  using real = accumulate_t<scalar_t>;
  struct Tiles {
    alignas(128) scalar_t a[a_rows * kRowStride<scalar_t, a_columns>];
    alignas(128) scalar_t b[kTileK * kRowStride<scalar_t, kTileN>];
  };
  PixelSample<real> samples[pixels];
  union alignas(128) {
    Tiles tiles[kTilePairs<scalar_t>];
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
