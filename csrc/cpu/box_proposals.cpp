// box_proposals on the CPU; threads share the images:
//
// 1. Of each level the best top_k logits, in one pass that mostly compares 16 logits at a time with the worst of the
//    best so far; then only those anchors are decoded. Half types are read as they are.
// 2. Greedy NMS with the levels as groups, ordered by logits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "checks_box_proposals.h"
#include "common/box_coder.h"
#include "common/score_key.h"
#include "cpu/greedy_nms.h"
#include "cpu/simd.h"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 64;  // logits looked at in one go
constexpr int64_t kNoRow = -1;

// Up to kChunk logits in float32; whether one of them is above the floor, or NaN.
template <typename scalar_t>
CASCADEOPS_INLINE bool read_chunk(const scalar_t* logits, int64_t count, float floor, float* chunk) {
  constexpr int64_t lanes = Lanes<float>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Lanes<float>::type vector;
    load_lanes(logits + i, vector);
    store_lanes(vector, chunk + i);
  }
  for (; i < count; ++i) chunk[i] = static_cast<float>(logits[i]);
  int any = 0;
  for (i = 0; i < count; ++i) any |= !(chunk[i] <= floor);
  return any != 0;
}

CASCADEOPS_CLONES bool next_chunk(const float* logits, int64_t count, float floor, float* chunk) {
  return read_chunk(logits, count, floor, chunk);
}

CASCADEOPS_CLONES bool next_chunk(const Half* logits, int64_t count, float floor, float* chunk) {
  return read_chunk(logits, count, floor, chunk);
}

CASCADEOPS_CLONES bool next_chunk(const BFloat16* logits, int64_t count, float floor, float* chunk) {
  return read_chunk(logits, count, floor, chunk);
}

// The rows of the best `top_k` logits, best first, equal ones by row. Returns the first NaN met, or kNoRow.
//
// `best` holds up to 2 * top_k rows; when it is full its worse half goes, and what is not above the worst of the rest
// cannot be among the best any more: an equal logit has a lower row there.
template <typename scalar_t>
int64_t select_top(const scalar_t* logits, int64_t rows, int64_t top_k, std::vector<int32_t>& selected) {
  std::vector<uint64_t> best;  // key, then row: a smaller number is a better row
  best.reserve(std::min(rows, 2 * top_k));
  float floor = -std::numeric_limits<float>::infinity();
  bool has_floor = false;
  const auto keep_best = [&] {
    std::nth_element(best.begin(), best.begin() + top_k - 1, best.end());
    best.resize(top_k);
    floor = static_cast<float>(logits[static_cast<uint32_t>(best.back())]);
    has_floor = true;
  };
  float chunk[kChunk];
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t count = std::min(kChunk, rows - begin);
    if (!next_chunk(logits + begin, count, floor, chunk) && has_floor) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (std::isnan(chunk[i])) return begin + i;
      if (has_floor && chunk[i] <= floor) continue;
      best.push_back(uint64_t{descending_key(chunk[i])} << 32 | static_cast<uint64_t>(begin + i));
      if (static_cast<int64_t>(best.size()) == 2 * top_k) keep_best();
    }
  }
  if (static_cast<int64_t>(best.size()) > top_k) keep_best();
  std::sort(best.begin(), best.end());
  selected.resize(best.size());
  std::transform(best.begin(), best.end(), selected.begin(), [](uint64_t item) { return static_cast<uint32_t>(item); });
  return kNoRow;
}

// Appends one level of one image: the candidates that have an area, best first. Returns the first NaN met, or kNoRow.
template <typename scalar_t>
int64_t append_level(const scalar_t* logits, const scalar_t* deltas, const Box* anchors, int64_t rows, int64_t top_k,
                     const Deltas& stds, float height, float width, int32_t level, Candidates& candidates) {
  std::vector<int32_t> selected;
  const int64_t bad_row = select_top(logits, rows, top_k, selected);
  if (bad_row != kNoRow) return bad_row;
  for (const int32_t row : selected) {
    const scalar_t* d = deltas + int64_t{row} * 4;
    const Deltas read{static_cast<float>(d[0]), static_cast<float>(d[1]), static_cast<float>(d[2]),
                      static_cast<float>(d[3])};
    const Box box = decode_box(anchors[row], read, stds, height, width);
    if (!has_area(box)) continue;
    candidates.boxes.push_back(box);
    candidates.scores.push_back(static_cast<float>(logits[row]));
    candidates.groups.push_back(level);
  }
  return kNoRow;
}

