// The gate of a self-calibrated convolution on the CPU.
//
//   out[n, c, y, x] = k3[n, c, y, x] * sigmoid(x[n, c, y, x] + k2[n, c, cell(y), cell(x)])
//
// with PyTorch's nearest rule (common/nearest.h). Maps may have any strides; results are channels-last if x is, else
// contiguous, and the walk follows them, in blocks: lines of consecutive elements that take the same values of k2. In
// channels-last maps these are the channels of the pixels that a row has in a cell; in contiguous ones, the rows of one
// channel in a row of cells. A buffer holds k2 for a row of cells, spread over the pixels of a line where needed. So
// every map is read once and every result written once.
//
// Backward recomputes the sigmoid. The gradient of k2 is summed in a second buffer like the first, block by block, by
// the thread that owns the row of cells or the channel: in the same order for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "checks_self_calibrated_gate.h"
#include "common/nearest.h"
#include "common/sigmoid.h"
#include "cpu/cache_line.h"
#include "cpu/exp.h"
#include "cpu/fresh_pages.h"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

// One axis: the pixels of cell i are those from [i] to [i + 1].
std::vector<int64_t> pixel_ranges(int64_t cells, int64_t pixels) {
  const NearestAxis axis(cells, pixels);
  std::vector<int64_t> begin(cells + 1);
  for (int64_t cell = 0; cell <= cells; ++cell) begin[cell] = axis.begin_of(cell);
  return begin;
}

// What the tasks of a call share. A task is a row of cells of one image (channels-last), or a channel of one image.
struct Walk {
  std::vector<int64_t> rows, columns;
  int64_t channels;
  bool channels_last;

  Walk(const Tensor& x, const Tensor& k2)
      : rows(pixel_ranges(k2.size(2), x.size(2))),
        columns(pixel_ranges(k2.size(3), x.size(3))),
        channels(x.size(1)),
        channels_last(channels_adjacent(x)) {}

  int64_t cell_rows() const { return static_cast<int64_t>(rows.size()) - 1; }
  int64_t cell_columns() const { return static_cast<int64_t>(columns.size()) - 1; }
  int64_t width() const { return columns.back(); }
  int64_t tasks_per_image() const { return channels_last ? cell_rows() : channels; }
  int64_t line_length() const { return channels_last ? channels : width(); }
  int64_t lines_in_buffer() const { return channels_last ? cell_columns() : 1; }
};

// `lines` lines of `count` elements; the first element is (channel, row, column).
struct Block {
  int64_t channel, row, column, count, lines;
};

// How far apart the elements of a line lie in a map, and the lines of a block. `adjacent` is known to the compiler.
template <bool channels_last, bool adjacent>
struct Order {
  template <typename Map>
  static CASCADEOPS_INLINE int64_t element(const Map& map) {
    return adjacent ? 1 : channels_last ? map.channel : map.column;
  }
  template <typename Map>
  static CASCADEOPS_INLINE int64_t line(const Map& map) {
    return channels_last ? map.column : map.row;
  }
  // Five maps with four lines each are more streams than the hardware foresees: asks for what comes next.
  template <bool written, typename scalar_t, typename Map>
  static CASCADEOPS_INLINE void prefetch(const scalar_t* from, const Map& map, int64_t lines) {
    constexpr int64_t ahead = size_t{4} * 64 / sizeof(scalar_t);
    __builtin_prefetch(from + (channels_last ? lines * map.column : ahead), written, 2);
  }
};

template <typename scalar_t>
CASCADEOPS_INLINE scalar_t* at(const MapView<scalar_t>& map, int64_t channel, int64_t row, int64_t column) {
  return map.data + channel * map.channel + row * map.row + column * map.column;
}

template <typename scalar_t>
CASCADEOPS_INLINE scalar_t* at(const MapView<scalar_t>& map, const Block& block) {
  return at(map, block.channel, block.row, block.column);
}

// A line of `count` numbers in steps of a cache line. The last one is moved back to be whole, since a part costs as
// much as several; a line shorter than one step has a part only.
template <typename scalar_t>
struct Steps {
  static constexpr int64_t width = CacheLine<scalar_t>::count;
  int64_t count;

  int64_t size() const { return (count + width - 1) / width; }
  int64_t lanes() const { return std::min(count, width); }
  int64_t first(int64_t step) const { return std::min(step * width, count - lanes()); }
  int64_t padded() const { return size() * width; }
  // Where number i stands among padded() sums, which are kept step by step: two steps may hold it, the first one
  // counts.
  int64_t place(int64_t i) const { return i / width * width + CacheLine<scalar_t>::place(i - first(i / width)); }
};

