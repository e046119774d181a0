#include "cpu/nms_rows.h"

#include <algorithm>
#include <cmath>

namespace cascadeops {
namespace {

// Group numbers that lie close together, as labels and levels do: a table with a place for each.
int32_t number_by_table(const std::vector<int64_t>& groups, int64_t smallest, uint64_t range,
                        std::vector<int32_t>& numbers) {
  std::vector<int32_t> table(range + 1, -1);
  int32_t count = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    int32_t& number = table[static_cast<uint64_t>(groups[i]) - static_cast<uint64_t>(smallest)];
    if (number < 0) number = count++;
    numbers[i] = number;
  }
  return count;
}

// Any group numbers: open addressing, where a slot holds 1 + the position where its group appeared first.
int32_t number_by_hash(const std::vector<int64_t>& groups, std::vector<int32_t>& numbers) {
  int bits = 4;
  while (size_t{1} << bits < 2 * groups.size()) ++bits;
  std::vector<int32_t> slots(size_t{1} << bits);
  int32_t count = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    size_t slot = (static_cast<uint64_t>(groups[i]) * 0x9E3779B97F4A7C15u) >> (64 - bits);  // Fibonacci hashing
    while (slots[slot] != 0 && groups[slots[slot] - 1] != groups[i]) slot = (slot + 1) & (slots.size() - 1);
    if (slots[slot] == 0) {
      slots[slot] = static_cast<int32_t>(i) + 1;
      numbers[i] = count++;
    } else {
      numbers[i] = numbers[slots[slot] - 1];
    }
  }
  return count;
}

// Replaces arbitrary group numbers by 0, 1, ... in order of appearance and returns how many there are.
int32_t number_groups(const std::vector<int64_t>& groups, std::vector<int32_t>& numbers) {
  numbers.resize(groups.size());
  if (groups.empty()) return 0;
  const auto [smallest, largest] = std::minmax_element(groups.begin(), groups.end());
  const uint64_t range = static_cast<uint64_t>(*largest) - static_cast<uint64_t>(*smallest);
  return range < groups.size() ? number_by_table(groups, *smallest, range, numbers) : number_by_hash(groups, numbers);
}

}  // namespace

int64_t collect_rows(const Box* boxes, const float* scores, const int64_t* groups, int64_t rows, bool skip_padding,
                     RowCandidates& image) {
  Candidates& candidates = image.candidates;
  std::vector<int64_t> given_groups;
  candidates.boxes.reserve(rows);
  candidates.scores.reserve(rows);
  image.row.reserve(rows);
  if (groups) given_groups.reserve(rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (skip_padding && scores[row] == -INFINITY) continue;
    if (std::isnan(scores[row]) || !is_finite(boxes[row])) return row;
    candidates.boxes.push_back(boxes[row]);
    candidates.scores.push_back(scores[row]);
    image.row.push_back(static_cast<int32_t>(row));
    if (groups) given_groups.push_back(groups[row]);
  }
  if (groups) candidates.num_groups = number_groups(given_groups, candidates.groups);
  return -1;
}

}  // namespace cascadeops
