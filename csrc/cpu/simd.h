// Run-time choice of the instruction set: a function marked CASCADEOPS_CLONES is compiled for AVX-512, AVX2 and the
// base instruction set, and the loader picks one. No clone contracts a * b + c (-ffp-contract=off), so all give the
// same bits.
//
// Only plain functions can be cloned, and only what is inlined into them is compiled for their instruction set: put the
// work into templates marked CASCADEOPS_INLINE and call those from one small cloned function per type.
#pragma once

#include <cstddef>  // any C library header: it defines __GLIBC__

// Clones need ifunc support (GNU C library) and GCC; elsewhere the compiler's own target flags decide.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CASCADEOPS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CASCADEOPS_CLONES
#endif

#define CASCADEOPS_INLINE inline __attribute__((always_inline))
