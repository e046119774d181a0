// What this binary was built with and what it picks on this machine, for `python -m cascadeops`. Both are plain C
// symbols that Python reads with ctypes, since they must answer even where torch refuses the operators.

#include "cpu/simd.h"

#define CASCADEOPS_TEXT(...) #__VA_ARGS__
#define CASCADEOPS_EXPANDED(...) CASCADEOPS_TEXT(__VA_ARGS__)
#define CASCADEOPS_EXPORT extern "C" __attribute__((visibility("default")))

// A JSON object: version, compiler, flags, torch (whose headers), cuda, architectures. setup.py defines it.
CASCADEOPS_EXPORT const char* cascadeops_build_info() { return CASCADEOPS_BUILD_INFO; }

// The clone (csrc/cpu/simd.h) that the loader chooses on this processor.
CASCADEOPS_EXPORT const char* cascadeops_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  constexpr bool has_clones = sizeof(CASCADEOPS_EXPANDED(CASCADEOPS_CLONES)) > 1;
  if (has_clones && __builtin_cpu_supports("avx512f")) return "AVX-512";
  if (has_clones && __builtin_cpu_supports("avx2")) return "AVX2";
#endif
  return "baseline of the compiler";
}
