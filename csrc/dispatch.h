// From a run-time dtype to a C++ type, for the host code of CPU and CUDA kernels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <utility>

#include "checks.h"

namespace cascadeops {

// Sums of half types are kept in float32, sums of float64 in float64.
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Calls body(scalar_t{}) with the C++ type of `dtype`: dispatch_floating(dtype, "op", [&](auto zero) { using scalar_t =
// decltype(zero); ... }).
template <typename Body>
void dispatch_floating(torch::headeronly::ScalarType dtype, const char* op, Body&& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      check(false, op, ": dtype must be float32, float64, float16 or bfloat16, got ",
            torch::headeronly::toString(dtype));
  }
}

}  // namespace cascadeops
