// polygon_mask_targets on CUDA: polygons drawn into the M x M cells of a box, by the rule of common/polygon.h.
//
// Layouts: vertices [V, 2] float32 (x, y), polygon_offsets [P + 1], object_offsets [G + 1] and index [K] int64, boxes
// [K, 4] float32, targets [K, M, M] uint8, all contiguous. A block makes 32 columns of one box's target: all of it for
// M up to 32. Its threads share the edges of a polygon, one edge each at a time; a flip is the xor of one bit of shared
// memory, so that their order does not matter. Then one thread a column turns flips into cells, by a prefix xor over
// words of 32 rows, and adds them to the object's. An edge is a few divisions and, where it is steep, a search of some
// ten steps for each column it crosses.
//
// Bytes: the polygons once from L2, M * M bytes a box. A few hundred boxes are less than a megabyte: the launch itself
// is the floor.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks_polygon.h"
#include "common/polygon.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 128;  // about the vertices of an outline; a multiple of the 32 that turn flips into cells
constexpr int kColumns = 32;

// Bit i: the xor of bits 0 .. i.
__device__ uint32_t prefix_xor(uint32_t bits) {
  for (int shift = 1; shift < 32; shift *= 2) bits ^= bits << shift;
  return bits;
}

// Whether [begin, end) lies in [0, count).
__device__ bool is_range(int64_t begin, int64_t end, int64_t count) {
  return begin >= 0 && begin <= end && end <= count;
}

__global__ void __launch_bounds__(kThreads)
    polygon_mask_targets_kernel(const float* __restrict__ vertices, int64_t num_vertices,
                                const int64_t* __restrict__ polygon_offsets, int64_t num_polygons,
                                const int64_t* __restrict__ object_offsets, int64_t num_objects,
                                const float* __restrict__ boxes, const int64_t* __restrict__ index, int64_t tiles,
                                int32_t size, uint8_t* __restrict__ targets, uint64_t* fault) {
  extern __shared__ uint32_t bits[];
  const int32_t words = (size + 31) / 32, tiles_across = (size + kColumns - 1) / kColumns;
  uint32_t* const flips = bits;                              // [words, kColumns], row 32 w + i in bit i
  uint32_t* const cells = bits + int64_t{words} * kColumns;  // the same of the object's polygons so far

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t k = tile / tiles_across;
    const int32_t first_column = static_cast<int32_t>(tile % tiles_across) * kColumns;
    const int32_t last_column = min(first_column + kColumns, size);
    for (int32_t i = threadIdx.x; i < words * kColumns; i += kThreads) flips[i] = cells[i] = 0;
    __syncthreads();

    // The same for all threads of the block, as everything is that decides about synchronisation.
    const float* box = boxes + 4 * k;
    const int64_t object = index[k];
    bool valid = object >= 0 && object < num_objects && isfinite(box[0]) && isfinite(box[1]) && isfinite(box[2]) &&
                 isfinite(box[3]);
    const int64_t first = valid ? object_offsets[object] : 0, last = valid ? object_offsets[object + 1] : 0;
    valid = valid && is_range(first, last, num_polygons);
    const CellGrid grid(box, size);
    for (int64_t polygon = first; valid && polygon < last; ++polygon) {
      const int64_t begin = polygon_offsets[polygon], end = polygon_offsets[polygon + 1];
      valid = is_range(begin, end, num_vertices);
      bool finite = true;
      for (int64_t i = begin + threadIdx.x; valid && i < end; i += kThreads) {
        const float* from = vertices + 2 * i;
        const float* to = vertices + 2 * (i + 1 < end ? i + 1 : begin);
        finite = finite && isfinite(from[0]) && isfinite(from[1]);
        for_each_flip(grid.point(from), grid.point(to), first_column, last_column, size,
                      [&](int32_t column, int32_t row) {
                        if (row < size)
                          atomicXor(flips + int64_t{row} / 32 * kColumns + column - first_column, 1u << row % 32);
                      });
      }
      valid = __syncthreads_and(finite) && valid;
      if (threadIdx.x < kColumns) {
        uint32_t inside = 0;  // all ones where the last row of the word before is inside
        for (int32_t i = threadIdx.x; i < words * kColumns; i += kColumns) {
          const uint32_t word = prefix_xor(flips[i]) ^ inside;
          inside = word >> 31 ? ~0u : 0u;
          cells[i] |= word;
          flips[i] = 0;
        }
      }
      __syncthreads();
    }

    const bool padding = object == -1;
    if (!valid && !padding && threadIdx.x == 0) note_fault(fault, Fault::kPolygonMaskTargets, k);
    const int32_t columns = last_column - first_column;
    for (int32_t i = threadIdx.x; i < size * kColumns; i += kThreads) {
      const int32_t row = i / kColumns, column = i % kColumns;
      if (column >= columns) continue;
      const uint32_t cell = cells[row / 32 * kColumns + column] >> row % 32 & 1;
      targets[(k * size + row) * size + first_column + column] = valid ? static_cast<uint8_t>(cell) : uint8_t{0};
    }
    __syncthreads();
  }
}

Tensor polygon_mask_targets_cuda(Tensor vertices,         // [V, 2]
                                 Tensor polygon_offsets,  // [P + 1]
                                 Tensor object_offsets,   // [G + 1]
                                 Tensor boxes,            // [K, 4]
                                 Tensor index,            // [K]
                                 int64_t output_size) {
  check_polygon_mask_targets(vertices, polygon_offsets, object_offsets, boxes, index, output_size);
  const torch::stable::accelerator::DeviceGuard guard(vertices.get_device_index());
  for (Tensor* tensor : {&vertices, &polygon_offsets, &object_offsets, &boxes, &index})
    *tensor = torch::stable::contiguous(*tensor);
  Tensor targets =
      torch::stable::new_empty(boxes, {boxes.size(0), output_size, output_size}, torch::headeronly::ScalarType::Byte);
  if (targets.numel() == 0) return targets;
  const auto size = static_cast<int32_t>(output_size);
  const int64_t tiles = boxes.size(0) * ((size + kColumns - 1) / kColumns);
  const size_t shared = 2 * sizeof(uint32_t) * kColumns * ((size + 31) / 32);  // 32 KiB for 4096 rows
  polygon_mask_targets_kernel<<<grid_blocks(tiles, 1), kThreads, shared, current_stream(vertices)>>>(
      vertices.const_data_ptr<float>(), vertices.size(0), polygon_offsets.const_data_ptr<int64_t>(),
      polygon_offsets.size(0) - 1, object_offsets.const_data_ptr<int64_t>(), object_offsets.size(0) - 1,
      boxes.const_data_ptr<float>(), index.const_data_ptr<int64_t>(), tiles, size, targets.mutable_data_ptr<uint8_t>(),
      fault_word(vertices));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return targets;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("polygon_mask_targets", TORCH_BOX(&cascadeops::polygon_mask_targets_cuda));
}
