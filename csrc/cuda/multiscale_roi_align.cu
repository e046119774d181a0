// RoIAlign over a feature pyramid on CUDA, all levels in one launch: the forward pass.
//
// out[k, c, p, q] = vector[image k, c] + sum over maps m, y, x of wy[m][p][y] * wx[m][q][x] * map m[image k][c, y, x],
// where m is the RoI's level, and the extra map if there is one, and wy and wx are the averaged bilinear weights of the
// RoI's samples along one axis.
//
// Layouts: maps [N, C, H_m, W_m] with any strides; out [K, C, h, w]; rois [K, 5]; vector [N, C]. A block owns a RoI and
// every gridDim.y-th row of its bins. It first writes wy and wx to shared memory, one thread per bin, so that samples
// which share cells are merged: a bin of b x b cells then reads about (b + 1)^2 cells, not 4 * ceil(b)^2. After that a
// thread owns 16 bytes of channels of one bin (channels-last maps: neighbouring threads read neighbouring channels), or
// one channel of one bin (other maps: neighbouring threads own neighbouring bins). Maps so large that the weights of
// the longest possible axis do not fit into shared memory are sampled without it, weights computed by every thread.
//
// Bytes: each RoI's cells are read from the L2 cache once per bin that uses them, about 1.5 times; out is written once.
// The floor is the larger of the touched part of the maps plus out over the memory's bandwidth, and those reads over
// L2's. 1000 x 7 x 7 x 256 in bfloat16 on an H100 (3 TB/s): 45.7 MB + 25.1 MB, 24 us.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"
#include "cuda/roi_pyramid.cuh"
#include "cuda/roi_taps.cuh"
#include "dispatch.h"
#include "layout.h"
#include "roi_maps.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
// Blocks that keep every multiprocessor busy (132 of them on an H100, 8 blocks each, two waves); few RoIs are split by
// rows.
constexpr int64_t kEnoughBlocks = 2048;
// Shared memory that a block gets without asking, and at most on sm_80 to sm_90 (the least of them: sm_86, sm_89).
constexpr int64_t kKilobyte = 1024, kWithoutAsking = 48 * kKilobyte, kAtMost = 99 * kKilobyte;

// One of the maps that the block's RoI reads.
template <typename scalar_t, typename real>
struct Source {
  const scalar_t* image;
  int64_t channel, row, column;
  AxisOnMap<real> y, x;
  SharedTaps<real> y_taps, x_taps;
};

// Calls visit(cell, weight) for the cells of bin (p, q), cell pointing at channel 0.
template <bool shared_taps, typename scalar_t, typename real, typename Visit>
__device__ void for_each_tap(const Source<scalar_t, real>& source, int p, int q, Visit&& visit) {
  if constexpr (shared_taps) {
    const auto &ys = source.y_taps, &xs = source.x_taps;
    for (int i = ys.begin[p]; i < ys.begin[p + 1]; ++i)
      for (int j = xs.begin[q]; j < xs.begin[q + 1]; ++j)
        visit(source.image + ys.cell[i] * source.row + xs.cell[j] * source.column, ys.weight[i] * xs.weight[j]);
  } else {
    const auto &y = source.y, &x = source.x;
    for_each_cell(y.axis, p, y.origin, y.size, y.sample_weight, [&](int64_t row, real row_weight) {
      for_each_cell(x.axis, q, x.origin, x.size, x.sample_weight, [&](int64_t column, real weight) {
        visit(source.image + row * source.row + column * source.column, row_weight * weight);
      });
    });
  }
}

// Shared memory for the taps of a map of the longest axes given: those of the levels, and those of the extra map.
struct TapsMemory {
  int64_t height[2], width[2], total;
};

