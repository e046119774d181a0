// Mask targets on the CPU: RoIAlign (scale 1, adaptive sampling, aligned) of ground-truth bitmaps, thresholded at a
// half.
//
// target[k, p, q] = sum over y, x of wy[p][y] * wx[q][x] * bitmap[y, x] >= samples / 2, where wy and wx hold the
// bilinear weights of the box's samples along one axis, not yet divided by their number: so sums of halves and quarters
// are exact, as in a loop over the samples. Threads share the boxes; the rows that a row of the target reads are summed
// over the window's columns first, then the columns of each target cell.
//
// A bitmap is stored inside its window only. Sampling the window as if it were the image gives what the image gives: a
// border of the window that is not the image's border is 0, and so is everything beyond.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu/axis_taps.h"
#include "cpu/simd.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

CASCADEOPS_CLONES void resample(const uint8_t* crop, int64_t crop_width, const AxisTaps<float>& ys,
                                const AxisTaps<float>& xs, float half, std::vector<float>& row, uint8_t* target) {
  row.resize(crop_width);
  for (int64_t p = 0; p < ys.bins(); ++p) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t i = ys.begin[p]; i < ys.begin[p + 1]; ++i) {
      const uint8_t* from = crop + ys.cell[i] * crop_width;
      float* to = row.data();
      for (int64_t x = 0; x < crop_width; ++x) to[x] += ys.weight[i] * static_cast<float>(from[x]);
    }
    for (int64_t q = 0; q < xs.bins(); ++q) {
      float sum = 0;
      for (int64_t j = xs.begin[q]; j < xs.begin[q + 1]; ++j) sum += xs.weight[j] * row[xs.cell[j]];
      *target++ = sum >= half;
    }
  }
}

// The rows that are not padding. bitmaps, offsets, windows, boxes, index: contiguous.
void check_values(const Tensor& bitmaps, const Tensor& offsets, const Tensor& windows, const Tensor& boxes,
                  const Tensor& index) {
  constexpr const char* op = "mask_targets";
  const int64_t objects = offsets.size(0), total = bitmaps.size(0);
  for (int64_t k = 0; k < index.size(0); ++k) {
    const int64_t object = index.const_data_ptr<int64_t>()[k];
    check(object >= -1 && object < objects, op, ": index[", k, "] must be in [-1, ", objects, "), got ", object);
    if (object < 0) continue;
    const float* box = boxes.const_data_ptr<float>() + 4 * k;
    for (int i = 0; i < 4; ++i)
      check(std::isfinite(box[i]), op, ": boxes[", k, ", ", i, "] must be finite, got ", box[i]);
    const int32_t* window = windows.const_data_ptr<int32_t>() + 4 * object;
    const int64_t offset = offsets.const_data_ptr<int64_t>()[object];
    check(window[2] >= 0 && window[3] >= 0, op, ": windows[", object,
          "] must have a width and height of at least 0, got (", window[2], ", ", window[3], ")");
    check(offset >= 0 && offset <= total && int64_t{window[2]} * window[3] <= total - offset, op, ": windows[", object,
          "] of ", window[2], " x ", window[3], " at offsets[", object, "] = ", offset,
          " must lie in bitmaps, which hold ", total);
  }
}

Tensor mask_targets_cpu(Tensor bitmaps, Tensor offsets, Tensor windows, Tensor boxes, Tensor index,
                        int64_t output_size) {
  check_mask_targets(bitmaps, offsets, windows, boxes, index, output_size);
  for (Tensor* tensor : {&bitmaps, &offsets, &windows, &boxes, &index}) *tensor = torch::stable::contiguous(*tensor);
  check_values(bitmaps, offsets, windows, boxes, index);
  Tensor targets = torch::stable::new_empty(bitmaps, {boxes.size(0), output_size, output_size});

  torch::stable::parallel_for(0, boxes.size(0), 1, [&](int64_t begin, int64_t end) {
    AxisTaps<float> ys, xs;
    std::vector<float> row;
    for (int64_t k = begin; k < end; ++k) {
      uint8_t* target = targets.mutable_data_ptr<uint8_t>() + k * output_size * output_size;
      const int64_t object = index.const_data_ptr<int64_t>()[k];
      const int32_t* window = object < 0 ? nullptr : windows.const_data_ptr<int32_t>() + 4 * object;
      if (!window || window[2] == 0 || window[3] == 0) {
        std::fill_n(target, output_size * output_size, uint8_t{0});
        continue;
      }
      const float* box = boxes.const_data_ptr<float>() + 4 * k;
      const auto x_axis = roi_axis<float>(box[0], box[2], 1, output_size, 0, true);
      const auto y_axis = roi_axis<float>(box[1], box[3], 1, output_size, 0, true);
      xs.build(x_axis, output_size, window[0], window[2], 1);
      ys.build(y_axis, output_size, window[1], window[3], 1);
      const float samples = static_cast<float>(x_axis.samples) * static_cast<float>(y_axis.samples);
      resample(bitmaps.const_data_ptr<uint8_t>() + offsets.const_data_ptr<int64_t>()[object], window[2], ys, xs,
               0.5f * std::max(samples, 1.0f), row, target);
    }
  });
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) { library.impl("mask_targets", TORCH_BOX(&mask_targets_cpu)); }

}  // namespace cascadeops
