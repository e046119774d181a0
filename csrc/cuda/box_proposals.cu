// box_proposals on CUDA, without a synchronisation with the host. Of each level, the best top_k rows:
//
// 1. histogram_kernel: levels of more than 4096 rows are cut into up to 32 chunks; one block per (image, chunk) counts
//    its rows by the first 11 bits of their keys.
// 2. split_kernel: the same blocks add up the counts of their level, which tells the bin of the top_k-th key and where
//    their own rows begin, and write the rows of better bins as chosen and those of that bin to a list of the
//    undecided, both in the order of the rows.
// 3. select_kernel: one block per (image, level) finds the rest of the key by a radix select over the undecided, 11 and
//    10 bits; of those with the very key it takes as many as there is room for, in the order of the rows. A short level
//    is undecided as a whole, and one of at most top_k rows is chosen whole. The block decodes what was chosen: one
//    anchor and four deltas a row.
// 4. greedy NMS of cuda/greedy_nms.cuh: all images at once, the level as group, ordered by logits; equal ones by level,
//    then by row. Of chosen rows only equal ones must be in order, so better bins, better keys and the very key may
//    follow each other.
//
// Half types are read as they are. Bytes: the logits once from memory and twice from L2 (268,569 anchors: 1.1 MB, 0.4
// us of an H100's memory), 8 KB a chunk written and read by each block of its level (32 chunks: 256 KB), 36 for each
// chosen anchor. The floor is three launches that wait for each other, some microseconds each, and then the NMS. No GPU
// has measured the sizes of the chunks. Scratch: 4 bytes for each row of a level that is cut, and the counts. A NaN
// logit is no candidate, and noted as a fault.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks_box_proposals.h"
#include "common/box_coder.h"
#include "cuda/faults.cuh"
#include "cuda/greedy_nms.cuh"
#include "cuda/radix_select.cuh"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int32_t kChunkRows = 4096;  // at least, save the last of a level
constexpr int32_t kMostChunks = 32;   // of a level

struct Level {
  const void *logits, *deltas;  // [N, rows], [N, rows, 4] of one type
  const Box* anchors;           // [rows]
  int32_t rows, chosen;         // chosen = min(top_k, rows)
  int64_t begin;                // of its candidates among those of an image
  int32_t chunks, chunk_rows;   // chunks = 0: of no use
  int32_t first_chunk;          // among those of an image
  int64_t first_undecided;      // the begin of its list in that of an image
};

struct Levels {
  Level at[kMaxProposalLevels];
  int32_t count, chunks;  // chunks: of an image
  int64_t undecided;      // places in the list of an image
};

// What the first digit decides on a level.
struct FirstDigit {
  uint32_t bin;        // of the wanted row
  uint32_t wanted;     // rows still to choose among those of this bin
  uint32_t undecided;  // rows of this bin
};

struct Candidate {
  Box box;
  float logit;
  int32_t level;  // -1: no candidate
};

// The part of a level that a block of histogram_kernel and of split_kernel has.
struct Chunk {
  int64_t image;
  int32_t level, number;  // number: in its level
  int32_t begin, end;     // rows
};

__device__ __forceinline__ Chunk chunk_of_block(const Levels& levels) {
  const auto place = static_cast<int32_t>(blockIdx.x % levels.chunks);
  int32_t level = 0;
  while (place - levels.at[level].first_chunk >= levels.at[level].chunks) ++level;
  const int32_t number = place - levels.at[level].first_chunk, begin = number * levels.at[level].chunk_rows;
  return {blockIdx.x / levels.chunks, level, number, begin,
          min(begin + levels.at[level].chunk_rows, levels.at[level].rows)};
}

template <typename scalar_t>
__device__ __forceinline__ const scalar_t* logits_of(const Level& level, int64_t image) {
  return static_cast<const scalar_t*>(level.logits) + image * level.rows;
}