template <typename scalar_t, int vector, bool channels_last, bool shared_taps>
__global__ void __launch_bounds__(kThreads)
    multiscale_roi_align_forward_kernel(const __grid_constant__ RoiPlacement placement,
                                        const __grid_constant__ RoiMaps<const scalar_t> maps, int channels,
                                        const float* __restrict__ rois, const int64_t* __restrict__ count,
                                        const scalar_t* __restrict__ image_vector, const TapsMemory taps_memory,
                                        const __grid_constant__ MapBatch<scalar_t> out, uint64_t* fault) {
  using real = accumulate_t<scalar_t>;
  extern __shared__ __align__(16) char memory[];
  const int64_t k = blockIdx.x;
  const float* roi = rois + 5 * k;
  const bool counted = k < counted_rows(count, gridDim.x), placed = counted && placement.is_placed(roi);
  if (counted && !placed && roi[0] != -1.0f && blockIdx.y == 0 && threadIdx.x == 0)
    note_fault(fault, Fault::kMultiscaleRoiAlign, k);
  const int64_t image = placed ? static_cast<int64_t>(roi[0]) : 0;
  const int height = static_cast<int>(placement.bins_y), width = static_cast<int>(placement.bins_x);

  Source<scalar_t, real> source[2];
  const int sources = !placed ? 0 : placement.maps > placement.levels ? 2 : 1;
  char* free_memory = memory;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= sources) break;
    const int map = s == 0 ? placement.level(roi) : placement.levels;
    const auto y = placement.y_axis<real>(roi, map), x = placement.x_axis<real>(roi, map);
    source[s].image = maps.map[map].data + image * maps.map[map].image;
    source[s].channel = maps.map[map].channel;
    source[s].row = maps.map[map].row;
    source[s].column = maps.map[map].column;
    source[s].y = {y, height, 0, placement.height[map], real(1) / static_cast<real>(y.samples)};
    source[s].x = {x, width, 0, placement.width[map], real(1) / static_cast<real>(x.samples)};
    if constexpr (shared_taps) {
      source[s].y_taps = SharedTaps<real>(free_memory, height, taps_memory.height[s]);
      free_memory += SharedTaps<real>::bytes(height, taps_memory.height[s]);
      source[s].x_taps = SharedTaps<real>(free_memory, width, taps_memory.width[s]);
      free_memory += SharedTaps<real>::bytes(width, taps_memory.width[s]);
      build_taps<real>(source[s].y, source[s].x, source[s].y_taps, source[s].x_taps);
    }
  }

  // The input check keeps the number of a RoI's values below 2^31.
  const int groups = channels / vector;
  const int rows = (height - blockIdx.y + gridDim.y - 1) / gridDim.y;
  for (int item = threadIdx.x; item < rows * width * groups; item += blockDim.x) {
    const int bin = channels_last ? item / groups : item % (rows * width);
    const int c = (channels_last ? item % groups : item / (rows * width)) * vector;
    const int p = blockIdx.y + bin / width * gridDim.y, q = bin % width;
    real sum[vector] = {};
    if (placed && image_vector != nullptr)
      for (int i = 0; i < vector; ++i) sum[i] = static_cast<real>(image_vector[image * channels + c + i]);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s >= sources) break;
      const int64_t channel = c * source[s].channel;
      for_each_tap<shared_taps>(source[s], p, q, [&](const scalar_t* cell, real weight) {
        const auto pack = *reinterpret_cast<const Pack<scalar_t, vector>*>(cell + channel);
        for (int i = 0; i < vector; ++i) sum[i] += weight * static_cast<real>(pack.value[i]);
      });
    }
    Pack<scalar_t, vector> result;
    for (int i = 0; i < vector; ++i) result.value[i] = static_cast<scalar_t>(sum[i]);
    scalar_t* to = out.data + k * out.image + c * out.channel + p * out.row + q * out.column;
    *reinterpret_cast<Pack<scalar_t, vector>*>(to) = result;
  }
}

