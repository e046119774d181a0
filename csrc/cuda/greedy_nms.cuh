// Greedy NMS for a batch, shared by padded_nms and multiclass_nms. Candidates of an image are numbered 0 .. candidates
// - 1; a Source says what a candidate is and takes the result:
//
//   bool valid(image, i);  float score(image, i);  Box box(image, i);  int64_t group(image, i);
//   void write(image, slot, i);  // the slot-th best kept candidate; i = -1 for slots after the last
//   void write_count(image, count);
//
// 1. score_keys: one thread per candidate writes its sort key, image in the high half, score in the low half; so one
//    device-wide stable radix sort orders all images at once, equal scores by candidate.
// 2. greedy_sweep: one block per image takes its candidates in tiles of 256, four threads to a candidate. A tile is
//    compared with all boxes kept so far, then with itself (bit matrix in shared memory), and its survivors are
//    appended. The block stops when max_output are kept. Nothing is read back by the host.
//
// Bytes: 24 for each candidate of the sort and its temporary storage; the sweep reads a candidate once (20 to 28 bytes)
// and the kept boxes, which stay in cache, once per tile. Its floor is the arithmetic of the comparisons, some 20
// operations each.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>

#include "common/boxes.h"
#include "common/score_key.h"
#include "cuda/launch.cuh"

