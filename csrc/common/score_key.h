// Scores as integers for radix sorts.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace cascadeops {

// Orders like the float, reversed: the smallest key is the best score. Both zeros have one key. Only NaN reaches
// kNoCandidate.
CASCADEOPS_HD uint32_t descending_key(float score) {
  score += 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

constexpr uint32_t kNoCandidate = 0xFFFFFFFFu;

}  // namespace cascadeops
