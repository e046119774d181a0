// The layouts in which the kernels of deform_conv2d read their operands, on CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

namespace cascadeops {

// Channels side by side; a copy only if they are not.
inline torch::stable::Tensor channels_last(const torch::stable::Tensor& map) {
  return torch::stable::contiguous(map, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Offsets or mask: planes of the type of sums; a copy only if they come in another dtype or layout.
inline torch::stable::Tensor as_planes(const torch::stable::Tensor& map, torch::headeronly::ScalarType sum_dtype) {
  return torch::stable::contiguous(torch::stable::to(map, sum_dtype));
}

inline torch::headeronly::ScalarType sum_dtype_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace cascadeops
