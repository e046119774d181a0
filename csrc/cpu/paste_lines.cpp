// A line of the image lies between two lines of the mask. These two are stretched to pixels once and serve all image
// lines between them, so that the loop over pixels has neither gathers nor branches and becomes vector code. Where the
// four cells around a pixel are all clearly above the threshold, or all below it, so is every mean of them: with a
// mask of a real object, few pixels are left to evaluate.

#include "cpu/paste_lines.h"

#include <algorithm>
#include <cmath>
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

// Rounding moves a weighted mean by less than this part of itself: see bilinear().
constexpr float kClear = 0x1p-20f;

}  // namespace

PastedLines::PastedLines(int64_t h, int64_t w, const Box& box, int64_t height, int64_t width, Along along,
                         float threshold)
    : along_(along), threshold_(threshold) {
  const bool rows = along == Along::kRows;
  const PasteAxis x = axis_x(box, w), y = axis_y(box, h);
  const PasteAxis& along_axis = rows ? x : y;
  across_axis_ = rows ? y : x;
  lines_ = pixels_ = {0, 0};
  cells_ = along_axis.cells;
  mask_lines_ = across_axis_.cells;
  if (!has_area(box)) return;
  pixels_ = along_axis.reached(static_cast<int32_t>(rows ? width : height));
  lines_ = across_axis_.reached(static_cast<int32_t>(rows ? height : width));
  const int64_t count = pixels_.end - pixels_.begin;
  if (count == 0 || lines_.begin == lines_.end) {
    lines_ = {0, 0};
    return;
  }

  padded_.assign((int64_t{mask_lines_} + 1) * (cells_ + 2), 0.0f);
  cell_.resize(count), near_.resize(count), far_.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const PasteTaps taps = paste_taps(along_axis.position(pixels_.begin + static_cast<int32_t>(i)));
    cell_[i] = taps.cell + 1;
    near_[i] = taps.near;
    far_[i] = taps.far;
  }
  for (int32_t gap = 0; gap < cells_ + 2; ++gap) {
    const auto first = std::lower_bound(cell_.begin(), cell_.end(), gap);  // cells never decrease with the pixel
    gap_begin_.push_back(pixels_.begin + static_cast<int32_t>(first - cell_.begin()));
  }
  for (Stretched& stretched : stretched_) stretched.before.resize(count), stretched.after.resize(count);
}

const float* PastedLines::padded_line(int32_t mask_line) const {
  const bool inside = mask_line >= 0 && mask_line < mask_lines_;
  return &padded_[(inside ? mask_line : mask_lines_) * int64_t{cells_ + 2}];
}

void PastedLines::stretch(int32_t mask_line, Stretched& out) const {
  out.line = mask_line;
  gather_cells(padded_line(mask_line), cell_.data(), static_cast<int64_t>(cell_.size()), out.before.data(),
               out.after.data());
}

// The pieces of the lines between mask_line and the next.
void PastedLines::find_pieces(int32_t mask_line) {
  pieces_.clear();
  const float *first = padded_line(mask_line), *second = padded_line(mask_line + 1);
  const float clearly_in = threshold_ + threshold_ * kClear, clearly_out = threshold_ - threshold_ * kClear;
  const auto out = [=](int32_t cell) { return first[cell] < clearly_out && second[cell] < clearly_out; };
  const auto in = [=](int32_t cell) {
    // An infinite cell with a weight of 0 makes a mean that is NaN.
    return first[cell] >= clearly_in && second[cell] >= clearly_in && std::isfinite(first[cell] + second[cell]);
  };
  for (int32_t gap = 0; gap <= cells_; ++gap) {
    const int32_t begin = gap_begin_[gap], end = gap_begin_[gap + 1];
    if (begin == end) continue;
    if (threshold_ > 0 && out(gap) && out(gap + 1)) continue;
    const bool all_in = threshold_ > 0 && in(gap) && in(gap + 1);
    if (!pieces_.empty() && pieces_.back().end == begin && pieces_.back().all_in == all_in) {
      pieces_.back().end = end;
    } else {
      pieces_.push_back({begin, end, all_in});
    }
  }
}

const std::vector<Piece>& PastedLines::move_to(int32_t line) {
  const PasteTaps taps = paste_taps(across_axis_.position(line));
  auto& [first, second] = stretched_;
  if (first.line != taps.cell) {
    std::swap(first, second);
    if (first.line != taps.cell) stretch(taps.cell, first);
    stretch(taps.cell + 1, second);
    find_pieces(taps.cell);
  }
  near_across_ = taps.near;
  far_across_ = taps.far;
  return pieces_;
}

void PastedLines::evaluate(const Piece& piece, uint8_t* out) const {
  const auto& [first, second] = stretched_;
  const int64_t skip = piece.begin - pixels_.begin;
  const Line view{first.before.data() + skip,
                  first.after.data() + skip,
                  second.before.data() + skip,
                  second.after.data() + skip,
                  near_.data() + skip,
                  far_.data() + skip,
                  near_across_,
                  far_across_,
                  piece.end - piece.begin};
  if (along_ == Along::kRows) {
    evaluate_row(view, threshold_, out);
  } else {
    evaluate_column(view, threshold_, out);
  }
}

}  // namespace cascadeops
