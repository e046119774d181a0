// Candidates are visited by descending score. Each is compared with the boxes already kept of its own group; groups do
// not meet, so threads share them. Three things keep the work small, and none changes a decision:
//
// - Kept boxes lie in blocks of 16, one array per coordinate, so that 16 comparisons are one vector operation. It asks
//   for less than the IoU: a cheap float32 bound, beyond which the float64 rule of common/boxes.h decides.
// - A large group keeps its boxes in the cells of a grid, by their top left corners. A box whose IoU with the candidate
//   exceeds the threshold t shares more than t of either width, so its corner lies at most (1 - t) widths to the right
//   and (1 - t) / t widths to the left of the candidate's; only those cells are looked at. Heights likewise.
// - The visit goes in chunks of growing length and ends with the chunk in which max_output are reached.
//
// Memory: at most 64 bytes per candidate, those of the caller's lists included (tests/test_nms_at_scale.py).

#include "cpu/greedy_nms.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/score_key.h"
#include "cpu/simd.h"

namespace cascadeops {
namespace {

constexpr int kLanes = 16;  // one AVX-512 vector
constexpr int64_t kCandidatesPerCell = 32;
constexpr double kCellsPerBox = 2;  // along an axis, of a box of mean size; more would be looked at half empty
constexpr int64_t kFirstChunk = 1024, kCandidatesPerThread = 1 << 14;  // fewer, a millisecond, are not worth a thread

// Positions by descending score, equal scores by position: a radix sort with three digits of 11 bits.
std::vector<int32_t> sort_by_score(const std::vector<float>& scores) {
  struct Item {
    uint32_t key;
    int32_t position;
  };
  constexpr int digit_bits = 11, digits = 3, buckets = 1 << digit_bits;
  std::vector<Item> items(scores.size()), sorted(scores.size());
  std::array<std::array<int32_t, buckets>, digits> first{};  // counts at first, then where the next item goes
  for (size_t i = 0; i < scores.size(); ++i) {
    items[i] = {descending_key(scores[i]), static_cast<int32_t>(i)};
    for (int digit = 0; digit < digits; ++digit) ++first[digit][items[i].key >> digit * digit_bits & (buckets - 1)];
  }
  for (int digit = 0; digit < digits; ++digit) {
    std::exclusive_scan(first[digit].begin(), first[digit].end(), first[digit].begin(), int32_t{0});
    for (const Item& item : items) sorted[first[digit][item.key >> digit * digit_bits & (buckets - 1)]++] = item;
    items.swap(sorted);
  }
  std::vector<int32_t> order(scores.size());
  for (size_t i = 0; i < items.size(); ++i) order[i] = items[i].position;
  return order;
}

struct alignas(64) Block {
  float x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes];
  float bound[kLanes];
};

// Free places of a block: without extent, they overlap nothing.
constexpr Block kEmptyBlock{};

// IoU > t means  inter > t / (1 + t) * (area_a + area_b).  The bound of a box is its part of the right-hand side, made
// smaller by more than the roundings of float32; -infinity where float32 may overflow or underflow, and so says
// nothing.
struct BoundRule {
  float share;

  explicit BoundRule(double threshold) : share(static_cast<float>(threshold / (1 + threshold) * (1 - 0x1p-18))) {}

  CASCADEOPS_INLINE float operator()(const Box& box) const {
    const float area = box_area(box), bound = share * area;
    return area > 0x1p-60f && area < 0x1p120f && bound > 0x1p-100f ? bound : -std::numeric_limits<float>::infinity();
  }
};

// Where top left corners lie in an image, as far as candidates have any, and the mean box.
struct Extent {
  double x = 0, y = 0, width = 0, height = 0, mean_width = 0, mean_height = 0;

  explicit Extent(const std::vector<Box>& boxes) {
    if (boxes.empty()) return;
    float x1 = boxes[0].x1, y1 = boxes[0].y1, x2 = x1, y2 = y1;
    for (const Box& box : boxes) {
      x1 = std::min(x1, box.x1), x2 = std::max(x2, box.x1);
      y1 = std::min(y1, box.y1), y2 = std::max(y2, box.y1);
      mean_width += std::max(0.0, static_cast<double>(box.x2) - box.x1);
      mean_height += std::max(0.0, static_cast<double>(box.y2) - box.y1);
    }
    x = x1, y = y1, width = static_cast<double>(x2) - x1, height = static_cast<double>(y2) - y1;
    mean_width /= static_cast<double>(boxes.size()), mean_height /= static_cast<double>(boxes.size());
  }
};

struct Range {
  int first, last;
};

// The kept boxes of one group.
struct Group {
  int columns = 1, rows = 1;                      // of the grid
  double x = 0, y = 0, x_scale = 0, y_scale = 0;  // origin, and cells per pixel
  double widest = 0, highest = 0;                 // of the kept boxes
  int64_t count = 0;                              // of the kept boxes, those without area included
  std::vector<int32_t> newest, used;              // of each cell: its newest block, -1 if none, and boxes in that
  std::vector<int32_t> older;                     // of each block: the next one of its cell, -1 if none
  std::vector<Block> blocks;

