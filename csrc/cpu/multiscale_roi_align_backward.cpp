// RoIAlign over a feature pyramid on the CPU: the backward pass, as a gather over tiles of the maps.
//
// gradient m[n][c, y, x] = sum over the RoIs k of image n that read map m, and over p, q, of wy[k][p][y] * wx[k][q][x]
// * grad[k][c, p, q].
//
// First every RoI's weights are computed, and each tile of each map gets the list of RoIs that have weights there. Then
// the threads share the tiles: a tile's sums are kept in a few kilobytes of float32 (float64 for float64), the RoIs are
// added in their order, and the tile is written once, in the gradient's dtype. So nothing is cleared before, nothing is
// added concurrently, and the result does not depend on the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/fresh_pages.h"
#include "cpu/roi_taps.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"
#include "dispatch.h"
#include "layout.h"
#include "roi_maps.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

constexpr int kChunk = 4;      // vectors of channels that a task sums: 64 of float32
constexpr int64_t kSide = 16;  // cells along a tile's sides: the sums of a task are 64 KB

// A RoI on one of the maps that it reads.
template <typename real>
struct Landing {
  int64_t roi;
  int map;
  RoiTaps<real> taps;
};

// The part of an axis' taps that lies on a tile.
struct Span {
  int64_t begin, end;
};

template <typename real>
CASCADEOPS_INLINE Span span_on(const AxisTaps<real>& taps, int64_t bin, int64_t first_cell) {
  Span span{taps.begin[bin], taps.begin[bin + 1]};
  while (span.begin < span.end && taps.cell[span.begin] < first_cell) ++span.begin;
  while (span.begin < span.end && taps.cell[span.end - 1] >= first_cell + kSide) --span.end;
  return span;
}

// A tile of one map, and the RoIs that have weights on it, in ascending order.
template <typename real>
struct Tile {
  int64_t y, x, height, width;  // first cell, and cells
  const std::vector<Landing<real>>& landings;
  const int64_t *begin, *end;  // into landings
};

// The gradient of a RoI's row of bins with the `lanes` channels of a bin side by side: where it is, or copied.
template <typename scalar_t>
CASCADEOPS_INLINE MapView<const scalar_t> adjacent_row(const MapView<const scalar_t>& row, int64_t bins, int64_t lanes,
                                                       std::vector<scalar_t>& copy) {
  if (row.channel == 1) return row;
  copy.resize(bins * lanes);
  const int64_t run = row.column == 1 ? bins : 1;  // bins that lie side by side
  for (int64_t q = 0; q < bins; q += run)
    transpose(row.data + q * row.column, row.channel, lanes, run, copy.data() + q * lanes, lanes);
  return {copy.data(), 1, 0, lanes};
}

// Sums `lanes` channels of a tile, in `vectors` vectors for each cell.
template <int vectors, typename scalar_t, typename real>
CASCADEOPS_INLINE void sum_tile(const Tile<real>& tile, const MapView<const scalar_t>& grad, int64_t grad_roi,
                                int64_t lanes, std::vector<scalar_t>& copy, real* sums) {
  using Vector = typename Lanes<real>::type;
  constexpr int64_t width = Lanes<real>::count, cell_width = vectors * width;
  std::memset(sums, 0, kSide * kSide * cell_width * sizeof(real));
  for (const int64_t* item = tile.begin; item < tile.end; ++item) {
    const Landing<real>& landing = tile.landings[*item];
    const auto &y = landing.taps.y, &x = landing.taps.x;
    for (int64_t p = 0; p < y.bins(); ++p) {
      const Span rows = span_on(y, p, tile.y);
      if (rows.begin == rows.end) continue;
      const scalar_t* bins = grad.data + landing.roi * grad_roi + p * grad.row;
      const auto from = adjacent_row<scalar_t>({bins, grad.channel, grad.row, grad.column}, x.bins(), lanes, copy);
      for (int64_t q = 0; q < x.bins(); ++q) {
        const Span columns = span_on(x, q, tile.x);
        if (columns.begin == columns.end) continue;
        Vector value[vectors];
        load_chunk(from.data + q * from.column, lanes, value);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          real* row = sums + ((y.cell[i] - tile.y) * kSide - tile.x) * cell_width;
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            real* cell = row + x.cell[j] * cell_width;
            const real weight = y.weight[i] * x.weight[j];
            for (int v = 0; v < vectors; ++v) {
              Vector sum;
              load_lanes(cell + v * width, sum);
              sum += weight * value[v];
              store_lanes(sum, cell + v * width);
            }
          }
        }
      }
    }
  }
}

