// RoIAlign over a feature pyramid on CUDA, all levels in one launch.
//
// out[k, c, p, q] = sum over y, x of wy[p][y] * wx[q][x] * feature[level k, image k][c, y, x], where wy and wx are the
// averaged bilinear weights of the RoI's samples along one axis.
//
// Layouts: maps [N, C, H_l, W_l] with any strides; out and grad likewise [K, C, h, w]; rois [K, 5]. A block owns a RoI
// and every gridDim.y-th row of its bins. It first writes wy and wx to shared memory, one thread per bin, so that
// samples which share cells are merged: a bin of b x b cells then reads about (b + 1)^2 cells, not 4 * ceil(b)^2. After
// that a thread owns 16 bytes of channels of one bin (channels-last maps: neighbouring threads read neighbouring
// channels), or one channel of one bin (other maps: neighbouring threads own neighbouring bins).
//
// Bytes: each RoI's cells are read from the L2 cache once per bin that uses them, about 1.5 times; out is written once.
// The floor is the larger of the touched part of the maps plus out over the memory's bandwidth, and those reads over
// L2's.
//
// Backward: the same walk adds to the cells with atomics, into float32 sums that are rounded to the maps' dtype at the
// end (float64 for float64 maps). The order of the additions, and so the last bit of the result, changes from run to
// run.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/roi_taps.cuh"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxLevels = 8;
constexpr int kThreads = 256;
// Blocks that keep every multiprocessor busy (132 of them on an H100, 8 blocks each, two waves); few RoIs are split by
// rows.
constexpr int64_t kEnoughBlocks = 2048;

// Everything about the maps and the placement of RoIs on them; passed by value.
template <typename scalar_t>
struct Pyramid {
  scalar_t* data[kMaxLevels];
  int64_t image[kMaxLevels], channel[kMaxLevels], row[kMaxLevels], column[kMaxLevels];  // strides, in elements
  int64_t height[kMaxLevels], width[kMaxLevels];
  double spatial_scale[kMaxLevels];
  int levels;
  int64_t images;
  int channels;
  int64_t max_height, max_width;
  int64_t sampling_ratio;
  bool aligned, epsilon_inside_log;
  float finest_size;
};

// The bins of all RoIs: out of the forward pass, grad of the backward pass.
template <typename scalar_t>
struct Bins {
  scalar_t* data;
  int64_t roi, channel, row, column;  // strides, in elements
  int height, width;
};

template <typename scalar_t, int vector>
struct alignas(sizeof(scalar_t) * vector) Pack {
  scalar_t value[vector];
};

// A row that cannot be placed - padding, a bad batch index, a coordinate that is not finite - belongs to no image.
__device__ bool is_placed(const float* roi, int64_t images) {
  return roi[0] >= 0 && roi[0] < static_cast<float>(images) && isfinite(roi[1]) && isfinite(roi[2]) &&
         isfinite(roi[3]) && isfinite(roi[4]);
}

// Calls body(map, cells of the bin, bin) for this thread's share of the block's bins and channels, where map points at
// the thread's first channel in the RoI's image, and bin at the same channel of the bin. A RoI without a place has no
// cells.
template <typename scalar_t, int vector, bool channels_last, typename map_t, typename bins_t, typename Body>
__device__ void for_each_bin(const Pyramid<map_t>& pyramid, const float* rois, const Bins<bins_t>& bins, Body&& body) {
  using real = accumulate_t<scalar_t>;
  extern __shared__ __align__(16) char memory[];
  SharedTaps<real> ys(memory, bins.height, pyramid.max_height);
  SharedTaps<real> xs(memory + SharedTaps<real>::bytes(bins.height, pyramid.max_height), bins.width, pyramid.max_width);
  const int64_t k = blockIdx.x;
  const float* roi = rois + 5 * k;
  const bool placed = is_placed(roi, pyramid.images);
  int level = 0;
  if (placed) {
    level =
        roi_level(roi[3] - roi[1], roi[4] - roi[2], pyramid.finest_size, pyramid.epsilon_inside_log, pyramid.levels);
    const real scale = static_cast<real>(pyramid.spatial_scale[level]);
    const auto y = roi_axis<real>(roi[2], roi[4], scale, bins.height, pyramid.sampling_ratio, pyramid.aligned);
    const auto x = roi_axis<real>(roi[1], roi[3], scale, bins.width, pyramid.sampling_ratio, pyramid.aligned);
    build_taps<real>({y, bins.height, 0, pyramid.height[level], real(1) / static_cast<real>(y.samples)},
                     {x, bins.width, 0, pyramid.width[level], real(1) / static_cast<real>(x.samples)}, ys, xs);
  }
  map_t* image = pyramid.data[level] + (placed ? static_cast<int64_t>(roi[0]) * pyramid.image[level] : 0);
  const int64_t row = pyramid.row[level], column = pyramid.column[level];

  // The input check keeps the number of a RoI's values below 2^31.
  const int groups = pyramid.channels / vector;
  const int rows = (bins.height - blockIdx.y + gridDim.y - 1) / gridDim.y;
  for (int item = threadIdx.x; item < rows * bins.width * groups; item += blockDim.x) {
    const int bin = channels_last ? item / groups : item % (rows * bins.width);
    const int c = (channels_last ? item % groups : item / (rows * bins.width)) * vector;
    const int p = blockIdx.y + bin / bins.width * gridDim.y, q = bin % bins.width;
    map_t* map = image + c * pyramid.channel[level];
    const auto for_each_tap = [&](auto&& visit) {
      if (!placed) return;
      for (int i = ys.begin[p]; i < ys.begin[p + 1]; ++i)
        for (int j = xs.begin[q]; j < xs.begin[q + 1]; ++j)
          visit(map + ys.cell[i] * row + xs.cell[j] * column, ys.weight[i] * xs.weight[j]);
    };
    body(bins.data + k * bins.roi + c * bins.channel + p * bins.row + q * bins.column, for_each_tap);
  }
}

