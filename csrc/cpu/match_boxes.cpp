// match_boxes on the CPU. Threads share the boxes in blocks of 64.
//
// 1. Each block collects the ground truths that touch its outline (of neighbouring anchors, a few of hundreds; all
// others
//    have IoU 0), and compares with each of them, 16 boxes a vector operation. This gives the best ground truth of each
//    box and the best IoU of each ground truth, which is a maximum and so the same for any number of threads.
// 2. With low_quality_iou: blocks with a box that reaches it compare again, by the same inlined function and so to the
//    same bits, and boxes with exactly the best IoU of a ground truth go to the last such one.
//
// Memory: 4 bytes for each box, 28 + 4 * threads for each ground truth. No matrix of IoUs exists.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "checks_match_boxes.h"
#include "common/boxes.h"
#include "cpu/simd.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 64;
constexpr int64_t kWorkPerThread = 1 << 18;  // comparisons; fewer are not worth a thread
constexpr int64_t kNegative = -1, kIgnored = -2;

struct Thresholds {
  float positive, negative;
  std::optional<float> low_quality;
};

// The valid ground truths of an image.
struct GroundTruths {
  std::vector<Box> boxes;
  std::vector<float> areas;
  std::vector<int32_t> index;  // row of each
  std::vector<float> best;     // its best IoU over the boxes of the image
};

// 64 boxes, one array per coordinate. Rows that are not valid hold a box without area.
struct BoxBlock {
  alignas(64) float x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];
  int count;
  Box outline;

  CASCADEOPS_INLINE BoxBlock(const Box* boxes, const bool* valid, int64_t rows)
      : count(static_cast<int>(std::min<int64_t>(rows, kBlock))) {
    constexpr float largest = std::numeric_limits<float>::max();
    outline = {largest, largest, -largest, -largest};
    for (int i = 0; i < kBlock; ++i) {
      const bool used = i < count && valid[i];
      const Box box = used ? boxes[i] : Box{};
      x1[i] = box.x1, y1[i] = box.y1, x2[i] = box.x2, y2[i] = box.y2;
      area[i] = box_area(box);
      if (!used) continue;
      outline.x1 = std::min(outline.x1, box.x1), outline.x2 = std::max(outline.x2, box.x2);
      outline.y1 = std::min(outline.y1, box.y1), outline.y2 = std::max(outline.y2, box.y2);
    }
  }

  CASCADEOPS_INLINE void iou_with(const Box& box, float box_area, float* iou) const {
    for (int i = 0; i < kBlock; ++i) {
      iou[i] = rounded_iou(box, box_area, {x1[i], y1[i], x2[i], y2[i]}, area[i]);
    }
  }
};

// Positions of the ground truths that can have an IoU above 0 with a box inside the outline.
CASCADEOPS_INLINE int64_t collect_near(const GroundTruths& gt, const Box& outline, int32_t* near) {
  int64_t count = 0;
  for (size_t g = 0; g < gt.boxes.size(); ++g) {
    const Box& box = gt.boxes[g];
    near[count] = static_cast<int32_t>(g);
    count += (box.x1 < outline.x2) & (box.x2 > outline.x1) & (box.y1 < outline.y2) & (box.y2 > outline.y1);
  }
  return count;
}

// Step 1 for one block: match and best_iou of its rows; raises best_of_gt. near: room for every ground truth.
CASCADEOPS_CLONES
void match_block(const Box* boxes, const bool* valid, int64_t rows, const GroundTruths& gt, float positive,
                 float negative, int32_t* near, float* best_of_gt, float* best_iou, int64_t* match) {
  const BoxBlock block(boxes, valid, rows);
  alignas(64) float best[kBlock], iou[kBlock];
  alignas(64) int32_t best_gt[kBlock];
  for (int i = 0; i < kBlock; ++i) best[i] = gt.boxes.empty() ? -1.0f : 0.0f, best_gt[i] = 0;
  const int64_t count = collect_near(gt, block.outline, near);
  for (int64_t n = 0; n < count; ++n) {
    const int32_t g = near[n];
    block.iou_with(gt.boxes[g], gt.areas[g], iou);
    int32_t highest;  // IoUs are not negative, so their bits order like integers, whose maximum is vector code
    memcpy(&highest, &best_of_gt[g], sizeof highest);
    for (int i = 0; i < kBlock; ++i) {
      int32_t bits;
      memcpy(&bits, &iou[i], sizeof bits);
      highest = std::max(highest, bits);
      best_gt[i] = iou[i] > best[i] ? g : best_gt[i];
      best[i] = iou[i] > best[i] ? iou[i] : best[i];
    }
    memcpy(&best_of_gt[g], &highest, sizeof highest);
  }
  for (int i = 0; i < block.count; ++i) {
    best_iou[i] = best[i];
    match[i] = best[i] < negative ? kNegative : best[i] >= positive ? gt.index[best_gt[i]] : kIgnored;
    if (!valid[i]) match[i] = kIgnored, best_iou[i] = -1.0f;
  }
}

