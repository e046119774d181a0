// Steps of a radix select by one block of 1024 threads: the best rows by 32-bit keys, digit by digit of 11 bits. See
// cuda/box_proposals.cu for the whole.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/score_key.h"

namespace cascadeops {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kBinsPerThread = kBins / kSelectThreads;
constexpr int kFirstShift = 32 - kDigitBits;

struct SelectState {
  uint32_t histogram[kBins];
  uint32_t warp_sums[kSelectWarps];
  uint32_t bin, wanted;
};

template <typename scalar_t>
__device__ __forceinline__ uint32_t key_of(scalar_t logit) {
  const float value = static_cast<float>(logit);
  return isnan(value) ? kNoCandidate : descending_key(value);
}

// Sum over the threads of the block before this one.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, SelectState& state) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) state.warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = sum - value;
  for (int w = 0; w < warp; ++w) before += state.warp_sums[w];
  __syncthreads();
  return before;
}

// counts: of this thread's bins, threadIdx.x * kBinsPerThread + i. Leaves in the state the bin of the wanted-th row,
// and as wanted how many rows of this bin are among the wanted.
__device__ __forceinline__ void find_bin(const uint32_t (&counts)[kBinsPerThread], uint32_t wanted,
                                         SelectState& state) {
  uint32_t total = 0;
  for (const uint32_t count : counts) total += count;
  uint32_t before = sum_before(total, state);
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (before < wanted && wanted <= before + counts[i]) {  // true for one bin of one thread
      state.bin = threadIdx.x * kBinsPerThread + i;
      state.wanted = wanted - before;
    }
    before += counts[i];
  }
  __syncthreads();
}

// Writes row(i) for the i of [0, count) with key(i) < threshold to `better`, and for the first most_equal with
// key(i) == threshold to `equal`, both ascending in i. Each warp looks at a stretch, twice: to count, and to write
// where its part begins.
template <typename Key, typename Row>
__device__ __forceinline__ void split_rows(int32_t count, uint32_t threshold, uint32_t most_equal, Key key, Row row,
                                           int32_t* __restrict__ better, int32_t* __restrict__ equal,
                                           SelectState& state) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t stretch = (int64_t{count} + kSelectThreads - 1) / kSelectThreads * 32;  // whole rounds of a warp
  const int64_t begin = warp * stretch, end = min(begin + stretch, int64_t{count});
  uint32_t better_mask = 0, equal_mask = 0;
  const auto look = [&](int64_t i) {
    const uint32_t found = i < end ? key(i) : 0;
    better_mask = __ballot_sync(~0u, i < end && found < threshold);
    equal_mask = __ballot_sync(~0u, i < end && found == threshold);
  };

  uint32_t better_count = 0, equal_count = 0;
  for (int64_t first = begin; first < end; first += 32) {
    look(first + lane);
    better_count += __popc(better_mask);
    equal_count += __popc(equal_mask);
  }
  // One lane of each warp brings its counts, so the sums before it are those of the warps before.
  uint32_t better_slot = __shfl_sync(~0u, sum_before(lane == 0 ? better_count : 0, state), 0);
  uint32_t equal_slot = __shfl_sync(~0u, sum_before(lane == 0 ? equal_count : 0, state), 0);

  for (int64_t first = begin; first < end; first += 32) {
    look(first + lane);
    const uint32_t lower = (1u << lane) - 1, slot = equal_slot + __popc(equal_mask & lower);
    if (better_mask >> lane & 1) better[better_slot + __popc(better_mask & lower)] = row(first + lane);
    if ((equal_mask >> lane & 1) && slot < most_equal) equal[slot] = row(first + lane);
    better_slot += __popc(better_mask);
    equal_slot += __popc(equal_mask);
  }
}

}  // namespace cascadeops
