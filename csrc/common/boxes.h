// Intersection over union against a threshold, with one answer for every device and instruction set.
//
// The answer is defined in float64:  inter / (area_a + area_b - inter) > threshold  for boxes that share some area.
// Float32 decides almost all pairs: its relative error is below 2^-19 (three roundings each in inter and in both areas,
// three in the union, two in the product: 17 half-ulps of 2^-24, to first order), so a pair that passes or fails by
// more than 2^-18 has the float64 answer too. The few between are decided in float64. The bound needs a union far from
// overflow and underflow and a threshold that float32 holds; outside of that every overlapping pair counts as doubtful.
#pragma once

#include "common/portable.h"

namespace cascadeops {

struct Box {  // not aligned: inputs may start at any float
  float x1, y1, x2, y2;
};

CASCADEOPS_HD float box_area(const Box& box) { return (box.x2 - box.x1) * (box.y2 - box.y1); }

// False for NaN and infinity.
CASCADEOPS_HD bool is_finite(const Box& box) {
  const auto finite = [](float x) { return x - x == 0; };
  return finite(box.x1) && finite(box.y1) && finite(box.x2) && finite(box.y2);
}

// Intersection over union rounded as PyTorch rounds it in float32, so that an assignment made of these numbers is the
// one that tensor operations give: boxes without overlap have 0, and a union below 1e-6 counts as that.
CASCADEOPS_HD float rounded_iou(const Box& a, float area_a, const Box& b, float area_b) {
  const float width = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  const float height = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  const float inter = (width > 0 ? width : 0.0f) * (height > 0 ? height : 0.0f);
  const float union_area = area_a + area_b - inter;
  return inter / (union_area > 1e-6f ? union_area : 1e-6f);
}

struct IouTest {
  double threshold;
  float low, high;  // inter < low * union: surely not above; inter > high * union: surely above
};

inline IouTest make_iou_test(double threshold) {
  constexpr double margin = 0x1p-18, tiny = 0x1p-100;
  if (threshold > 0 && threshold < tiny) return {threshold, -1.0f, 2.0f};  // neither side is ever sure
  return {threshold, static_cast<float>(threshold * (1 - margin)), static_cast<float>(threshold * (1 + margin))};
}

constexpr int kIouAbove = 1;
constexpr int kIouDoubt = 2;

// kIouAbove, kIouDoubt or 0 (not above). Free of branches, so that a loop over boxes becomes vector code.
CASCADEOPS_HD int compare_iou(const Box& a, float area_a, const Box& b, float area_b, const IouTest& test) {
  const float width = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  const float height = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  const float inter = width * height;
  const float union_area = area_a + area_b - inter;
  const int overlap = (width > 0) & (height > 0);
  const int safe = (union_area > 0x1p-60f) & (union_area < 0x1p120f);
  const int above = overlap & safe & (inter > test.high * union_area);
  const int below = safe & (inter < test.low * union_area);
  return above | ((overlap & ~above & ~below & 1) << 1);
}

// The definition, for the pairs in doubt. No a * b + c may be fused here (see the flags in setup.py).
CASCADEOPS_HD bool iou_above_exactly(const Box& a, const Box& b, double threshold) {
  const double width = static_cast<double>(a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  const double height = static_cast<double>(a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  if (!(width > 0 && height > 0)) return false;
  const double inter = width * height;
  const double area_a = (static_cast<double>(a.x2) - a.x1) * (static_cast<double>(a.y2) - a.y1);
  const double area_b = (static_cast<double>(b.x2) - b.x1) * (static_cast<double>(b.y2) - b.y1);
  return inter / (area_a + area_b - inter) > threshold;
}

CASCADEOPS_HD bool iou_above(const Box& a, float area_a, const Box& b, float area_b, const IouTest& test) {
  const int answer = compare_iou(a, area_a, b, area_b, test);
  return answer == kIouDoubt ? iou_above_exactly(a, b, test.threshold) : answer == kIouAbove;
}

}  // namespace cascadeops
