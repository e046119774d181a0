// A cache line of numbers as vectors of the accumulator's type, for what is done to each number by itself.
//
// Half types make two vectors: of the numbers at even places and of those at odd ones. These are the halves of 32-bit
// lanes, so that nothing moves from lane to lane, which is what widening and narrowing sixteen numbers mostly costs.
// Like exp.h without comparisons. A processor with AVX-512 converts float16 itself, in half the time; GCC's vectors do
// not reach these instructions, so they are written out, and make one vector of the first half, one of the second.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "dispatch.h"

namespace cascadeops {

typedef int32_t SignedBits __attribute__((vector_size(64)));

// All ones where x is negative.
CASCADEOPS_INLINE void mask_of_negative(const SignedBits& x, SignedBits& mask) { mask = x >> 31; }

// A half type in the upper 16 bits, the rest 0 or not -> float.
CASCADEOPS_INLINE void widen(const SignedBits& upper, Lanes<float>::type& to, torch::headeronly::BFloat16) {
  const SignedBits bits = upper & ~0xffff;
  memcpy(&to, &bits, sizeof(to));
}

CASCADEOPS_INLINE void widen(const SignedBits& upper, Lanes<float>::type& to, torch::headeronly::Half) {
  // With the exponent field moved to its place the number is 2^112 too small, subnormal ones included.
  SignedBits bits = upper >> 3 & int32_t(0x8fffe000), not_finite;
  memcpy(&to, &bits, sizeof(to));
  to *= 0x1p112f;
  memcpy(&bits, &to, sizeof(to));
  mask_of_negative(0x477fffff - (bits & 0x7fffffff), not_finite);
  bits |= not_finite & 0x7f800000;
  memcpy(&to, &bits, sizeof(to));
}

// float -> a half type in the upper 16 bits, rounded to nearest, ties to even; the lower ones are anything.
// bfloat16: a NaN stays one, because its lower bits are 0: it has come from a bfloat16, or the processor has made it.
CASCADEOPS_INLINE void narrow(const Lanes<float>::type& from, SignedBits& upper, torch::headeronly::BFloat16) {
  FloatBits bits;
  memcpy(&bits, &from, sizeof(bits));
  bits += 0x7fff + (bits >> 16 & 1);
  memcpy(&upper, &bits, sizeof(upper));
}

CASCADEOPS_INLINE void narrow(const Lanes<float>::type& from, SignedBits& upper, torch::headeronly::Half) {
  SignedBits bits, above, nan;
  memcpy(&bits, &from, sizeof(bits));
  const SignedBits sign = bits & ~0x7fffffff, magnitude = bits & 0x7fffffff;
  // Times 4 by way of 2^112, so that what float16 cannot hold becomes infinite. To this is added the power of two whose
  // last place is float16's for such a number: the addition rounds. Below 2^-14 float16's places are all the same.
  Lanes<float>::type number, power;
  memcpy(&number, &magnitude, sizeof(number));
  number = number * 0x1p112f * 0x1p-110f;
  const SignedBits over = (magnitude & 0x7f800000) - 0x38800000;
  mask_of_negative(over, above);
  const SignedBits power_bits = 0x40000000 + (over & ~above);
  memcpy(&power, &power_bits, sizeof(power));
  number += power;
  memcpy(&bits, &number, sizeof(bits));
  mask_of_negative(0x7f800000 - magnitude, nan);
  // The power's own bit, a 1 above the ten of the mantissa, carries into the exponent field.
  upper = sign | ((((bits >> 13 & 0x7c00) + (bits & 0xfff)) | (nan & 0x7e00)) << 16);
}

#if defined(__x86_64__) && defined(__GNUC__)
inline bool converts_float16() { return __builtin_cpu_supports("avx512f"); }

CASCADEOPS_INLINE void widen_in_hardware(const torch::headeronly::Half* from, Lanes<float>::type (&part)[2]) {
  asm("vcvtph2ps (%2), %%zmm0\n\tvmovups %%zmm0, %0\n\t"
      "vcvtph2ps 32(%2), %%zmm0\n\tvmovups %%zmm0, %1"
      : "=m"(part[0]), "=m"(part[1])
      : "r"(from), "m"(*reinterpret_cast<const char (*)[64]>(from))
      : "xmm0");
}

CASCADEOPS_INLINE void narrow_in_hardware(const Lanes<float>::type (&part)[2], torch::headeronly::Half* to) {
  asm("vmovups %1, %%zmm0\n\tvcvtps2ph $0, %%zmm0, (%3)\n\t"
      "vmovups %2, %%zmm0\n\tvcvtps2ph $0, %%zmm0, 32(%3)"
      : "=m"(*reinterpret_cast<char (*)[64]>(to))
      : "m"(part[0]), "m"(part[1]), "r"(to)
      : "xmm0");
}
#else
inline bool converts_float16() { return false; }
inline void widen_in_hardware(const torch::headeronly::Half*, Lanes<float>::type (&)[2]) {}
inline void narrow_in_hardware(const Lanes<float>::type (&)[2], torch::headeronly::Half*) {}
#endif

template <typename scalar_t>
struct CacheLine {
  using real = accumulate_t<scalar_t>;
  static constexpr int64_t count = 64 / sizeof(scalar_t);
  static constexpr int parts = sizeof(real) / sizeof(scalar_t);
  typename Lanes<real>::type part[parts];

  // Where number i stands in the parts.
  static int64_t place(int64_t i) { return in_hardware() ? i : i % parts * (count / parts) + i / parts; }

  // `numbers` that lie `stride` apart; the others are 0.
  CASCADEOPS_INLINE void load(const scalar_t* from, int64_t stride, int64_t numbers) {
    if (stride == 1 && numbers == count) return load(from);
    scalar_t whole[count] = {};
    for (int64_t i = 0; i < numbers; ++i) whole[i] = from[i * stride];
    load(whole);
  }

  // The first `numbers` to addresses that lie `stride` apart.
  CASCADEOPS_INLINE void store(scalar_t* to, int64_t stride, int64_t numbers) const {
    if (stride == 1 && numbers == count) return store(to);
    scalar_t whole[count];
    store(whole);
    for (int64_t i = 0; i < numbers; ++i) to[i * stride] = whole[i];
  }

 private:
  static bool in_hardware() { return std::is_same_v<scalar_t, torch::headeronly::Half> && converts_float16(); }

  CASCADEOPS_INLINE void load(const scalar_t* from) {
    if constexpr (parts == 1) {
      memcpy(part, from, sizeof(part));
    } else {
      if constexpr (std::is_same_v<scalar_t, torch::headeronly::Half>)
        if (in_hardware()) return widen_in_hardware(from, part);
      SignedBits pairs;
      memcpy(&pairs, from, sizeof(pairs));
      widen(pairs << 16, part[0], scalar_t());
      widen(pairs, part[1], scalar_t());
    }
  }

  CASCADEOPS_INLINE void store(scalar_t* to) const {
    if constexpr (parts == 1) {
      memcpy(to, part, sizeof(part));
    } else {
      if constexpr (std::is_same_v<scalar_t, torch::headeronly::Half>)
        if (in_hardware()) return narrow_in_hardware(part, to);
      SignedBits even, odd;
      narrow(part[0], even, scalar_t());
      narrow(part[1], odd, scalar_t());
      const SignedBits pairs = (even >> 16 & 0xffff) | (odd & ~0xffff);
      memcpy(static_cast<void*>(to), &pairs, sizeof(pairs));
    }
  }
};

}  // namespace cascadeops
