// Rows of boxes, scores and groups as candidates of greedy NMS, for nms and padded_nms.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/greedy_nms.h"

namespace cascadeops {

struct RowCandidates {
  Candidates candidates;
  std::vector<int32_t> row;  // of each candidate
};

// Collects the rows of one image; groups may be null. Returns the first row with a NaN score or a box that is not
// finite, or -1. skip_padding: a row with score -infinity is no candidate, and its box is not looked at.
int64_t collect_rows(const Box* boxes, const float* scores, const int64_t* groups, int64_t rows, bool skip_padding,
                     RowCandidates& image);

}  // namespace cascadeops
