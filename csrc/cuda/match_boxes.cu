// match_boxes on CUDA, two launches over [N, P] boxes, one thread a box, 256 boxes of one image a block:
//
// 1. match_kernel: the best ground truth of each box, and the best IoU of each ground truth over the image's boxes.
// 2. claim_kernel, with low_quality_iou: boxes whose own best IoU reaches it compare again, by the same function and so
//    to the same bits; one with exactly the best IoU of a ground truth goes to the last such one.
//
// Ground truths pass through shared memory in tiles of 256. A warp tests 32 of them at once against the outline of its
// 32 boxes, one a lane, and its lanes then compare with those that touch it: neighbouring anchors touch a few of
// hundreds, and all others have IoU 0. The best IoU of a ground truth is a maximum of non-negative floats, whose bits
// order like integers: warp, block (shared atomic), device (one atomic per block and ground truth that got one), the
// same in any order.
//
// Bytes: 17 read and 8 written a box, and with low_quality_iou 4 written, 21 read, for 268,569 anchors 13 MB: 4 us of
// an H100's memory. Scratch: 4 for each box and ground truth. A box that is not finite counts as one without area.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks_match_boxes.h"
#include "common/boxes.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;  // boxes of a block, and ground truths of a tile
constexpr unsigned kWarp = ~0u;
constexpr int64_t kNegative = -1, kIgnored = -2;

struct Problem {
  const float* boxes;    // [N, P, 4], images box_stride floats apart
  const bool* valid;     // [N, P]
  const Box* gt_boxes;   // [N, G]
  const bool* gt_valid;  // [N, G]
  int64_t box_stride, blocks_per_image;
  int32_t rows, gt_rows;
  float positive, negative, low_quality;
  uint32_t* best_of_gt;  // [N, G] bits of the best IoU, at first 0
  float* best_iou;       // [N, P], or nullptr without low_quality_iou
  int64_t* match;        // [N, P]
  uint64_t* fault;
};

struct Tile {
  Box boxes[kThreads];
  float areas[kThreads];
  uint32_t best[kThreads];  // bits of the best IoU, of this block's boxes in step 1, of all boxes in step 2
  int32_t first_valid;      // step 1: first valid ground truth of the image so far
};

struct Place {
  int64_t image;
  int32_t row;
  bool inside;
};

__device__ __forceinline__ Place place_of(const Problem& p) {
  const int64_t image = blockIdx.x / p.blocks_per_image;
  const int64_t row = (blockIdx.x - image * p.blocks_per_image) * kThreads + threadIdx.x;
  return {image, static_cast<int32_t>(row), row < p.rows};
}

__device__ __forceinline__ Box finite_or_empty(const Box& box) { return is_finite(box) ? box : Box{}; }

__device__ __forceinline__ Box stored_box(const Problem& p, const Place& place) {
  const float* from = p.boxes + place.image * p.box_stride + int64_t{place.row} * 4;
  return {from[0], from[1], from[2], from[3]};
}

__device__ __forceinline__ Box load_box(const Problem& p, const Place& place) {
  return finite_or_empty(stored_box(p, place));
}

// The smallest box around those of the warp's lanes that take part.
__device__ __forceinline__ Box outline_of_warp(const Box& box, bool takes_part) {
  Box outline = takes_part ? box : Box{INFINITY, INFINITY, -INFINITY, -INFINITY};
  for (int step = 16; step > 0; step /= 2) {
    outline.x1 = fminf(outline.x1, __shfl_xor_sync(kWarp, outline.x1, step));
    outline.y1 = fminf(outline.y1, __shfl_xor_sync(kWarp, outline.y1, step));
    outline.x2 = fmaxf(outline.x2, __shfl_xor_sync(kWarp, outline.x2, step));
    outline.y2 = fmaxf(outline.y2, __shfl_xor_sync(kWarp, outline.y2, step));
  }
  return outline;
}

__device__ __forceinline__ bool touches(const Box& a, const Box& b) {
  return a.x1 < b.x2 && a.x2 > b.x1 && a.y1 < b.y2 && a.y2 > b.y1;
}

