// sigmoid(t) = 1 / (1 + E) and its derivative, from E = exp(-t). As 1 - sigmoid(t) = E * sigmoid(t), the derivative
// loses no digits where the sigmoid is close to 1. How E is found differs from device to device; this does not. `real`
// is a number or, on the CPU, a vector of them.
#pragma once

#include "common/portable.h"

namespace cascadeops {

// t is clamped to +-kSigmoidRange before E is taken: E is then a normal number of float32 (between 2^-126 and 2^126),
// and so no product overflows. Beyond, a sigmoid or its derivative is below 2^-125 where it should be even closer to 0.
constexpr float kSigmoidRange = 0x1.5d51ecp6f;  // 87.33, just below 126 ln 2

// value * sigmoid(t), one rounding less than the product.
template <typename real>
CASCADEOPS_HD void times_sigmoid_of(const real& E, real& value) {
  value = value / (1 + E);
}

template <typename real>
CASCADEOPS_HD void sigmoid_of(const real& E, real& value, real& derivative) {
  value = 1 / (1 + E);
  derivative = value * (E * value);
}

}  // namespace cascadeops