template <bool clamped, typename Vector>
CASCADEOPS_INLINE void bring_into_range(Vector& t, RangeCheck& check) {
  if constexpr (clamped) {
    clamp_to_range(t);
  } else {
    check.note(t);
  }
}

// The maps of one image, and what is done to a step of the lines of a block. Numbers beyond the range of the
// exponential are rare: lines<false> does not clamp, and says whether there was one; then lines<true> does the work
// again.
template <typename scalar_t>
struct Forward {
  MapView<const scalar_t> x, k3, k2;
  MapView<scalar_t> out;

  bool lines_are_adjacent(bool channels_last) const {
    return channels_last ? x.channel == 1 && k3.channel == 1 : x.column == 1 && k3.column == 1;
  }

  template <typename Order, bool clamped, typename real>
  CASCADEOPS_INLINE bool lines(const Block& block, int64_t i, int64_t lanes, const scalar_t* cells, real*) const {
    const scalar_t* x_at = at(x, block) + i * Order::element(x);
    const scalar_t* k3_at = at(k3, block) + i * Order::element(k3);
    scalar_t* out_at = at(out, block) + i;
    RangeCheck check;
    CacheLine<scalar_t> cell, t, value;
    cell.load(cells + i, 1, lanes);
    for (int64_t line = 0; line < block.lines; ++line) {
      t.load(x_at, Order::element(x), lanes);
      value.load(k3_at, Order::element(k3), lanes);
      for (int part = 0; part < t.parts; ++part) {
        typename Lanes<real>::type e;
        t.part[part] += cell.part[part];
        bring_into_range<clamped>(t.part[part], check);
        exp_of_negated<scalar_t>(t.part[part], e);
        times_sigmoid_of(e, value.part[part]);
      }
      value.store(out_at, 1, lanes);
      x_at += Order::line(x);
      k3_at += Order::line(k3);
      out_at += Order::line(out);
    }
    return check.beyond();
  }

  template <typename real>
  CASCADEOPS_INLINE void finish(const Walk&, int64_t, int64_t, real*) const {}
};

template <typename scalar_t>
struct Backward {
  MapView<const scalar_t> grad, x, k3, k2;
  MapView<scalar_t> grad_x, grad_k3, grad_k2;

  bool lines_are_adjacent(bool channels_last) const {
    return channels_last ? grad.channel == 1 && x.channel == 1 && k3.channel == 1
                         : grad.column == 1 && x.column == 1 && k3.column == 1;
  }

  // sums: those of this step.
  template <typename Order, bool clamped, typename real>
  CASCADEOPS_INLINE bool lines(const Block& block, int64_t i, int64_t lanes, const scalar_t* cells, real* sums) const {
    const scalar_t* grad_at = at(grad, block) + i * Order::element(grad);
    const scalar_t* x_at = at(x, block) + i * Order::element(x);
    const scalar_t* k3_at = at(k3, block) + i * Order::element(k3);
    scalar_t *grad_x_at = at(grad_x, block) + i, *grad_k3_at = at(grad_k3, block) + i;
    RangeCheck check;
    CacheLine<scalar_t> cell, t, value, upstream;
    cell.load(cells + i, 1, lanes);
    typename Lanes<real>::type sum[t.parts];
    memcpy(sum, sums, sizeof(sum));
    for (int64_t line = 0; line < block.lines; ++line) {
      upstream.load(grad_at, Order::element(grad), lanes);
      t.load(x_at, Order::element(x), lanes);
      value.load(k3_at, Order::element(k3), lanes);
      Order::template prefetch<false>(grad_at, grad, block.lines);
      Order::template prefetch<false>(x_at, x, block.lines);
      Order::template prefetch<false>(k3_at, k3, block.lines);
      Order::template prefetch<true>(grad_x_at, grad_x, block.lines);
      Order::template prefetch<true>(grad_k3_at, grad_k3, block.lines);
      for (int part = 0; part < t.parts; ++part) {
        typename Lanes<real>::type e, gate, slope;
        t.part[part] += cell.part[part];
        bring_into_range<clamped>(t.part[part], check);
        exp_of_negated<scalar_t>(t.part[part], e);
        sigmoid_of(e, gate, slope);
        slope = upstream.part[part] * value.part[part] * slope;
        sum[part] += slope;
        t.part[part] = slope;
        value.part[part] = gate * upstream.part[part];
      }
      value.store(grad_k3_at, 1, lanes);
      t.store(grad_x_at, 1, lanes);
      grad_at += Order::line(grad);
      x_at += Order::line(x);
      k3_at += Order::line(k3);
      grad_x_at += Order::line(grad_x);
      grad_k3_at += Order::line(grad_k3);
    }
    if (check.beyond()) return true;
    memcpy(sums, sum, sizeof(sum));
    return false;
  }

