// One definition of the arithmetic for host and device: the functions of csrc/common are inline and marked
// CASCADEOPS_HD.
#pragma once

#ifdef __CUDACC__
#define CASCADEOPS_HD __host__ __device__ __forceinline__
#else
#define CASCADEOPS_HD inline __attribute__((always_inline))
#endif
