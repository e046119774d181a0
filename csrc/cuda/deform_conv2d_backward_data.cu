// Deformable convolution on CUDA: the gradients of input, offset and mask.
//
// With grad_sample[n, c, t, p] = sum over outputs o of weight[o, c, t] * grad[n, o, p]:
//   grad_input[n, c, cell] = sum over the samples that read the cell of weight of the cell * mask * grad_sample
//   grad_offset[n, t, p]   = mask * sum over c of grad_sample * slope of the sample by y and by x
//   grad_mask[n, t, p]     = sum over c of grad_sample * sample before the mask
//
// Layouts: input and its gradient [N, H, W, C], grad [N, h, w, out_channels], weight packed as [taps, out_channels, C /
// groups], offset, mask and their gradients planes. A block owns 64 output pixels, one tap and one offset group. For
// 128 channels at a time it computes grad_sample as a tile of shared memory (tile_product.cuh); then a warp takes one
// pixel after the other, its lanes neighbouring channels: they add to the four cells and sum up the products with the
// cells' values. The sums over channels stay in the warp, so grad_offset and grad_mask are written once, without
// atomics.
//
// Two blocks may add to one cell. The additions are atomic, in float32, so their order and the last bits of grad_input
// vary; or, when a fixed order is asked for, in 64-bit fixed point, where order does not matter. The unit of the fixed
// point follows from a bound of all sums: |grad_sample| <= |grad| * |weight| (the longest vectors over the outputs),
// times the largest mask, times the number of samples that can meet in a cell. That leaves 2^-43 of the bound for 100 x
// 168 pixels and 9 taps, where float32 has 2^-24 of each sum.
//
// Floor on an H100, 128 channels of 100 x 168 in bfloat16: 4.95 GFLOP, 12.4 us at 400 TFLOP/s; and 4 x 19 million
// additions, which L2 takes at one cache line a cycle and slice. Workspace: the packed weights, and the sums of
// grad_input, 4 or 8 bytes an element (float32 without a fixed order: none).

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks_deform_conv2d.h"
#include "cuda/deform_tile.cuh"
#include "deform_operands.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename scalar_t>
struct DataMemory : BlockMemory<scalar_t, kTileM, kTileM, kTileK> {
  accumulate_t<scalar_t> corner_sums[kTileM][4];  // grad_sample times the cell, over the channels
};

// Sums in their own type, in any order.
template <typename real>
struct AnyOrder {
  real* sums;
  __device__ void prepare() {}
  __device__ void add(int64_t index, real value) const { atomicAdd(sums + index, value); }
};

// The largest squares of |grad| and |weight| over the outputs, and the largest |mask|, as the bits of doubles: those of
// numbers that are not negative order like integers, and NaN above all.
struct Bounds {
  unsigned long long grad, weight, mask;
};

__device__ __forceinline__ double fixed_point_bound(const Bounds& bounds, double samples) {
  const auto value = [](unsigned long long bits) { return __longlong_as_double(static_cast<long long>(bits)); };
  return sqrt(value(bounds.grad)) * sqrt(value(bounds.weight)) * value(bounds.mask) * samples;
}

// 2^e, where every sum is below 2^62 units of 2^-e.
__device__ __forceinline__ int fixed_point_exponent(const Bounds& bounds, double samples) {
  int exponent = 0;
  frexp(fixed_point_bound(bounds, samples), &exponent);
  return 62 - exponent;
}

struct FixedOrder {
  unsigned long long* sums;
  const Bounds* bounds;
  double samples;  // at most so many in one cell
  double scale;

  __device__ void prepare() { scale = ldexp(1.0, fixed_point_exponent(*bounds, samples)); }
  __device__ void add(int64_t index, float value) const {
    // Two's complement: unsigned additions wrap to the right sum.
    atomicAdd(sums + index, static_cast<unsigned long long>(__double2ll_rn(static_cast<double>(value) * scale)));
  }
};