// counts: [N, chunks, kBins]
template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads)
    histogram_kernel(Levels levels, uint32_t* __restrict__ counts, uint64_t* fault) {
  __shared__ uint32_t histogram[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) histogram[bin] = 0;
  __syncthreads();
  const Chunk chunk = chunk_of_block(levels);
  const Level& level = levels.at[chunk.level];
  const scalar_t* logits = logits_of<scalar_t>(level, chunk.image);
  for (int32_t row = chunk.begin + static_cast<int32_t>(threadIdx.x); row < chunk.end; row += kSelectThreads) {
    const uint32_t key = key_of(logits[row]);
    if (key == kNoCandidate) note_fault(fault, Fault::kBoxProposals, chunk.image * level.rows + row);
    atomicAdd(&histogram[key >> kFirstShift], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
    counts[int64_t{blockIdx.x} * kBins + bin] = histogram[bin];
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads)
    split_kernel(Levels levels, const uint32_t* __restrict__ counts, int64_t per_image,
                 int32_t* __restrict__ rows_chosen, int32_t* __restrict__ undecided,
                 FirstDigit* __restrict__ first_digits) {
  __shared__ SelectState state;
  __shared__ uint32_t better_before, equal_before, equal;
  const Chunk chunk = chunk_of_block(levels);
  const Level& level = levels.at[chunk.level];
  counts += (chunk.image * levels.chunks + level.first_chunk) * kBins;
  uint32_t all[kBinsPerThread] = {}, before[kBinsPerThread] = {};
  for (int32_t number = 0; number < level.chunks; ++number) {
    for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t count = counts[number * kBins + static_cast<int>(threadIdx.x) * kBinsPerThread + i];
      all[i] += count;
      if (number < chunk.number) before[i] += count;
    }
  }
  if (threadIdx.x == 0) better_before = 0;
  find_bin(all, static_cast<uint32_t>(level.chosen), state);
  for (int i = 0; i < kBinsPerThread; ++i) {
    const uint32_t bin = threadIdx.x * kBinsPerThread + i;
    if (bin < state.bin && before[i] != 0) atomicAdd(&better_before, before[i]);
    if (bin == state.bin) equal_before = before[i], equal = all[i];
  }
  __syncthreads();
  if (chunk.number == 0 && threadIdx.x == 0) {
    first_digits[chunk.image * levels.count + chunk.level] = {state.bin, state.wanted, equal};
  }
  const scalar_t* logits = logits_of<scalar_t>(level, chunk.image);
  split_rows(
      chunk.end - chunk.begin, state.bin, ~0u,
      [&](int64_t i) { return key_of(logits[chunk.begin + i]) >> kFirstShift; },
      [&](int64_t i) { return chunk.begin + static_cast<int32_t>(i); },
      rows_chosen + chunk.image * per_image + level.begin + better_before,
      undecided + chunk.image * levels.undecided + level.first_undecided + equal_before, state);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(Levels levels, const float* __restrict__ image_sizes, Deltas stds, int64_t per_image,
                  const int32_t* __restrict__ undecided, const FirstDigit* __restrict__ first_digits,
                  int32_t* __restrict__ rows_chosen, Candidate* __restrict__ candidates, uint64_t* fault) {
  __shared__ SelectState state;
  const int64_t image = blockIdx.x / levels.count;
  const auto number = static_cast<int32_t>(blockIdx.x % levels.count);
  const Level& level = levels.at[number];
  const scalar_t* logits = logits_of<scalar_t>(level, image);
  const scalar_t* deltas = static_cast<const scalar_t*>(level.deltas) + image * level.rows * 4;
  int32_t* chosen = rows_chosen + image * per_image + level.begin;
  const bool whole = level.chosen == level.rows, cut = level.chunks > 0;
  if (!cut) {
    for (int64_t row = threadIdx.x; row < level.rows; row += kSelectThreads)
      if (isnan(static_cast<float>(logits[row]))) note_fault(fault, Fault::kBoxProposals, image * level.rows + row);
  }
  if (!whole) {
    undecided += image * levels.undecided + level.first_undecided;
    const auto row_at = [&](int64_t i) { return cut ? undecided[i] : static_cast<int32_t>(i); };
    const auto key_at = [&](int64_t i) { return key_of(logits[row_at(i)]); };
    FirstDigit known{0, static_cast<uint32_t>(level.chosen), static_cast<uint32_t>(level.rows)};
    if (cut) known = first_digits[image * levels.count + number];
    uint32_t prefix = known.bin, wanted = known.wanted;  // the digits found so far, and what is left to choose there
    for (int high = cut ? kFirstShift : 32; high > 0;) {
      const int bits = min(kDigitBits, high), low = high - bits;
      for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) state.histogram[bin] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < known.undecided; i += kSelectThreads) {
        const uint32_t key = key_at(i);
        if (uint64_t{key} >> high == prefix) atomicAdd(&state.histogram[key >> low & ((1u << bits) - 1)], 1u);
      }
      __syncthreads();
      uint32_t counts[kBinsPerThread];
      for (int i = 0; i < kBinsPerThread; ++i) counts[i] = state.histogram[threadIdx.x * kBinsPerThread + i];
      find_bin(counts, wanted, state);
      prefix = prefix << bits | state.bin;
      wanted = state.wanted;
      high = low;
    }
    int32_t* better = chosen + (static_cast<uint32_t>(level.chosen) - known.wanted);
    split_rows(static_cast<int32_t>(known.undecided), prefix, wanted, key_at, row_at, better,
               better + (known.wanted - wanted), state);
    __syncthreads();  // shows the block its chosen rows
  }
  const float height = image_sizes[image * 2], width = image_sizes[image * 2 + 1];
  for (int64_t i = threadIdx.x; i < level.chosen; i += kSelectThreads) {
    const int64_t row = whole ? i : chosen[i];
    const scalar_t* d = deltas + row * 4;
    const Deltas read{static_cast<float>(d[0]), static_cast<float>(d[1]), static_cast<float>(d[2]),
                      static_cast<float>(d[3])};
    const Box box = decode_box(level.anchors[row], read, stds, height, width);
    const float logit = static_cast<float>(logits[row]);
    candidates[image * per_image + level.begin + i] = {box, logit, has_area(box) && !isnan(logit) ? number : -1};
  }
}