template <typename scalar_t, int vector, bool channels_last>
__global__ void __launch_bounds__(kThreads)
    multiscale_roi_align_forward_kernel(const __grid_constant__ Pyramid<const scalar_t> pyramid,
                                        const float* __restrict__ rois, const __grid_constant__ Bins<scalar_t> out) {
  using real = accumulate_t<scalar_t>;
  for_each_bin<scalar_t, vector, channels_last>(pyramid, rois, out, [&](scalar_t* bin, const auto& for_each_tap) {
    real sum[vector] = {};
    for_each_tap([&](const scalar_t* cell, real weight) {
      const auto pack = *reinterpret_cast<const Pack<scalar_t, vector>*>(cell);
      for (int i = 0; i < vector; ++i) sum[i] += weight * static_cast<real>(pack.value[i]);
    });
    Pack<scalar_t, vector> result;
    for (int i = 0; i < vector; ++i) result.value[i] = static_cast<scalar_t>(sum[i]);
    *reinterpret_cast<Pack<scalar_t, vector>*>(bin) = result;
  });
}

template <typename scalar_t, bool channels_last>
__global__ void __launch_bounds__(kThreads)
    multiscale_roi_align_backward_kernel(const __grid_constant__ Pyramid<accumulate_t<scalar_t>> sums,
                                         const float* __restrict__ rois,
                                         const __grid_constant__ Bins<const scalar_t> grad) {
  using real = accumulate_t<scalar_t>;
  // One channel per thread: a warp's additions then fall on 32 adjacent words of a channels-last map.
  for_each_bin<scalar_t, 1, channels_last>(sums, rois, grad, [&](const scalar_t* bin, const auto& for_each_tap) {
    const real value = static_cast<real>(*bin);
    for_each_tap([&](real* cell, real weight) { atomicAdd(cell, weight * value); });
  });
}

struct Placement {
  const std::vector<double>& spatial_scales;
  int64_t sampling_ratio;
  bool aligned;
  double finest_size;
  bool epsilon_inside_log;
};

template <typename scalar_t, typename Data>
Pyramid<scalar_t> pyramid_of(const std::vector<Tensor>& maps, const Placement& placement, Data&& data) {
  Pyramid<scalar_t> pyramid{};
  pyramid.levels = static_cast<int>(maps.size());
  for (int level = 0; level < pyramid.levels; ++level) {
    const Tensor& map = maps[level];
    pyramid.data[level] = data(map);
    pyramid.image[level] = map.stride(0);
    pyramid.channel[level] = map.stride(1);
    pyramid.row[level] = map.stride(2);
    pyramid.column[level] = map.stride(3);
    pyramid.height[level] = map.size(2);
    pyramid.width[level] = map.size(3);
    pyramid.spatial_scale[level] = placement.spatial_scales[level];
    pyramid.max_height = std::max(pyramid.max_height, map.size(2));
    pyramid.max_width = std::max(pyramid.max_width, map.size(3));
  }
  pyramid.images = maps[0].size(0);
  pyramid.channels = static_cast<int>(maps[0].size(1));
  pyramid.sampling_ratio = placement.sampling_ratio;
  pyramid.aligned = placement.aligned;
  pyramid.epsilon_inside_log = placement.epsilon_inside_log;
  pyramid.finest_size = static_cast<float>(placement.finest_size);
  return pyramid;
}

template <typename scalar_t>
Bins<scalar_t> bins_of(scalar_t* data, const Tensor& bins) {
  return {data,
          bins.stride(0),
          bins.stride(1),
          bins.stride(2),
          bins.stride(3),
          static_cast<int>(bins.size(2)),
          static_cast<int>(bins.size(3))};
}

bool all_channels_adjacent(const std::vector<Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), [](const Tensor& map) { return channels_adjacent(map); });
}

