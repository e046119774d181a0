// What the CUDA kernels of multiscale_roi_align are given: the maps, and the bins of all RoIs. Passed by value.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/roi_placement.h"
#include "cuda/launch.cuh"
#include "layout.h"

namespace cascadeops {

// A four-dimensional tensor: a map [N, C, H, W], or all bins [K, C, h, w]. Strides are in elements.
template <typename scalar_t>
struct MapBatch {
  scalar_t* data;
  int64_t image, channel, row, column;
};

// The maps that may be read (forward) or are written (backward).
template <typename scalar_t>
struct RoiMaps {
  MapBatch<scalar_t> map[RoiPlacement::kMaxMaps];
};

template <typename scalar_t, int vector>
struct alignas(sizeof(scalar_t) * vector) Pack {
  scalar_t value[vector];
};

template <typename scalar_t>
MapBatch<scalar_t> map_batch(scalar_t* data, const torch::stable::Tensor& tensor) {
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline bool all_channels_adjacent(const std::vector<torch::stable::Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), [](const auto& map) { return channels_adjacent(map); });
}

// Whether every cell begins a run of whole 16-byte packs of channels.
inline bool is_packable(const torch::stable::Tensor& map) {
  const int64_t bytes = static_cast<int64_t>(map.element_size());
  return channels_adjacent(map) && reinterpret_cast<uintptr_t>(map.data_ptr()) % 16 == 0 &&
         map.size(1) * bytes % 16 == 0 && map.stride(0) * bytes % 16 == 0 && map.stride(2) * bytes % 16 == 0 &&
         map.stride(3) * bytes % 16 == 0;
}

inline bool are_packable(const std::vector<torch::stable::Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), is_packable);
}

// The rows of rois that count: all, or as many as the device's number says.
__device__ inline int64_t counted_rows(const int64_t* count, int64_t rows) {
  return count == nullptr || *count > rows ? rows : *count;
}

inline const int64_t* count_pointer(const std::optional<torch::stable::Tensor>& count) {
  return count ? count->const_data_ptr<int64_t>() : nullptr;
}

}  // namespace cascadeops
