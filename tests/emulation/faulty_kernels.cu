// Launches that are wrong, each in one way, for the test that the emulation notices: tests/test_emulated_cuda.py.

#include <torch/csrc/stable/library.h>

#include <functional>
#include <map>
#include <string>

#include "cuda/launch.cuh"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kWholeWarp = ~0u;

__device__ unsigned result[kThreads];  // keeps the compiler from leaving things out

__global__ void good_kernel() {
  __shared__ unsigned shared[kThreads];
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  result[threadIdx.x] = shared[kThreads - 1 - threadIdx.x] + __shfl_xor_sync(kWholeWarp, threadIdx.x, 1);
}

__global__ void some_threads_miss_the_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void threads_end_before_the_barrier_kernel() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle_kernel() {
  if (threadIdx.x % 2 == 0) result[threadIdx.x] = __shfl_xor_sync(kWholeWarp, threadIdx.x, 2);
}

__global__ void shuffle_from_outside_of_the_mask_kernel() {
  if (threadIdx.x % 32 < 16) result[threadIdx.x] = __shfl_xor_sync(0xffffu, threadIdx.x, 16);
}

__global__ void foreign_mask_kernel() {
  if (threadIdx.x % 32 < 16) __syncwarp(0xff);
}

// Without a barrier, what a thread reads depends on who comes first.
__global__ void race_kernel() {
  __shared__ unsigned shared[kThreads];
  shared[threadIdx.x] = threadIdx.x;
  result[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void misaligned_vector_kernel() {
  extern __shared__ __align__(16) char shared[];
  *reinterpret_cast<uint4*>(shared + 4 * (1 + threadIdx.x % 3)) = uint4{};
}

__global__ void index_beyond_an_array_kernel() {
  __shared__ unsigned shared[kThreads];
  shared[threadIdx.x + blockDim.x / 64] = 0;
}

__global__ void beyond_dynamic_shared_memory_kernel(int bytes) {
  extern __shared__ char shared[];
  if (threadIdx.x == 0) shared[bytes] = 1;
}

const torch::stable::accelerator::DeviceGuard guard() { return torch::stable::accelerator::DeviceGuard(0); }

template <typename... Arguments>
void launch(void (*kernel)(Arguments...), dim3 blocks, dim3 threads, int shared, Arguments... arguments) {
  const auto on_device = guard();
  kernel<<<blocks, threads, shared, nullptr>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

const std::map<std::string, std::function<void()>> kLaunches = {
    {"good", [] { launch(good_kernel, 3, kThreads, 0); }},
    {"some threads miss the barrier", [] { launch(some_threads_miss_the_barrier_kernel, 1, kThreads, 0); }},
    {"threads end before the barrier", [] { launch(threads_end_before_the_barrier_kernel, 1, kThreads, 0); }},
    {"two barriers", [] { launch(two_barriers_kernel, 1, kThreads, 0); }},
    {"divergent shuffle", [] { launch(divergent_shuffle_kernel, 1, kThreads, 0); }},
    {"shuffle from outside of the mask", [] { launch(shuffle_from_outside_of_the_mask_kernel, 1, kThreads, 0); }},
    {"half a warp", [] { launch(good_kernel, 1, kThreads - 16, 0); }},
    {"foreign mask", [] { launch(foreign_mask_kernel, 1, kThreads, 0); }},
    {"race", [] { launch(race_kernel, 1, kThreads, 0); }},
    {"misaligned vector", [] { launch(misaligned_vector_kernel, 1, kThreads, 256); }},
    {"index beyond an array", [] { launch(index_beyond_an_array_kernel, 1, kThreads, 0); }},
    {"beyond dynamic shared memory", [] { launch(beyond_dynamic_shared_memory_kernel, 1, kThreads, 100, 100); }},
    {"too much dynamic shared memory", [] { launch(good_kernel, 1, kThreads, 48 * 1024 + 1); }},
    {"no blocks", [] { launch(good_kernel, 0, kThreads, 0); }},
    {"no threads", [] { launch(good_kernel, 1, 0, 0); }},
    {"too many threads", [] { launch(good_kernel, 1, 1025, 0); }},
    {"too many rows of blocks", [] { launch(good_kernel, dim3(1, 65536), kThreads, 0); }},
    {"no device guard", [] { good_kernel<<<1, kThreads, 0, nullptr>>>(); }},
    {"no launch check",
     [] {
       const auto on_device = guard();
       good_kernel<<<1, kThreads, 0, nullptr>>>();
       good_kernel<<<1, kThreads, 0, nullptr>>>();
     }},
};

// What the threads of a launch left; the sum over threads i of i * i * value.
int64_t run(std::string name) {
  std::fill(result, result + kThreads, 0u);
  kLaunches.at(name)();
  int64_t sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += int64_t{i} * i * static_cast<int32_t>(result[i]);
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cascadeops_emulation, library) { library.def("run(str name) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(cascadeops_emulation, CompositeExplicitAutograd, library) {
  library.impl("run", TORCH_BOX(&run));
}
