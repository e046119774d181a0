// Greedy NMS for a batch, shared by nms, padded_nms, multiclass_nms and box_proposals. Candidates of an image are
// numbered 0 .. candidates - 1; a Source says what a candidate is and takes the result:
//
//   bool valid(image, i);  float score(image, i);  Box box(image, i);  int64_t group(image, i);
//   void write(image, slot, i);  // the slot-th best kept candidate; i = -1 for slots after the last
//   void write_count(image, count);
//
// 1. score_keys: one thread per candidate writes its sort key, from high to low: image, segment, score; so one
//    device-wide stable radix sort orders all at once, equal scores by candidate.
// 2. greedy_sweep: one block per segment takes its candidates in tiles of 256, four threads to a candidate. A tile is
//    compared with all boxes kept so far, then with itself (bit matrix in shared memory), and its survivors are
//    appended. The block stops when max_output are kept.
//
// An image is one segment where few are asked for: then the sweep, which goes by score, soon has them. Where many are
// asked for of several groups, the groups are spread over segments by a hash, and blocks work on them at the same time;
// groups that meet in a segment are told apart by number, so that they share time and nothing else. The kept are then
// ordered by a second sort, and
// 3. write_kept hands the first max_output of each image to the Source.
//
// A large image of one segment of which a good part is asked for (see in_rounds) is not swept by one block but goes
// over the whole device in rounds, see cuda/nms_rounds.cuh. No GPU has measured where this begins to be faster. A large
// group among others remains the work of a single block.
//
// Nothing is read back by the host. Scratch for each candidate: 24 bytes and the temporary storage of the sort; with
// segments 48, in rounds 25; without segments 24 for each that is asked for. The sweep reads a candidate once (20 to 28
// bytes) and the kept boxes of its segment, which stay in cache, once per tile. Its floor is the arithmetic of the
// comparisons, some 20 operations each.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>

#include "checks.h"
#include "common/boxes.h"
#include "common/score_key.h"
#include "cuda/launch.cuh"
#include "cuda/nms_rounds.cuh"

