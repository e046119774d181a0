// sigmoid(t) = 1 / (1 + exp(-t)) and its derivative, from e = exp(-|t|), which is at most 1: nothing overflows, and the
// derivative, which is e / (1 + e)^2 on both sides, loses no digits where the sigmoid is close to 1.
//
// How e is found differs from device to device; this does not. `real` is a number or, on the CPU, a vector of them.
#pragma once

#include "common/portable.h"

namespace cascadeops {

template <typename real>
CASCADEOPS_HD void sigmoid_of(const real& t, const real& e, real& value) {
  const real one = real{} + 1;
  value = (t < 0 ? e : one) / (one + e);
}

template <typename real>
CASCADEOPS_HD void sigmoid_of(const real& t, const real& e, real& value, real& derivative) {
  const real one = real{} + 1, above = one / (one + e), below = e * above;
  value = t < 0 ? below : above;
  derivative = above * below;
}

}  // namespace cascadeops
