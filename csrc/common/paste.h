// Where a pixel of the image falls on a mask stretched over its box, and the bilinear value there; as
// grid_sample(align_corners=False, padding_mode="zeros") in float32, in its order of operations. Nothing here may be
// fused to a * b + c (see the flags in setup.py), so that every device gives the same bytes.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/boxes.h"
#include "common/portable.h"

namespace cascadeops {

struct Span {
  int32_t begin, end;
};

// One axis of one mask: cells of the mask over the interval [first, last) of pixels.
struct PasteAxis {
  float first, last;
  int32_t cells;

  // In cells, 0 at the centre of cell 0. Never decreases with the pixel, in float32 too: each step is monotonic.
  CASCADEOPS_HD float position(int32_t pixel) const {
    const float normalised = (static_cast<float>(pixel) + 0.5f - first) / (last - first) * 2.0f - 1.0f;
    return ((normalised + 1.0f) * static_cast<float>(cells) - 1.0f) / 2.0f;
  }

  // The pixels out of [0, pixels) whose value can differ from 0: -1 < position < cells.
  CASCADEOPS_HD Span reached(int32_t pixels) const {
    if (!(first < last)) return {0, 0};
    Span span{0, pixels};
    for (int32_t above = pixels; span.begin < above;) {
      const int32_t middle = span.begin + (above - span.begin) / 2;
      if (position(middle) > -1.0f) {
        above = middle;
      } else {
        span.begin = middle + 1;
      }
    }
    for (int32_t below = span.begin; below < span.end;) {
      const int32_t middle = below + (span.end - below) / 2;
      if (position(middle) < static_cast<float>(cells)) {
        below = middle + 1;
      } else {
        span.end = middle;
      }
    }
    return span;
  }
};

CASCADEOPS_HD PasteAxis axis_x(const Box& box, int64_t cells) { return {box.x1, box.x2, static_cast<int32_t>(cells)}; }
CASCADEOPS_HD PasteAxis axis_y(const Box& box, int64_t cells) { return {box.y1, box.y2, static_cast<int32_t>(cells)}; }

// A box without area reaches nothing, on both axes.
CASCADEOPS_HD bool has_area(const Box& box) { return box.x1 < box.x2 && box.y1 < box.y2; }

// The two cells around a position (the first may be -1, the second may be past the end: both count as 0), and their
// weights.
struct PasteTaps {
  int32_t cell;  // and cell + 1
  float near, far;
};

CASCADEOPS_HD PasteTaps paste_taps(float position) {
  const float cell = floorf(position);
  const float far = position - cell;
  return {static_cast<int32_t>(cell), 1.0f - far, far};
}

// Weights are `near` and `far` of the taps in x and y; cells are named by (row, column).
CASCADEOPS_HD float bilinear(float v00, float v01, float v10, float v11, float near_x, float far_x, float near_y,
                             float far_y) {
  return v00 * (near_x * near_y) + v01 * (far_x * near_y) + v10 * (near_x * far_y) + v11 * (far_x * far_y);
}

// A mask [h, w] stretched over its box.
template <typename scalar_t>
struct PastedMask {
  const scalar_t* probs;
  PasteAxis x, y;

  CASCADEOPS_HD PastedMask(const scalar_t* mask_probs, const Box& box, int64_t h, int64_t w)
      : probs(mask_probs), x(axis_x(box, w)), y(axis_y(box, h)) {}

  CASCADEOPS_HD float cell(int32_t row, int32_t column) const {
    const bool inside = row >= 0 && row < y.cells && column >= 0 && column < x.cells;
    return inside ? static_cast<float>(probs[static_cast<int64_t>(row) * x.cells + column]) : 0.0f;
  }

  CASCADEOPS_HD float value(const PasteTaps& across, const PasteTaps& down) const {
    return bilinear(cell(down.cell, across.cell), cell(down.cell, across.cell + 1), cell(down.cell + 1, across.cell),
                    cell(down.cell + 1, across.cell + 1), across.near, across.far, down.near, down.far);
  }
};

// Probability as a byte, rounded down; NaN and everything below 0 gives 0, everything above 1 gives 255.
CASCADEOPS_HD uint8_t probability_byte(float value) {
  const float scaled = value * 255.0f;
  const float above = scaled > 0.0f ? scaled : 0.0f;
  return static_cast<uint8_t>(static_cast<int32_t>(above < 255.0f ? above : 255.0f));
}

}  // namespace cascadeops