  void prepare(const Extent& extent, int64_t candidates) {
    const double most_columns = kCellsPerBox * extent.width / extent.mean_width;  // or infinity, or NaN
    const double most_rows = kCellsPerBox * extent.height / extent.mean_height;
    const auto cells = static_cast<double>(candidates / kCandidatesPerCell);
    const double shrink = std::sqrt(std::min(1.0, cells / (most_columns * most_rows)));
    columns = whole_number(most_columns * shrink, cells);
    rows = whole_number(most_rows * shrink, cells / columns);
    x = extent.x, y = extent.y;
    x_scale = extent.width > 0 ? columns / extent.width : 0;
    y_scale = extent.height > 0 ? rows / extent.height : 0;
    newest.assign(int64_t{columns} * rows, -1);
    used.assign(int64_t{columns} * rows, kLanes);
    blocks.reserve(candidates / kLanes + newest.size());  // the most there can be: growing would hold them twice
  }

  // From 1 to `most`, NaN becomes 1.
  static int whole_number(double value, double most) {
    return value > 1 ? static_cast<int>(std::max(1.0, std::min(value, most))) : 1;
  }

  // Cells do not decrease with the coordinate, so a range of coordinates is a range of cells.
  CASCADEOPS_INLINE static int cell(double distance, double scale, int cells) {
    return static_cast<int>(std::clamp(distance * scale, 0.0, cells - 1.0));
  }

