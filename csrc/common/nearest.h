// Nearest upsampling along one axis, by the rule of PyTorch's interpolate(mode="nearest").
//
// A pixel takes the cell floor(pixel * (cells / pixels)), at most the last one, with quotient and product rounded to
// float32. The rounding is part of the rule: of 6 cells, pixel 37 of 74 takes cell 2 and not 3. The cell never
// decreases with the pixel, so that the pixels of a cell are a range.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/portable.h"

namespace cascadeops {

// Every number of pixels up to here is exact in float32.
constexpr int64_t kMostPixels = int64_t{1} << 24;

struct NearestAxis {
  int64_t cells, pixels;  // both at least 1
  float scale;

  CASCADEOPS_HD NearestAxis(int64_t cells_, int64_t pixels_)
      : cells(cells_), pixels(pixels_), scale(static_cast<float>(cells_) / static_cast<float>(pixels_)) {}

  CASCADEOPS_HD int64_t cell_of(int64_t pixel) const {
    const int64_t cell = static_cast<int64_t>(floorf(static_cast<float>(pixel) * scale));
    return cell < cells ? cell : cells - 1;
  }

  // The first pixel that takes this cell or a later one; `pixels` if none does. So the pixels of a cell are those from
  // begin_of(cell) to begin_of(cell + 1), none where cells are skipped.
  CASCADEOPS_HD int64_t begin_of(int64_t cell) const {
    if (cell >= cells) return pixels;
    int64_t pixel = cell * pixels / cells;
    // Right up to rounding: these are a step or two.
    while (pixel > 0 && cell_of(pixel - 1) >= cell) --pixel;
    while (pixel < pixels && cell_of(pixel) < cell) ++pixel;
    return pixel;
  }
};

}  // namespace cascadeops
