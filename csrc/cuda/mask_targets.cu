// Mask targets on CUDA: RoIAlign (scale 1, adaptive sampling, aligned) of ground-truth bitmaps, thresholded at a half.
//
// target[k, p, q] = sum over y, x of wy[p][y] * wx[q][x] * bitmap[y, x] >= samples / 2, in the order of additions of
// the CPU kernel, so that ties fall alike. A bitmap is stored inside its window only, which is sampled as if it were
// the image: see csrc/cpu/mask_targets.cpp.
//
// Layouts: bitmaps [total] uint8, windows [G, 4] (x0, y0, width, height), boxes [K, 4], index [K], targets [K, M, M]
// uint8, all contiguous. Threads: one per target cell. It sums the bitmap's rows column by column; the weights of its
// row and its column are computed on the spot, because windows differ in size from box to box, which would need shared
// memory for the largest; neighbouring threads own neighbouring columns of the target and so read neighbouring pixels.
//
// Bytes: each box reads its window about once per target cell's overlap, from L2, and writes M * M bytes. A few hundred
// boxes are a few megabytes: the launch itself is the floor.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "common/bilinear.h"
#include "common/boxes.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    mask_targets_kernel(const uint8_t* __restrict__ bitmaps, int64_t total, const int64_t* __restrict__ offsets,
                        const int32_t* __restrict__ windows, int64_t objects, const float* __restrict__ boxes,
                        const int64_t* __restrict__ index, int64_t cells, int64_t size, uint8_t* __restrict__ targets,
                        uint64_t* fault) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < cells; item += step) {
    const int64_t k = item / (size * size), p = item / size % size, q = item % size;
    targets[item] = 0;
    const int64_t object = index[k];
    if (object == -1) continue;
    const float* box = boxes + 4 * k;
    const bool is_object = object >= 0 && object < objects;
    const int32_t* window = windows + 4 * (is_object ? object : 0);
    const int64_t offset = is_object ? offsets[object] : -1;
    const int64_t width = is_object ? window[2] : 0, height = is_object ? window[3] : 0;
    if (!is_object || !is_finite({box[0], box[1], box[2], box[3]}) || width < 0 || height < 0 || offset < 0 ||
        offset > total || width * height > total - offset) {
      if (p == 0 && q == 0) note_fault(fault, Fault::kMaskTargets, k);
      continue;
    }
    if (width == 0 || height == 0) continue;

    const auto ys = roi_axis<float>(box[1], box[3], 1.0f, size, 0, true);
    const auto xs = roi_axis<float>(box[0], box[2], 1.0f, size, 0, true);
    float sum = 0.0f;
    for_each_cell(xs, q, window[0], width, 1.0f, [&](int64_t x, float x_weight) {
      float column = 0.0f;
      for_each_cell(ys, p, window[1], height, 1.0f, [&](int64_t y, float y_weight) {
        column += y_weight * static_cast<float>(bitmaps[offset + y * width + x]);
      });
      sum += x_weight * column;
    });
    const float samples = static_cast<float>(ys.samples) * static_cast<float>(xs.samples);
    targets[item] = sum >= 0.5f * fmaxf(samples, 1.0f);
  }
}

Tensor mask_targets_cuda(Tensor bitmaps, Tensor offsets, Tensor windows, Tensor boxes, Tensor index,
                         int64_t output_size) {
  check_mask_targets(bitmaps, offsets, windows, boxes, index, output_size);
  const torch::stable::accelerator::DeviceGuard guard(bitmaps.get_device_index());
  for (Tensor* tensor : {&bitmaps, &offsets, &windows, &boxes, &index}) *tensor = torch::stable::contiguous(*tensor);
  Tensor targets = torch::stable::new_empty(bitmaps, {boxes.size(0), output_size, output_size});
  if (targets.numel() == 0) return targets;
  mask_targets_kernel<<<grid_blocks(targets.numel(), kThreads), kThreads, 0, current_stream(bitmaps)>>>(
      bitmaps.const_data_ptr<uint8_t>(), bitmaps.size(0), offsets.const_data_ptr<int64_t>(),
      windows.const_data_ptr<int32_t>(), offsets.size(0), boxes.const_data_ptr<float>(),
      index.const_data_ptr<int64_t>(), targets.numel(), output_size, targets.mutable_data_ptr<uint8_t>(),
      fault_word(bitmaps));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) { library.impl("mask_targets", TORCH_BOX(&mask_targets_cuda)); }

}  // namespace cascadeops
