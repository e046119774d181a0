// COCO's compressed run lengths. A mask is read down its columns; its runs alternate between 0 and 1, the first one
// counts zeros and may be empty. From the fourth on, a run is stored as its difference from the run two before. A
// number is cut into groups of five bits, lowest first, until the rest is the sign of the last group; bit 5 of a group
// says that more follow, and 48 is added to make it a printable character. Format: github.com/cocodataset/cocoapi,
// common/maskApi.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/portable.h"

namespace cascadeops {

// Writes one number and returns the bytes it takes; with out = nullptr it only counts them.
CASCADEOPS_HD int32_t encode_count(int64_t value, uint8_t* out) {
  for (int32_t length = 0;;) {
    const int64_t group = value & 31;
    value >>= 5;
    const bool more = value != (group & 16 ? -1 : 0);
    if (out) out[length] = static_cast<uint8_t>(48 + (more ? 32 : 0) + group);
    ++length;
    if (!more) return length;
  }
}

// Run lengths -> bytes.
inline std::vector<uint8_t> encode_runs(const std::vector<int64_t>& runs) {
  constexpr int32_t longest = 13;  // 64 bits in groups of five
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < runs.size(); ++i) {
    uint8_t group[longest];
    const int32_t length = encode_count(i > 2 ? runs[i] - runs[i - 2] : runs[i], group);
    bytes.insert(bytes.end(), group, group + length);
  }
  return bytes;
}

}  // namespace cascadeops
