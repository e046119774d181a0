// exp(-t) of vectors, for |t| up to the range of sigmoid.h, and what brings t there.
//
// Written without comparisons: where a vector is wider than a register, GCC makes scalar code of them.
#pragma once

#include <cmath>

#include "common/sigmoid.h"
#include "cpu/cache_line.h"

namespace cascadeops {

constexpr int32_t kRangeBits = 0x42aea8f6;  // of kSigmoidRange as a float

// 2^f for |f| <= 1/2: the polynomials of a degree whose largest relative error is smallest. Degree 5: 1.1e-7; in pairs,
// which are independent.
template <typename scalar_t>
CASCADEOPS_INLINE void power_of_two(const Lanes<float>::type& f, Lanes<float>::type& power, scalar_t) {
  const Lanes<float>::type low = f * 0x1.62e42ap-1f + 1.0f, middle = f * 0x1.c6b75ap-5f + 0x1.ebf9bap-3f;
  const Lanes<float>::type high = f * 0x1.5bb92ap-10f + 0x1.3ceb6cp-7f, square = f * f;
  power = low + square * (middle + square * high);
}

// Degree 3: 1.1e-4, a twentieth of the rounding of a bfloat16 result. 2^0 is 1, so the gate of 0 rounds as 1/2 does.
CASCADEOPS_INLINE void power_of_two(const Lanes<float>::type& f, Lanes<float>::type& power,
                                    torch::headeronly::BFloat16) {
  const Lanes<float>::type low = f * 0x1.62f5fap-1f + 1.0f, high = f * 0x1.c2a218p-5f + 0x1.f00c4cp-3f;
  power = low + f * f * high;
}

// exp(-t) for maps of scalar_t. But for bfloat16 off by at most 2e-7 + 5e-8 |t| of the result.
template <typename scalar_t>
CASCADEOPS_INLINE void exp_of_negated(const Lanes<float>::type& t, Lanes<float>::type& result) {
  using Vector = Lanes<float>::type;
  // exp(-t) = 2^(n + f) with |f| <= 1/2. Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
  const Vector exponent = t * -0x1.715476p0f;
  const Vector shifted = exponent + 0x1.8p23f;
  const Vector f = exponent - (shifted - 0x1.8p23f);
  Vector power;
  power_of_two(f, power, scalar_t());
  FloatBits n, power_bits;
  memcpy(&n, &shifted, sizeof(n));
  memcpy(&power_bits, &power, sizeof(power_bits));
  power_bits += n << 23;  // times 2^n
  memcpy(&result, &power_bits, sizeof(result));
}

template <typename scalar_t>
CASCADEOPS_INLINE void exp_of_negated(const Lanes<double>::type& t, Lanes<double>::type& result) {
  for (int64_t lane = 0; lane < Lanes<double>::count; ++lane) result[lane] = std::exp(-t[lane]);
}

// t within +-kSigmoidRange; NaN stays NaN.
CASCADEOPS_INLINE void clamp_to_range(Lanes<float>::type& t) {
  constexpr int32_t infinity = 0x7f800000;
  SignedBits bits;
  memcpy(&bits, &t, sizeof(bits));
  // Magnitudes order like their bits, and x >> 31 is a mask of all ones for x < 0. Both kinds to keep: below, and NaN.
  const SignedBits magnitude = bits & 0x7fffffff, above = magnitude - kRangeBits;
  const SignedBits keep = above >> 31 | (infinity - magnitude) >> 31;
  const SignedBits clamped = (kRangeBits + (above & keep)) | (bits & ~0x7fffffff);
  memcpy(&t, &clamped, sizeof(t));
}

CASCADEOPS_INLINE void clamp_to_range(Lanes<double>::type& t) {
  constexpr double range = kSigmoidRange;
  for (int64_t lane = 0; lane < Lanes<double>::count; ++lane)
    t[lane] = t[lane] > range ? range : t[lane] < -range ? -range : t[lane];
}

// Whether any number that was noted lies beyond the range, or is NaN: a fourth of what clamping costs.
class RangeCheck {
 public:
  CASCADEOPS_INLINE void note(const Lanes<float>::type& t) {
    SignedBits bits;
    memcpy(&bits, &t, sizeof(bits));
    left_ |= kRangeBits - (bits & 0x7fffffff);
  }
  CASCADEOPS_INLINE void note(const Lanes<double>::type&) { left_ -= 1; }  // doubles are always clamped

  CASCADEOPS_INLINE bool beyond() const {
    uint64_t pairs[8], any = 0;
    memcpy(pairs, &left_, sizeof(pairs));
    for (const uint64_t pair : pairs) any |= pair;
    return any & 0x8000000080000000;
  }

 private:
  SignedBits left_{};  // negative: beyond
};

}  // namespace cascadeops
