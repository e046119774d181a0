// A pasted mask evaluated line by line, for masks (along rows) and run lengths (along columns).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/paste.h"

namespace cascadeops {

enum class Along { kRows, kColumns };

// Pixels [begin, end) of a line. They are all 1, or have to be evaluated.
struct Piece {
  int32_t begin, end;
  bool all_in;
};

class PastedLines {
 public:
  // probs: [h, w]. threshold: a pixel is 1 where its probability is >= threshold, else 0; negative: a pixel is its
  // probability as a byte.
  template <typename scalar_t>
  PastedLines(const scalar_t* probs, int64_t h, int64_t w, const Box& box, int64_t height, int64_t width, Along along,
              float threshold)
      : PastedLines(h, w, box, height, width, along, threshold) {
    const int64_t step = along == Along::kRows ? 1 : w, line_step = along == Along::kRows ? w : 1;
    for (int64_t line = 0; line < mask_lines_ && !cell_.empty(); ++line)
      for (int64_t i = 0; i < cells_; ++i)
        padded_[line * (cells_ + 2) + 1 + i] = static_cast<float>(probs[line * line_step + i * step]);
  }

  Span lines() const { return lines_; }  // the rows (columns) that reach the mask; outside of these all is 0

  // Goes to one of lines(): its pieces in ascending order; between them all is 0.
  const std::vector<Piece>& move_to(int32_t line);

  // The pixels of a piece of the current line.
  void evaluate(const Piece& piece, uint8_t* out) const;

 private:
  PastedLines(int64_t h, int64_t w, const Box& box, int64_t height, int64_t width, Along along, float threshold);

  // A line of mask cells, stretched to pixels: the cells before and after the centre of each pixel.
  struct Stretched {
    int32_t line = -2;  // -2: none yet
    std::vector<float> before, after;
  };
  const float* padded_line(int32_t mask_line) const;
  void stretch(int32_t mask_line, Stretched& out) const;
  void find_pieces(int32_t mask_line);

  Along along_;
  float threshold_;
  PasteAxis across_axis_;
  Span lines_, pixels_;
  int32_t cells_, mask_lines_;              // along a line, and how many lines
  std::vector<float> padded_;               // mask lines, each with a zero before and after; and a line of zeros
  std::vector<int32_t> cell_;               // of each pixel, counted in the padded line
  std::vector<int32_t> gap_begin_;          // the first pixel between padded cells g and g + 1; [cells + 2]
  std::vector<float> near_, far_;           // weights of each pixel
  std::array<Stretched, 2> stretched_;      // the mask lines around the current line
  std::vector<Piece> pieces_;               // of all lines between these two
  float near_across_ = 0, far_across_ = 0;  // weights of the two on the current line
};

}  // namespace cascadeops