// Every thread loads one ground truth of the tile that begins at `begin`; those that are not valid have no area.
__device__ __forceinline__ bool load_tile(const Problem& p, int64_t image, int32_t begin, Tile& tile) {
  const int64_t g = int64_t{begin} + threadIdx.x, at = image * p.gt_rows + g;
  const bool valid = g < p.gt_rows && p.gt_valid[at];
  const Box box = valid ? finite_or_empty(p.gt_boxes[at]) : Box{};
  if (valid && !is_finite(p.gt_boxes[at])) note_fault(p.fault, Fault::kMatchBoxes, at);
  tile.boxes[threadIdx.x] = box;
  tile.areas[threadIdx.x] = box_area(box);
  return valid;
}

__global__ void __launch_bounds__(kThreads) match_kernel(Problem p) {
  __shared__ Tile tile;
  const Place place = place_of(p);
  const int lane = threadIdx.x % 32;
  const int64_t at = place.image * p.rows + place.row;
  const bool valid = place.inside && p.valid[at];
  const Box box = valid ? load_box(p, place) : Box{};
  const float area = box_area(box);
  const Box outline = outline_of_warp(box, valid);
  if (valid && !is_finite(stored_box(p, place))) note_fault(p.fault, Fault::kMatchBoxes, at);
  if (threadIdx.x == 0) tile.first_valid = p.gt_rows;

  float best = 0;
  int32_t best_gt = -1;
  for (int32_t begin = 0; begin < p.gt_rows; begin += kThreads) {
    __syncthreads();  // the last tile is no longer read
    tile.best[threadIdx.x] = 0;
    if (load_tile(p, place.image, begin, tile)) {
      atomicMin(&tile.first_valid, begin + static_cast<int32_t>(threadIdx.x));
    }
    __syncthreads();
    for (int first = 0; first < min(kThreads, p.gt_rows - begin); first += 32) {
      for (uint32_t near = __ballot_sync(kWarp, touches(outline, tile.boxes[first + lane])); near; near &= near - 1) {
        const int g = first + __ffs(near) - 1;
        const float iou = rounded_iou(tile.boxes[g], tile.areas[g], box, area);
        if (iou > best) best = iou, best_gt = begin + g;
        const uint32_t highest = __reduce_max_sync(kWarp, __float_as_uint(iou));
        if (lane == 0 && highest > tile.best[g]) atomicMax(&tile.best[g], highest);
      }
    }
    __syncthreads();
    if (tile.best[threadIdx.x] != 0) {
      atomicMax(&p.best_of_gt[place.image * p.gt_rows + begin + threadIdx.x], tile.best[threadIdx.x]);
    }
  }
  __syncthreads();
  if (!place.inside) return;
  const bool any_gt = tile.first_valid < p.gt_rows;
  if (best_gt < 0) best = any_gt ? 0.0f : -1.0f, best_gt = tile.first_valid;
  const int64_t chosen = best < p.negative ? kNegative : best >= p.positive ? best_gt : kIgnored;
  p.match[at] = valid ? chosen : kIgnored;
  if (p.best_iou) p.best_iou[at] = valid ? best : -1.0f;
}

__global__ void __launch_bounds__(kThreads) claim_kernel(Problem p) {
  __shared__ Tile tile;
  const Place place = place_of(p);
  const int lane = threadIdx.x % 32;
  const int64_t at = place.image * p.rows + place.row;
  const bool candidate = place.inside && p.best_iou[at] >= p.low_quality;
  if (!__syncthreads_or(candidate)) return;
  const Box box = candidate ? load_box(p, place) : Box{};
  const float area = box_area(box);
  const Box outline = outline_of_warp(box, candidate);
  const bool any_candidate = __any_sync(kWarp, candidate);

  int32_t claimed = -1;
  for (int32_t begin = 0; begin < p.gt_rows; begin += kThreads) {
    __syncthreads();
    const bool gt_valid = load_tile(p, place.image, begin, tile);
    // Bits above those of infinity are equal to no IoU.
    tile.best[threadIdx.x] = gt_valid ? p.best_of_gt[place.image * p.gt_rows + begin + threadIdx.x] : ~0u;
    __syncthreads();
    for (int first = 0; any_candidate && first < min(kThreads, p.gt_rows - begin); first += 32) {
      const float best = __uint_as_float(tile.best[first + lane]);  // NaN where not valid
      // A ground truth whose best IoU is 0 claims boxes far from it.
      const bool near = p.low_quality > 0 ? touches(outline, tile.boxes[first + lane]) : true;
      for (uint32_t claims = __ballot_sync(kWarp, near && best >= p.low_quality); claims; claims &= claims - 1) {
        const int g = first + __ffs(claims) - 1;
        const float iou = rounded_iou(tile.boxes[g], tile.areas[g], box, area);
        if (__float_as_uint(iou) == tile.best[g]) claimed = begin + g;
      }
    }
  }
  if (candidate && claimed >= 0) p.match[at] = claimed;
}

