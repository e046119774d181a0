// Greedy NMS of one image's candidates, shared by padded_nms and multiclass_nms.
#pragma once

#include <cstdint>
#include <vector>

#include "common/boxes.h"

namespace cascadeops {

// Parallel arrays, in the order that decides between equal scores.
struct Candidates {
  std::vector<Box> boxes;
  std::vector<float> scores;    // no NaN
  std::vector<int32_t> groups;  // 0 .. num_groups - 1; empty for a single group
  int64_t num_groups = 1;
};

// Positions of the candidates to keep, best first, at most max_output.
std::vector<int32_t> greedy_nms(const Candidates& candidates, const IouTest& test, int64_t max_output);

}  // namespace cascadeops