template <int vectors, typename scalar_t, typename real>
CASCADEOPS_INLINE void store_tile(const Tile<real>& tile, const real* sums, int64_t lanes,
                                  const MapView<scalar_t>& map) {
  constexpr int64_t width = Lanes<real>::count, cell_width = vectors * width;
  // Of maps with adjacent columns, a channel's row of the tile is written in one go.
  for (int64_t y = 0; y < tile.height; ++y) {
    scalar_t* row = map.data + (tile.y + y) * map.row + tile.x * map.column;
    const real* row_sums = sums + y * kSide * cell_width;
    scalar_t plain[kSide * cell_width];
    for (int64_t x = 0; x < tile.width; ++x) {
      typename Lanes<real>::type sum[vectors];
      for (int v = 0; v < vectors; ++v) load_lanes(row_sums + x * cell_width + v * width, sum[v]);
      if (map.channel == 1)
        store_chunk(sum, lanes, row + x * map.column);
      else
        store_chunk(sum, cell_width, plain + x * cell_width);
    }
    if (map.channel == 1) continue;
    transpose(plain, cell_width, tile.width, lanes, row, map.channel);
  }
}

// The gradient of `lanes` channels of one tile, compiled for each type and instruction set. grad and map point at the
// first of these channels.
#define CASCADEOPS_GATHER(scalar_t)                                                                            \
  CASCADEOPS_CLONES void gather(const Tile<accumulate_t<scalar_t>>& tile, const MapView<const scalar_t>& grad, \
                                int64_t grad_roi, int64_t lanes, std::vector<scalar_t>& copy,                  \
                                accumulate_t<scalar_t>* sums, const MapView<scalar_t>& map) {                  \
    if (lanes == kChunk * Lanes<accumulate_t<scalar_t>>::count) {                                              \
      sum_tile<kChunk>(tile, grad, grad_roi, lanes, copy, sums);                                               \
      store_tile<kChunk>(tile, sums, lanes, map);                                                              \
    } else {                                                                                                   \
      sum_tile<1>(tile, grad, grad_roi, lanes, copy, sums);                                                    \
      store_tile<1>(tile, sums, lanes, map);                                                                   \
    }                                                                                                          \
  }
CASCADEOPS_GATHER(float)
CASCADEOPS_GATHER(double)
CASCADEOPS_GATHER(torch::headeronly::Half)
CASCADEOPS_GATHER(torch::headeronly::BFloat16)
#undef CASCADEOPS_GATHER

// Every RoI on every map that it reads, in the order of rois, with its weights.
template <typename real>
std::vector<Landing<real>> land(const RoiPlacement& placement, const float* rois, int64_t rows) {
  std::vector<Landing<real>> landings;
  for (int64_t k = 0; k < rows; ++k)
    for (int map = 0; map < placement.maps; ++map)
      if (rois[5 * k] >= 0 && placement.reads(rois + 5 * k, map)) landings.push_back({k, map, {}});
  share_tasks(static_cast<int64_t>(landings.size()), [&](const auto& draw) {
    for (int64_t i; (i = draw()) < static_cast<int64_t>(landings.size());)
      landings[i].taps.build(placement, rois + 5 * landings[i].roi, landings[i].map);
  });
  return landings;
}

// The tiles of all maps and images, and which landings each of them holds: numbers[offsets[t]] to
// numbers[offsets[t + 1]].
class Tiling {
 public:
  explicit Tiling(const RoiPlacement& placement) : placement_(placement) {
    for (int map = 0; map < placement.maps; ++map)
      first_[map + 1] = first_[map] + placement.images * rows(map) * columns(map);
    offsets_.assign(first_[placement.maps] + 1, 0);
  }

  int64_t tiles() const { return static_cast<int64_t>(offsets_.size()) - 1; }

  template <typename real>
  void distribute(const std::vector<Landing<real>>& landings, const float* rois) {
    for_each_tile(landings, rois, [&](int64_t tile, int64_t) { ++offsets_[tile + 1]; });
    for (int64_t tile = 0; tile < tiles(); ++tile) offsets_[tile + 1] += offsets_[tile];
    numbers_.resize(offsets_.back());
    std::vector<int64_t> next = offsets_;
    for_each_tile(landings, rois, [&](int64_t tile, int64_t number) { numbers_[next[tile]++] = number; });
  }

