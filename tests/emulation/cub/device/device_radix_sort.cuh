// Stands for CUB's header of this name: the one function of it that csrc/cuda uses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda_runtime.h"

namespace cub {

struct DeviceRadixSort {
  // Stable, ascending, by bits [begin_bit, end_bit) of the keys. With storage == nullptr it only tells how much it
  // needs.
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* storage, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
                               Value* sorted_values, int64_t count, int begin_bit, int end_bit, cudaStream_t) {
    if (storage == nullptr) {
      bytes = 256;
      return cudaSuccess;
    }
    if (bytes < 256 || begin_bit < 0 || end_bit > static_cast<int>(8 * sizeof(Key))) return cudaErrorInvalidValue;
    const auto digits = [&](int64_t i) {
      const Key above = end_bit == static_cast<int>(8 * sizeof(Key)) ? ~Key{0} : (Key{1} << end_bit) - 1;
      return (keys[i] & above) >> begin_bit;
    };
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return digits(a) < digits(b); });
    for (int64_t i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