namespace cascadeops {

constexpr int kKeyThreads = 256;
constexpr int kTile = 256;  // candidates
constexpr int kParts = 4;   // threads per candidate, in different warps: a warp then reads one kept box at a time
constexpr int kSweepThreads = kTile * kParts;
constexpr int kWords = kTile / 32;
constexpr int kWordsPerPart = kWords / kParts;

template <typename Source>
__global__ void __launch_bounds__(kKeyThreads)
    score_keys_kernel(Source source, int64_t images, int32_t candidates, uint64_t* __restrict__ keys,
                      int32_t* __restrict__ order) {
  const int64_t total = images * candidates, stride = int64_t{gridDim.x} * kKeyThreads;
  for (int64_t item = int64_t{blockIdx.x} * kKeyThreads + threadIdx.x; item < total; item += stride) {
    const int64_t image = item / candidates;
    const auto i = static_cast<int32_t>(item - image * candidates);
    const uint32_t key = source.valid(image, i) ? descending_key(source.score(image, i)) : kNoCandidate;
    keys[item] = static_cast<uint64_t>(image) << 32 | key;
    order[item] = i;
  }
}

struct SweepTile {
  Box boxes[kTile];
  int64_t groups[kTile];
  uint32_t rivals[kWords][kTile];  // bit j of rivals[w][i]: candidate 32 w + j comes before i and would suppress it
  uint32_t open[kWords];           // candidates that nothing has suppressed and nothing has confirmed
  uint32_t kept[kWords];
};

// Decides the open candidates of a tile among themselves: one is kept when all its rivals are out, and out when one of
// them is kept. Each round decides at least the first that is open; chains of suppressions are short, so few rounds do.
__device__ __forceinline__ void resolve_tile(SweepTile& tile, int candidate, int part) {
  const int word = candidate / 32;
  for (;;) {
    bool suppressed = false, waiting = false;
    const bool open = tile.open[word] >> (candidate % 32) & 1;
    if (open && part == 0) {
      for (int w = 0; w <= word; ++w) {
        suppressed |= (tile.rivals[w][candidate] & tile.kept[w]) != 0;
        waiting |= (tile.rivals[w][candidate] & tile.open[w]) != 0;
      }
    }
    __syncthreads();
    const uint32_t newly_kept = __ballot_sync(~0u, open && !suppressed && !waiting);
    const uint32_t still_open = __ballot_sync(~0u, open && !suppressed && waiting);
    if (part == 0 && candidate % 32 == 0) {
      tile.kept[word] |= newly_kept;
      tile.open[word] = still_open;
    }
    if (!__syncthreads_or(part == 0 && still_open != 0)) return;
  }
}

template <typename Source>
__global__ void __launch_bounds__(kSweepThreads)
    greedy_sweep_kernel(Source source, const uint64_t* __restrict__ keys, const int32_t* __restrict__ order,
                        int32_t candidates, IouTest test, int32_t max_output, Box* kept_boxes, int64_t* kept_groups) {
  __shared__ SweepTile tile;
  const int64_t image = blockIdx.x;
  const int candidate = threadIdx.x % kTile, part = threadIdx.x / kTile, word = candidate / 32;
  keys += image * candidates;
  order += image * candidates;
  kept_boxes += image * max_output;
  kept_groups += image * max_output;

  int32_t count = 0;
  for (int64_t begin = 0; begin < candidates && count < max_output; begin += kTile) {
    const int64_t place = begin + candidate;
    const bool valid = place < candidates && static_cast<uint32_t>(keys[place]) != kNoCandidate;
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
    resolve_tile(tile, candidate, part);

    int32_t before = 0, total = 0;
    for (int w = 0; w < kWords; ++w) {
      if (w < word) before += __popc(tile.kept[w]);
      total += __popc(tile.kept[w]);
    }
    const int32_t slot = count + before + __popc(tile.kept[word] & ((1u << (candidate % 32)) - 1));
    if (part == 0 && (tile.kept[word] >> (candidate % 32) & 1) && slot < max_output) {
      kept_boxes[slot] = box;
      kept_groups[slot] = group;
      source.write(image, slot, id);
    }
    count = min(count + total, max_output);
    // Candidates are sorted, so one that is none ends the list. The barrier also frees the tile and shows the kept
    // boxes.
    if (__syncthreads_or(!valid)) break;
  }
  for (int32_t slot = count + static_cast<int32_t>(threadIdx.x); slot < max_output; slot += kSweepThreads) {
    source.write(image, slot, -1);
  }
  if (threadIdx.x == 0) source.write_count(image, count);
}

// Enqueues the two steps on the stream of `like`; its device is the current one.
template <typename Source>
void launch_greedy_nms(const Source& source, const torch::stable::Tensor& like, int64_t images, int64_t candidates,
                       double iou_threshold, int64_t max_output) {
  using torch::headeronly::ScalarType;
  if (images == 0) return;
  const cudaStream_t stream = current_stream(like);
  const int64_t total = images * candidates;
  const auto scratch = [&](int64_t count, ScalarType dtype) { return torch::stable::new_empty(like, {count}, dtype); };

  const torch::stable::Tensor keys = scratch(2 * total, ScalarType::Long), order = scratch(2 * total, ScalarType::Int);
  auto* key_data = static_cast<uint64_t*>(keys.mutable_data_ptr());
  auto* order_data = static_cast<int32_t*>(order.mutable_data_ptr());
  if (total > 0) {
    score_keys_kernel<<<grid_blocks(total, kKeyThreads), kKeyThreads, 0, stream>>>(
        source, images, static_cast<int32_t>(candidates), key_data, order_data);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    int key_bits = 32;
    while (images > int64_t{1} << (key_bits - 32)) ++key_bits;
    size_t bytes = 0;
    const auto sort = [&](void* storage) {
      return cub::DeviceRadixSort::SortPairs(storage, bytes, key_data, key_data + total, order_data, order_data + total,
                                             total, 0, key_bits, stream);
    };
    STD_CUDA_CHECK(sort(nullptr));
    const torch::stable::Tensor storage = scratch(static_cast<int64_t>(bytes), ScalarType::Byte);
    STD_CUDA_CHECK(sort(storage.mutable_data_ptr()));
  }

  const torch::stable::Tensor kept_boxes = scratch(images * max_output * 4, ScalarType::Float);
  const torch::stable::Tensor kept_groups = scratch(images * max_output, ScalarType::Long);
  greedy_sweep_kernel<<<static_cast<unsigned>(images), kSweepThreads, 0, stream>>>(
      source, key_data + total, order_data + total, static_cast<int32_t>(candidates), make_iou_test(iou_threshold),
      static_cast<int32_t>(max_output), static_cast<Box*>(kept_boxes.mutable_data_ptr()),
      static_cast<int64_t*>(kept_groups.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace cascadeops
