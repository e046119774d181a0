// What every CUDA kernel of this library needs around its launch. A launch reads
//   torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
//   kernel<<<blocks, threads, 0, current_stream(x)>>>(...);
//   STD_CUDA_KERNEL_LAUNCH_CHECK();
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>

namespace cascadeops {

// PyTorch's current stream on the device of `tensor`.
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks for a grid-stride loop over `items`: enough for all of them, up to 2^20, which is more than any device holds
// at once and far below the limit of the grid's x dimension.
inline unsigned grid_blocks(int64_t items, int64_t items_per_block) {
  return static_cast<unsigned>(std::min<int64_t>((items + items_per_block - 1) / items_per_block, int64_t{1} << 20));
}

}  // namespace cascadeops
