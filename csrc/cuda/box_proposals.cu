// box_proposals on CUDA, without a synchronisation with the host:
//
// 1. select_kernel: one block per (image, level) finds the key of the top_k-th logit by a radix select, three digits of
//    11, 11 and 10 bits over a histogram in shared memory; its warps then write the rows up to that key, in the order
//    of the rows, and of those with the very key as many as there is room for. A level with at most top_k rows goes
//    whole. The block decodes what it chose: one anchor and four deltas a row.
// 2. greedy NMS of cuda/greedy_nms.cuh: all images at once, the level as group, ordered by logits; equal ones by level,
//    then by row.
//
// Half types are read as they are. Bytes: the logits six times, once from memory and then from L2 (268,569 anchors: 1.1
// MB, 0.4 us of an H100's memory; one block of level 0 takes 0.8 MB six times from L2), 36 for each chosen anchor. A
// NaN logit is no candidate, and noted as a fault.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks_box_proposals.h"
#include "common/box_coder.h"
#include "common/score_key.h"
#include "cuda/faults.cuh"
#include "cuda/greedy_nms.cuh"
#include "dispatch.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kDigits = 3;  // 11 + 11 + 10 bits

struct Level {
  const void *logits, *deltas;  // [N, rows], [N, rows, 4] of one type
  const Box* anchors;           // [rows]
  int32_t rows, chosen;         // chosen = min(top_k, rows)
  int64_t begin;                // of its candidates among those of an image
};

struct Levels {
  Level at[kMaxProposalLevels];
  int32_t count;
};

struct Candidate {
  Box box;
  float logit;
  int32_t level;  // -1: no candidate
};