namespace cascadeops {

constexpr int kKeyThreads = 256;
constexpr int kParts = 4;  // threads per candidate, in different warps: a warp then reads one kept box at a time
constexpr int kSweepThreads = kTile * kParts;
constexpr int kWords = kTile / 32;
constexpr int kWordsPerPart = kWords / kParts;
constexpr int64_t kFewOutputs = 1024;  // up to these one block per image is enough
constexpr int64_t kSegmentSize = 256;  // candidates of a segment to aim at
constexpr int kMostSegmentBits = 12;
constexpr int64_t kMostPerOutput = 8;   // candidates for each that is asked for, where an image goes in rounds
constexpr int64_t kRoundBlocks = 1024;  // to aim at, of 256 threads

// Fibonacci hashing: neighbouring numbers come to different segments.
__device__ __forceinline__ uint64_t segment_of(int64_t group, int bits) {
  return bits == 0 ? 0 : static_cast<uint64_t>(group) * 0x9E3779B97F4A7C15u >> (64 - bits);
}

// The first place in keys, ascending, whose key is not below `key`.
__device__ __forceinline__ int64_t first_not_below(const uint64_t* __restrict__ keys, int64_t count, uint64_t key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Source>
__global__ void __launch_bounds__(kKeyThreads)
    score_keys_kernel(Source source, int64_t images, int32_t candidates, int segment_bits, uint64_t* __restrict__ keys,
                      int32_t* __restrict__ order) {
  const int64_t total = images * candidates, stride = int64_t{gridDim.x} * kKeyThreads;
  for (int64_t item = int64_t{blockIdx.x} * kKeyThreads + threadIdx.x; item < total; item += stride) {
    const int64_t image = item / candidates;
    const auto i = static_cast<int32_t>(item - image * candidates);
    const uint32_t key = source.valid(image, i) ? descending_key(source.score(image, i)) : kNoCandidate;
    const uint64_t segment = segment_bits == 0 ? 0 : segment_of(source.group(image, i), segment_bits);
    keys[item] = (static_cast<uint64_t>(image) << segment_bits | segment) << 32 | key;
    order[item] = i;
  }
}

struct SweepTile {
  Box boxes[kTile];
  int64_t groups[kTile];
  uint32_t rivals[kWords][kTile];
  uint32_t open[kWords], kept[kWords];
};

// Places of the sorted candidates and of the kept boxes of a block.
struct Segment {
  int64_t begin, end, kept;
};

// kept_keys: null where an image is one segment, and the result goes to the Source; else the keys of the second sort,
// [images, candidates], of which every one is written.
template <typename Source>
__global__ void __launch_bounds__(kSweepThreads)
    greedy_sweep_kernel(Source source, const uint64_t* __restrict__ keys, const int32_t* __restrict__ order,
                        int64_t total, int32_t candidates, int segment_bits, IouTest test, int32_t max_output,
                        Box* kept_boxes, int64_t* kept_groups, uint64_t* __restrict__ kept_keys) {
  __shared__ SweepTile tile;
  __shared__ Segment segment;
  const int64_t image = blockIdx.x >> segment_bits;
  const int candidate = threadIdx.x % kTile, part = threadIdx.x / kTile, word = candidate / 32;
  if (threadIdx.x == 0) {
    segment = {image * candidates, (image + 1) * candidates, image * max_output};
    if (kept_keys) {
      segment.begin = first_not_below(keys, total, static_cast<uint64_t>(blockIdx.x) << 32);
      segment.end = first_not_below(keys, total, static_cast<uint64_t>(blockIdx.x + uint64_t{1}) << 32);
      segment.kept = segment.begin;
    }
  }
  __syncthreads();
  kept_boxes += segment.kept;
  kept_groups += segment.kept;
  const auto record = [&](int64_t place, bool kept) {
    const uint32_t key = kept ? score_of(keys[place]) : kNoCandidate;
    kept_keys[image * candidates + order[place]] = static_cast<uint64_t>(image) << 32 | key;
  };

  int32_t count = 0;
  int64_t begin = segment.begin;
  for (bool more = true; more && begin < segment.end && count < max_output; begin += kTile) {
    const int64_t place = begin + candidate;
    const bool inside = place < segment.end;
    const bool valid = inside && score_of(keys[place]) != kNoCandidate;
    const int32_t id = valid ? order[place] : -1;
    Box box{};
    int64_t group = 0;
    if (valid) {
      box = source.box(image, id);
      group = source.group(image, id);
    }
    const float area = box_area(box);
    const uint32_t valid_word = __ballot_sync(~0u, valid);
    if (part == 0) {
      tile.boxes[candidate] = box;
      tile.groups[candidate] = group;
      if (candidate % 32 == 0) {
        tile.open[word] = valid_word;
        tile.kept[word] = 0;
      }
    }
    __syncthreads();

    bool suppressed = false;
    for (int32_t i = part; valid && !suppressed && i < count; i += kParts) {
      const Box other = kept_boxes[i];
      suppressed = kept_groups[i] == group && iou_above(other, box_area(other), box, area, test);
    }
    const uint32_t suppressed_word = __ballot_sync(~0u, suppressed);
    if (candidate % 32 == 0 && suppressed_word != 0) atomicAnd(&tile.open[word], ~suppressed_word);
    __syncthreads();

    const bool open = tile.open[word] >> (candidate % 32) & 1;
    for (int w = part * kWordsPerPart; w < (part + 1) * kWordsPerPart; ++w) {
      uint32_t rivals = 0;
      for (int i = w * 32; open && i < min(w * 32 + 32, candidate); ++i) {
        if (!(tile.open[w] >> (i % 32) & 1) || tile.groups[i] != group) continue;
        const Box other = tile.boxes[i];
        rivals |= static_cast<uint32_t>(iou_above(other, box_area(other), box, area, test)) << (i % 32);
      }
      tile.rivals[w][candidate] = rivals;
    }
    __syncthreads();
    resolve<kWords>(tile.rivals[0], tile.open, tile.kept, candidate, part == 0);

    int32_t before = 0, found = 0;
    for (int w = 0; w < kWords; ++w) {
      if (w < word) before += __popc(tile.kept[w]);
      found += __popc(tile.kept[w]);
    }
    const int32_t slot = count + before + __popc(tile.kept[word] & ((1u << (candidate % 32)) - 1));
    const bool kept = (tile.kept[word] >> (candidate % 32) & 1) && slot < max_output;
    if (part == 0 && kept) {
      kept_boxes[slot] = box;
      kept_groups[slot] = group;
      if (!kept_keys) source.write(image, slot, id);
    }
    if (part == 0 && inside && kept_keys) record(place, kept);
    count = min(count + found, max_output);
    // Candidates are sorted, so one that is none ends the list. The barrier also frees the tile and shows the kept
    // boxes.
    more = !__syncthreads_or(!valid);
  }
  if (kept_keys) {
    for (int64_t place = begin + threadIdx.x; place < segment.end; place += kSweepThreads) record(place, false);
    return;
  }
  for (int32_t slot = count + static_cast<int32_t>(threadIdx.x); slot < max_output; slot += kSweepThreads) {
    source.write(image, slot, -1);
  }
  if (threadIdx.x == 0) source.write_count(image, count);
}

// keys, order: [images, candidates] after the second sort. One thread per slot.
template <typename Source>
__global__ void __launch_bounds__(kKeyThreads)
    write_kept_kernel(Source source, const uint64_t* __restrict__ keys, const int32_t* __restrict__ order,
                      int64_t images, int32_t candidates, int32_t max_output) {
  const int64_t total = images * max_output, stride = int64_t{gridDim.x} * kKeyThreads;
  for (int64_t item = int64_t{blockIdx.x} * kKeyThreads + threadIdx.x; item < total; item += stride) {
    const int64_t image = item / max_output, slot = item - image * max_output;
    const int64_t place = image * candidates + slot;
    const bool kept = slot < candidates && score_of(keys[place]) != kNoCandidate;
    source.write(image, slot, kept ? order[place] : -1);
    if (slot == 0) {
      const int64_t found =
          first_not_below(keys + place, candidates, static_cast<uint64_t>(image) << 32 | kNoCandidate);
      source.write_count(image, min(found, int64_t{max_output}));
    }
  }
}

// Bits of the number of segments of an image.
inline int segment_bits_of(int64_t candidates, int64_t max_output, bool grouped) {
  int bits = 0;
  if (!grouped || max_output <= kFewOutputs) return bits;
  while (bits < kMostSegmentBits && kSegmentSize << bits < candidates) ++bits;
  return bits;
}

// Whether images of one segment go in rounds: a round must not be most of the work, and the sweep must not be likely to
// have its max_output after a small part of the candidates.
inline bool in_rounds(int64_t candidates, int64_t max_output) {
  return candidates > kRound && candidates <= kMostPerOutput * max_output;
}

inline int bits_of(int64_t count) {
  int bits = 0;
  while (count > int64_t{1} << bits) ++bits;
  return bits;
}

// Enqueues all steps on the stream of `like`; its device is the current one. grouped: whether the candidates of an
// image may be of several groups.
template <typename Source>
void launch_greedy_nms(const Source& source, const torch::stable::Tensor& like, int64_t images, int64_t candidates,
                       bool grouped, double iou_threshold, int64_t max_output) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  if (images == 0) return;
  const cudaStream_t stream = current_stream(like);
  const int64_t total = images * candidates;
  const auto count = static_cast<int32_t>(candidates), most = static_cast<int32_t>(max_output);
  const int segment_bits = segment_bits_of(candidates, max_output, grouped);
  check(images <= kMaxCandidates >> segment_bits, "nms: boxes must have fewer than 2**", 31 - segment_bits, " images");
  const auto scratch = [&](int64_t size, ScalarType dtype) { return torch::stable::new_empty(like, {size}, dtype); };

  const Tensor keys = scratch(2 * total, ScalarType::Long), order = scratch(2 * total, ScalarType::Int);
  auto* key_data = static_cast<uint64_t*>(keys.mutable_data_ptr());
  auto* order_data = static_cast<int32_t*>(order.mutable_data_ptr());
  Tensor storage = scratch(0, ScalarType::Byte);
  // From the first halves of keys and order to the second ones.
  const auto sort = [&](int key_bits) {
    size_t bytes = 0;
    const auto run = [&](void* place) {
      return cub::DeviceRadixSort::SortPairs(place, bytes, key_data, key_data + total, order_data, order_data + total,
                                             total, 0, key_bits, stream);
    };
    STD_CUDA_CHECK(run(nullptr));
    if (storage.size(0) < static_cast<int64_t>(bytes)) storage = scratch(static_cast<int64_t>(bytes), ScalarType::Byte);
    STD_CUDA_CHECK(run(storage.mutable_data_ptr()));
  };
  if (total > 0) {
    score_keys_kernel<<<grid_blocks(total, kKeyThreads), kKeyThreads, 0, stream>>>(source, images, count, segment_bits,
                                                                                   key_data, order_data);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sort(32 + segment_bits + bits_of(images));
  }

  const bool segmented = segment_bits > 0;
  const int64_t room = segmented ? total : images * max_output;
  const Tensor kept_boxes = scratch(room * 4, ScalarType::Float), kept_groups = scratch(room, ScalarType::Long);
  auto* box_data = static_cast<Box*>(kept_boxes.mutable_data_ptr());
  auto* group_data = static_cast<int64_t*>(kept_groups.mutable_data_ptr());
  if (!segmented && in_rounds(candidates, max_output)) {
    const Tensor counts = scratch(images, ScalarType::Int), suppressed = scratch(total, ScalarType::Byte);
    const Tensor rivals = scratch(images * kRoundWords * kRound, ScalarType::Int);
    const auto parts = static_cast<int32_t>(std::clamp<int64_t>(kRoundBlocks / (images * kRoundTiles), 1, kMostParts));
    const Rounds rounds{key_data + total,
                        order_data + total,
                        count,
                        most,
                        parts,
                        box_data,
                        group_data,
                        counts.mutable_data_ptr<int32_t>(),
                        suppressed.mutable_data_ptr<uint8_t>(),
                        static_cast<uint32_t*>(rivals.mutable_data_ptr())};
    STD_CUDA_CHECK(cudaMemsetAsync(rounds.kept_counts, 0, images * sizeof(int32_t), stream));
    STD_CUDA_CHECK(cudaMemsetAsync(rounds.suppressed, 0, total, stream));
    for (int64_t first = 0; first < candidates; first += kRound) {
      const auto begin = static_cast<int32_t>(first);
      const auto blocks = static_cast<unsigned>(images * parts * kRoundTiles);
      compare_kernel<<<blocks, kTile, 0, stream>>>(source, rounds, begin, make_iou_test(iou_threshold));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      resolve_kernel<<<static_cast<unsigned>(images), kRound, 0, stream>>>(source, rounds, begin);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    return;
  }
  greedy_sweep_kernel<<<static_cast<unsigned>(images << segment_bits), kSweepThreads, 0, stream>>>(
      source, key_data + total, order_data + total, total, count, segment_bits, make_iou_test(iou_threshold), most,
      box_data, group_data, segmented ? key_data : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!segmented) return;
  sort(32 + bits_of(images));  // order's first half still numbers the candidates of each image
  write_kept_kernel<<<grid_blocks(images * max_output, kKeyThreads), kKeyThreads, 0, stream>>>(
      source, key_data + total, order_data + total, images, count, most);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace cascadeops