  // A row of cells is complete: its sums become the gradient of k2, and are cleared.
  template <typename real>
  CASCADEOPS_INLINE void finish(const Walk& walk, int64_t channel, int64_t cell_row, real* sums) const {
    const Steps<scalar_t> steps{walk.line_length()};
    for (int64_t j = 0; j < walk.cell_columns(); ++j) {
      if (walk.channels_last) {
        scalar_t* to = at(grad_k2, 0, cell_row, j);
        for (int64_t step = 0; step < steps.size(); ++step) {
          CacheLine<scalar_t> line;
          memcpy(line.part, sums + j * steps.padded() + step * steps.width, sizeof(line.part));
          line.store(to + steps.first(step), 1, steps.lanes());
        }
      } else {
        real sum = 0;
        for (int64_t column = walk.columns[j]; column < walk.columns[j + 1]; ++column) sum += sums[steps.place(column)];
        *at(grad_k2, channel, cell_row, j) = static_cast<scalar_t>(sum);
      }
    }
    std::fill_n(sums, walk.lines_in_buffer() * steps.padded(), real(0));
  }
};

template <typename Order, typename Maps, typename scalar_t, typename real>
CASCADEOPS_INLINE void run_block(const Maps& maps, const Block& block, const scalar_t* cells, real* sums) {
  constexpr bool may_skip_clamping = sizeof(real) == sizeof(float);
  const Steps<scalar_t> steps{block.count};
  for (int64_t step = 0; step < steps.size(); ++step, sums += steps.width) {
    const int64_t i = steps.first(step);
    if (may_skip_clamping && block.count >= steps.width &&
        !maps.template lines<Order, false>(block, i, steps.width, cells, sums))
      continue;
    maps.template lines<Order, true>(block, i, steps.lanes(), cells, sums);
  }
}

// All channels of one row of cells.
template <typename Order, typename Maps, typename scalar_t, typename real>
CASCADEOPS_INLINE void run_row_of_cells(const Walk& walk, const Maps& maps, int64_t cell_row, scalar_t* cells,
                                        real* sums) {
  const int64_t channels = walk.channels, padded = Steps<scalar_t>{channels}.padded();
  for (int64_t j = 0; j < walk.cell_columns(); ++j) {
    const scalar_t* from = at(maps.k2, 0, cell_row, j);
    if (maps.k2.channel == 1)
      std::copy_n(from, channels, cells + j * channels);
    else
      for (int64_t c = 0; c < channels; ++c) cells[j * channels + c] = from[c * maps.k2.channel];
  }
  for (int64_t row = walk.rows[cell_row]; row < walk.rows[cell_row + 1]; ++row) {
    for (int64_t j = 0; j < walk.cell_columns(); ++j) {
      const int64_t column = walk.columns[j];
      run_block<Order>(maps, Block{0, row, column, channels, walk.columns[j + 1] - column}, cells + j * channels,
                       sums + j * padded);
    }
  }
  maps.finish(walk, 0, cell_row, sums);
}

template <typename Order, typename Maps, typename scalar_t, typename real>
CASCADEOPS_INLINE void run_channel(const Walk& walk, const Maps& maps, int64_t channel, scalar_t* cells, real* sums) {
  for (int64_t i = 0; i < walk.cell_rows(); ++i) {
    for (int64_t j = 0; j < walk.cell_columns(); ++j)
      std::fill(cells + walk.columns[j], cells + walk.columns[j + 1], *at(maps.k2, channel, i, j));
    const int64_t row = walk.rows[i];
    run_block<Order>(maps, Block{channel, row, 0, walk.width(), walk.rows[i + 1] - row}, cells, sums);
    maps.finish(walk, channel, i, sums);
  }
}

template <typename Maps, typename scalar_t, typename real>
CASCADEOPS_INLINE void run_task_in_order(const Walk& walk, const Maps& maps, int64_t task, scalar_t* cells,
                                         real* sums) {
  const bool adjacent = maps.lines_are_adjacent(walk.channels_last);
  if (walk.channels_last && adjacent)
    run_row_of_cells<Order<true, true>>(walk, maps, task, cells, sums);
  else if (walk.channels_last)
    run_row_of_cells<Order<true, false>>(walk, maps, task, cells, sums);
  else if (adjacent)
    run_channel<Order<false, true>>(walk, maps, task, cells, sums);
  else
    run_channel<Order<false, false>>(walk, maps, task, cells, sums);
}

