// Results of many megabytes lie in pages that the system hands out, zeroed, when they are first touched. At 4 KiB a
// page that costs more than filling them: asked for huge pages, it gives 2 MiB at a time.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cascadeops {

// For a tensor that is about to be filled whole. A wish: where the system cannot grant it, nothing changes.
inline void ask_for_huge_pages([[maybe_unused]] torch::stable::Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cascadeops
