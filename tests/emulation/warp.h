// CUDA's functions through which the threads of a block or of a warp meet. A shuffle's `width` is always the warp's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "emulator.h"

inline void __syncthreads(emulation::Place place = emulation::Place::here()) {
  emulation::meet_block("__syncthreads", place, false);
}
inline int __syncthreads_count(int value, emulation::Place place = emulation::Place::here()) {
  return emulation::meet_block("__syncthreads_count", place, value != 0);
}
inline int __syncthreads_or(int value, emulation::Place place = emulation::Place::here()) {
  return emulation::meet_block("__syncthreads_or", place, value != 0) > 0;
}
inline int __syncthreads_and(int value, emulation::Place place = emulation::Place::here()) {
  return emulation::meet_block("__syncthreads_and", place, value == 0) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, emulation::Place place = emulation::Place::here()) {
  emulation::meet_warp("__syncwarp", place, mask, 0);
}

inline unsigned __ballot_sync(unsigned mask, int value, emulation::Place place = emulation::Place::here()) {
  const uint64_t* values = emulation::meet_warp("__ballot_sync", place, mask, value != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    if (mask >> lane & 1) bits |= static_cast<unsigned>(values[lane]) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int value, emulation::Place place = emulation::Place::here()) {
  return __ballot_sync(mask, value, place) != 0;
}
inline int __all_sync(unsigned mask, int value, emulation::Place place = emulation::Place::here()) {
  return __ballot_sync(mask, value, place) == mask;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emulation::Place place = emulation::Place::here()) {
  const uint64_t* values = emulation::meet_warp("__reduce_max_sync", place, mask, value);
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    if (mask >> lane & 1) value = std::max(value, static_cast<unsigned>(values[lane]));
  return value;
}

// The value of lane `from(own lane)`; the own value where that is no lane of the warp.
template <typename T, typename From>
T emulated_shuffle(const char* operation, unsigned mask, T value, From from, emulation::Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* values = emulation::meet_warp(operation, place, mask, bits);
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int source = from(static_cast<int>(thread % emulation::kWarp));
  if (source < 0 || source >= emulation::kWarp) return value;
  if (!(mask >> source & 1)) emulation::fault(std::string(operation) + " reads a lane outside of its mask");
  std::memcpy(&value, &values[source], sizeof value);
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, emulation::Place place = emulation::Place::here()) {
  return emulated_shuffle("__shfl_sync", mask, value, [&](int) { return lane & 31; }, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, emulation::Place place = emulation::Place::here()) {
  return emulated_shuffle(
      "__shfl_up_sync", mask, value, [&](int own) { return own - static_cast<int>(distance); }, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, emulation::Place place = emulation::Place::here()) {
  return emulated_shuffle(
      "__shfl_down_sync", mask, value, [&](int own) { return own + static_cast<int>(distance); }, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, emulation::Place place = emulation::Place::here()) {
  return emulated_shuffle("__shfl_xor_sync", mask, value, [&](int own) { return own ^ bits; }, place);
}
