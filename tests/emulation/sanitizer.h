// What AddressSanitizer must be told: which stack runs, and which memory is not there. Nothing in a build without it.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#ifdef __SANITIZE_ADDRESS__
inline const void* host_stack;
inline size_t host_stack_size;
inline void leave_host(const char* stack, size_t size) { __sanitizer_start_switch_fiber(nullptr, stack, size); }
inline void enter_thread() { __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size); }
inline void leave_thread() { __sanitizer_start_switch_fiber(nullptr, host_stack, host_stack_size); }
inline void enter_host() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
inline void forbid(const char* memory, size_t size) { __asan_poison_memory_region(memory, size); }
inline void allow(const char* memory, size_t size) { __asan_unpoison_memory_region(memory, size); }
#else
inline void leave_host(const char*, size_t) {}
inline void enter_thread() {}
inline void leave_thread() {}
inline void enter_host() {}
inline void forbid(const char*, size_t) {}
inline void allow(const char*, size_t) {}
#endif

}  // namespace emulation