// Whether every cell of every map begins a run of whole 16-byte packs.
bool is_packable(const std::vector<Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), [](const Tensor& map) {
    const int64_t bytes = static_cast<int64_t>(map.element_size());
    return reinterpret_cast<uintptr_t>(map.data_ptr()) % 16 == 0 && map.size(1) * bytes % 16 == 0 &&
           map.stride(0) * bytes % 16 == 0 && map.stride(2) * bytes % 16 == 0 && map.stride(3) * bytes % 16 == 0;
  });
}

template <typename scalar_t, typename map_t, typename bins_t>
void launch(void (*kernel)(Pyramid<map_t>, const float*, Bins<bins_t>), const Pyramid<map_t>& pyramid,
            const Tensor& rois, const Bins<bins_t>& bins) {
  using real = accumulate_t<scalar_t>;
  const int64_t memory =
      SharedTaps<real>::bytes(bins.height, pyramid.max_height) + SharedTaps<real>::bytes(bins.width, pyramid.max_width);
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (memory > kWithoutAsking)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory)));
  const int64_t count = rois.size(0);
  const int64_t splits = std::clamp<int64_t>((kEnoughBlocks + count - 1) / count, 1, std::min(bins.height, 65535));
  kernel<<<dim3(static_cast<unsigned>(count), static_cast<unsigned>(splits)), kThreads, memory, current_stream(rois)>>>(
      pyramid, rois.const_data_ptr<float>(), bins);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor multiscale_roi_align_cuda(std::vector<Tensor> features, Tensor rois, int64_t height, int64_t width,
                                 std::vector<double> spatial_scales, int64_t sampling_ratio, bool aligned,
                                 double finest_size, bool epsilon_inside_log) {
  check_multiscale_roi_align(features, rois, height, width, spatial_scales, finest_size);
  const torch::stable::accelerator::DeviceGuard guard(rois.get_device_index());
  rois = torch::stable::contiguous(rois);
  const auto dtype = features[0].scalar_type();
  Tensor out =
      empty_map(features[0], {rois.size(0), features[0].size(1), height, width}, dtype, memory_format_of(features[0]));
  if (out.numel() == 0) return out;
  const Placement placement{spatial_scales, sampling_ratio, aligned, finest_size, epsilon_inside_log};

  dispatch_floating(dtype, "multiscale_roi_align", [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int vector = 16 / sizeof(scalar_t);
    const auto pyramid = pyramid_of<const scalar_t>(features, placement,
                                                    [](const Tensor& map) { return map.const_data_ptr<scalar_t>(); });
    const auto bins = bins_of(out.mutable_data_ptr<scalar_t>(), out);
    if (!all_channels_adjacent(features))
      launch<scalar_t>(multiscale_roi_align_forward_kernel<scalar_t, 1, false>, pyramid, rois, bins);
    else if (is_packable(features))
      launch<scalar_t>(multiscale_roi_align_forward_kernel<scalar_t, vector, true>, pyramid, rois, bins);
    else
      launch<scalar_t>(multiscale_roi_align_forward_kernel<scalar_t, 1, true>, pyramid, rois, bins);
  });
  return out;
}

std::vector<Tensor> multiscale_roi_align_backward_cuda(Tensor grad, std::vector<Tensor> features, Tensor rois,
                                                       std::vector<double> spatial_scales, int64_t sampling_ratio,
                                                       bool aligned, double finest_size, bool epsilon_inside_log) {
  check_multiscale_roi_align_backward(grad, features, rois, spatial_scales, finest_size);
  const torch::stable::accelerator::DeviceGuard guard(rois.get_device_index());
  rois = torch::stable::contiguous(rois);
  const auto dtype = features[0].scalar_type();
  const auto sum_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> sums;
  for (const Tensor& map : features) {
    sums.push_back(
        empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, sum_dtype, memory_format_of(map)));
    torch::stable::zero_(sums.back());
  }
  if (grad.numel() > 0) {
    const Placement placement{spatial_scales, sampling_ratio, aligned, finest_size, epsilon_inside_log};
    dispatch_floating(dtype, "multiscale_roi_align", [&](auto zero) {
      using scalar_t = decltype(zero);
      using real = accumulate_t<scalar_t>;
      const auto pyramid =
          pyramid_of<real>(sums, placement, [](const Tensor& map) { return map.mutable_data_ptr<real>(); });
      const auto bins = bins_of(grad.const_data_ptr<scalar_t>(), grad);
      if (all_channels_adjacent(sums))
        launch<scalar_t>(multiscale_roi_align_backward_kernel<scalar_t, true>, pyramid, rois, bins);
      else
        launch<scalar_t>(multiscale_roi_align_backward_kernel<scalar_t, false>, pyramid, rois, bins);
    });
  }
  for (Tensor& sum : sums) sum = torch::stable::to(sum, dtype);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align_cuda));
  library.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward_cuda));
}

}  // namespace cascadeops
