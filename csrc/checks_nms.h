// Input checks of nms and batched_nms.
#pragma once

#include "checks.h"

namespace cascadeops {

// idxs: null for nms.
inline void check_nms(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                      const torch::stable::Tensor* idxs, double iou_threshold) {
  check(boxes.dim() == 2 && boxes.size(1) == 4, op, ": boxes must have shape [N, 4], got ", shape_of(boxes));
  check(boxes.size(0) <= kMaxCandidates, op, ": boxes must have fewer than 2**31 rows, got ", boxes.size(0));
  check(scores.dim() == 1 && scores.size(0) == boxes.size(0), op, ": scores must have shape [N] = [", boxes.size(0),
        "], got ", shape_of(scores));
  check_dtype(op, "boxes", boxes, torch::headeronly::ScalarType::Float);
  check_dtype(op, "scores", scores, torch::headeronly::ScalarType::Float);
  check_same_device(op, "scores", scores, "boxes", boxes);
  if (idxs != nullptr) {
    check(idxs->dim() == 1 && idxs->size(0) == boxes.size(0), op, ": idxs must have shape [N] = [", boxes.size(0),
          "], got ", shape_of(*idxs));
    check_dtype(op, "idxs", *idxs, torch::headeronly::ScalarType::Long);
    check_same_device(op, "idxs", *idxs, "boxes", boxes);
  }
  check_nms_limits(op, iou_threshold, "rows", boxes.size(0));
}

// bad_row: the first row with a NaN score or a box that is not finite, or -1.
inline void check_nms_values(const char* op, int64_t bad_row) {
  check(bad_row < 0, op, ": boxes must be finite and scores not NaN; see row ", bad_row);
}

}  // namespace cascadeops
