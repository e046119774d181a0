// Input checks of preprocess, for CPU and CUDA.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "checks.h"

namespace cascadeops {

inline void check_preprocess(const std::vector<torch::stable::Tensor>& images, const std::vector<int64_t>& sizes,
                             int64_t height, int64_t width, const std::vector<double>& mean,
                             const std::vector<double>& deviation, torch::headeronly::ScalarType dtype) {
  constexpr const char* op = "preprocess";
  using torch::headeronly::ScalarType;
  constexpr int64_t limit = int64_t{1} << 23;  // see common/resize.h
  check(!images.empty(), op, ": images must hold at least one image");
  check(sizes.size() == 2 * images.size(), op, ": sizes must hold (height, width) of each image, ", 2 * images.size(),
        " numbers, got ", sizes.size());
  for (size_t i = 0; i < images.size(); ++i) {
    const torch::stable::Tensor& image = images[i];
    const std::string name = "images[" + std::to_string(i) + "]";
    check(image.dim() == 3 && image.size(2) == 3, op, ": ", name, " must have shape [H, W, 3], got ", shape_of(image));
    check(image.size(0) >= 1 && image.size(1) >= 1 && image.size(0) <= limit && image.size(1) <= limit, op, ": ", name,
          " must have 1 to 2**23 pixels a side, got ", shape_of(image));
    check_dtype(op, name.c_str(), image, ScalarType::Byte);
    check_same_device(op, name.c_str(), image, "images[0]", images[0]);
    const int64_t h = sizes[2 * i], w = sizes[2 * i + 1];
    check(h >= 1 && w >= 1 && h <= height && w <= width, op, ": the size of ", name, " must lie in the batch's (",
          height, ", ", width, "), got (", h, ", ", w, ")");
  }
  check(height <= limit && width <= limit, op,
        ": images, resized and padded to divisor, must have at most 2**23 pixels a side, got (", height, ", ", width,
        ")");
  check(mean.size() == 3 && deviation.size() == 3, op, ": mean and std must hold 3 numbers each, got ", mean.size(),
        " and ", deviation.size());
  for (int channel = 0; channel < 3; ++channel) {
    check(std::isfinite(mean[channel]), op, ": mean[", channel, "] must be finite, got ", mean[channel]);
    // As float32, which they are read as.
    check(static_cast<float>(deviation[channel]) > 0 && std::isfinite(deviation[channel]), op, ": std[", channel,
          "] must be above 0 and finite, got ", deviation[channel]);
  }
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
        ": dtype must be float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
}

}  // namespace cascadeops