// Step 2 for one block.
CASCADEOPS_CLONES
void claim_block(const Box* boxes, const bool* valid, int64_t rows, const GroundTruths& gt, float low_quality,
                 int32_t* near, const float* best_iou, int64_t* match) {
  const int64_t used = std::min<int64_t>(rows, kBlock);
  if (std::none_of(best_iou, best_iou + used, [&](float best) { return best >= low_quality; })) return;
  const BoxBlock block(boxes, valid, rows);
  alignas(64) float iou[kBlock];
  constexpr float everywhere = std::numeric_limits<float>::infinity();
  // A ground truth whose best IoU is 0 claims boxes far from it.
  const Box outline = low_quality > 0 ? block.outline : Box{-everywhere, -everywhere, everywhere, everywhere};
  const int64_t count = collect_near(gt, outline, near);
  for (int64_t n = 0; n < count; ++n) {
    const int32_t g = near[n];
    if (!(gt.best[g] >= low_quality)) continue;
    block.iou_with(gt.boxes[g], gt.areas[g], iou);
    for (int i = 0; i < block.count; ++i) {
      if (iou[i] == gt.best[g] && valid[i]) match[i] = gt.index[g];
    }
  }
}

// [rows of one image]: contiguous.
void match_image(const Box* boxes, const bool* valid, int64_t rows, GroundTruths& gt, const Thresholds& thresholds,
                 float* best_iou, int64_t* match) {
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  const int64_t grain = kWorkPerThread / kBlock / (static_cast<int64_t>(gt.boxes.size()) + 16) + 1;
  std::mutex merging;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> near(gt.boxes.size() + 1);
    std::vector<float> best_of_gt(gt.boxes.size(), 0.0f);
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, rows); row += kBlock) {
      match_block(boxes + row, valid + row, rows - row, gt, thresholds.positive, thresholds.negative, near.data(),
                  best_of_gt.data(), best_iou + row, match + row);
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t g = 0; g < best_of_gt.size(); ++g) gt.best[g] = std::max(gt.best[g], best_of_gt[g]);
  });
  if (!thresholds.low_quality) return;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> near(gt.boxes.size() + 1);
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, rows); row += kBlock) {
      claim_block(boxes + row, valid + row, rows - row, gt, *thresholds.low_quality, near.data(), best_iou + row,
                  match + row);
    }
  });
}

void check_rows(const char* name, const Box* boxes, const bool* valid, int64_t rows, int64_t image) {
  for (int64_t row = 0; row < rows; ++row) {
    check(!valid[row] || is_finite(boxes[row]), "match_boxes: ", name, " must be finite in valid rows; see image ",
          image, ", row ", row);
  }
}

// The tensor itself when each image's boxes lie together, as in anchors expanded to a batch; else a contiguous copy.
Tensor dense_rows(const Tensor& boxes) {
  return boxes.stride(2) == 1 && boxes.stride(1) == 4 ? boxes : torch::stable::contiguous(boxes);
}

Tensor match_boxes_cpu(const Tensor& boxes,     // [N, P, 4]
                       const Tensor& valid,     // [N, P]
                       const Tensor& gt_boxes,  // [N, G, 4]
                       const Tensor& gt_valid,  // [N, G]
                       double positive_iou, double negative_iou, std::optional<double> low_quality_iou) {
  check_match_boxes(boxes, valid, gt_boxes, gt_valid, positive_iou, negative_iou, low_quality_iou);
  const int64_t batch = boxes.size(0), rows = boxes.size(1), gt_rows = gt_boxes.size(1);
  Tensor match = torch::stable::new_empty(boxes, {batch, rows}, ScalarType::Long);
  if (batch == 0 || rows == 0) return match;
  const Tensor dense_boxes = dense_rows(boxes), dense_valid = torch::stable::contiguous(valid);
  const Tensor dense_gt = torch::stable::contiguous(gt_boxes), dense_gt_valid = torch::stable::contiguous(gt_valid);
  Thresholds thresholds{static_cast<float>(positive_iou), static_cast<float>(negative_iou), std::nullopt};
  if (low_quality_iou) thresholds.low_quality = static_cast<float>(*low_quality_iou);

  std::vector<float> best_iou(rows);
  for (int64_t image = 0; image < batch; ++image) {
    const auto* box_data = reinterpret_cast<const Box*>(static_cast<const float*>(dense_boxes.const_data_ptr()) +
                                                        image * dense_boxes.stride(0));
    const bool* valid_data = static_cast<const bool*>(dense_valid.const_data_ptr()) + image * rows;
    const auto* gt_data = static_cast<const Box*>(dense_gt.const_data_ptr()) + image * gt_rows;
    const bool* gt_valid_data = static_cast<const bool*>(dense_gt_valid.const_data_ptr()) + image * gt_rows;
    check_rows("boxes", box_data, valid_data, rows, image);
    check_rows("gt_boxes", gt_data, gt_valid_data, gt_rows, image);
    GroundTruths gt;
    for (int64_t g = 0; g < gt_rows; ++g) {
      if (!gt_valid_data[g]) continue;
      gt.boxes.push_back(gt_data[g]);
      gt.areas.push_back(box_area(gt_data[g]));
      gt.index.push_back(static_cast<int32_t>(g));
    }
    gt.best.assign(gt.boxes.size(), 0.0f);
    match_image(box_data, valid_data, rows, gt, thresholds, best_iou.data(),
                match.mutable_data_ptr<int64_t>() + image * rows);
  }
  return match;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("match_boxes", TORCH_BOX(&cascadeops::match_boxes_cpu));
}
