// Deformable convolution on CUDA: the gradient of the weights, an implicit GEMM whose sum runs over the pixels.
//
// grad_weight[o, c, t] = sum over n, p of grad[n, o, p] * sample[n, c, t, p]
//
// Layouts: input [N, H, W, C], grad [N, h, w, out_channels], offset and mask planes. A block owns 64 channels of one
// group and offset group x 128 outputs x one tap, and a share of the batch's pixels: it gathers the samples of 32
// pixels into one tile of shared memory, copies grad there into another, and multiplies them (tile_product.cuh). The
// shares are added in their order by a second kernel, so the result is the same in every run.
//
// Bytes: the samples, as in the forward pass, for each 128 outputs; grad for each tap and 64 channels, from L2. Floor
// on an H100 for 128 channels of 100 x 168 in bfloat16: 4.95 GFLOP, 12.4 us at 400 TFLOP/s. Workspace: as many times
// the weights in float32 as it takes to give every multiprocessor two blocks.

#include <torch/csrc/stable/library.h>

#include <numeric>

#include "checks_deform_conv2d.h"
#include "cuda/deform_tile.cuh"
#include "deform_operands.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLocated = 256;           // pixels whose samples are computed at a time, one by each thread
constexpr int64_t kEnoughBlocks = 264;  // two for each multiprocessor of an H100

template <typename scalar_t>
using WeightMemory = BlockMemory<scalar_t, kLocated, kTileK, kTileM>;

// How the blocks divide the work. Channels are cut at the borders of all groups, then into chunks of kTileM.
struct WeightTiles {
  int64_t unit;          // channels between two borders
  int64_t chunks;        // of a unit
  int64_t output_tiles;  // of a group
  int64_t pixels;        // of a share, a multiple of kLocated

  WeightTiles(const DeformGeometry& g, int64_t shares)
      : unit(std::gcd(g.group_channels(), g.offset_channels())),
        chunks((unit + kTileM - 1) / kTileM),
        output_tiles((g.group_outputs() + kTileN - 1) / kTileN),
        pixels(((g.images * g.pixels() + shares - 1) / shares + kLocated - 1) / kLocated * kLocated) {}

  int64_t blocks(const DeformGeometry& g) const { return g.channels / unit * chunks * output_tiles * g.taps(); }
};

// shares: [shares, taps, C / groups, out_channels]
template <typename scalar_t, int vector>
__global__ void __launch_bounds__(kProductThreads, (kResidentBlocks<scalar_t, vector>))
    deform_conv2d_backward_weight_kernel(DeformGeometry g, WeightTiles tiles, const scalar_t* __restrict__ grad,
                                         const scalar_t* __restrict__ input,
                                         Displacements<accumulate_t<scalar_t>> displacements,
                                         accumulate_t<scalar_t>* __restrict__ shares) {
  extern __shared__ __align__(128) char shared[];
  auto& memory = *reinterpret_cast<WeightMemory<scalar_t>*>(shared);
  int64_t block = blockIdx.x;
  const auto digit = [&](int64_t base) {
    const int64_t value = block % base;
    block /= base;
    return value;
  };
  const int64_t output_tile = digit(tiles.output_tiles), tap = digit(g.taps()), chunk = digit(tiles.chunks);
  const int64_t unit = digit(g.channels / tiles.unit), share = block;
  const int64_t c = unit * tiles.unit + chunk * kTileM;
  const int channels = up_to(kTileM, (unit + 1) * tiles.unit - c);
  const int64_t group = c / g.group_channels(), first_output = group * g.group_outputs() + output_tile * kTileN;
  const int outputs = up_to(kTileN, (group + 1) * g.group_outputs() - first_output);
  const int64_t begin = share * tiles.pixels, end = min(begin + tiles.pixels, g.images * g.pixels());

  BlockProduct<scalar_t, 1, kRowStride<scalar_t, kTileM>> product;
  SampledTile<scalar_t, vector, kTileK, kTileM> sampled;
  CopiedTile<scalar_t, vector, kTileK, kTileN> grads;
  const PixelSample<accumulate_t<scalar_t>>* samples = nullptr;
  int64_t pixel = begin;
  const auto fetch = [&] {
    if (pixel >= end) return false;
    const int64_t place = (pixel - begin) % kLocated;
    if (place == 0) {
      locate(g, displacements, pixel, end, kLocated, c / g.offset_channels(), tap, memory.samples);
      __syncthreads();
    }
    samples = memory.samples + place;
    sampled.fetch(g, input + c, channels, samples);
    grads.fetch(grad + pixel * g.out_channels + first_output, g.out_channels, up_to(kTileK, end - pixel), outputs);
    pixel += kTileK;
    return true;
  };
  multiply_tiles<kFetchEarly<scalar_t, vector>>(memory.tiles, product, fetch, [&](auto& tiles) {
    sampled.put(samples, tiles.a);
    grads.put(tiles.b);
  });
  __syncthreads();
  product.store(memory.sums);
  __syncthreads();
  shares += (share * g.taps() + tap) * g.group_channels() * g.out_channels;
  for (int i = threadIdx.x; i < kTileM * kTileN; i += kProductThreads) {
    const int row = i / kTileN, column = i % kTileN;
    if (row < channels && column < outputs)
      shares[(c - group * g.group_channels() + row) * g.out_channels + first_output + column] =
          memory.sums[row * kSumStride<scalar_t> + column];
  }
}

