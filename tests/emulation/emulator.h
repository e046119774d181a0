// CUDA launches on the CPU, for tests. The blocks of a grid run one after the other, in a random order; so do the
// threads of a block, each until it ends or meets others: at a barrier, in a shuffle, a vote. When all are there that
// the meeting needs, they go on. What could hang or mislead a GPU is a fault here: an exception with the kernel's name
// and the place in its source.
//
// What this shows and what it does not: CONTRIBUTING.md, "CUDA kernels without a GPU".
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;

namespace emulation {

constexpr int kWarp = 32;

// The place of a call, when it is the default argument of the function that is called.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Waits until every lane of `mask` calls the same operation at the same place with the same mask; the values that they
// bring, by lane.
const uint64_t* meet_warp(const char* operation, Place place, unsigned mask, uint64_t value);

// Waits until every thread of the block calls the same operation at the same place; how many bring a value other than
// 0.
int meet_block(const char* operation, Place place, bool value);

// Ends the launch with an exception. For use by a running thread.
[[noreturn]] void fault(const std::string& text);

// Whether a kernel is running.
bool is_running();

// The launch's dynamic shared memory.
char* dynamic_shared_memory();

// Allows the next launch this much dynamic shared memory. False if no device has so much.
bool allow_shared_memory(int64_t bytes);

// What every launch must have around it: a device guard before, a launch check after.
void enter_device_guard();
void leave_device_guard();
void check_launch();

void run(const char* kernel, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread);

// Stands for kernel<<<blocks, threads, shared, stream>>>, see launch_syntax.py.
template <typename Kernel>
auto launcher(const char* name, Kernel kernel, dim3 blocks, dim3 threads, size_t shared = 0, cudaStream_t = nullptr) {
  return [=](auto... arguments) { run(name, blocks, threads, shared, [&] { kernel(arguments...); }); };
}

}  // namespace emulation
