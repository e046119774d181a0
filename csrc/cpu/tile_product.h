// Products of small matrices that were packed for it: the multiplications of a convolution, tile by tile.
#pragma once

#include <cstdint>

namespace cascadeops {

// A tile of packed samples or gradients: kTileRows rows (output pixels) of kTileColumns numbers, kTileStride apart. A
// constant stride lets the product address every row from one register; it is no power of two, so that the rows fall
// on different sets of the cache. Writers may spill one vector beyond the columns.
constexpr int64_t kTileRows = 84;      // a multiple of the rows of every register block: 14 (AVX-512), 6 (AVX), 3
constexpr int64_t kStripRows = 14;     // rows that cost no more than one
constexpr int64_t kTileColumns = 576;  // 64 channels of a 3 x 3 kernel
constexpr int64_t kTileStride = kTileColumns + 16;

// Numbers in a panel: columns that a product treats together, 64 bytes.
template <typename real>
constexpr int64_t kPanel = 64 / sizeof(real);

// How the factors of c += a * b lie in memory. The sum runs over segments of `depth` numbers each.
struct TileProduct {
  int64_t rows;    // of a and c; up to 13 further rows of c, and of what they read in a, are overwritten
  int64_t panels;  // columns of b and c
  int64_t depth, segments;
  int64_t a_segment, b_segment;  // distances between segments, in numbers
  int64_t b_panel;               // distance between panels
  int64_t c_stride;              // distance between rows of c
};

// a: rows of a tile; b: panels whose rows lie one after the other.
void multiply_rows(const float* a, const float* b, float* c, const TileProduct& product);
void multiply_rows(const double* a, const double* b, double* c, const TileProduct& product);

// a: columns of a tile, so that the sum runs over its rows; b: columns of another tile, of which panels are vectors.
void multiply_columns(const float* a, const float* b, float* c, const TileProduct& product);
void multiply_columns(const double* a, const double* b, double* c, const TileProduct& product);

}  // namespace cascadeops
