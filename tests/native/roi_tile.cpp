#include "common/roi_tile.h"

#include <pybind11/numpy.h>

#include <algorithm>

#include "common.h"
#include "common/roi_placement.h"

namespace py = pybind11;
using namespace cascadeops;

namespace {

template <typename real>
using Array = py::array_t<real, py::array::c_style | py::array::forcecast>;

// The gradient [C, H, W] of one map and image, tile by tile as the CUDA kernel does it: grad [K, C, h, w], boxes [K,
// 4].
template <typename real>
py::array_t<real> gathered_gradient(const Array<real>& grad, const Array<float>& boxes, int64_t height, int64_t width,
                                    double spatial_scale, int64_t sampling_ratio, bool aligned, int64_t subdivision) {
  constexpr int kChannels = 2;
  const auto g = grad.template unchecked<4>();
  const auto box = boxes.template unchecked<2>();
  RoiPlacement placement{};
  placement.maps = 2;  // read as the extra map, so that a subdivision counts
  placement.levels = 1;
  placement.height[1] = height;
  placement.width[1] = width;
  placement.spatial_scale[1] = spatial_scale;
  placement.images = 1;
  placement.bins_y = g.shape(2);
  placement.bins_x = g.shape(3);
  placement.subdivision = subdivision;
  placement.sampling_ratio = sampling_ratio;
  placement.aligned = aligned;
  py::array_t<real> result({static_cast<py::ssize_t>(kChannels), height, width});
  auto map = result.template mutable_unchecked<3>();
  for (int64_t tile_y = 0; tile_y < height; tile_y += kTile) {
    for (int64_t tile_x = 0; tile_x < width; tile_x += kTile) {
      real sum[kTile][kTile][kChannels] = {};
      for (py::ssize_t k = 0; k < box.shape(0); ++k) {
        const float roi[5] = {0, box(k, 0), box(k, 1), box(k, 2), box(k, 3)};
        const auto y = placement.y_axis<real>(roi, 1), x = placement.x_axis<real>(roi, 1);
        const CellRange rows = cells_of(y, placement.bins_y, height), columns = cells_of(x, placement.bins_x, width);
        if (rows.first >= tile_y + kTile || rows.last < tile_y || columns.first >= tile_x + kTile ||
            columns.last < tile_x)
          continue;
        for (int64_t p = 0; p < placement.bins_y; p += kBinsAtOnce) {
          for (int64_t q = 0; q < placement.bins_x; q += kBinsAtOnce) {
            TileTaps<real> taps{};
            for (int bin = 0; bin < kBinsAtOnce; ++bin) {
              if (p + bin < placement.bins_y && tile_weights(y, p + bin, tile_y, height, taps.y[bin]))
                taps.y_bins |= 1u << bin;
              if (q + bin < placement.bins_x && tile_weights(x, q + bin, tile_x, width, taps.x[bin]))
                taps.x_bins |= 1u << bin;
            }
            const auto load = [&](int bin_y, int bin_x, real(&value)[kChannels]) {
              for (int c = 0; c < kChannels; ++c) value[c] = g(k, c, p + bin_y, q + bin_x);
            };
            for (int row = 0; row < kTile; ++row) gather_row<kChannels>(taps, row, load, sum[row]);
          }
        }
      }
      for (int64_t i = tile_y; i < std::min(tile_y + kTile, height); ++i)
        for (int64_t j = tile_x; j < std::min(tile_x + kTile, width); ++j)
          for (int c = 0; c < kChannels; ++c) map(c, i, j) = sum[i - tile_y][j - tile_x][c];
    }
  }
  return result;
}

}  // namespace

void bind_roi_tile(py::module_& module) {
  module.def("gathered_gradient_float32", &gathered_gradient<float>);
  module.def("gathered_gradient_float64", &gathered_gradient<double>);
}
