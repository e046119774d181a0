// A pasted mask evaluated line by line, for masks (along rows) and run lengths (along columns).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/paste.h"

namespace cascadeops {

enum class Along { kRows, kColumns };

class PastedLines {
 public:
  // probs: [h, w]
  PastedLines(const float* probs, int64_t h, int64_t w, const Box& box, int64_t height, int64_t width, Along along);

  Span lines() const { return lines_; }    // the rows (columns) that reach the mask
  Span pixels() const { return pixels_; }  // the part of each that does

  // Writes one line's pixels(): 1 where the probability is >= threshold, else 0; for a negative threshold the
  // probability as a byte.
  void evaluate(int32_t line, float threshold, uint8_t* out);

 private:
  // A line of mask cells, stretched to pixels: the cells before and after the centre of each pixel.
  struct Stretched {
    int32_t line = -2;  // -2: none yet
    std::vector<float> before, after;
  };
  void stretch(int32_t mask_line, Stretched& out) const;

  Along along_;
  PasteAxis across_axis_;
  Span lines_, pixels_;
  int32_t cells_, mask_lines_;          // along a line, and how many lines
  std::vector<float> padded_;           // mask lines, each with a zero before and after
  std::vector<int32_t> cell_;           // of each pixel, counted in the padded line
  std::vector<float> near_, far_;       // weights of each pixel
  std::array<Stretched, 2> stretched_;  // the mask lines around the current line
};

}  // namespace cascadeops
