// CUDA's atomic functions. Threads are coroutines, which nothing interrupts here.
#pragma once

#include <type_traits>

template <typename T, typename Change>
T emulated_atomic(T* address, Change change) {
  const T old = *address;
  *address = change(old);
  return old;
}

template <typename T>
using same_t = std::common_type_t<T>;  // takes no part in deduction

template <typename T>
T atomicAdd(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicAnd(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return old & value; });
}
template <typename T>
T atomicOr(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return old | value; });
}
template <typename T>
T atomicXor(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return old ^ value; });
}
template <typename T>
T atomicMin(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicExch(T* address, same_t<T> value) {
  return emulated_atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, same_t<T> compare, same_t<T> value) {
  return emulated_atomic(address, [&](T old) { return old == compare ? value : old; });
}