// grad_weight: [out_channels, C / groups, taps]
template <typename scalar_t>
__global__ void __launch_bounds__(kProductThreads)
    add_shares_kernel(DeformGeometry g, const accumulate_t<scalar_t>* __restrict__ from, int64_t shares,
                      scalar_t* __restrict__ grad_weight) {
  const int64_t channels = g.group_channels(), total = g.taps() * channels * g.out_channels;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t o = i % g.out_channels, c = i / g.out_channels % channels, tap = i / (g.out_channels * channels);
    accumulate_t<scalar_t> sum = 0;
    for (int64_t share = 0; share < shares; ++share) sum += from[share * total + i];
    grad_weight[(o * channels + c) * g.taps() + tap] = static_cast<scalar_t>(sum);
  }
}

Tensor deform_conv2d_backward_weight_cuda(Tensor grad, Tensor input, Tensor offset, std::optional<Tensor> mask,
                                          Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                          std::vector<int64_t> dilation) {
  const DeformGeometry g = check_deform_conv2d_backward(grad, input, offset, mask, weight, stride, padding, dilation);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto dtype = input.scalar_type(), sum_dtype = sum_dtype_of(dtype);
  Tensor grad_weight =
      torch::stable::new_empty(weight, {g.out_channels, g.group_channels(), g.kernel_height, g.kernel_width}, dtype);
  if (g.images == 0) return torch::stable::zero_(grad_weight);
  grad = channels_last(grad);
  input = channels_last(input);
  offset = as_planes(offset, sum_dtype);
  if (mask) mask = as_planes(*mask, sum_dtype);

  const int64_t pixels = g.images * g.pixels(), blocks = WeightTiles(g, 1).blocks(g);
  const int64_t wanted = (kEnoughBlocks + blocks - 1) / blocks, most = (pixels + kLocated - 1) / kLocated;
  const WeightTiles tiles(g, std::min(wanted, most));
  const int64_t shares = (pixels + tiles.pixels - 1) / tiles.pixels;
  const Tensor sums = torch::stable::new_empty(weight, {shares, grad_weight.numel()}, sum_dtype);
  const cudaStream_t stream = current_stream(input);
  dispatch_floating(dtype, "deform_conv2d", [&](auto zero) {
    using scalar_t = decltype(zero);
    using real = accumulate_t<scalar_t>;
    constexpr int vector = 16 / sizeof(scalar_t);
    const scalar_t *grads = grad.const_data_ptr<scalar_t>(), *images = input.const_data_ptr<scalar_t>();
    const auto kernel = is_packable<scalar_t>(g) && is_aligned(grads) && is_aligned(images)
                            ? deform_conv2d_backward_weight_kernel<scalar_t, vector>
                            : deform_conv2d_backward_weight_kernel<scalar_t, 1>;
    launch_tiles<WeightMemory<scalar_t>>(
        kernel, blocks * shares, stream, g, tiles, grads, images,
        Displacements<real>{offset.const_data_ptr<real>(), mask ? mask->const_data_ptr<real>() : nullptr},
        sums.mutable_data_ptr<real>());
    add_shares_kernel<scalar_t><<<grid_blocks(grad_weight.numel(), kProductThreads), kProductThreads, 0, stream>>>(
        g, sums.const_data_ptr<real>(), shares, grad_weight.mutable_data_ptr<scalar_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("deform_conv2d_backward_weight", TORCH_BOX(&deform_conv2d_backward_weight_cuda));
}

}  // namespace cascadeops
