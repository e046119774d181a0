// Input checks shared by the CPU and CUDA kernels: one function per operator, so that an error reads the same on both.
// A message names the operator, the argument, the rule and what came: "padded_nms: boxes must have shape [B, N, 4], got [4, 4]".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace cascadeops {

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

}  // namespace cascadeops
