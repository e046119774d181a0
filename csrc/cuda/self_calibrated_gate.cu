// The gate of a self-calibrated convolution on CUDA.
//
//   out[n, c, y, x] = k3[n, c, y, x] * sigmoid(x[n, c, y, x] + k2[n, c, cell(y), cell(x)])
//
// with PyTorch's nearest rule (common/nearest.h). Maps may have any strides; results are channels-last if x is, else
// contiguous.
//
// Forward: a block owns up to 256 packs of one row of one image. In channels-last maps a pack is 16 bytes of channels
// of one pixel, and neighbouring threads have neighbouring channels, then pixels; in contiguous maps it is 16 bytes of
// columns of one channel. Where sizes, strides or addresses do not allow 16 bytes, a pack is one element.
//
// Backward: a block owns 64 (cell, pack of channels) pairs of one row of cells, and four threads share the rows of a
// cell; in contiguous maps a pack is one channel, and neighbouring threads have neighbouring cells. Each thread
// recomputes the sigmoid of its pixels and keeps the sum for k2 in registers; the four sums meet in shared memory and
// are added in order. So nothing is zeroed before, nothing is added atomically, and results are the same in every run.
//
// Bytes, in elements of the map: 3 forward (x, k3, out), 5 backward (grad, x, k3, two gradients), and k2's sixteenth.
// For bfloat16 at 32 x 200 x 336 (res2 of an 800 x 1344 image) that is 13.2 MB and 21.8 MB: 4.4 us and 7.3 us at the
// 3.0 TB/s that an H100 reaches. No GPU has run these kernels yet.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "checks_self_calibrated_gate.h"
#include "common/nearest.h"
#include "common/sigmoid.h"
#include "cuda/launch.cuh"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kRowThreads = 4;                        // pooling by 4, the published one, gives each thread one row
constexpr int kCellThreads = kThreads / kRowThreads;  // two warps across, so that a warp's accesses are neighbours

template <typename scalar_t>
struct Map {
  scalar_t* data;
  int64_t image, channel, row, column;  // strides, in elements

  __device__ scalar_t* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * image + c * channel + y * row + x * column;
  }
};

template <typename scalar_t, int vector>
struct alignas(sizeof(scalar_t) * vector) Pack {
  scalar_t value[vector];
};

template <int vector, typename scalar_t>
__device__ Pack<scalar_t, vector> load(const scalar_t* from) {
  return *reinterpret_cast<const Pack<scalar_t, vector>*>(from);
}

template <int vector, typename scalar_t>
__device__ void store(const Pack<scalar_t, vector>& pack, scalar_t* to) {
  *reinterpret_cast<Pack<scalar_t, vector>*>(to) = pack;
}

struct Sizes {
  NearestAxis rows, columns;
  int64_t channels;
};

// exp(-t), t clamped; NaN stays NaN.
__device__ float exp_of_negated(float t) {
  return expf(t > kSigmoidRange ? -kSigmoidRange : t < -kSigmoidRange ? kSigmoidRange : -t);
}
__device__ double exp_of_negated(double t) {
  constexpr double range = kSigmoidRange;
  return exp(t > range ? -range : t < -range ? range : -t);
}

template <typename scalar_t, int vector, bool channels_last>
__global__ void __launch_bounds__(kThreads)
    self_calibrated_gate_forward_kernel(const __grid_constant__ Sizes sizes,
                                        const __grid_constant__ Map<const scalar_t> x,
                                        const __grid_constant__ Map<const scalar_t> k3,
                                        const __grid_constant__ Map<const scalar_t> k2,
                                        const __grid_constant__ Map<scalar_t> out) {
  using real = accumulate_t<scalar_t>;
  const unsigned rows = static_cast<unsigned>(sizes.rows.pixels), row = blockIdx.x % rows, n = blockIdx.x / rows;
  const int64_t cell_row = sizes.rows.cell_of(row);
  // Below 2^31, see the launch.
  const unsigned across =
      static_cast<unsigned>(channels_last ? sizes.channels / vector : sizes.columns.pixels / vector);
  const unsigned items = across * static_cast<unsigned>(channels_last ? sizes.columns.pixels : sizes.channels);
  for (unsigned item = blockIdx.y * kThreads + threadIdx.x; item < items; item += gridDim.y * kThreads) {
    const int64_t inner = item % across * int64_t{vector}, outer = item / across;
    const int64_t c = channels_last ? inner : outer, column = channels_last ? outer : inner;
    const auto x_pack = load<vector>(x.at(n, c, row, column)), k3_pack = load<vector>(k3.at(n, c, row, column));
    Pack<scalar_t, vector> cells, result;
    if constexpr (channels_last) {
      cells = load<vector>(k2.at(n, c, cell_row, sizes.columns.cell_of(column)));
    } else {
      for (int i = 0; i < vector; ++i) cells.value[i] = *k2.at(n, c, cell_row, sizes.columns.cell_of(column + i));
    }
    for (int i = 0; i < vector; ++i) {
      const real t = static_cast<real>(x_pack.value[i]) + static_cast<real>(cells.value[i]);
      real value = static_cast<real>(k3_pack.value[i]);
      times_sigmoid_of(exp_of_negated(t), value);
      result.value[i] = static_cast<scalar_t>(value);
    }
    store<vector>(result, out.at(n, c, row, column));
  }
}

