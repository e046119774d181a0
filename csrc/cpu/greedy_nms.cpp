// Candidates are visited by descending score. Each is compared with the boxes already kept of its own group, which lie
// together as one array per coordinate, so that 16 comparisons are one vector operation. The visit stops as soon as
// max_output are kept. Memory: 36 bytes per candidate for the sort and the kept boxes.

#include "cpu/greedy_nms.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "common/score_key.h"
#include "cpu/simd.h"

namespace cascadeops {
namespace {

constexpr int64_t kLanes = 16;  // one AVX-512 vector

// Positions by descending score, equal scores by position: a radix sort with three digits of 11 bits.
std::vector<int32_t> sort_by_score(const std::vector<float>& scores) {
  struct Item {
    uint32_t key;
    int32_t position;
  };
  constexpr int digit_bits = 11, digits = 3, buckets = 1 << digit_bits;
  std::vector<Item> items(scores.size()), sorted(scores.size());
  std::array<std::array<uint32_t, buckets>, digits> first{};  // counts at first, then where the next item goes
  for (size_t i = 0; i < scores.size(); ++i) {
    items[i] = {descending_key(scores[i]), static_cast<int32_t>(i)};
    for (int digit = 0; digit < digits; ++digit) ++first[digit][items[i].key >> digit * digit_bits & (buckets - 1)];
  }
  for (int digit = 0; digit < digits; ++digit) {
    std::exclusive_scan(first[digit].begin(), first[digit].end(), first[digit].begin(), 0u);
    for (const Item& item : items) sorted[first[digit][item.key >> digit * digit_bits & (buckets - 1)]++] = item;
    items.swap(sorted);
  }
  std::vector<int32_t> order(scores.size());
  for (size_t i = 0; i < items.size(); ++i) order[i] = items[i].position;
  return order;
}

// Kept boxes, each group in a region of its own that has room for all its candidates. Free places hold a box that
// overlaps nothing, and regions are whole vectors, so that comparisons need no remainder loop.
class KeptBoxes {
 public:
  explicit KeptBoxes(const Candidates& candidates) : begin_(candidates.num_groups + 1), count_(candidates.num_groups) {
    if (candidates.groups.empty()) begin_[1] = static_cast<int64_t>(candidates.boxes.size());
    for (int32_t group : candidates.groups) ++begin_[group + 1];
    for (size_t group = 1; group < begin_.size(); ++group) {
      begin_[group] = begin_[group - 1] + (begin_[group] + kLanes - 1) / kLanes * kLanes;
    }
    for (auto& x : low_) x.assign(begin_.back(), std::numeric_limits<float>::max());
    for (auto& x : high_) x.assign(begin_.back(), std::numeric_limits<float>::lowest());
    area_.assign(begin_.back(), 0.0f);
  }

  void add(const Box& box, int32_t group) {
    const int64_t place = begin_[group] + count_[group]++;
    low_[0][place] = box.x1, low_[1][place] = box.y1;
    high_[0][place] = box.x2, high_[1][place] = box.y2;
    area_[place] = box_area(box);
  }

  bool suppress(const Box& box, int32_t group, const IouTest& test) const {
    const int64_t begin = begin_[group];
    return any_above(&low_[0][begin], &low_[1][begin], &high_[0][begin], &high_[1][begin], &area_[begin], count_[group],
                     box, test);
  }

 private:
  static bool any_above(const float* x1, const float* y1, const float* x2, const float* y2, const float* area,
                        int64_t count, const Box& box, const IouTest& test);

  std::vector<int64_t> begin_, count_;            // of each group
  std::array<std::vector<float>, 2> low_, high_;  // (x1, y1), (x2, y2)
  std::vector<float> area_;
};

CASCADEOPS_CLONES
bool KeptBoxes::any_above(const float* x1, const float* y1, const float* x2, const float* y2, const float* area,
                          int64_t count, const Box& box, const IouTest& test) {
  const Box candidate = box;
  const IouTest limits = test;
  const float candidate_area = box_area(candidate);
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    int answers = 0;
    for (int64_t i = begin; i < begin + kLanes; ++i) {
      answers |= compare_iou({x1[i], y1[i], x2[i], y2[i]}, area[i], candidate, candidate_area, limits);
    }
    if (answers & kIouAbove) return true;
    if (answers == 0) continue;
    for (int64_t i = begin; i < begin + kLanes; ++i) {
      if (iou_above({x1[i], y1[i], x2[i], y2[i]}, area[i], candidate, candidate_area, limits)) return true;
    }
  }
  return false;
}

}  // namespace

std::vector<int32_t> greedy_nms(const Candidates& candidates, const IouTest& test, int64_t max_output) {
  if (candidates.boxes.empty()) return {};  // there may be no group either
  KeptBoxes kept_boxes(candidates);
  std::vector<int32_t> kept;
  for (int32_t position : sort_by_score(candidates.scores)) {
    if (static_cast<int64_t>(kept.size()) == max_output) break;
    const Box& box = candidates.boxes[position];
    const int32_t group = candidates.groups.empty() ? 0 : candidates.groups[position];
    if (kept_boxes.suppress(box, group, test)) continue;
    kept_boxes.add(box, group);
    kept.push_back(position);
  }
  return kept;
}

}  // namespace cascadeops