// One task, compiled for each instruction set and type.
#define CASCADEOPS_GATE_TASKS(scalar_t)                                                                            \
  CASCADEOPS_CLONES void run_task(const Walk& walk, const Forward<scalar_t>& maps, int64_t task, scalar_t* cells,  \
                                  accumulate_t<scalar_t>* sums) {                                                  \
    run_task_in_order(walk, maps, task, cells, sums);                                                              \
  }                                                                                                                \
  CASCADEOPS_CLONES void run_task(const Walk& walk, const Backward<scalar_t>& maps, int64_t task, scalar_t* cells, \
                                  accumulate_t<scalar_t>* sums) {                                                  \
    run_task_in_order(walk, maps, task, cells, sums);                                                              \
  }
CASCADEOPS_GATE_TASKS(float)
CASCADEOPS_GATE_TASKS(double)
CASCADEOPS_GATE_TASKS(torch::headeronly::Half)
CASCADEOPS_GATE_TASKS(torch::headeronly::BFloat16)
#undef CASCADEOPS_GATE_TASKS

// maps_of(image) gives the maps of one image.
template <typename scalar_t, typename MapsOf>
void run_tasks(const Walk& walk, int64_t images, const MapsOf& maps_of) {
  // Fewer elements are not worth a thread of their own.
  constexpr int64_t kElements = 16384;
  const int64_t per_image = walk.tasks_per_image();
  const int64_t elements = walk.channels * walk.rows.back() * walk.width() / per_image;
  const int64_t grain = std::max<int64_t>(kElements / std::max<int64_t>(elements, 1), 1);
  torch::stable::parallel_for(0, images * per_image, grain, [&](int64_t begin, int64_t end) {
    const int64_t lines = walk.lines_in_buffer();
    std::vector<scalar_t> cells(lines * walk.line_length());
    std::vector<accumulate_t<scalar_t>> sums(lines * Steps<scalar_t>{walk.line_length()}.padded());
    for (int64_t task = begin; task < end; ++task)
      run_task(walk, maps_of(task / per_image), task % per_image, cells.data(), sums.data());
  });
}

Tensor empty_result(const Tensor& map, const Tensor& x) {
  const std::array<int64_t, 4> size{map.size(0), map.size(1), map.size(2), map.size(3)};
  Tensor result = empty_map(x, size, x.scalar_type(), memory_format_of(x));
  ask_for_huge_pages(result);
  return result;
}

Tensor self_calibrated_gate_cpu(Tensor x, Tensor k3, Tensor k2) {
  check_self_calibrated_gate(x, k3, k2);
  Tensor out = empty_result(x, x);
  dispatch_floating(x.scalar_type(), "self_calibrated_gate", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto read = [](const Tensor& map, int64_t n) { return view_of(map.const_data_ptr<scalar_t>(), map, n); };
    if (x.numel() == 0) return;
    run_tasks<scalar_t>(Walk(x, k2), x.size(0), [&](int64_t n) {
      return Forward<scalar_t>{read(x, n), read(k3, n), read(k2, n), view_of(out.mutable_data_ptr<scalar_t>(), out, n)};
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> self_calibrated_gate_backward_cpu(Tensor grad, Tensor x, Tensor k3, Tensor k2) {
  check_self_calibrated_gate_backward(grad, x, k3, k2);
  Tensor grad_x = empty_result(x, x), grad_k3 = empty_result(k3, x), grad_k2 = empty_result(k2, x);
  dispatch_floating(x.scalar_type(), "self_calibrated_gate", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto read = [](const Tensor& map, int64_t n) { return view_of(map.const_data_ptr<scalar_t>(), map, n); };
    const auto write = [](Tensor& map, int64_t n) { return view_of(map.mutable_data_ptr<scalar_t>(), map, n); };
    if (x.numel() == 0) return void(torch::stable::zero_(grad_k2));
    run_tasks<scalar_t>(Walk(x, k2), x.size(0), [&](int64_t n) {
      return Backward<scalar_t>{read(grad, n),    read(x, n),        read(k3, n),      read(k2, n),
                                write(grad_x, n), write(grad_k3, n), write(grad_k2, n)};
    });
  });
  return {grad_x, grad_k3, grad_k2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("self_calibrated_gate", TORCH_BOX(&self_calibrated_gate_cpu));
  library.impl("self_calibrated_gate_backward", TORCH_BOX(&self_calibrated_gate_backward_cpu));
}

}  // namespace cascadeops
