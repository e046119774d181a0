// Input checks of polygon_mask_targets, for CPU and CUDA.
#pragma once

#include "checks.h"

namespace cascadeops {

inline void check_polygon_mask_targets(const torch::stable::Tensor& vertices,
                                       const torch::stable::Tensor& polygon_offsets,
                                       const torch::stable::Tensor& object_offsets, const torch::stable::Tensor& boxes,
                                       const torch::stable::Tensor& index, int64_t output_size) {
  constexpr const char* op = "polygon_mask_targets";
  using torch::headeronly::ScalarType;
  check(vertices.dim() == 2 && vertices.size(1) == 2, op, ": vertices must have shape [V, 2], got ",
        shape_of(vertices));
  check(polygon_offsets.dim() == 1 && polygon_offsets.size(0) >= 1, op,
        ": polygon_offsets must have shape [P + 1], got ", shape_of(polygon_offsets));
  check(object_offsets.dim() == 1 && object_offsets.size(0) >= 1, op, ": object_offsets must have shape [G + 1], got ",
        shape_of(object_offsets));
  check(boxes.dim() == 2 && boxes.size(1) == 4, op, ": boxes must have shape [K, 4], got ", shape_of(boxes));
  check(index.dim() == 1 && index.size(0) == boxes.size(0), op, ": index must have shape [K] = [", boxes.size(0),
        "], got ", shape_of(index));
  check_dtype(op, "vertices", vertices, ScalarType::Float);
  check_dtype(op, "polygon_offsets", polygon_offsets, ScalarType::Long);
  check_dtype(op, "object_offsets", object_offsets, ScalarType::Long);
  check_dtype(op, "boxes", boxes, ScalarType::Float);
  check_dtype(op, "index", index, ScalarType::Long);
  check_same_device(op, "polygon_offsets", polygon_offsets, "vertices", vertices);
  check_same_device(op, "object_offsets", object_offsets, "vertices", vertices);
  check_same_device(op, "boxes", boxes, "vertices", vertices);
  check_same_device(op, "index", index, "vertices", vertices);
  // 32 columns of a target in shared memory, see csrc/cuda/polygon_mask_targets.cu.
  check(output_size > 0 && output_size <= 4096, op, ": output_size must be in [1, 4096], got ", output_size);
}

}  // namespace cascadeops
