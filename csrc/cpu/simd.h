// Vectors of one cache line, and the run-time choice of the instruction set.
//
// A function marked CASCADEOPS_CLONES is compiled for AVX-512, AVX2 and the base instruction set, and the loader picks
// one. None contracts a * b + c (-ffp-contract=off), so all give the same bits. Only plain functions can be cloned, and
// only what is inlined into them is compiled for their instruction set: put the work into templates marked
// CASCADEOPS_INLINE and call those from one small cloned function per type.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>  // any C library header: it defines __GLIBC__
#include <cstring>

// Clones need ifunc support (GNU C library) and GCC; elsewhere the compiler's own target flags decide.
#if defined(CASCADEOPS_CLONES)  // a sanitizer build that defines it as nothing
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CASCADEOPS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CASCADEOPS_CLONES
#endif

#define CASCADEOPS_INLINE inline __attribute__((always_inline))
#define CASCADEOPS_INLINE_LAMBDA __attribute__((always_inline))

namespace cascadeops {

// `count` numbers of the accumulator's type (float or double); the compiler splits it where registers are narrower.
// Vectors are passed by reference, because their passing by value depends on the instruction set.
template <typename real>
struct Lanes {
  typedef real type __attribute__((vector_size(64)));
  static constexpr int64_t count = 64 / sizeof(real);
};

typedef uint16_t HalfBits __attribute__((vector_size(32)));
typedef uint32_t FloatBits __attribute__((vector_size(64)));

CASCADEOPS_INLINE void load_lanes(const float* from, Lanes<float>::type& to) { memcpy(&to, from, sizeof(to)); }
CASCADEOPS_INLINE void load_lanes(const double* from, Lanes<double>::type& to) { memcpy(&to, from, sizeof(to)); }

CASCADEOPS_INLINE void load_lanes(const torch::headeronly::BFloat16* from, Lanes<float>::type& to) {
  HalfBits half;
  memcpy(&half, from, sizeof(half));
  const FloatBits bits = __builtin_convertvector(half, FloatBits) << 16;
  memcpy(&to, &bits, sizeof(to));
}

CASCADEOPS_INLINE void load_lanes(const torch::headeronly::Half* from, Lanes<float>::type& to) {
  HalfBits half;
  memcpy(&half, from, sizeof(half));
  const FloatBits wide = __builtin_convertvector(half, FloatBits);
  // With the exponent field moved to its place the number is 2^112 too small, subnormal ones included.
  const FloatBits magnitude = (wide & 0x7fff) << 13;
  memcpy(&to, &magnitude, sizeof(to));
  to *= 0x1p112f;
  FloatBits bits;
  memcpy(&bits, &to, sizeof(bits));
  const FloatBits not_finite = FloatBits((wide & 0x7c00) == 0x7c00) & 0x7f800000;
  bits |= not_finite | (wide & 0x8000) << 16;
  memcpy(&to, &bits, sizeof(to));
}

CASCADEOPS_INLINE void store_lanes(const Lanes<float>::type& from, float* to) { memcpy(to, &from, sizeof(from)); }
CASCADEOPS_INLINE void store_lanes(const Lanes<double>::type& from, double* to) { memcpy(to, &from, sizeof(from)); }

// Rounds to nearest, ties to even, as PyTorch does; float16 below likewise.
CASCADEOPS_INLINE void store_lanes(const Lanes<float>::type& from, torch::headeronly::BFloat16* to) {
  FloatBits bits;
  memcpy(&bits, &from, sizeof(bits));
  const FloatBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const HalfBits half = __builtin_convertvector(from == from ? rounded : FloatBits{} + 0x7fc0, HalfBits);
  memcpy(static_cast<void*>(to), &half, sizeof(half));
}

CASCADEOPS_INLINE void store_lanes(const Lanes<float>::type& from, torch::headeronly::Half* to) {
  FloatBits bits;
  memcpy(&bits, &from, sizeof(bits));
  const FloatBits sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  // Below 2^-14 the spacing is 2^-24, which is that of the floats from 0.5 to 1: the addition rounds.
  Lanes<float>::type magnitude;
  memcpy(&magnitude, &bits, sizeof(bits));
  magnitude += 0.5f;
  FloatBits subnormal;
  memcpy(&subnormal, &magnitude, sizeof(bits));
  subnormal -= 0x3f000000;
  const FloatBits normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  FloatBits result = bits < 0x38800000 ? subnormal : normal;
  result = bits >= 0x47800000 ? FloatBits{} + 0x7c00 : result;
  result = bits > 0x7f800000 ? FloatBits{} + 0x7e00 : result;
  const HalfBits half = __builtin_convertvector(result | sign, HalfBits);
  memcpy(static_cast<void*>(to), &half, sizeof(half));
}

// `count` numbers that lie `stride` apart into the first lanes, 0 into the others.
template <typename scalar_t, typename Vector>
CASCADEOPS_INLINE void load_lanes(const scalar_t* from, int64_t stride, int64_t count, Vector& to) {
  constexpr int64_t width = sizeof(Vector) / sizeof(to[0]);
  if (stride == 1 && count == width) return load_lanes(from, to);
  scalar_t whole[width] = {};
  for (int64_t lane = 0; lane < count; ++lane) whole[lane] = from[lane * stride];
  load_lanes(whole, to);
}

// The first `count` lanes to addresses that lie `stride` apart.
template <typename scalar_t, typename Vector>
CASCADEOPS_INLINE void store_lanes(const Vector& from, scalar_t* to, int64_t stride, int64_t count) {
  constexpr int64_t width = sizeof(Vector) / sizeof(from[0]);
  if (stride == 1 && count == width) return store_lanes(from, to);
  scalar_t whole[width];
  store_lanes(from, whole);
  for (int64_t lane = 0; lane < count; ++lane) to[lane * stride] = whole[lane];
}

// `count` adjacent numbers as several vectors, the numbers in whatever order is the cheapest: store_chunk undoes it.
// Only a single vector may be incomplete.
template <int vectors, typename scalar_t, typename Vector>
CASCADEOPS_INLINE void load_chunk(const scalar_t* from, int64_t count, Vector (&to)[vectors]) {
  constexpr int64_t width = sizeof(Vector) / sizeof(to[0][0]);
  if constexpr (vectors == 1) return load_lanes(from, 1, count, to[0]);
  for (int v = 0; v < vectors; ++v) load_lanes(from + v * width, to[v]);
}

// Numbers with an even index come into one vector, odd ones into the next: one instruction each instead of two.
template <int vectors>
CASCADEOPS_INLINE void load_chunk(const torch::headeronly::BFloat16* from, int64_t count,
                                  Lanes<float>::type (&to)[vectors]) {
  if constexpr (vectors == 1) return load_lanes(from, 1, count, to[0]);
  for (int v = 0; v + 1 < vectors; v += 2) {
    FloatBits pairs;
    memcpy(&pairs, from + v * Lanes<float>::count, sizeof(pairs));
    const FloatBits even = pairs << 16, odd = pairs & 0xffff0000;
    memcpy(&to[v], &even, sizeof(even));
    memcpy(&to[v + 1], &odd, sizeof(odd));
  }
}

template <int vectors, typename scalar_t, typename Vector>
CASCADEOPS_INLINE void store_adjacent(const Vector (&from)[vectors], scalar_t* to) {
  for (int v = 0; v < vectors; ++v) store_lanes(from[v], to + v * (sizeof(Vector) / sizeof(from[0][0])));
}

template <int vectors>
CASCADEOPS_INLINE void store_adjacent(const Lanes<float>::type (&from)[vectors], torch::headeronly::BFloat16* to) {
  if constexpr (vectors == 1) return store_lanes(from[0], to);
  for (int v = 0; v + 1 < vectors; v += 2) {
    FloatBits bits[2];
    for (int i = 0; i < 2; ++i) {
      memcpy(&bits[i], &from[v + i], sizeof(bits[i]));
      bits[i] += 0x7fff + (bits[i] >> 16 & 1);
      bits[i] = from[v + i] == from[v + i] ? bits[i] : FloatBits{} + 0x7fc00000;
    }
    const FloatBits pairs = bits[0] >> 16 | (bits[1] & 0xffff0000);
    memcpy(static_cast<void*>(to + v * Lanes<float>::count), &pairs, sizeof(pairs));
  }
}

// The first `count` numbers of a chunk.
template <int vectors, typename scalar_t, typename Vector>
CASCADEOPS_INLINE void store_chunk(const Vector (&from)[vectors], int64_t count, scalar_t* to) {
  constexpr int64_t whole = vectors * sizeof(Vector) / sizeof(from[0][0]);
  if (count == whole) return store_adjacent(from, to);
  scalar_t all[whole];
  store_adjacent(from, all);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

}  // namespace cascadeops
