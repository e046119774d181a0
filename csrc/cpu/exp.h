// exp(t) of vectors, for t <= 0.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace cascadeops {

// Off by 2e-7 + 5e-8 |t| of the result at most; 0 below -87, where float32's normal numbers end; NaN stays NaN.
// Free of branches, and short: it decides the speed of what calls it.
CASCADEOPS_INLINE void exp_of_negative(const Lanes<float>::type& t, Lanes<float>::type& result) {
  using Vector = Lanes<float>::type;
  // exp(t) = 2^(n + f) with |f| <= 1/2. Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
  const Vector exponent = t * 0x1.715476p0f;
  const Vector shifted = exponent + 0x1.8p23f;
  const Vector f = exponent - (shifted - 0x1.8p23f);
  // 2^f: the polynomial of degree 5 whose largest relative error is smallest, 1.1e-7.
  Vector p = f * 0x1.5bb92ap-10f + 0x1.3ceb6cp-7f;
  p = p * f + 0x1.c6b75ap-5f;
  p = p * f + 0x1.ebf9bap-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.0f;
  FloatBits n, bits;
  memcpy(&n, &shifted, sizeof(n));
  memcpy(&bits, &p, sizeof(bits));
  bits += n << 23;  // times 2^n
  memcpy(&p, &bits, sizeof(p));
  result = t < -87.0f ? Vector{} : p;
}

CASCADEOPS_INLINE void exp_of_negative(const Lanes<double>::type& t, Lanes<double>::type& result) {
  result = t;
  for (int64_t lane = 0; lane < Lanes<double>::count; ++lane) result[lane] = std::exp(result[lane]);
}

// -|t|
CASCADEOPS_INLINE void negative_magnitude(const Lanes<float>::type& t, Lanes<float>::type& result) {
  FloatBits bits;
  memcpy(&bits, &t, sizeof(bits));
  bits |= 0x80000000u;
  memcpy(&result, &bits, sizeof(result));
}

CASCADEOPS_INLINE void negative_magnitude(const Lanes<double>::type& t, Lanes<double>::type& result) {
  result = t > 0 ? -t : t;
}

}  // namespace cascadeops
