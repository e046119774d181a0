// From an anchor and the regression of a network to a box inside the image. No a * b + c may be fused here (see the
// flags in setup.py): the roundings are those of tensor operations.
#pragma once

#include <cmath>

#include "common/boxes.h"
#include "common/portable.h"

namespace cascadeops {

// |log(16 / 1000)|: a box grows or shrinks by at most 62.5 in one regression.
constexpr float kMaxLogScale = 4.135166556742356f;

struct Deltas {  // in units of the standard deviations
  float x, y, width, height;
};

// Float32 rounded from float64, so that every device has the same value.
CASCADEOPS_HD float rounded_exp(float x) { return static_cast<float>(exp(static_cast<double>(x))); }

CASCADEOPS_HD float rounded_sigmoid(float x) { return static_cast<float>(1 / (1 + exp(-static_cast<double>(x)))); }

// One axis of a box: its low and high end.
CASCADEOPS_HD void decode_axis(float low, float high, float shift, float log_scale, float limit, float& out_low,
                               float& out_high) {
  log_scale = log_scale < -kMaxLogScale ? -kMaxLogScale : log_scale > kMaxLogScale ? kMaxLogScale : log_scale;
  const float size = high - low;
  const float centre = (low + high) * 0.5f + size * shift;
  const float half = size * rounded_exp(log_scale) * 0.5f;
  const auto clipped = [&](float x) { return x < 0 ? 0.0f : x > limit ? limit : x; };
  out_low = clipped(centre - half);
  out_high = clipped(centre + half);
}

// The anchor moved and scaled, then clipped to [0, width] x [0, height]. NaN stays NaN.
CASCADEOPS_HD Box decode_box(const Box& anchor, const Deltas& deltas, const Deltas& stds, float height, float width) {
  Box box;
  decode_axis(anchor.x1, anchor.x2, deltas.x * stds.x, deltas.width * stds.width, width, box.x1, box.x2);
  decode_axis(anchor.y1, anchor.y2, deltas.y * stds.y, deltas.height * stds.height, height, box.y1, box.y2);
  return box;
}

CASCADEOPS_HD bool has_area(const Box& box) { return box.x2 > box.x1 && box.y2 > box.y1; }  // false for NaN

}  // namespace cascadeops