struct SelectState {
  uint32_t histogram[kBins];
  uint32_t warp_sums[kSelectWarps];
  uint32_t prefix;  // the digits found so far
  uint32_t wanted;  // rows still to choose among those that have this prefix
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

// Leaves in the state the key of the `chosen`-th best row as prefix, and as wanted how many rows with this very key are
// among the chosen.
template <typename scalar_t>
__device__ __forceinline__ void find_threshold(const scalar_t* __restrict__ logits, int32_t rows, int32_t chosen,
                                               SelectState& state) {
  constexpr int bins_per_thread = kBins / kSelectThreads;
  if (threadIdx.x == 0) state.prefix = 0, state.wanted = static_cast<uint32_t>(chosen);
  int shift = 32;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int bits = min(kDigitBits, shift), high = shift;
    shift -= bits;
    for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) state.histogram[bin] = 0;
    __syncthreads();
    const uint32_t prefix = state.prefix, wanted = state.wanted;
    for (int64_t row = threadIdx.x; row < rows; row += kSelectThreads) {
      const uint32_t key = key_of(logits[row]);
      if (high == 32 || key >> high == prefix) atomicAdd(&state.histogram[key >> shift & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    uint32_t counts[bins_per_thread], total = 0;
    for (int i = 0; i < bins_per_thread; ++i) total += counts[i] = state.histogram[threadIdx.x * bins_per_thread + i];
    uint32_t before = sum_before(total, state);
    for (int i = 0; i < bins_per_thread; ++i) {
      if (before < wanted && wanted <= before + counts[i]) {  // true for one bin of one thread
        state.prefix = prefix << bits | (threadIdx.x * bins_per_thread + i);
        state.wanted = wanted - before;
      }
      before += counts[i];
    }
    __syncthreads();
  }
}

// Writes the chosen rows to `to`, ascending. Each warp looks at a stretch of rows, twice: to count, and to write where
// its part begins.
template <typename scalar_t>
__device__ __forceinline__ void write_chosen(const scalar_t* __restrict__ logits, int32_t rows, SelectState& state,
                                             int32_t* __restrict__ to) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t threshold = state.prefix, ties = state.wanted;
  const int64_t stretch = (int64_t{rows} + kSelectWarps * 32 - 1) / (kSelectWarps * 32) * 32;
  const int64_t begin = warp * stretch, end = min(begin + stretch, int64_t{rows});

  uint32_t better = 0, equal = 0;
  for (int64_t first = begin; first < end; first += 32) {
    const uint32_t key = first + lane < end ? key_of(logits[first + lane]) : kNoCandidate;
    better += __popc(__ballot_sync(~0u, key < threshold));
    equal += __popc(__ballot_sync(~0u, first + lane < end && key == threshold));
  }
  // One lane of each warp brings its counts, so the sums before it are those of the warps before.
  uint32_t equal_before = sum_before(lane == 0 ? equal : 0, state);
  equal_before = __shfl_sync(~0u, equal_before, 0);
  uint32_t better_before = sum_before(lane == 0 ? better : 0, state);
  better_before = __shfl_sync(~0u, better_before, 0);

  for (int64_t first = begin; first < end; first += 32) {
    const bool inside = first + lane < end;
    const uint32_t key = inside ? key_of(logits[first + lane]) : kNoCandidate;
    const uint32_t better_mask = __ballot_sync(~0u, key < threshold);
    const uint32_t equal_mask = __ballot_sync(~0u, inside && key == threshold);
    const uint32_t lower = (1u << lane) - 1;
    const uint32_t ties_before = min(equal_before + __popc(equal_mask & lower), ties);
    const bool chosen = key < threshold || (inside && key == threshold && ties_before < ties);
    if (chosen) to[better_before + __popc(better_mask & lower) + ties_before] = static_cast<int32_t>(first + lane);
    better_before += __popc(better_mask);
    equal_before += __popc(equal_mask);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(Levels levels, const float* __restrict__ image_sizes, Deltas stds, int64_t per_image,
                  int32_t* __restrict__ rows_chosen, Candidate* __restrict__ candidates, uint64_t* fault) {
  __shared__ SelectState state;
  const int64_t image = blockIdx.x / levels.count;
  const auto number = static_cast<int32_t>(blockIdx.x % levels.count);
  const Level& level = levels.at[number];
  const scalar_t* logits = static_cast<const scalar_t*>(level.logits) + image * level.rows;
  const scalar_t* deltas = static_cast<const scalar_t*>(level.deltas) + image * level.rows * 4;
  int32_t* chosen = rows_chosen + image * per_image + level.begin;
  const bool whole = level.chosen == level.rows;
  for (int64_t row = threadIdx.x; row < level.rows; row += kSelectThreads)
    if (isnan(static_cast<float>(logits[row]))) note_fault(fault, Fault::kBoxProposals, image * level.rows + row);
  if (!whole) {
    find_threshold(logits, level.rows, level.chosen, state);
    write_chosen(logits, level.rows, state, chosen);
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

std::vector<Tensor> contiguous(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
  return tensors;
}

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
    const int64_t rows = logits[i].size(1), chosen = std::min(top_k, rows);
    levels.at[i] = {
        logits[i].const_data_ptr(), deltas[i].const_data_ptr(),   static_cast<const Box*>(anchors[i].const_data_ptr()),
        static_cast<int32_t>(rows), static_cast<int32_t>(chosen), begin};
    begin += chosen;
  }
  const Tensor rows_chosen = torch::stable::new_empty(image_sizes, {batch * per_image}, ScalarType::Int);
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
  check(batch <= kMaxCandidates / levels.count, "box_proposals: image_sizes must hold fewer than 2**28 images");
  dispatch_floating(logits[0].scalar_type(), "box_proposals", [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) {  // the check knows no float64
      const auto blocks = static_cast<unsigned>(batch * levels.count);
      select_kernel<decltype(zero)><<<blocks, kSelectThreads, 0, current_stream(image_sizes)>>>(
          levels, sizes.const_data_ptr<float>(), units, per_image, rows_chosen.mutable_data_ptr<int32_t>(),
          static_cast<Candidate*>(candidates.mutable_data_ptr()), fault_word(image_sizes));
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
