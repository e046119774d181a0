// Greedy NMS in rounds of 1024 candidates, with all multiprocessors at work on one image; cuda/greedy_nms.cuh says
// when. Candidates are sorted; each image keeps its boxes so far, and their number, on the device. A round is two
// launches:
//
// A. compare_kernel: the candidates of the round in tiles of 256, one thread each, times up to kMostParts blocks that
//    share the others. A block compares its tile with its part of the kept boxes, and a thread stops at the first that
//    suppresses its candidate. Then it writes its part of the round's bit matrix: who comes before whom and would
//    suppress it.
// B. resolve_kernel: one block per image, one thread per candidate, follows the matrix and appends the survivors.
//
// So 2 * ceil(candidates / 1024) launches, whatever the data; they find nothing to do once max_output are kept. Work:
// every candidate against every kept box that is better, up to its suppressor; some 20 operations each. For 100,000
// boxes that are all kept: 5 * 10^9 pairs, 10^11 operations, 3 ms of an H100's 3.3 * 10^13 a second as its floor,
// where a single multiprocessor needs 132 times that; and 196 launches, one after the other. Scratch: a byte a
// candidate, and 128 KB an image for the matrix, which stays in cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/boxes.h"
#include "common/score_key.h"

namespace cascadeops {

constexpr int kTile = 256;    // candidates
constexpr int kRound = 1024;  // candidates
constexpr int kMostParts = 256;
constexpr int kRoundTiles = kRound / kTile, kRoundWords = kRound / 32;

__device__ __forceinline__ uint32_t score_of(uint64_t key) { return static_cast<uint32_t>(key); }

// Decides the open candidates of 32 * `words` among themselves: one is kept when all its rivals are out, and out when
// one of them is kept. Each round decides at least the first that is open; chains of suppressions are short, so few
// rounds do. rivals: [words][32 * words], bit j of rivals[w][i]: candidate 32 w + j comes before i and would suppress
// it. open, kept: the bits of candidates that nothing has suppressed and nothing has confirmed, and of those confirmed.
// All threads of the block call it, those that are not active with some other warp's candidate.
template <int words>
__device__ __forceinline__ void resolve(const uint32_t* rivals, uint32_t* open, uint32_t* kept, int candidate,
                                        bool active) {
  const int word = candidate / 32;
  for (;;) {
    bool suppressed = false, waiting = false;
    const bool undecided = active && (open[word] >> (candidate % 32) & 1);
    for (int w = 0; undecided && w <= word; ++w) {
      const uint32_t bits = rivals[w * words * 32 + candidate];
      suppressed |= (bits & kept[w]) != 0;
      waiting |= (bits & open[w]) != 0;
    }
    __syncthreads();
    const uint32_t newly_kept = __ballot_sync(~0u, undecided && !suppressed && !waiting);
    const uint32_t still_open = __ballot_sync(~0u, undecided && !suppressed && waiting);
    if (active && candidate % 32 == 0) {
      kept[word] |= newly_kept;
      open[word] = still_open;
    }
    if (!__syncthreads_or(still_open != 0)) return;
  }
}

struct Rounds {
  const uint64_t* keys;  // [images, candidates], sorted
  const int32_t* order;  // [images, candidates]
  int32_t candidates, max_output, parts;
  Box* kept_boxes;       // [images, max_output]
  int64_t* kept_groups;  // [images, max_output]
  int32_t* kept_counts;  // [images], 0 before the first round
  uint8_t* suppressed;   // [images, candidates], 0 before the first round
  uint32_t* rivals;      // [images, kRoundWords, kRound]
};

template <typename Source>
__global__ void __launch_bounds__(kTile) compare_kernel(Source source, Rounds rounds, int32_t first, IouTest test) {
  __shared__ Box other_boxes[32];
  __shared__ int64_t other_groups[32];
  const int tile = blockIdx.x % kRoundTiles, part = static_cast<int>(blockIdx.x / kRoundTiles % rounds.parts);
  const int64_t image = blockIdx.x / kRoundTiles / rounds.parts;
  const int64_t count = rounds.kept_counts[image];
  if (count >= rounds.max_output) return;
  const int candidate = tile * kTile + static_cast<int>(threadIdx.x), word = candidate / 32;
  const int64_t round = image * rounds.candidates + first, place = round + candidate;
  const auto load = [&](int i, Box& box, int64_t& group) {  // false if candidate i of the round is none
    if (first + int64_t{i} >= rounds.candidates || score_of(rounds.keys[round + i]) == kNoCandidate) return false;
    box = source.box(image, rounds.order[round + i]);
    group = source.group(image, rounds.order[round + i]);
    return true;
  };

  Box box{};
  int64_t group = 0;
  bool open = load(candidate, box, group);
  const float area = box_area(box);
  const Box* kept_boxes = rounds.kept_boxes + image * rounds.max_output;
  const int64_t* kept_groups = rounds.kept_groups + image * rounds.max_output;
  const int64_t end = count * (part + 1) / rounds.parts;
  for (int64_t i = count * part / rounds.parts; open && i < end; ++i) {
    const Box other = kept_boxes[i];
    if (kept_groups[i] != group || !iou_above(other, box_area(other), box, area, test)) continue;
    open = false;
    rounds.suppressed[place] = 1;
  }

  uint32_t* rivals = rounds.rivals + image * kRoundWords * kRound;
  for (int w = part; w < (tile + 1) * (kTile / 32); w += rounds.parts) {
    __syncthreads();
    if (threadIdx.x < 32)
      load(w * 32 + static_cast<int>(threadIdx.x), other_boxes[threadIdx.x], other_groups[threadIdx.x]);
    __syncthreads();
    if (!open || w > word) continue;  // nobody reads them: the candidate is suppressed
    uint32_t bits = 0;
    for (int j = 0; j < min(32, candidate - w * 32); ++j) {
      const Box other = other_boxes[j];
      const bool rival = other_groups[j] == group && iou_above(other, box_area(other), box, area, test);
      bits |= static_cast<uint32_t>(rival) << j;
    }
    rivals[w * kRound + candidate] = bits;
  }
}

template <typename Source>
__global__ void __launch_bounds__(kRound) resolve_kernel(Source source, Rounds rounds, int32_t first) {
  __shared__ uint32_t open[kRoundWords], kept[kRoundWords];
  const int64_t image = blockIdx.x;
  const int candidate = threadIdx.x, word = candidate / 32;
  const int32_t max_output = rounds.max_output;
  int32_t count = rounds.kept_counts[image];
  if (count < max_output) {
    const int64_t place = image * rounds.candidates + first + candidate;
    const bool valid = first + int64_t{candidate} < rounds.candidates && score_of(rounds.keys[place]) != kNoCandidate;
    const uint32_t open_word = __ballot_sync(~0u, valid && !rounds.suppressed[place]);
    if (candidate % 32 == 0) open[word] = open_word, kept[word] = 0;
    __syncthreads();
    resolve<kRoundWords>(rounds.rivals + image * kRoundWords * kRound, open, kept, candidate, true);

    int32_t before = 0, found = 0;
    for (int w = 0; w < kRoundWords; ++w) {
      if (w < word) before += __popc(kept[w]);
      found += __popc(kept[w]);
    }
    const int32_t slot = count + before + __popc(kept[word] & ((1u << (candidate % 32)) - 1));
    if ((kept[word] >> (candidate % 32) & 1) && slot < max_output) {
      const int32_t id = rounds.order[place];
      rounds.kept_boxes[image * max_output + slot] = source.box(image, id);
      rounds.kept_groups[image * max_output + slot] = source.group(image, id);
      source.write(image, slot, id);
    }
    count = min(count + found, max_output);
    if (candidate == 0) rounds.kept_counts[image] = count;
  }
  if (first + int64_t{kRound} < rounds.candidates) return;
  for (int32_t slot = count + candidate; slot < max_output; slot += kRound) source.write(image, slot, -1);
  if (candidate == 0) source.write_count(image, count);
}

}  // namespace cascadeops
