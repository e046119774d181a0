// What the compiler calls where -fsanitize=alignment,bounds finds a fault: a misaligned vector, an index beyond an
// array. In a kernel it ends the launch, so that a test can expect it. (The build with AddressSanitizer has the
// compiler's own library for this.)
#include <cstdio>
#include <cstdlib>
#include <string>

#include "emulator.h"

#ifndef __SANITIZE_ADDRESS__

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

static void report(const SourceLocation& location, const std::string& what) {
  const std::string text = what + ", " + location.file + ":" + std::to_string(location.line);
  if (emulation::is_running()) emulation::fault(text);
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}

extern "C" {

void __ubsan_handle_type_mismatch_v1(const SourceLocation* data, uintptr_t address) {
  report(*data, "misaligned access to address ..." + std::to_string(address % 64) + " (modulo 64)");
}

void __ubsan_handle_out_of_bounds(const SourceLocation* data, uintptr_t index) {
  report(*data, "index " + std::to_string(static_cast<int64_t>(index)) + " is outside of an array");
}

}  // extern "C"

#endif
