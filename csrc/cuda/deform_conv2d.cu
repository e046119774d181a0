// Deformable convolution on CUDA, forward, as an implicit GEMM.
//
// out[n, o, p] = bias[o] + sum over taps t and channels c of o's group of weight[o, c, t] * sample[n, c, t, p], where a
// sample is bilinear, displaced by its offset and multiplied by its mask (common/deform.h).
//
// Layouts: input [N, H, W, C], weight packed as [taps, C / groups, out_channels], offset and mask planes in float32
// (float64 for float64), out [N, out_channels, h, w] with any strides. A block owns 64 output pixels (of the whole
// batch) x 128 outputs of one group. For each tap it computes where its pixels sample, once; then, 32 channels at a
// time, its threads gather the samples, 16 bytes of channels each, into one tile of shared memory, copy the weights
// into another, and multiply the tiles (tile_product.cuh: tensor cores for half types). While one pair of tiles is
// multiplied, the next is on its way in registers. So samples never reach global memory; the workspace is the packed
// weights.
//
// Bytes: input, offset, mask and weight once from memory (7 MB in bfloat16 for 128 channels of 100 x 168, 2.3 us on an
// H100), and 4 corners x taps times the input from L1 and L2, for each 128 outputs. Floor: its 4.95 GFLOP take 12.4 us
// at 400 TFLOP/s in bfloat16.

#include <torch/csrc/stable/library.h>

#include "checks_deform_conv2d.h"
#include "cuda/deform_tile.cuh"
#include "deform_operands.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

template <typename scalar_t>
using ForwardMemory = BlockMemory<scalar_t, kTileM, kTileM, kTileK>;

// out: any strides, but rows of an image follow each other without a gap.
template <typename scalar_t>
struct OutputView {
  scalar_t* data;
  int64_t image, channel, pixel;  // strides, in elements
};

template <typename scalar_t, int vector>
__global__ void __launch_bounds__(kProductThreads, (kResidentBlocks<scalar_t, vector>))
    deform_conv2d_forward_kernel(DeformGeometry g, const scalar_t* __restrict__ input,
                                 Displacements<accumulate_t<scalar_t>> displacements,
                                 const scalar_t* __restrict__ weight, const scalar_t* __restrict__ bias,
                                 OutputView<scalar_t> out) {
  using real = accumulate_t<scalar_t>;
  extern __shared__ __align__(128) char shared[];
  auto& memory = *reinterpret_cast<ForwardMemory<scalar_t>*>(shared);
  const int64_t tiles = (g.group_outputs() + kTileN - 1) / kTileN;  // of a group
  const int64_t group = blockIdx.x / tiles % g.groups;
  const int64_t first_output = group * g.group_outputs() + blockIdx.x % tiles * kTileN;
  const int outputs = up_to(kTileN, (group + 1) * g.group_outputs() - first_output);
  const int64_t first_pixel = blockIdx.x / (tiles * g.groups) * kTileM, pixels = g.images * g.pixels();
  const int64_t first_channel = group * g.group_channels(), last_channel = first_channel + g.group_channels();

  BlockProduct<scalar_t, kRowStride<scalar_t, kTileK>, 1> product;
  SampledTile<scalar_t, vector, kTileM, kTileK> sampled;
  CopiedTile<scalar_t, vector, kTileK, kTileN> weights;
  const scalar_t* row = weight + first_output;       // of the channel at hand: they follow each other
  int64_t tap = 0, c = first_channel, located = -1;  // located: the offset group whose samples are in shared memory
  const auto fetch = [&] {
    if (c == last_channel) {
      c = first_channel;
      located = -1;
      ++tap;
    }
    if (tap == g.taps()) return false;
    const int64_t offset_group = c / g.offset_channels();
    const int64_t end = min(c + kTileK, min(last_channel, (offset_group + 1) * g.offset_channels()));
    if (offset_group != located) {
      locate(g, displacements, first_pixel, pixels, kTileM, offset_group, tap, memory.samples);
      __syncthreads();
      located = offset_group;
    }
    const int channels = static_cast<int>(end - c);
    sampled.fetch(g, input + c, channels, memory.samples);
    weights.fetch(row, g.out_channels, channels, outputs);
    row += channels * g.out_channels;
    c = end;
    return true;
  };
  multiply_tiles<kFetchEarly<scalar_t, vector>>(memory.tiles, product, fetch, [&](auto& tiles) {
    sampled.put(memory.samples, tiles.a);
    weights.put(tiles.b);
  });
  __syncthreads();
  product.store(memory.sums);
  __syncthreads();

  const bool by_pixels = out.channel != 1;  // which of the two lies side by side in memory
  for (int i = threadIdx.x; i < kTileM * kTileN; i += kProductThreads) {
    const int row = by_pixels ? i % kTileM : i / kTileN, column = by_pixels ? i / kTileM : i % kTileN;
    const int64_t pixel = first_pixel + row, o = first_output + column;
    if (pixel >= pixels || column >= outputs) continue;
    const real sum = memory.sums[row * kSumStride<scalar_t> + column] + (bias ? static_cast<real>(bias[o]) : real(0));
    out.data[pixel / g.pixels() * out.image + o * out.channel + pixel % g.pixels() * out.pixel] =
        static_cast<scalar_t>(sum);
  }
}

Tensor deform_conv2d_cuda(Tensor input, Tensor offset, std::optional<Tensor> mask, Tensor weight,
                          std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation) {
  const DeformGeometry g = check_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto dtype = input.scalar_type();
  Tensor out = empty_map(input, {g.images, g.out_channels, g.out_height, g.out_width}, dtype, memory_format_of(input));
  if (out.numel() == 0) return out;
  input = channels_last(input);
  offset = as_planes(offset, sum_dtype_of(dtype));
  if (mask) mask = as_planes(*mask, sum_dtype_of(dtype));
  if (bias) bias = torch::stable::contiguous(*bias);

  dispatch_floating(dtype, "deform_conv2d", [&](auto zero) {
    using scalar_t = decltype(zero);
    using real = accumulate_t<scalar_t>;
    constexpr int vector = 16 / sizeof(scalar_t);
    const Tensor packed = pack_weight<scalar_t>(weight, g, false);
    const scalar_t* image = input.const_data_ptr<scalar_t>();
    const auto kernel = is_packable<scalar_t>(g) && is_aligned(image) ? deform_conv2d_forward_kernel<scalar_t, vector>
                                                                      : deform_conv2d_forward_kernel<scalar_t, 1>;
    const int64_t tiles = g.groups * ((g.group_outputs() + kTileN - 1) / kTileN);
    const int64_t blocks = (g.images * g.pixels() + kTileM - 1) / kTileM * tiles;
    launch_tiles<ForwardMemory<scalar_t>>(
        kernel, blocks, current_stream(input), g, image,
        Displacements<real>{offset.const_data_ptr<real>(), mask ? mask->const_data_ptr<real>() : nullptr},
        packed.const_data_ptr<scalar_t>(), bias ? bias->const_data_ptr<scalar_t>() : nullptr,
        OutputView<scalar_t>{out.mutable_data_ptr<scalar_t>(), out.stride(0), out.stride(1), out.stride(3)});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) { library.impl("deform_conv2d", TORCH_BOX(&deform_conv2d_cuda)); }

}  // namespace cascadeops