template <typename scalar_t, int vector, typename Sums>
__global__ void __launch_bounds__(kProductThreads, (kResidentBlocks<scalar_t, vector>))
    deform_conv2d_backward_data_kernel(DeformGeometry g, const scalar_t* __restrict__ grad,
                                       const scalar_t* __restrict__ input,
                                       Displacements<accumulate_t<scalar_t>> displacements,
                                       const scalar_t* __restrict__ weight, Sums sums,
                                       accumulate_t<scalar_t>* __restrict__ grad_offset,
                                       accumulate_t<scalar_t>* __restrict__ grad_mask) {
  using real = accumulate_t<scalar_t>;
  constexpr int warps = kProductThreads / 32;
  extern __shared__ __align__(128) char shared[];
  auto& memory = *reinterpret_cast<DataMemory<scalar_t>*>(shared);
  const int64_t tap = blockIdx.x % g.taps(), offset_group = blockIdx.x / g.taps() % g.offset_groups;
  const int64_t first_pixel = blockIdx.x / (g.taps() * g.offset_groups) * kTileM, pixels = g.images * g.pixels();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums.prepare();
  locate(g, displacements, first_pixel, pixels, kTileM, offset_group, tap, memory.samples);

  for (int row = warp; row < kTileM; row += warps)  // the rows that this warp owns to the end
    if (lane < 4) memory.corner_sums[row][lane] = 0;
  const int64_t last_channel = (offset_group + 1) * g.offset_channels();
  for (int64_t c = offset_group * g.offset_channels(), next; c < last_channel; c = next) {
    const int64_t group = c / g.group_channels(), first_output = group * g.group_outputs();
    next = min(c + kTileN, min(last_channel, (group + 1) * g.group_channels()));
    BlockProduct<scalar_t, kRowStride<scalar_t, kTileK>, 1> product;
    CopiedTile<scalar_t, vector, kTileM, kTileK> grads;
    CopiedTile<scalar_t, vector, kTileK, kTileN> weights;
    int64_t o = 0;
    const auto fetch = [&] {
      if (o >= g.group_outputs()) return false;
      const int outputs = up_to(kTileK, g.group_outputs() - o);
      grads.fetch(grad + first_pixel * g.out_channels + first_output + o, g.out_channels,
                  up_to(kTileM, pixels - first_pixel), outputs);
      weights.fetch(
          weight + (tap * g.out_channels + first_output + o) * g.group_channels() + c - group * g.group_channels(),
          g.group_channels(), outputs, static_cast<int>(next - c));
      o += kTileK;
      return true;
    };
    __syncthreads();  // samples are there, and the sums of the channels before have been used
    multiply_tiles<kFetchEarly<scalar_t, vector>>(memory.tiles, product, fetch, [&](auto& tiles) {
      grads.put(tiles.a);
      weights.put(tiles.b);
    });
    __syncthreads();
    product.store(memory.sums);
    __syncthreads();

    for (int row = warp; row < kTileM; row += warps) {
      const PixelSample<real>& pixel = memory.samples[row];
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t cell = pixel.cell(corner);
        if (cell < 0) continue;
        const real factor = pixel.sample.weight(corner) * pixel.mask;
        real products = 0;
        for (int64_t column = lane; column < next - c; column += 32) {
          const int64_t index = cell * g.channels + c + column;
          const real grad_sample = memory.sums[row * kSumStride<scalar_t> + column];
          products += grad_sample * static_cast<real>(input[index]);
          sums.add(index, factor * grad_sample);
        }
        for (int distance = 16; distance > 0; distance /= 2) products += __shfl_xor_sync(~0u, products, distance);
        if (lane == 0) memory.corner_sums[row][corner] += products;
      }
    }
  }

  __syncwarp();
  for (int row = warp; row < kTileM && first_pixel + row < pixels; row += warps) {
    if (lane != 0) continue;
    const auto& [sample, mask, image] = memory.samples[row];
    const real* corners = memory.corner_sums[row];
    const int64_t plane = plane_index(g, first_pixel + row, offset_group, tap);
    real* offset = grad_offset + plane + (plane - (first_pixel + row) % g.pixels());  // two planes for each of the mask
    offset[0] = mask * sample.slope_y(corners);
    offset[g.pixels()] = mask * sample.slope_x(corners);
    if (!grad_mask) continue;
    real value = 0;
    for (int corner = 0; corner < 4; ++corner) value += sample.weight(corner) * corners[corner];
    grad_mask[plane] = value;
  }
}

