// polygon_mask_targets on the CPU: for each box the edges of its object's polygons are moved onto the target's grid,
// and each notes the cells where it flips the columns below, see common/polygon.h. A running parity down the rows then
// gives the cells of a polygon; an object is the union of its polygons. Threads share the boxes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks_polygon.h"
#include "common/polygon.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

void check_offsets(const char* name, const Tensor& offsets, const char* what, int64_t count) {
  constexpr const char* op = "polygon_mask_targets";
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < offsets.size(0); ++i) {
    check(offset[i] >= 0 && offset[i] <= count, op, ": ", name, "[", i, "] must be in [0, ", count, "], the number of ",
          what, ", got ", offset[i]);
    check(i == 0 || offset[i] >= offset[i - 1], op, ": ", name, " must not decrease, got ", offset[i], " at [", i,
          "] after ", offset[i - (i > 0)]);
  }
}

// All of them contiguous.
void check_values(const Tensor& vertices, const Tensor& polygon_offsets, const Tensor& object_offsets,
                  const Tensor& boxes, const Tensor& index) {
  constexpr const char* op = "polygon_mask_targets";
  check_offsets("polygon_offsets", polygon_offsets, "vertices", vertices.size(0));
  check_offsets("object_offsets", object_offsets, "polygons", polygon_offsets.size(0) - 1);
  const float* coordinate = vertices.const_data_ptr<float>();
  for (int64_t i = 0; i < vertices.numel(); ++i)
    check(std::isfinite(coordinate[i]), op, ": vertices[", i / 2, ", ", i % 2, "] must be finite, got ", coordinate[i]);
  const int64_t objects = object_offsets.size(0) - 1;
  for (int64_t k = 0; k < index.size(0); ++k) {
    const int64_t object = index.const_data_ptr<int64_t>()[k];
    check(object >= -1 && object < objects, op, ": index[", k, "] must be in [-1, ", objects, "), got ", object);
    const float* box = boxes.const_data_ptr<float>() + 4 * k;
    for (int i = 0; i < 4; ++i)
      check(object < 0 || std::isfinite(box[i]), op, ": boxes[", k, ", ", i, "] must be finite, got ", box[i]);
  }
}

// Adds the cells of one polygon to a target of size x size. flips, [size + 1, size], is 0 before and after.
void draw_polygon(const float* vertices, int64_t count, const CellGrid& grid, int32_t size, std::vector<uint8_t>& flips,
                  std::vector<uint8_t>& inside, uint8_t* target) {
  for (int64_t i = 0; i < count; ++i) {
    const float* next = vertices + 2 * (i + 1 < count ? i + 1 : 0);
    for_each_flip(grid.point(vertices + 2 * i), grid.point(next), 0, size, size,
                  [&](int32_t column, int32_t row) { flips[row * size + column] ^= 1; });
  }
  std::fill(inside.begin(), inside.end(), uint8_t{0});
  for (int64_t row = 0; row < size; ++row) {
    for (int64_t column = 0; column < size; ++column) {
      inside[column] ^= flips[row * size + column];
      target[row * size + column] |= inside[column];
    }
  }
  std::fill(flips.begin(), flips.end(), uint8_t{0});
}

Tensor polygon_mask_targets_cpu(Tensor vertices,         // [V, 2]
                                Tensor polygon_offsets,  // [P + 1]
                                Tensor object_offsets,   // [G + 1]
                                Tensor boxes,            // [K, 4]
                                Tensor index,            // [K]
                                int64_t output_size) {
  check_polygon_mask_targets(vertices, polygon_offsets, object_offsets, boxes, index, output_size);
  for (Tensor* tensor : {&vertices, &polygon_offsets, &object_offsets, &boxes, &index})
    *tensor = torch::stable::contiguous(*tensor);
  check_values(vertices, polygon_offsets, object_offsets, boxes, index);
  Tensor targets =
      torch::stable::new_empty(boxes, {boxes.size(0), output_size, output_size}, torch::headeronly::ScalarType::Byte);

  const float* vertex = vertices.const_data_ptr<float>();
  const int64_t* polygon = polygon_offsets.const_data_ptr<int64_t>();
  const int64_t* object = object_offsets.const_data_ptr<int64_t>();
  const float* box = boxes.const_data_ptr<float>();
  const int64_t* owner = index.const_data_ptr<int64_t>();
  auto* out = targets.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, boxes.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> flips((output_size + 1) * output_size), inside(output_size);
    for (int64_t k = begin; k < end; ++k) {
      uint8_t* target = out + k * output_size * output_size;
      std::fill_n(target, output_size * output_size, uint8_t{0});
      if (owner[k] < 0) continue;
      const CellGrid grid(box + 4 * k, output_size);
      for (int64_t p = object[owner[k]]; p < object[owner[k] + 1]; ++p)
        draw_polygon(vertex + 2 * polygon[p], polygon[p + 1] - polygon[p], grid, static_cast<int32_t>(output_size),
                     flips, inside, target);
    }
  });
  return targets;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("polygon_mask_targets", TORCH_BOX(&cascadeops::polygon_mask_targets_cpu));
}
