// box_proposals on the CPU, in two parallel steps:
//
// 1. Threads share the (image, level) pairs: the best top_k logits, in one pass over a level that mostly compares 16
//    logits at a time with the worst of the best so far; then only those anchors are decoded.
// 2. Threads share the images (one image: its levels): greedy NMS with the levels as groups, ordered by logits.

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

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 64;  // logits looked at in one go
constexpr int64_t kNoRow = -1;

// Whether a logit is above the floor, or NaN.
CASCADEOPS_CLONES
bool any_above(const float* logits, int64_t count, float floor) {
  int any = 0;
  for (int64_t i = 0; i < count; ++i) any |= !(logits[i] <= floor);
  return any != 0;
}

// The rows of the best `top_k` logits, best first, equal ones by row. Returns the first NaN met, or kNoRow.
//
// `best` holds up to 2 * top_k rows; when it is full its worse half goes, and what is not above the worst of the rest
// cannot be among the best any more: an equal logit has a lower row there.
int64_t select_top(const float* logits, int64_t rows, int64_t top_k, std::vector<int32_t>& selected) {
  std::vector<uint64_t> best;  // key, then row: a smaller number is a better row
  best.reserve(std::min(rows, 2 * top_k));
  float floor = -std::numeric_limits<float>::infinity();
  bool has_floor = false;
  const auto keep_best = [&] {
    std::nth_element(best.begin(), best.begin() + top_k - 1, best.end());
    best.resize(top_k);
    floor = logits[static_cast<uint32_t>(best.back())];
    has_floor = true;
  };
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, rows);
    if (has_floor && !any_above(logits + begin, end - begin, floor)) continue;
    for (int64_t row = begin; row < end; ++row) {
      if (std::isnan(logits[row])) return row;
      if (has_floor && logits[row] <= floor) continue;
      best.push_back(uint64_t{descending_key(logits[row])} << 32 | static_cast<uint64_t>(row));
      if (static_cast<int64_t>(best.size()) == 2 * top_k) keep_best();
    }
  }
  if (static_cast<int64_t>(best.size()) > top_k) keep_best();
  std::sort(best.begin(), best.end());
  selected.resize(best.size());
  std::transform(best.begin(), best.end(), selected.begin(), [](uint64_t item) { return static_cast<uint32_t>(item); });
  return kNoRow;
}

// One level of one image: the candidates that have an area, best first.
struct LevelCandidates {
  std::vector<Box> boxes;
  std::vector<float> logits;
  int64_t bad_row = kNoRow;
};

LevelCandidates decode_level(const float* logits, const Deltas* deltas, const Box* anchors, int64_t rows, int64_t top_k,
                             const Deltas& stds, float height, float width) {
  LevelCandidates out;
  std::vector<int32_t> selected;
  out.bad_row = select_top(logits, rows, top_k, selected);
  if (out.bad_row != kNoRow) return out;
  out.boxes.reserve(selected.size());
  out.logits.reserve(selected.size());
  for (const int32_t row : selected) {
    const Box box = decode_box(anchors[row], deltas[row], stds, height, width);
    if (!has_area(box)) continue;
    out.boxes.push_back(box);
    out.logits.push_back(logits[row]);
  }
  return out;
}

Candidates merge_levels(const LevelCandidates* levels, size_t count) {
  Candidates merged;
  merged.num_groups = static_cast<int32_t>(count);
  for (size_t level = 0; level < count; ++level) {
    const LevelCandidates& from = levels[level];
    merged.boxes.insert(merged.boxes.end(), from.boxes.begin(), from.boxes.end());
    merged.scores.insert(merged.scores.end(), from.logits.begin(), from.logits.end());
    merged.groups.insert(merged.groups.end(), from.boxes.size(), static_cast<int32_t>(level));
  }
  return merged;
}

std::vector<Tensor> contiguous(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
  return tensors;
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

  std::vector<LevelCandidates> found(batch * levels);
  torch::stable::parallel_for(0, batch * levels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / levels, level = item % levels, rows = logits[level].size(1);
      const float* size = sizes.const_data_ptr<float>() + image * 2;
      found[item] =
          decode_level(logits[level].const_data_ptr<float>() + image * rows,
                       static_cast<const Deltas*>(deltas[level].const_data_ptr()) + image * rows,
                       static_cast<const Box*>(anchors[level].const_data_ptr()), rows, top_k, units, size[0], size[1]);
    }
  });
  for (int64_t item = 0; item < batch * levels; ++item) {
    check(found[item].bad_row == kNoRow, "box_proposals: logits must not be NaN; see logits[", item % levels, "][",
          item / levels, ", ", found[item].bad_row, "]");
  }

  const IouTest test = make_iou_test(iou_threshold);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const Candidates candidates = merge_levels(&found[image * levels], levels);
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
    }
  });
  return {boxes, scores, count};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("box_proposals", TORCH_BOX(&cascadeops::box_proposals_cpu));
}
