// Input checks of box_proposals.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "checks.h"

namespace cascadeops {

constexpr size_t kMaxProposalLevels = 8;

// Candidates of an image: of each level its best top_k.
inline int64_t candidates_of_image(const std::vector<torch::stable::Tensor>& logits, int64_t top_k) {
  int64_t total = 0;
  for (const torch::stable::Tensor& level : logits) total += std::min(top_k, level.size(1));
  return total;
}

inline void check_box_proposals(const std::vector<torch::stable::Tensor>& logits,
                                const std::vector<torch::stable::Tensor>& deltas,
                                const std::vector<torch::stable::Tensor>& anchors,
                                const torch::stable::Tensor& image_sizes, int64_t top_k, int64_t max_proposals,
                                double iou_threshold, const std::vector<double>& stds) {
  constexpr const char* op = "box_proposals";
  using torch::headeronly::ScalarType;
  check(!logits.empty() && logits.size() <= kMaxProposalLevels, op, ": logits must hold 1 to ", kMaxProposalLevels,
        " levels, got ", logits.size());
  check(deltas.size() == logits.size() && anchors.size() == logits.size(), op,
        ": deltas and anchors must hold as many levels as logits, ", logits.size(), ", got ", deltas.size(), " and ",
        anchors.size());
  check(image_sizes.dim() == 2 && image_sizes.size(1) == 2, op, ": image_sizes must have shape [N, 2], got ",
        shape_of(image_sizes));
  check_dtype(op, "image_sizes", image_sizes, ScalarType::Float);
  const int64_t batch = image_sizes.size(0);
  const ScalarType dtype = logits[0].scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
        ": logits[0] must have dtype float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  for (size_t level = 0; level < logits.size(); ++level) {
    const std::string number = "[" + std::to_string(level) + "]";
    const torch::stable::Tensor* const tensors[] = {&logits[level], &deltas[level], &anchors[level]};
    const std::string names[] = {"logits" + number, "deltas" + number, "anchors" + number};
    check(logits[level].dim() == 2 && logits[level].size(0) == batch, op, ": ", names[0],
          " must have shape [N, A] with N = ", batch, ", got ", shape_of(logits[level]));
    const int64_t rows = logits[level].size(1);
    check(rows <= kMaxCandidates / 2, op, ": ", names[0], " must have fewer than 2**30 anchors, got ", rows);
    check(deltas[level].dim() == 3 && deltas[level].size(0) == batch && deltas[level].size(1) == rows &&
              deltas[level].size(2) == 4,
          op, ": ", names[1], " must have shape [N, A, 4] = [", batch, ", ", rows, ", 4], got ",
          shape_of(deltas[level]));
    check(anchors[level].dim() == 2 && anchors[level].size(0) == rows && anchors[level].size(1) == 4, op, ": ",
          names[2], " must have shape [A, 4] = [", rows, ", 4], got ", shape_of(anchors[level]));
    for (int i = 0; i < 3; ++i) {
      check_dtype(op, names[i].c_str(), *tensors[i], i < 2 ? dtype : ScalarType::Float);
      check_same_device(op, names[i].c_str(), *tensors[i], "image_sizes", image_sizes);
    }
  }
  check(top_k > 0 && top_k <= kMaxCandidates / 2, op, ": top_k must be in [1, 2**30), got ", top_k);
  check(candidates_of_image(logits, top_k) <= kMaxCandidates, op, ": the levels must have fewer than 2**31 candidates");
  check_nms_limits(op, iou_threshold, "max_proposals", max_proposals);
  check(stds.size() == 4, op, ": stds must be four numbers, got ", stds.size());
  for (const double std : stds) check(std > 0 && std::isfinite(std), op, ": stds must be positive, got ", std);
}

}  // namespace cascadeops
