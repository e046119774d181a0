// Input checks of match_boxes.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"

namespace cascadeops {

inline void check_match_boxes(const torch::stable::Tensor& boxes, const torch::stable::Tensor& valid,
                              const torch::stable::Tensor& gt_boxes, const torch::stable::Tensor& gt_valid,
                              double positive_iou, double negative_iou, std::optional<double> low_quality_iou) {
  constexpr const char* op = "match_boxes";
  using torch::headeronly::ScalarType;
  const auto check_pair = [&](const char* name, const torch::stable::Tensor& rows, const char* mask_name,
                              const torch::stable::Tensor& mask, const char* letter) {
    check(rows.dim() == 3 && rows.size(2) == 4, op, ": ", name, " must have shape [N, ", letter, ", 4], got ",
          shape_of(rows));
    check(mask.dim() == 2 && mask.size(0) == rows.size(0) && mask.size(1) == rows.size(1), op, ": ", mask_name,
          " must have shape [N, ", letter, "] = [", rows.size(0), ", ", rows.size(1), "], got ", shape_of(mask));
    check_dtype(op, name, rows, ScalarType::Float);
    check_dtype(op, mask_name, mask, ScalarType::Bool);
    check(rows.size(1) < int64_t{1} << 30, op, ": ", name, " must have fewer than 2**30 rows, got ", rows.size(1));
    check_same_device(op, name, rows, "boxes", boxes);
    check_same_device(op, mask_name, mask, "boxes", boxes);
  };
  check_pair("boxes", boxes, "valid", valid, "P");
  check_pair("gt_boxes", gt_boxes, "gt_valid", gt_valid, "G");
  check(gt_boxes.size(0) == boxes.size(0), op, ": gt_boxes must have the batch size of boxes, ", boxes.size(0),
        ", got ", gt_boxes.size(0));
  check(positive_iou >= 0 && positive_iou <= 1, op, ": positive_iou must be in [0, 1], got ", positive_iou);
  check(negative_iou >= 0 && negative_iou <= positive_iou, op, ": negative_iou must be in [0, positive_iou], got ",
        negative_iou, " with positive_iou ", positive_iou);
  check(!low_quality_iou || (*low_quality_iou >= 0 && *low_quality_iou <= 1), op,
        ": low_quality_iou must be in [0, 1] or None, got ", low_quality_iou.value_or(0));
}

}  // namespace cascadeops
