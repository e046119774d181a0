#include "cpu/deform_tile.h"

#include "cpu/simd.h"
#include "dispatch.h"

namespace cascadeops {
namespace {

// What a corner outside of the image reads.
alignas(64) constexpr unsigned char kZeros[kTileColumns * sizeof(double)] = {};

template <typename real>
CASCADEOPS_INLINE void locate_samples(const DeformGeometry& g, const Displacements<real>& displacements,
                                      const PixelBlock& block, int64_t offset_group, int64_t tap,
                                      BlockSamples<real>& samples) {
  const int64_t plane = (block.image * g.offset_groups + offset_group) * g.taps() + tap;
  const real* dy = displacements.offset + 2 * plane * g.pixels() + block.first;
  const real* dx = dy + g.pixels();
  int64_t y = block.first / g.out_width, x = block.first % g.out_width;
  for (int64_t p = 0; p < block.count; ++p) {
    samples.sample[p] = DeformSample<real>(g, y, x, tap, dy[p], dx[p]);
    if (++x == g.out_width) {
      x = 0;
      ++y;
    }
  }
  const real* mask = displacements.mask ? displacements.mask + plane * g.pixels() + block.first : nullptr;
  for (int64_t p = 0; p < block.count; ++p) samples.mask[p] = mask ? mask[p] : real(1);
}

template <typename scalar_t, typename real>
CASCADEOPS_INLINE void gather_samples(const scalar_t* image, int64_t stride, const BlockSamples<real>& samples,
                                      int64_t count, int64_t channels, real* tile) {
  using Vector = typename Lanes<real>::type;
  constexpr int64_t lanes = Lanes<real>::count;
  for (int64_t p = 0; p < count; ++p, tile += kTileStride) {
    const DeformSample<real>& sample = samples.sample[p];
    const scalar_t* corner[4];
    real weight[4];
    for (int i = 0; i < 4; ++i) {
      corner[i] = sample.cell[i] < 0 ? reinterpret_cast<const scalar_t*>(kZeros) : image + sample.cell[i] * stride;
      weight[i] = sample.weight(i) * samples.mask[p];
    }
    for (int64_t c = 0; c < channels; c += lanes) {
      Vector sum{};
      for (int i = 0; i < 4; ++i) {
        Vector value;
        load_lanes(corner[i] + c, 1, std::min(lanes, channels - c), value);
        sum += weight[i] * value;
      }
      store_lanes(sum, tile + c);
    }
  }
}

template <typename scalar_t, typename real>
CASCADEOPS_INLINE void load_rows(const scalar_t* rows, int64_t stride, int64_t count, int64_t columns, real* tile) {
  constexpr int64_t lanes = Lanes<real>::count;
  for (int64_t p = 0; p < count; ++p, rows += stride, tile += kTileStride) {
    for (int64_t c = 0; c < columns; c += lanes) {
      typename Lanes<real>::type value;
      load_lanes(rows + c, 1, std::min(lanes, columns - c), value);
      store_lanes(value, tile + c);
    }
  }
}

}  // namespace

#define CASCADEOPS_LOCATE(real)                                                                    \
  CASCADEOPS_CLONES void locate(const DeformGeometry& g, const Displacements<real>& displacements, \
                                const PixelBlock& block, int64_t offset_group, int64_t tap,        \
                                BlockSamples<real>& samples) {                                     \
    locate_samples(g, displacements, block, offset_group, tap, samples);                           \
  }
CASCADEOPS_LOCATE(float)
CASCADEOPS_LOCATE(double)
#undef CASCADEOPS_LOCATE

#define CASCADEOPS_FILL(scalar_t)                                                                                     \
  CASCADEOPS_CLONES void gather(const scalar_t* image, int64_t stride,                                                \
                                const BlockSamples<accumulate_t<scalar_t>>& samples, int64_t count, int64_t channels, \
                                accumulate_t<scalar_t>* tile) {                                                       \
    gather_samples(image, stride, samples, count, channels, tile);                                                    \
  }                                                                                                                   \
  CASCADEOPS_CLONES void load_tile(const scalar_t* rows, int64_t stride, int64_t count, int64_t columns,              \
                                   accumulate_t<scalar_t>* tile) {                                                    \
    load_rows(rows, stride, count, columns, tile);                                                                    \
  }
CASCADEOPS_FILL(float)
CASCADEOPS_FILL(double)
CASCADEOPS_FILL(torch::headeronly::Half)
CASCADEOPS_FILL(torch::headeronly::BFloat16)
#undef CASCADEOPS_FILL

}  // namespace cascadeops
