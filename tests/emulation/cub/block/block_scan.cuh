// Stands for CUB's header of this name: the scans that csrc/cuda uses. As with CUB, a barrier is needed before the
// storage is used again.
#pragma once

#include <functional>

#include "cuda_runtime.h"

namespace cub {

template <typename T, int threads>
class BlockScan {
 public:
  struct TempStorage {
    T values[threads], before[threads], total;
  };

  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  template <typename Operation>
  void ExclusiveScan(T input, T& before, T initial, Operation operation, T& total,
                     emulation::Place place = emulation::Place::here()) {
    storage_.values[threadIdx.x] = input;
    __syncthreads(place);
    if (threadIdx.x == 0) {
      storage_.total = initial;
      for (int i = 0; i < threads; ++i) {
        storage_.before[i] = storage_.total;
        storage_.total = operation(storage_.total, storage_.values[i]);
      }
    }
    __syncthreads(place);
    before = storage_.before[threadIdx.x];
    total = storage_.total;
  }

  void ExclusiveSum(T input, T& before, T& total, emulation::Place place = emulation::Place::here()) {
    ExclusiveScan(input, before, T{}, std::plus<T>{}, total, place);
  }

  void InclusiveSum(T input, T& sum, T& total, emulation::Place place = emulation::Place::here()) {
    T before;
    ExclusiveScan(input, before, T{}, std::plus<T>{}, total, place);
    sum = before + input;
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