template <typename real>
TapsMemory taps_memory_of(const RoiPlacement& placement) {
  TapsMemory memory{};
  for (int map = 0; map < placement.maps; ++map) {
    const int s = map < placement.levels ? 0 : 1;
    memory.height[s] = std::max(memory.height[s], placement.height[map]);
    memory.width[s] = std::max(memory.width[s], placement.width[map]);
  }
  for (int s = 0; s < (placement.maps > placement.levels ? 2 : 1); ++s)
    memory.total += SharedTaps<real>::bytes(placement.bins_y, memory.height[s]) +
                    SharedTaps<real>::bytes(placement.bins_x, memory.width[s]);
  return memory;
}

template <typename scalar_t, int vector, bool channels_last, bool shared_taps>
void launch(const RoiPlacement& placement, const RoiMaps<const scalar_t>& maps, const Tensor& rois,
            const std::optional<Tensor>& count, const std::optional<Tensor>& image_vector, const TapsMemory& memory,
            const Tensor& out) {
  const auto kernel = multiscale_roi_align_forward_kernel<scalar_t, vector, channels_last, shared_taps>;
  const int64_t bytes = shared_taps ? memory.total : 0;
  if (bytes > kWithoutAsking)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const int64_t rows = rois.size(0);
  const int64_t splits =
      std::clamp<int64_t>((kEnoughBlocks + rows - 1) / rows, 1, std::min<int64_t>(placement.bins_y, 65535));
  const dim3 blocks(static_cast<unsigned>(rows), static_cast<unsigned>(splits));
  kernel<<<blocks, kThreads, bytes, current_stream(rois)>>>(
      placement, maps, static_cast<int>(out.size(1)), rois.const_data_ptr<float>(), count_pointer(count),
      image_vector ? image_vector->const_data_ptr<scalar_t>() : nullptr, memory,
      map_batch(out.mutable_data_ptr<scalar_t>(), out), fault_word(rois));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor multiscale_roi_align_cuda(std::vector<Tensor> maps, Tensor rois, int64_t height, int64_t width,
                                 std::vector<double> spatial_scales, int64_t sampling_ratio, bool aligned,
                                 double finest_size, bool epsilon_inside_log, int64_t extra_subdivision,
                                 std::optional<Tensor> image_vector, std::optional<Tensor> count) {
  check_multiscale_roi_align(maps, rois, height, width, spatial_scales, finest_size, extra_subdivision, count);
  check_roi_image_vector(image_vector, maps[0]);
  const torch::stable::accelerator::DeviceGuard guard(rois.get_device_index());
  rois = torch::stable::contiguous(rois);
  if (image_vector) image_vector = torch::stable::contiguous(*image_vector);
  const auto dtype = maps[0].scalar_type();
  Tensor out = empty_map(maps[0], {rois.size(0), maps[0].size(1), height, width}, dtype, memory_format_of(maps[0]));
  if (out.numel() == 0) return out;
  const RoiPlacement placement = placement_of(maps, height, width, spatial_scales, sampling_ratio, aligned, finest_size,
                                              epsilon_inside_log, extra_subdivision);

  dispatch_floating(dtype, "multiscale_roi_align", [&](auto zero) {
    using scalar_t = decltype(zero);
    RoiMaps<const scalar_t> views;
    for (size_t i = 0; i < maps.size(); ++i) views.map[i] = map_batch(maps[i].const_data_ptr<scalar_t>(), maps[i]);
    const TapsMemory memory = taps_memory_of<accumulate_t<scalar_t>>(placement);
    if (memory.total > kAtMost)
      launch<scalar_t, 1, false, false>(placement, views, rois, count, image_vector, memory, out);
    else if (!all_channels_adjacent(maps))
      launch<scalar_t, 1, false, true>(placement, views, rois, count, image_vector, memory, out);
    else if (are_packable(maps))
      launch<scalar_t, 16 / sizeof(scalar_t), true, true>(placement, views, rois, count, image_vector, memory, out);
    else
      launch<scalar_t, 1, true, true>(placement, views, rois, count, image_vector, memory, out);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align_cuda));
}

}  // namespace cascadeops