template <typename scalar_t, int vector, bool channels_last>
__global__ void __launch_bounds__(kThreads) self_calibrated_gate_backward_kernel(
    const __grid_constant__ Sizes sizes, const __grid_constant__ Map<const scalar_t> grad,
    const __grid_constant__ Map<const scalar_t> x, const __grid_constant__ Map<const scalar_t> k3,
    const __grid_constant__ Map<const scalar_t> k2, const __grid_constant__ Map<scalar_t> grad_x,
    const __grid_constant__ Map<scalar_t> grad_k3, const __grid_constant__ Map<scalar_t> grad_k2) {
  using real = accumulate_t<scalar_t>;
  // [vector] outermost: the threads of a warp then write to neighbouring banks.
  __shared__ real shared[vector][kRowThreads][kCellThreads];
  const int cell_thread = threadIdx.x % kCellThreads, row_thread = threadIdx.x / kCellThreads;
  const unsigned cell_rows = static_cast<unsigned>(sizes.rows.cells);
  const unsigned cell_row = blockIdx.x % cell_rows, n = blockIdx.x / cell_rows;
  const int64_t first_row = sizes.rows.begin_of(cell_row), last_row = sizes.rows.begin_of(cell_row + 1);
  const unsigned groups = static_cast<unsigned>(sizes.channels / vector);
  const unsigned cell_columns = static_cast<unsigned>(sizes.columns.cells), items = groups * cell_columns;
  // All threads of a block make the same number of rounds, since they meet in each.
  for (unsigned first = blockIdx.y * kCellThreads; first < items; first += gridDim.y * kCellThreads) {
    const unsigned item = first + cell_thread;
    const int64_t cell_column = channels_last ? item / groups : item % cell_columns;
    const int64_t c = (channels_last ? item % groups : item / cell_columns) * int64_t{vector};
    real sum[vector] = {};
    if (item < items) {
      const auto cells = load<vector>(k2.at(n, c, cell_row, cell_column));
      const int64_t first_column = sizes.columns.begin_of(cell_column);
      const int64_t last_column = sizes.columns.begin_of(cell_column + 1);
      for (int64_t row = first_row + row_thread; row < last_row; row += kRowThreads) {
        const scalar_t* grad_at = grad.at(n, c, row, first_column);
        const scalar_t *x_at = x.at(n, c, row, first_column), *k3_at = k3.at(n, c, row, first_column);
        scalar_t *grad_x_at = grad_x.at(n, c, row, first_column), *grad_k3_at = grad_k3.at(n, c, row, first_column);
        // Not unrolled: many warps hide the memory's latency better than many registers.
#pragma unroll 1
        for (int64_t pixels = last_column - first_column; pixels > 0; --pixels) {
          const auto grad_pack = load<vector>(grad_at), x_pack = load<vector>(x_at), k3_pack = load<vector>(k3_at);
          Pack<scalar_t, vector> of_x, of_k3;
          for (int i = 0; i < vector; ++i) {
            const real upstream = static_cast<real>(grad_pack.value[i]);
            const real t = static_cast<real>(x_pack.value[i]) + static_cast<real>(cells.value[i]);
            real gate, slope;
            sigmoid_of(exp_of_negated(t), gate, slope);
            slope = upstream * static_cast<real>(k3_pack.value[i]) * slope;
            sum[i] += slope;
            of_x.value[i] = static_cast<scalar_t>(slope);
            of_k3.value[i] = static_cast<scalar_t>(upstream * gate);
          }
          store<vector>(of_x, grad_x_at);
          store<vector>(of_k3, grad_k3_at);
          grad_at += grad.column;
          x_at += x.column;
          k3_at += k3.column;
          grad_x_at += grad_x.column;
          grad_k3_at += grad_k3.column;
        }
      }
    }
    for (int i = 0; i < vector; ++i) shared[i][row_thread][cell_thread] = sum[i];
    __syncthreads();
    if (row_thread == 0 && item < items) {
      Pack<scalar_t, vector> of_k2;
      for (int i = 0; i < vector; ++i) {
        for (int r = 1; r < kRowThreads; ++r) sum[i] += shared[i][r][cell_thread];
        of_k2.value[i] = static_cast<scalar_t>(sum[i]);
      }
      store<vector>(of_k2, grad_k2.at(n, c, cell_row, cell_column));
    }
    __syncthreads();
  }
}