std::tuple<Tensor, Tensor, Tensor> box_proposals_cpu(std::vector<Tensor> logits,   // L x [N, A_l]
                                                     std::vector<Tensor> deltas,   // L x [N, A_l, 4]
                                                     std::vector<Tensor> anchors,  // L x [A_l, 4]
                                                     const Tensor& image_sizes,    // [N, 2] (height, width)
                                                     int64_t top_k, int64_t max_proposals, double iou_threshold,
                                                     std::vector<double> stds) {
  check_box_proposals(logits, deltas, anchors, image_sizes, top_k, max_proposals, iou_threshold, stds);
  const int64_t batch = image_sizes.size(0), levels = static_cast<int64_t>(logits.size());
  const int64_t capacity = std::min(max_proposals, candidates_of_image(logits, top_k));
  logits = contiguous(logits), deltas = contiguous(deltas), anchors = contiguous(anchors);
  const Tensor sizes = torch::stable::contiguous(image_sizes);
  Tensor boxes = torch::stable::new_empty(image_sizes, {batch, capacity, 4});
  Tensor scores = torch::stable::new_empty(image_sizes, {batch, capacity});
  Tensor count = torch::stable::new_empty(image_sizes, {batch}, ScalarType::Long);
  const Deltas units{static_cast<float>(stds[0]), static_cast<float>(stds[1]), static_cast<float>(stds[2]),
                     static_cast<float>(stds[3])};

  const IouTest test = make_iou_test(iou_threshold);
  std::vector<int64_t> bad_row(batch * levels, kNoRow);  // an exception may not leave parallel_for
  const auto run_image = [&](auto zero, int64_t image) {
    using scalar_t = decltype(zero);
    const float* size = sizes.const_data_ptr<float>() + image * 2;
    Candidates candidates;
    candidates.num_groups = levels;
    for (int64_t level = 0; level < levels; ++level) {
      const int64_t rows = logits[level].size(1);
      bad_row[image * levels + level] =
          append_level(static_cast<const scalar_t*>(logits[level].const_data_ptr()) + image * rows,
                       static_cast<const scalar_t*>(deltas[level].const_data_ptr()) + image * rows * 4,
                       static_cast<const Box*>(anchors[level].const_data_ptr()), rows, top_k, units, size[0], size[1],
                       static_cast<int32_t>(level), candidates);
    }
    const std::vector<int32_t> kept = greedy_nms(candidates, test, capacity);
    Box* out_boxes = static_cast<Box*>(boxes.mutable_data_ptr()) + image * capacity;
    float* out_scores = scores.mutable_data_ptr<float>() + image * capacity;
    for (size_t i = 0; i < kept.size(); ++i) {
      out_boxes[i] = candidates.boxes[kept[i]];
      out_scores[i] = rounded_sigmoid(candidates.scores[kept[i]]);
    }
    std::fill(out_boxes + kept.size(), out_boxes + capacity, Box{});
    std::fill(out_scores + kept.size(), out_scores + capacity, -INFINITY);
    count.mutable_data_ptr<int64_t>()[image] = static_cast<int64_t>(kept.size());
  };
  dispatch_floating(logits[0].scalar_type(), "box_proposals", [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) {  // the check knows no float64
      torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) run_image(zero, image);
      });
    }
  });
  for (int64_t item = 0; item < batch * levels; ++item) {
    check(bad_row[item] == kNoRow, "box_proposals: logits must not be NaN; see logits[", item % levels, "][",
          item / levels, ", ", bad_row[item], "]");
  }
  return {boxes, scores, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("box_proposals", TORCH_BOX(&cascadeops::box_proposals_cpu));
}
