// COCO's rule for the cells that a polygon covers (rleFrPoly of github.com/cocodataset/cocoapi, common/maskApi), for
// one edge at a time. Vertices are rounded to a grid of five lines to a cell. An edge becomes the chain of grid points
// nearest to it, one for each grid line along its longer side. Where the chain steps over the middle of a column of
// cells, that is from grid line 5 c + 2 to 5 c + 3, it flips all cells of column c from a certain row on downwards. A
// cell that is flipped an odd number of times is inside.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/portable.h"

namespace cascadeops {

struct GridPoint {
  int32_t x, y;
};

// Grid lines beyond are all alike to a target of at most a few thousand cells; 2^29 steps fit 32 bits.
constexpr double kFarthestLine = 1 << 28;

// In cells -> grid line: halves up, and below 0 towards 0, as the conversion to an integer does.
CASCADEOPS_HD int32_t grid_line(double cells) {
  const double line = 5.0 * cells + 0.5;
  return static_cast<int32_t>(line > kFarthestLine ? kFarthestLine : line < -kFarthestLine ? -kFarthestLine : line);
}

// A box that is cut into `cells` x `cells`. Boxes are at least a tenth of a pixel wide and high.
struct CellGrid {
  double left, top, per_x, per_y;  // pixels, cells per pixel

  CASCADEOPS_HD CellGrid(const float* box, int64_t cells) : left(box[0]), top(box[1]) {
    const double width = static_cast<double>(box[2]) - left, height = static_cast<double>(box[3]) - top;
    per_x = static_cast<double>(cells) / (width > 0.1 ? width : 0.1);
    per_y = static_cast<double>(cells) / (height > 0.1 ? height : 0.1);
  }

  // vertex: (x, y) in pixels
  CASCADEOPS_HD GridPoint point(const float* vertex) const {
    return {grid_line((vertex[0] - left) * per_x), grid_line((vertex[1] - top) * per_y)};
  }
};

// The row from which on cells are flipped by a chain whose upper point at the step is on grid line y.
CASCADEOPS_HD int32_t first_flipped_row(int32_t y, int32_t rows) {
  const int32_t row = y <= 2 ? 0 : (y + 2) / 5;  // (y - 2) / 5, rounded up
  return row < rows ? row : rows;
}

// The point on a chain `steps` after its start, along the shorter side.
CASCADEOPS_HD int32_t chain_point(int32_t start, double slope, int32_t steps) {
  return static_cast<int32_t>(static_cast<double>(start) + slope * steps + 0.5);
}

// Calls flip(column, row) for the columns in [first_column, last_column) whose middle the edge steps over; row is in
// [0, rows].
template <typename Flip>
CASCADEOPS_HD void for_each_flip(GridPoint from, GridPoint to, int32_t first_column, int32_t last_column, int32_t rows,
                                 Flip&& flip) {
  const bool flat = abs(to.x - from.x) >= abs(to.y - from.y);
  const GridPoint start = (flat ? from.x > to.x : from.y > to.y) ? to : from;
  const GridPoint end = (flat ? from.x > to.x : from.y > to.y) ? from : to;
  const int32_t low = start.x < end.x ? start.x : end.x, high = start.x < end.x ? end.x : start.x;
  if (high < 3) return;
  const int32_t reached = low <= 2 ? 0 : (low + 2) / 5, passed = (high - 3) / 5 + 1;
  const int32_t first = reached > first_column ? reached : first_column;
  const int32_t last = passed < last_column ? passed : last_column;
  if (first >= last) return;
  if (flat) {
    const double slope = static_cast<double>(end.y - start.y) / (end.x - start.x);
    for (int32_t column = first; column < last; ++column) {
      const int32_t steps = 5 * column + 2 - start.x;
      const int32_t before = chain_point(start.y, slope, steps), after = chain_point(start.y, slope, steps + 1);
      flip(column, first_flipped_row(before < after ? before : after, rows));
    }
    return;
  }
  const bool rightwards = start.x < end.x;
  const double slope = static_cast<double>(end.x - start.x) / (end.y - start.y);
  for (int32_t column = first; column < last; ++column) {
    // The first step that is over; x never turns back along a chain, rounding included.
    int32_t not_over = 0, over = end.y - start.y;
    while (over - not_over > 1) {
      const int32_t middle = not_over + (over - not_over) / 2;
      const int32_t x = chain_point(start.x, slope, middle);
      if (rightwards ? x >= 5 * column + 3 : x <= 5 * column + 2) {
        over = middle;
      } else {
        not_over = middle;
      }
    }
    flip(column, first_flipped_row(start.y + not_over, rows));
  }
}

}  // namespace cascadeops
