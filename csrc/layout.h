// Memory layouts of tensors, [N, C, H, W] maps above all.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <vector>

namespace cascadeops {

// Whether the channels of a pixel lie side by side, which the fast kernels need. The fake kernels in Python use the
// same rule for the layout of a result.
inline bool channels_adjacent(const torch::stable::Tensor& map) {
  return map.size(1) > 1 && map.stride(1) == 1 && !map.is_contiguous();
}

inline torch::headeronly::MemoryFormat memory_format_of(const torch::stable::Tensor& map) {
  using torch::headeronly::MemoryFormat;
  return channels_adjacent(map) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Uninitialised [N, C, H, W] tensor on the device of `like`.
inline torch::stable::Tensor empty_map(const torch::stable::Tensor& like, std::array<int64_t, 4> size,
                                       torch::headeronly::ScalarType dtype, torch::headeronly::MemoryFormat format) {
  return torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline std::vector<torch::stable::Tensor> contiguous(std::vector<torch::stable::Tensor> tensors) {
  for (torch::stable::Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
  return tensors;
}

// Channels, rows and columns of one image or one RoI, with their distances in elements.
template <typename scalar_t>
struct MapView {
  scalar_t* data;
  int64_t channel, row, column;
};

// The view of element `index` along the first dimension.
template <typename scalar_t>
MapView<scalar_t> view_of(scalar_t* data, const torch::stable::Tensor& tensor, int64_t index) {
  return {data + index * tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

}  // namespace cascadeops