__device__ void raise_bound(unsigned long long* bound, double value) {
  value = fabs(value);  // also clears the sign of NaN
  atomicMax(bound, static_cast<unsigned long long>(__double_as_longlong(value)));
}

// One thread per vector over the outputs (of all groups, which only makes the bound larger), and per mask.
template <typename scalar_t>
__global__ void __launch_bounds__(kProductThreads)
    bounds_kernel(DeformGeometry g, const scalar_t* __restrict__ grad, const scalar_t* __restrict__ weight,
                  const float* __restrict__ mask, Bounds* bounds) {
  const int64_t grads = g.images * g.pixels(), weights = g.taps() * g.group_channels();
  const int64_t masks = mask ? g.images * g.offset_groups * g.taps() * g.pixels() : 1;
  const int64_t step = int64_t{gridDim.x} * blockDim.x, thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < grads + weights; i += step) {
    // grad is [pixels, out_channels], weight [taps, out_channels, C / groups].
    const int64_t k = i - grads;
    const scalar_t* from =
        i < grads ? grad + i * g.out_channels
                  : weight + k / g.group_channels() * g.out_channels * g.group_channels() + k % g.group_channels();
    const int64_t stride = i < grads ? 1 : g.group_channels();
    double squares = 0;
    for (int64_t o = 0; o < g.out_channels; ++o) {
      const double value = static_cast<float>(from[o * stride]);
      squares += value * value;
    }
    raise_bound(i < grads ? &bounds->grad : &bounds->weight, squares);
  }
  for (int64_t i = thread; i < masks; i += step) raise_bound(&bounds->mask, mask ? mask[i] : 1.0f);
}

// Fixed point -> scalar_t; all NaN where float32 might not hold a sum, or a gradient, weight or mask is not finite.
template <typename scalar_t>
__global__ void __launch_bounds__(kProductThreads)
    round_sums_kernel(const long long* __restrict__ sums, int64_t count, const Bounds* bounds, double samples,
                      scalar_t* __restrict__ out) {
  const double unit = ldexp(1.0, -fixed_point_exponent(*bounds, samples));
  const bool bounded = isfinite(static_cast<float>(fixed_point_bound(*bounds, samples)));
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step)
    out[i] = static_cast<scalar_t>(bounded ? static_cast<float>(static_cast<double>(sums[i]) * unit) : nanf(""));
}