template <typename scalar_t>
Map<const scalar_t> read(const Tensor& map) {
  return {map.const_data_ptr<scalar_t>(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

template <typename scalar_t>
Map<scalar_t> write(Tensor& map) {
  return {map.mutable_data_ptr<scalar_t>(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// Whether a map divides into packs of 16 bytes along `dim`, where its elements are adjacent.
bool is_packable(const Tensor& map, int64_t dim) {
  const int64_t bytes = static_cast<int64_t>(map.element_size());
  bool whole = map.stride(dim) == 1 && map.size(dim) * bytes % 16 == 0 &&
               reinterpret_cast<uintptr_t>(map.const_data_ptr()) % 16 == 0;
  for (int64_t other = 0; other < 4; ++other) whole = whole && (other == dim || map.stride(other) * bytes % 16 == 0);
  return whole;
}

// Blocks: x for the rows (of cells) of all images, y for the items of a row, as far as the grid allows.
dim3 grid_of(int64_t rows, int64_t items, int64_t items_per_block) {
  check(items < int64_t{1} << 31 && rows < int64_t{1} << 31,
        "self_calibrated_gate: a row must have fewer than 2**31 elements and a batch fewer than 2**31 rows, got ",
        items, " and ", rows);
  return dim3(static_cast<unsigned>(rows),
              static_cast<unsigned>(std::min<int64_t>((items + items_per_block - 1) / items_per_block, 65535)));
}

Tensor empty_result(const Tensor& map, const Tensor& x) {
  return empty_map(x, {map.size(0), map.size(1), map.size(2), map.size(3)}, x.scalar_type(), memory_format_of(x));
}

Sizes sizes_of(const Tensor& x, const Tensor& k2) {
  return {NearestAxis(k2.size(2), x.size(2)), NearestAxis(k2.size(3), x.size(3)), x.size(1)};
}

Tensor self_calibrated_gate_cuda(Tensor x, Tensor k3, Tensor k2) {
  check_self_calibrated_gate(x, k3, k2);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty_result(x, x);
  dispatch_floating(x.scalar_type(), "self_calibrated_gate", [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int vector = 16 / sizeof(scalar_t);
    if (x.numel() == 0) return;
    const auto launch = [&](auto kernel, int64_t packed) {
      const dim3 grid = grid_of(x.size(0) * x.size(2), x.size(1) * x.size(3) / packed, kThreads);
      kernel<<<grid, kThreads, 0, current_stream(x)>>>(sizes_of(x, k2), read<scalar_t>(x), read<scalar_t>(k3),
                                                       read<scalar_t>(k2), write<scalar_t>(out));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (channels_adjacent(x)) {
      if (is_packable(x, 1) && is_packable(k3, 1) && is_packable(k2, 1) && is_packable(out, 1))
        launch(self_calibrated_gate_forward_kernel<scalar_t, vector, true>, vector);
      else
        launch(self_calibrated_gate_forward_kernel<scalar_t, 1, true>, 1);
    } else if (is_packable(x, 3) && is_packable(k3, 3) && is_packable(out, 3)) {
      launch(self_calibrated_gate_forward_kernel<scalar_t, vector, false>, vector);
    } else {
      launch(self_calibrated_gate_forward_kernel<scalar_t, 1, false>, 1);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> self_calibrated_gate_backward_cuda(Tensor grad, Tensor x, Tensor k3, Tensor k2) {
  check_self_calibrated_gate_backward(grad, x, k3, k2);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor grad_x = empty_result(x, x), grad_k3 = empty_result(k3, x), grad_k2 = empty_result(k2, x);
  dispatch_floating(x.scalar_type(), "self_calibrated_gate", [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int vector = 16 / sizeof(scalar_t);
    if (x.numel() == 0) return void(torch::stable::zero_(grad_k2));
    const auto launch = [&](auto kernel, int64_t packed) {
      const dim3 grid = grid_of(x.size(0) * k2.size(2), x.size(1) * k2.size(3) / packed, kCellThreads);
      kernel<<<grid, kThreads, 0, current_stream(x)>>>(sizes_of(x, k2), read<scalar_t>(grad), read<scalar_t>(x),
                                                       read<scalar_t>(k3), read<scalar_t>(k2), write<scalar_t>(grad_x),
                                                       write<scalar_t>(grad_k3), write<scalar_t>(grad_k2));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    const auto packable = [](const Tensor& map) { return is_packable(map, 1); };
    if (!channels_adjacent(x))
      launch(self_calibrated_gate_backward_kernel<scalar_t, 1, false>, 1);
    else if (packable(grad) && packable(x) && packable(k3) && packable(k2) && packable(grad_x) && packable(grad_k3) &&
             packable(grad_k2))
      launch(self_calibrated_gate_backward_kernel<scalar_t, vector, true>, vector);
    else
      launch(self_calibrated_gate_backward_kernel<scalar_t, 1, true>, 1);
  });
  return {grad_x, grad_k3, grad_k2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("self_calibrated_gate", TORCH_BOX(&self_calibrated_gate_cuda));
  library.impl("self_calibrated_gate_backward", TORCH_BOX(&self_calibrated_gate_backward_cuda));
}

}  // namespace cascadeops
