// The arithmetic of a deformable convolution: which cells a displaced sample reads, with which weights.
//
// Sample = sum over the four cells around (y, x) of weight * cell, where cells outside of the image are 0, and a sample
// one cell or more outside is 0 altogether. A position that is NaN or infinite is outside.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/portable.h"

namespace cascadeops {

// Sizes of one call. A tap is an element of the kernel, row by row. Weight groups and offset groups cut the input's
// channels independently of each other.
struct DeformGeometry {
  int64_t images, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t groups, offset_groups;

  CASCADEOPS_HD int64_t taps() const { return kernel_height * kernel_width; }
  CASCADEOPS_HD int64_t cells() const { return height * width; }
  CASCADEOPS_HD int64_t pixels() const { return out_height * out_width; }  // of one image's output
  CASCADEOPS_HD int64_t group_channels() const { return channels / groups; }
  CASCADEOPS_HD int64_t group_outputs() const { return out_channels / groups; }
  CASCADEOPS_HD int64_t offset_channels() const { return channels / offset_groups; }
};

// Displacements and modulation of all samples.
template <typename real>
struct Displacements {
  const real* offset;  // [N, offset_groups, taps, 2 (y, x), out_height, out_width]
  const real* mask;    // [N, offset_groups, taps, out_height, out_width], or null: all 1
};

// A position along one axis: the cell before it, and how far beyond that cell it lies.
template <typename real>
struct DeformAxis {
  int64_t low;
  real fraction;  // [0, 1)
  bool inside;    // -1 <= position < size
};

template <typename real>
CASCADEOPS_HD DeformAxis<real> deform_axis(real position, int64_t size) {
  const bool inside = position >= real(-1) && position < static_cast<real>(size);
  const real low = std::floor(inside ? position : real(0));
  return {static_cast<int64_t>(low), (inside ? position : real(0)) - low, inside};
}

// The sample of one output pixel and tap, displaced by (dy, dx) cells.
template <typename real>
struct DeformSample {
  int64_t cell[4];              // top left, top right, bottom left, bottom right, as row * width + column; -1: outside
  real fraction_y, fraction_x;  // of the way from top to bottom, from left to right

  DeformSample() = default;
  CASCADEOPS_HD DeformSample(const DeformGeometry& g, int64_t out_y, int64_t out_x, int64_t tap, real dy, real dx) {
    const int64_t row = out_y * g.stride_y - g.padding_y + tap / g.kernel_width * g.dilation_y;
    const int64_t column = out_x * g.stride_x - g.padding_x + tap % g.kernel_width * g.dilation_x;
    const DeformAxis<real> y = deform_axis(static_cast<real>(row) + dy, g.height);
    const DeformAxis<real> x = deform_axis(static_cast<real>(column) + dx, g.width);
    const bool inside = y.inside && x.inside;
    const bool top = inside && y.low >= 0, bottom = inside && y.low + 1 < g.height;
    const bool left = x.low >= 0, right = x.low + 1 < g.width;
    const int64_t first = y.low * g.width + x.low;
    cell[0] = top && left ? first : -1;
    cell[1] = top && right ? first + 1 : -1;
    cell[2] = bottom && left ? first + g.width : -1;
    cell[3] = bottom && right ? first + g.width + 1 : -1;
    fraction_y = y.fraction;
    fraction_x = x.fraction;
  }

  // The bilinear weight of a corner.
  CASCADEOPS_HD real weight(int corner) const {
    return (corner / 2 ? fraction_y : real(1) - fraction_y) * (corner % 2 ? fraction_x : real(1) - fraction_x);
  }

  // Derivatives of the sample by its position, from the values at the corners. (At a whole position, where the sample
  // has a kink, this is the derivative towards the bottom right.)
  CASCADEOPS_HD real slope_y(const real* corner) const {
    return (real(1) - fraction_x) * (corner[2] - corner[0]) + fraction_x * (corner[3] - corner[1]);
  }
  CASCADEOPS_HD real slope_x(const real* corner) const {
    return (real(1) - fraction_y) * (corner[1] - corner[0]) + fraction_y * (corner[3] - corner[2]);
  }
};

}  // namespace cascadeops