std::tuple<Tensor, Tensor, Tensor> deform_conv2d_backward_data_cuda(Tensor grad, Tensor input, Tensor offset,
                                                                    std::optional<Tensor> mask, Tensor weight,
                                                                    std::vector<int64_t> stride,
                                                                    std::vector<int64_t> padding,
                                                                    std::vector<int64_t> dilation, bool deterministic) {
  const DeformGeometry g = check_deform_conv2d_backward(grad, input, offset, mask, weight, stride, padding, dilation);
  const auto dtype = input.scalar_type(), sum_dtype = sum_dtype_of(dtype), offset_dtype = offset.scalar_type();
  const auto mask_dtype = mask ? mask->scalar_type() : offset_dtype;
  const auto format = memory_format_of(input);
  check(!deterministic || dtype != ScalarType::Double,
        "deform_conv2d: on CUDA there is no deterministic gradient of a float64 input");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto new_map = [&](ScalarType map_dtype) {
    return empty_map(input, {g.images, g.channels, g.height, g.width}, map_dtype,
                     torch::headeronly::MemoryFormat::ChannelsLast);
  };
  const int64_t planes = g.offset_groups * g.taps();
  Tensor grad_offset = torch::stable::new_empty(offset, {g.images, 2 * planes, g.out_height, g.out_width}, sum_dtype);
  Tensor grad_mask = mask ? torch::stable::new_empty(*mask, {g.images, planes, g.out_height, g.out_width}, sum_dtype)
                          : torch::stable::new_empty(offset, {0}, sum_dtype);
  if (g.images == 0) return {torch::stable::contiguous(new_map(dtype), format), grad_offset, grad_mask};
  grad = channels_last(grad);
  input = channels_last(input);
  offset = as_planes(offset, sum_dtype);
  if (mask) mask = as_planes(*mask, sum_dtype);
  Tensor grad_input = new_map(deterministic ? dtype : sum_dtype);
  const cudaStream_t stream = current_stream(input);

  dispatch_floating(dtype, "deform_conv2d", [&](auto zero) {
    using scalar_t = decltype(zero);
    using real = accumulate_t<scalar_t>;
    constexpr int vector = 16 / sizeof(scalar_t);
    const Tensor packed = pack_weight<scalar_t>(weight, g, true);
    const scalar_t *grads = grad.const_data_ptr<scalar_t>(), *images = input.const_data_ptr<scalar_t>();
    const scalar_t* weights = packed.const_data_ptr<scalar_t>();
    const real* masks = mask ? mask->const_data_ptr<real>() : nullptr;
    const int64_t blocks = (g.images * g.pixels() + kTileM - 1) / kTileM * planes;
    const auto run = [&](auto sums) {
      using Sums = decltype(sums);
      const auto kernel = is_packable<scalar_t>(g) && is_aligned(grads)
                              ? deform_conv2d_backward_data_kernel<scalar_t, vector, Sums>
                              : deform_conv2d_backward_data_kernel<scalar_t, 1, Sums>;
      launch_tiles<DataMemory<scalar_t>>(
          kernel, blocks, stream, g, grads, images, Displacements<real>{offset.const_data_ptr<real>(), masks}, weights,
          sums, grad_offset.mutable_data_ptr<real>(), mask ? grad_mask.mutable_data_ptr<real>() : nullptr);
    };
    if (!deterministic) {
      torch::stable::zero_(grad_input);
      return run(AnyOrder<real>{grad_input.mutable_data_ptr<real>()});
    }
    if constexpr (!std::is_same_v<scalar_t, double>) {
      // The last three numbers are the bounds.
      const int64_t count = grad_input.numel();
      Tensor fixed = torch::stable::new_empty(input, {count + 3}, ScalarType::Long);
      torch::stable::zero_(fixed);
      auto* sums = static_cast<unsigned long long*>(fixed.mutable_data_ptr());
      auto* bounds = reinterpret_cast<Bounds*>(sums + count);
      bounds_kernel<scalar_t>
          <<<grid_blocks(g.images * g.pixels() * planes, kProductThreads), kProductThreads, 0, stream>>>(
              g, grads, weights, masks, bounds);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const double samples = static_cast<double>(g.pixels()) * static_cast<double>(g.taps());
      run(FixedOrder{sums, bounds, samples, 0});
      round_sums_kernel<scalar_t><<<grid_blocks(count, kProductThreads), kProductThreads, 0, stream>>>(
          reinterpret_cast<const long long*>(sums), count, bounds, samples, grad_input.mutable_data_ptr<scalar_t>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {torch::stable::contiguous(torch::stable::to(grad_input, dtype), format),
          torch::stable::to(grad_offset, offset_dtype), torch::stable::to(grad_mask, mask_dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("deform_conv2d_backward_data", TORCH_BOX(&deform_conv2d_backward_data_cuda));
}

}  // namespace cascadeops
