// Copies between maps with adjacent columns and memory with adjacent channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/simd.h"

namespace cascadeops {

// The numbers as bits, in vectors of 16 bytes, which every processor has.
template <int bytes>
struct BitLanes;
template <>
struct BitLanes<2> {
  typedef uint16_t type __attribute__((vector_size(16)));
};
template <>
struct BitLanes<4> {
  typedef uint32_t type __attribute__((vector_size(16)));
};
template <>
struct BitLanes<8> {
  typedef uint64_t type __attribute__((vector_size(16)));
};

// Of two rows that lie `step` apart, exchanges the second halves of the first one's blocks of 2 * step numbers with the
// first halves of the second one's.
template <int step, typename Vector, size_t... i>
CASCADEOPS_INLINE void exchange_blocks(Vector& first, Vector& second, std::index_sequence<i...>) {
  constexpr size_t count = sizeof...(i);
  const Vector low = __builtin_shufflevector(first, second, (i & step ? count + i - step : i)...);
  second = __builtin_shufflevector(first, second, (i & step ? count + i : i + step)...);
  first = low;
}

template <int step, int side, typename Vector>
CASCADEOPS_INLINE void transpose_vectors(Vector (&rows)[side]) {
  for (int i = 0; i < side; ++i)
    if ((i & step) == 0) exchange_blocks<step>(rows[i], rows[i + step], std::make_index_sequence<side>());
  if constexpr (step > 1) transpose_vectors<step / 2>(rows);
}

// to[j][i] = from[i][j] for i < rows and j < columns; the elements of a row are adjacent, rows lie from_row and to_row
// elements apart.
template <typename scalar_t>
CASCADEOPS_INLINE void transpose(const scalar_t* from, int64_t from_row, int64_t rows, int64_t columns, scalar_t* to,
                                 int64_t to_row) {
  using Vector = typename BitLanes<sizeof(scalar_t)>::type;
  constexpr int64_t side = 16 / sizeof(scalar_t);
  if (rows < side || columns < side) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
    return;
  }
  // Squares; the last one of a row or column overlaps the one before.
  for (int64_t next_row = 0; next_row < rows; next_row += side) {
    const int64_t row = std::min(next_row, rows - side);
    for (int64_t next_column = 0; next_column < columns; next_column += side) {
      const int64_t column = std::min(next_column, columns - side);
      Vector square[side];
      for (int64_t i = 0; i < side; ++i) memcpy(&square[i], from + (row + i) * from_row + column, sizeof(Vector));
      transpose_vectors<side / 2>(square);
      for (int64_t j = 0; j < side; ++j)
        memcpy(static_cast<void*>(to + (column + j) * to_row + row), &square[j], sizeof(Vector));
    }
  }
}

}  // namespace cascadeops
