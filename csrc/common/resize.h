// Bilinear resizing with pixel centres at halves and no smoothing (OpenCV's INTER_LINEAR, interpolate's
// align_corners=False): pixel i of `target` pixels lies at (i + 1/2) * source / target - 1/2 of the source. The
// position is kept as a fraction of whole numbers, so that every device finds the same pixel and the same weight.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace cascadeops {

// The value is (1 - weight) * v[first] + weight * v[first + 1]; weight is 0 where there is no pixel first + 1.
struct ResizeTap {
  int32_t first;
  float weight;
};

// source, target: at most 2^23 pixels, so that no product leaves 64 bits and 2 * target is exact in float32.
CASCADEOPS_HD ResizeTap resize_tap(int64_t pixel, int64_t source, int64_t target) {
  const int64_t position = (2 * pixel + 1) * source - target;  // times 2 * target
  if (position <= 0) return {0, 0.0f};
  const int64_t first = position / (2 * target);
  if (first >= source - 1) return {static_cast<int32_t>(source - 1), 0.0f};
  return {static_cast<int32_t>(first), static_cast<float>(position % (2 * target)) / static_cast<float>(2 * target)};
}

// Between two values; exactly the first for weight 0.
CASCADEOPS_HD float lerp(float first, float second, float weight) { return first + weight * (second - first); }

}  // namespace cascadeops
