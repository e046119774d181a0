// Input checks of self_calibrated_gate, see checks.h.
#pragma once

#include "checks.h"
#include "common/nearest.h"

namespace cascadeops {

inline void check_self_calibrated_gate(const torch::stable::Tensor& x, const torch::stable::Tensor& k3,
                                       const torch::stable::Tensor& k2) {
  constexpr const char* op = "self_calibrated_gate";
  check(x.dim() == 4, op, ": x must have shape [N, C, H, W], got ", shape_of(x));
  const auto has_size_of_x = [&](const torch::stable::Tensor& map) {
    return map.dim() == 4 && map.size(0) == x.size(0) && map.size(1) == x.size(1) && map.size(2) == x.size(2) &&
           map.size(3) == x.size(3);
  };
  check(has_size_of_x(k3), op, ": k3 must have the shape of x, ", shape_of(x), ", got ", shape_of(k3));
  check(k2.dim() == 4 && k2.size(0) == x.size(0) && k2.size(1) == x.size(1), op,
        ": k2 must have shape [N, C, h, w] = [", x.size(0), ", ", x.size(1), ", h, w], got ", shape_of(k2));
  check(x.numel() == 0 || k2.numel() > 0, op, ": k2 must have at least one cell, got ", shape_of(k2));
  check(x.size(2) <= kMostPixels && x.size(3) <= kMostPixels && k2.size(2) <= kMostPixels && k2.size(3) <= kMostPixels,
        op, ": x, k3 and k2 must have at most 2**24 rows and columns, got ", shape_of(x), " and ", shape_of(k2));
  check_dtype(op, "k3", k3, x.scalar_type());
  check_dtype(op, "k2", k2, x.scalar_type());
  check_same_device(op, "k3", k3, "x", x);
  check_same_device(op, "k2", k2, "x", x);
}

inline void check_self_calibrated_gate_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                                                const torch::stable::Tensor& k3, const torch::stable::Tensor& k2) {
  constexpr const char* op = "self_calibrated_gate";
  check_self_calibrated_gate(x, k3, k2);
  check(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) && grad.size(2) == x.size(2) &&
            grad.size(3) == x.size(3),
        op, ": grad must have the shape of x, ", shape_of(x), ", got ", shape_of(grad));
  check_dtype(op, "grad", grad, x.scalar_type());
  check_same_device(op, "grad", grad, "x", x);
}

}  // namespace cascadeops