  CASCADEOPS_INLINE void add(const Box& box, float bound) {
    const int place = cell(static_cast<double>(box.y1) - y, y_scale, rows) * columns +
                      cell(static_cast<double>(box.x1) - x, x_scale, columns);
    if (used[place] == kLanes) {
      older.push_back(newest[place]);
      newest[place] = static_cast<int32_t>(blocks.size());
      used[place] = 0;
      blocks.push_back(kEmptyBlock);
    }
    Block& block = blocks[newest[place]];
    const int lane = used[place]++;
    block.x1[lane] = box.x1, block.y1[lane] = box.y1, block.x2[lane] = box.x2, block.y2[lane] = box.y2;
    block.bound[lane] = bound;
    widest = std::max(widest, static_cast<double>(box.x2) - box.x1);
    highest = std::max(highest, static_cast<double>(box.y2) - box.y1);
  }
};

CASCADEOPS_INLINE bool any_above(const Block& block, const Box& box, float bound, const IouTest& test) {
  int maybe = 0;
  for (int i = 0; i < kLanes; ++i) {
    const float width = (block.x2[i] < box.x2 ? block.x2[i] : box.x2) - (block.x1[i] > box.x1 ? block.x1[i] : box.x1);
    const float height = (block.y2[i] < box.y2 ? block.y2[i] : box.y2) - (block.y1[i] > box.y1 ? block.y1[i] : box.y1);
    maybe |= (width > 0) & (height > 0) & (width * height > block.bound[i] + bound);
  }
  if (!maybe) return false;
  for (int i = 0; i < kLanes; ++i) {
    const Box other{block.x1[i], block.y1[i], block.x2[i], block.y2[i]};
    if (iou_above(other, box_area(other), box, box_area(box), test)) return true;
  }
  return false;
}

// The cells whose corners a box that suppresses `low` .. `high` can have along one axis. A millionth more than the rule
// above, which is more than the roundings of float64.
CASCADEOPS_INLINE Range reach(float low, float high, double largest, double origin, double scale, int cells,
                              double threshold) {
  const double size = (static_cast<double>(high) - low) * (1 - threshold) * (1 + 0x1p-20);
  const double before = std::min(size / threshold, largest * (1 + 0x1p-20));
  return {Group::cell(low - before - origin, scale, cells), Group::cell(low + size - origin, scale, cells)};
}

// Visits the candidates of one group that `ranks` name, and marks those that are kept.
CASCADEOPS_CLONES
void sweep(Group& group, const Box* boxes, const int32_t* order, const int32_t* ranks, int64_t count,
           const IouTest& test, int64_t max_output, uint8_t* kept) {
  const BoundRule bound_of(test.threshold);
  for (int64_t i = 0; i < count && group.count < max_output; ++i) {
    const Box box = boxes[order[ranks[i]]];
    const bool has_area = box.x2 > box.x1 && box.y2 > box.y1;  // without, it overlaps nothing
    if (has_area) {
      const float bound = bound_of(box);
      Range columns{0, 0}, rows{0, 0};
      if (group.columns > 1) {
        columns = reach(box.x1, box.x2, group.widest, group.x, group.x_scale, group.columns, test.threshold);
      }
      if (group.rows > 1)
        rows = reach(box.y1, box.y2, group.highest, group.y, group.y_scale, group.rows, test.threshold);
      bool suppressed = false;
      for (int row = rows.first; row <= rows.last && !suppressed; ++row) {
        for (int column = columns.first; column <= columns.last && !suppressed; ++column) {
          int32_t block = group.newest[row * group.columns + column];
          for (; block >= 0 && !suppressed; block = group.older[block]) {
            suppressed = any_above(group.blocks[block], box, bound, test);
          }
        }
      }
      if (suppressed) continue;
      group.add(box, bound);
    }
    ++group.count;
    kept[ranks[i]] = 1;
  }
}

// Ranks begin .. end by group, each group's in ascending order; those of group g begin at first[g].
void divide_by_group(const Candidates& candidates, const std::vector<int32_t>& order, int64_t begin, int64_t end,
                     std::vector<int32_t>& first, std::vector<int32_t>& ranks) {
  first.assign(candidates.num_groups + 1, 0);
  ranks.resize(end - begin);
  if (candidates.groups.empty()) {
    first[1] = static_cast<int32_t>(end - begin);
    return std::iota(ranks.begin(), ranks.end(), static_cast<int32_t>(begin));
  }
  for (int64_t rank = begin; rank < end; ++rank) ++first[candidates.groups[order[rank]] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int64_t rank = begin; rank < end; ++rank) {
    ranks[next[candidates.groups[order[rank]]]++] = static_cast<int32_t>(rank);
  }
}

}  // namespace

std::vector<int32_t> greedy_nms(const Candidates& candidates, const IouTest& test, int64_t max_output) {
  if (candidates.boxes.empty()) return {};  // there may be no group either
  const auto total = static_cast<int64_t>(candidates.boxes.size());
  const std::vector<int32_t> order = sort_by_score(candidates.scores);
  std::vector<int64_t> sizes(candidates.num_groups, candidates.groups.empty() ? total : 0);
  for (int32_t group : candidates.groups) ++sizes[group];
  const Extent extent(candidates.boxes);
  std::vector<Group> groups(candidates.num_groups);

  std::vector<uint8_t> is_kept(total);
  std::vector<int32_t> kept, first, ranks;
  kept.reserve(std::min(total, max_output));
  int64_t chunk = max_output >= total ? total : std::max(kFirstChunk, 2 * max_output);
  for (int64_t begin = 0; begin < total && static_cast<int64_t>(kept.size()) < max_output; chunk *= 2) {
    const int64_t end = begin + std::min(chunk, total - begin);
    divide_by_group(candidates, order, begin, end, first, ranks);
    const int64_t grain = candidates.num_groups * kCandidatesPerThread / (end - begin) + 1;
    torch::stable::parallel_for(0, candidates.num_groups, grain, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group) {
        if (first[group] == first[group + 1]) continue;
        if (sizes[group] == 1) {
          is_kept[ranks[first[group]]] = 1;
          continue;
        }
        if (groups[group].newest.empty()) groups[group].prepare(extent, sizes[group]);
        sweep(groups[group], candidates.boxes.data(), order.data(), &ranks[first[group]],
              first[group + 1] - first[group], test, max_output, is_kept.data());
        if (end == total) groups[group] = Group();  // its memory is free for the next one
      }
    });
    for (int64_t rank = begin; rank < end && static_cast<int64_t>(kept.size()) < max_output; ++rank) {
      if (is_kept[rank]) kept.push_back(order[rank]);
    }
    begin = end;
  }
  return kept;
}

}  // namespace cascadeops
