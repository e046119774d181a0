// A line of the image lies between two lines of the mask. These two are stretched to pixels once and serve all image
// lines between them, so that the loop over pixels has neither gathers nor branches and becomes vector code.

#include "cpu/paste_lines.h"

#include <algorithm>
#include <utility>

#include "cpu/simd.h"

namespace cascadeops {
namespace {

struct Line {
  const float *before0, *after0;  // cells of the first mask line, of each pixel
  const float *before1, *after1;  // cells of the second
  const float *near, *far;        // weights along the line, of each pixel
  float near_across, far_across;  // weights of the two mask lines
  int64_t pixels;
};

template <Along along>
CASCADEOPS_INLINE float value_at(const Line& line, int64_t i) {
  if constexpr (along == Along::kRows) {
    return bilinear(line.before0[i], line.after0[i], line.before1[i], line.after1[i], line.near[i], line.far[i],
                    line.near_across, line.far_across);
  } else {
    return bilinear(line.before0[i], line.before1[i], line.after0[i], line.after1[i], line.near_across, line.far_across,
                    line.near[i], line.far[i]);
  }
}

template <Along along>
CASCADEOPS_INLINE void evaluate_line(const Line& line, float threshold, uint8_t* __restrict out) {
  if (threshold < 0) {
    for (int64_t i = 0; i < line.pixels; ++i) out[i] = probability_byte(value_at<along>(line, i));
  } else {
    for (int64_t i = 0; i < line.pixels; ++i) out[i] = value_at<along>(line, i) >= threshold;
  }
}

CASCADEOPS_CLONES void evaluate_row(const Line line, float threshold, uint8_t* out) {
  evaluate_line<Along::kRows>(line, threshold, out);
}
CASCADEOPS_CLONES void evaluate_column(const Line line, float threshold, uint8_t* out) {
  evaluate_line<Along::kColumns>(line, threshold, out);
}

CASCADEOPS_CLONES
void gather_cells(const float* cells, const int32_t* cell, int64_t pixels, float* __restrict before,
                  float* __restrict after) {
  for (int64_t i = 0; i < pixels; ++i) {
    before[i] = cells[cell[i]];
    after[i] = cells[cell[i] + 1];
  }
}

}  // namespace

PastedLines::PastedLines(const float* probs, int64_t h, int64_t w, const Box& box, int64_t height, int64_t width,
                         Along along)
    : along_(along) {
  const bool rows = along == Along::kRows;
  const PasteAxis x = axis_x(box, w), y = axis_y(box, h);
  const PasteAxis& along_axis = rows ? x : y;
  across_axis_ = rows ? y : x;
  lines_ = pixels_ = {0, 0};
  if (!has_area(box)) return;
  pixels_ = along_axis.reached(static_cast<int32_t>(rows ? width : height));
  lines_ = across_axis_.reached(static_cast<int32_t>(rows ? height : width));
  cells_ = along_axis.cells;
  mask_lines_ = across_axis_.cells;

  const int64_t padded_cells = cells_ + 2, step = rows ? 1 : w, line_step = rows ? w : 1;
  padded_.assign(mask_lines_ * padded_cells, 0.0f);
  for (int64_t line = 0; line < mask_lines_; ++line) {
    for (int64_t i = 0; i < cells_; ++i) padded_[line * padded_cells + 1 + i] = probs[line * line_step + i * step];
  }

  const int64_t count = pixels_.end - pixels_.begin;
  cell_.resize(count), near_.resize(count), far_.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const PasteTaps taps = paste_taps(along_axis.position(pixels_.begin + static_cast<int32_t>(i)));
    cell_[i] = taps.cell + 1;
    near_[i] = taps.near;
    far_[i] = taps.far;
  }
  for (Stretched& stretched : stretched_) stretched.before.resize(count), stretched.after.resize(count);
}

void PastedLines::stretch(int32_t mask_line, Stretched& out) const {
  out.line = mask_line;
  if (mask_line < 0 || mask_line >= mask_lines_) {
    std::fill(out.before.begin(), out.before.end(), 0.0f);
    std::fill(out.after.begin(), out.after.end(), 0.0f);
    return;
  }
  gather_cells(&padded_[mask_line * int64_t{cells_ + 2}], cell_.data(), static_cast<int64_t>(cell_.size()),
               out.before.data(), out.after.data());
}

void PastedLines::evaluate(int32_t line, float threshold, uint8_t* out) {
  const PasteTaps taps = paste_taps(across_axis_.position(line));
  auto& [first, second] = stretched_;
  if (first.line != taps.cell) {
    std::swap(first, second);
    if (first.line != taps.cell) stretch(taps.cell, first);
    stretch(taps.cell + 1, second);
  }
  const Line view{first.before.data(), first.after.data(), second.before.data(),
                  second.after.data(), near_.data(),       far_.data(),
                  taps.near,           taps.far,           static_cast<int64_t>(cell_.size())};
  if (along_ == Along::kRows) {
    evaluate_row(view, threshold, out);
  } else {
    evaluate_column(view, threshold, out);
  }
}

}  // namespace cascadeops