  // (map, image, the tile)
  template <typename real>
  std::tuple<int, int64_t, Tile<real>> at(int64_t tile, const std::vector<Landing<real>>& landings) const {
    int map = 0;
    while (first_[map + 1] <= tile) ++map;
    const int64_t local = tile - first_[map], in_image = local % (rows(map) * columns(map));
    const int64_t y = in_image / columns(map) * kSide, x = in_image % columns(map) * kSide;
    return {map, local / (rows(map) * columns(map)),
            Tile<real>{y, x, std::min(kSide, placement_.height[map] - y), std::min(kSide, placement_.width[map] - x),
                       landings, numbers_.data() + offsets_[tile], numbers_.data() + offsets_[tile + 1]}};
  }

 private:
  int64_t rows(int map) const { return (placement_.height[map] + kSide - 1) / kSide; }
  int64_t columns(int map) const { return (placement_.width[map] + kSide - 1) / kSide; }

  template <typename real, typename Visit>
  void for_each_tile(const std::vector<Landing<real>>& landings, const float* rois, Visit&& visit) const {
    for (size_t number = 0; number < landings.size(); ++number) {
      const auto& [roi, map, taps] = landings[number];
      if (taps.y.cell.empty() || taps.x.cell.empty()) continue;
      // Cells ascend within a bin and from bin to bin.
      const int64_t image = static_cast<int64_t>(rois[5 * roi]);
      for (int64_t y = taps.y.cell.front() / kSide; y <= taps.y.cell.back() / kSide; ++y)
        for (int64_t x = taps.x.cell.front() / kSide; x <= taps.x.cell.back() / kSide; ++x)
          visit(first_[map] + (image * rows(map) + y) * columns(map) + x, static_cast<int64_t>(number));
    }
  }

  const RoiPlacement& placement_;
  int64_t first_[RoiPlacement::kMaxMaps + 1] = {};
  std::vector<int64_t> offsets_, numbers_;
};

std::vector<Tensor> multiscale_roi_align_backward_cpu(Tensor grad, std::vector<Tensor> maps, Tensor rois,
                                                      std::vector<double> spatial_scales, int64_t sampling_ratio,
                                                      bool aligned, double finest_size, bool epsilon_inside_log,
                                                      int64_t extra_subdivision, std::optional<Tensor> count) {
  check_multiscale_roi_align_backward(grad, maps, rois, spatial_scales, finest_size, extra_subdivision, count);
  rois = torch::stable::contiguous(rois);
  const int64_t rows = check_roi_values(rois, maps[0].size(0), count);
  const RoiPlacement placement = placement_of(maps, grad.size(2), grad.size(3), spatial_scales, sampling_ratio, aligned,
                                              finest_size, epsilon_inside_log, extra_subdivision);
  const int64_t channels = maps[0].size(1);
  std::vector<Tensor> gradients;
  for (const Tensor& map : maps) {
    gradients.push_back(
        empty_map(map, {map.size(0), channels, map.size(2), map.size(3)}, map.scalar_type(), memory_format_of(map)));
    ask_for_huge_pages(gradients.back());
  }

  dispatch_floating(maps[0].scalar_type(), "multiscale_roi_align", [&](auto zero) {
    using scalar_t = decltype(zero);
    using real = accumulate_t<scalar_t>;
    constexpr int64_t width = Lanes<real>::count;
    const auto landings = land<real>(placement, rois.const_data_ptr<float>(), rows);
    Tiling tiling(placement);
    tiling.distribute(landings, rois.const_data_ptr<float>());
    const MapView<const scalar_t> bins = view_of(grad.const_data_ptr<scalar_t>(), grad, 0);
    // A task is a tile's chunk of channels; the last channels, less than a chunk, are taken one vector at a time.
    const int64_t chunks = channels / (kChunk * width);
    const int64_t parts = chunks + (channels - chunks * kChunk * width + width - 1) / width;
    share_tasks(tiling.tiles() * parts, [&](const auto& draw) {
      std::vector<real> sums(kSide * kSide * kChunk * width);
      std::vector<scalar_t> copy;
      for (int64_t task; (task = draw()) < tiling.tiles() * parts;) {
        const auto [map, image, tile] = tiling.at(task / parts, landings);
        const int64_t part = task % parts;
        const int64_t first = std::min(part, chunks) * kChunk * width + std::max<int64_t>(part - chunks, 0) * width;
        auto from = bins;
        from.data += first * from.channel;
        const Tensor& gradient = gradients[map];
        auto to = view_of(gradient.mutable_data_ptr<scalar_t>(), gradient, image);
        to.data += first * to.channel;
        const int64_t lanes = part < chunks ? kChunk * width : std::min(width, channels - first);
        gather(tile, from, grad.stride(0), lanes, copy, sums.data(), to);
      }
    });
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward_cpu));
}

}  // namespace cascadeops