struct Proposals {
  const Candidate* candidates;  // [N, per_image]
  int64_t per_image, capacity;
  Box* boxes;      // [N, capacity]
  float* scores;   // [N, capacity]
  int64_t* count;  // [N]

  __device__ const Candidate& at(int64_t image, int32_t i) const { return candidates[image * per_image + i]; }
  __device__ bool valid(int64_t image, int32_t i) const { return at(image, i).level >= 0; }
  __device__ float score(int64_t image, int32_t i) const { return at(image, i).logit; }
  __device__ Box box(int64_t image, int32_t i) const { return at(image, i).box; }
  __device__ int64_t group(int64_t image, int32_t i) const { return at(image, i).level; }
  __device__ void write(int64_t image, int64_t slot, int32_t i) const {
    const int64_t out = image * capacity + slot;
    boxes[out] = i < 0 ? Box{} : box(image, i);
    scores[out] = i < 0 ? -INFINITY : rounded_sigmoid(score(image, i));
  }
  __device__ void write_count(int64_t image, int64_t kept) const { count[image] = kept; }
};

std::tuple<Tensor, Tensor, Tensor> box_proposals_cuda(std::vector<Tensor> logits,   // L x [N, A_l]
                                                      std::vector<Tensor> deltas,   // L x [N, A_l, 4]
                                                      std::vector<Tensor> anchors,  // L x [A_l, 4]
                                                      const Tensor& image_sizes,    // [N, 2] (height, width)
                                                      int64_t top_k, int64_t max_proposals, double iou_threshold,
                                                      std::vector<double> stds) {
  const torch::stable::accelerator::DeviceGuard guard(image_sizes.get_device_index());
  check_box_proposals(logits, deltas, anchors, image_sizes, top_k, max_proposals, iou_threshold, stds);
  const int64_t batch = image_sizes.size(0), per_image = candidates_of_image(logits, top_k);
  const int64_t capacity = std::min(max_proposals, per_image);
  logits = contiguous(logits), deltas = contiguous(deltas), anchors = contiguous(anchors);
  const Tensor sizes = torch::stable::contiguous(image_sizes);
  Tensor boxes = torch::stable::new_empty(image_sizes, {batch, capacity, 4});
  Tensor scores = torch::stable::new_empty(image_sizes, {batch, capacity});
  Tensor count = torch::stable::new_empty(image_sizes, {batch}, ScalarType::Long);
  if (batch == 0) return {boxes, scores, count};

  Levels levels{};
  levels.count = static_cast<int32_t>(logits.size());
  int64_t begin = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto rows = static_cast<int32_t>(logits[i].size(1));
    const auto chosen = static_cast<int32_t>(std::min<int64_t>(top_k, rows));
    const bool cut = chosen < rows && rows > kChunkRows;
    const int32_t chunk_rows = std::max(kChunkRows, (rows + kMostChunks - 1) / kMostChunks);
    const int32_t chunks = cut ? (rows + chunk_rows - 1) / chunk_rows : 0;
    const auto* boxes_of_level = static_cast<const Box*>(anchors[i].const_data_ptr());
    levels.at[i] = {logits[i].const_data_ptr(),
                    deltas[i].const_data_ptr(),
                    boxes_of_level,
                    rows,
                    chosen,
                    begin,
                    chunks,
                    chunk_rows,
                    levels.chunks,
                    levels.undecided};
    begin += chosen;
    levels.chunks += chunks;
    if (cut) levels.undecided += rows;
  }
  const auto ints = [&](int64_t size) { return torch::stable::new_empty(image_sizes, {size}, ScalarType::Int); };
  const Tensor rows_chosen = ints(batch * per_image), undecided = ints(batch * levels.undecided);
  const Tensor counts = ints(batch * levels.chunks * kBins);
  const Tensor first_digits = ints(batch * levels.count * static_cast<int64_t>(sizeof(FirstDigit) / sizeof(int32_t)));
  const Tensor candidates = torch::stable::new_empty(
      image_sizes, {batch * per_image * static_cast<int64_t>(sizeof(Candidate) / sizeof(float))});
  const Proposals proposals{static_cast<const Candidate*>(candidates.const_data_ptr()),
                            per_image,
                            capacity,
                            static_cast<Box*>(boxes.mutable_data_ptr()),
                            scores.mutable_data_ptr<float>(),
                            count.mutable_data_ptr<int64_t>()};
  const Deltas units{static_cast<float>(stds[0]), static_cast<float>(stds[1]), static_cast<float>(stds[2]),
                     static_cast<float>(stds[3])};
  check(batch <= kMaxCandidates / std::max(levels.count, levels.chunks),
        "box_proposals: image_sizes must hold fewer than 2**23 images");
  const cudaStream_t stream = current_stream(image_sizes);
  auto* chosen_data = rows_chosen.mutable_data_ptr<int32_t>();
  auto* undecided_data = undecided.mutable_data_ptr<int32_t>();
  auto* count_data = static_cast<uint32_t*>(counts.mutable_data_ptr());
  auto* digit_data = static_cast<FirstDigit*>(first_digits.mutable_data_ptr());
  uint64_t* fault = fault_word(image_sizes);
  dispatch_floating(logits[0].scalar_type(), "box_proposals", [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (!std::is_same_v<scalar_t, double>) {  // the check knows no float64
      if (levels.chunks > 0) {
        const auto blocks = static_cast<unsigned>(batch * levels.chunks);
        histogram_kernel<scalar_t><<<blocks, kSelectThreads, 0, stream>>>(levels, count_data, fault);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        split_kernel<scalar_t><<<blocks, kSelectThreads, 0, stream>>>(levels, count_data, per_image, chosen_data,
                                                                      undecided_data, digit_data);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      const auto blocks = static_cast<unsigned>(batch * levels.count);
      select_kernel<scalar_t><<<blocks, kSelectThreads, 0, stream>>>(
          levels, sizes.const_data_ptr<float>(), units, per_image, undecided_data, digit_data, chosen_data,
          static_cast<Candidate*>(candidates.mutable_data_ptr()), fault);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  launch_greedy_nms(proposals, image_sizes, batch, per_image, true, iou_threshold, capacity);
  return {boxes, scores, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("box_proposals", TORCH_BOX(&cascadeops::box_proposals_cuda));
}