// The tensor itself when each image's boxes lie together, as in anchors expanded to a batch; else a contiguous copy.
Tensor dense_rows(const Tensor& boxes) {
  return boxes.stride(2) == 1 && boxes.stride(1) == 4 ? boxes : torch::stable::contiguous(boxes);
}

Tensor match_boxes_cuda(const Tensor& boxes,     // [N, P, 4]
                        const Tensor& valid,     // [N, P]
                        const Tensor& gt_boxes,  // [N, G, 4]
                        const Tensor& gt_valid,  // [N, G]
                        double positive_iou, double negative_iou, std::optional<double> low_quality_iou) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  check_match_boxes(boxes, valid, gt_boxes, gt_valid, positive_iou, negative_iou, low_quality_iou);
  const int64_t batch = boxes.size(0), rows = boxes.size(1), gt_rows = gt_boxes.size(1);
  Tensor match = torch::stable::new_empty(boxes, {batch, rows}, ScalarType::Long);
  if (batch == 0 || rows == 0) return match;
  const int64_t blocks_per_image = (rows + kThreads - 1) / kThreads;
  check(batch <= kMaxCandidates / blocks_per_image, "match_boxes: boxes must have fewer than 2**39 rows in all");
  const Tensor dense_boxes = dense_rows(boxes), dense_valid = torch::stable::contiguous(valid);
  const Tensor dense_gt = torch::stable::contiguous(gt_boxes), dense_gt_valid = torch::stable::contiguous(gt_valid);
  const Tensor best_of_gt = torch::stable::new_empty(boxes, {batch * gt_rows}, ScalarType::Int);
  const Tensor best_iou = torch::stable::new_empty(boxes, {low_quality_iou ? batch * rows : 0}, ScalarType::Float);
  const cudaStream_t stream = current_stream(boxes);
  const Problem problem{static_cast<const float*>(dense_boxes.const_data_ptr()),
                        static_cast<const bool*>(dense_valid.const_data_ptr()),
                        static_cast<const Box*>(dense_gt.const_data_ptr()),
                        static_cast<const bool*>(dense_gt_valid.const_data_ptr()),
                        dense_boxes.stride(0),
                        blocks_per_image,
                        static_cast<int32_t>(rows),
                        static_cast<int32_t>(gt_rows),
                        static_cast<float>(positive_iou),
                        static_cast<float>(negative_iou),
                        static_cast<float>(low_quality_iou.value_or(0)),
                        static_cast<uint32_t*>(best_of_gt.mutable_data_ptr()),
                        low_quality_iou ? best_iou.mutable_data_ptr<float>() : nullptr,
                        match.mutable_data_ptr<int64_t>(),
                        fault_word(boxes)};
  STD_CUDA_CHECK(cudaMemsetAsync(problem.best_of_gt, 0, batch * gt_rows * sizeof(uint32_t), stream));
  const auto blocks = static_cast<unsigned>(batch * blocks_per_image);
  match_kernel<<<blocks, kThreads, 0, stream>>>(problem);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (low_quality_iou) {
    claim_kernel<<<blocks, kThreads, 0, stream>>>(problem);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return match;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("match_boxes", TORCH_BOX(&cascadeops::match_boxes_cuda));
}
