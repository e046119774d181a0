// paste_masks on the CPU: the rows of all masks are shared out among the threads; only the pixels of a row that are
// near the edge of its mask are evaluated, the rest is filled.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/fresh_pages.h"
#include "cpu/paste_lines.h"
#include "dispatch.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainPixels = 1 << 15;  // a thread gets at least this many: some 10 us of work

// One row of the image, which is 0 before. Returns the part of it that can differ from 0.
Span paste_row(PastedLines& mask, int64_t row, uint8_t* out) {
  const std::vector<Piece>& pieces = mask.move_to(static_cast<int32_t>(row));
  for (const Piece& piece : pieces) {
    if (piece.all_in) {
      std::fill(out + piece.begin, out + piece.end, uint8_t{1});
    } else {
      mask.evaluate(piece, out + piece.begin);
    }
  }
  return pieces.empty() ? Span{0, 0} : Span{pieces.front().begin, pieces.back().end};
}

// Eight pixels of 0 or 1 to the bits of a byte, the first to bit 0.
uint8_t pack_byte(const uint8_t* pixels) {
  uint64_t byte = 0;
  for (int i = 0; i < 8; ++i) byte |= uint64_t{pixels[i]} << i;
  return static_cast<uint8_t>(byte);
}

// Rows [begin, end) of one mask; out: its row `begin`.
void paste_rows(PastedLines& mask, int64_t begin, int64_t end, int64_t width, bool packed, uint8_t* out) {
  const int64_t row_bytes = packed ? (width + 7) / 8 : width;
  std::fill_n(out, (end - begin) * row_bytes, uint8_t{0});
  const Span lines = mask.lines();
  std::vector<uint8_t> pixels(packed ? row_bytes * 8 : 0);
  for (int64_t row = std::max<int64_t>(begin, lines.begin); row < std::min<int64_t>(end, lines.end); ++row) {
    uint8_t* to = out + (row - begin) * row_bytes;
    if (!packed) {
      paste_row(mask, row, to);
      continue;
    }
    const Span span = paste_row(mask, row, pixels.data());
    const int64_t first = span.begin / 8, last = (span.end + 7) / 8;
    for (int64_t i = first; i < last; ++i) to[i] = pack_byte(&pixels[8 * i]);
    std::fill(pixels.begin() + 8 * first, pixels.begin() + 8 * last, uint8_t{0});
  }
}

Tensor paste_masks_cpu(const Tensor& probs,  // [N, h, w]
                       const Tensor& boxes,  // [N, 4]
                       int64_t height, int64_t width, double threshold, bool packed) {
  check_paste_masks(probs, boxes, height, width, threshold, packed);
  const int64_t masks = probs.size(0), h = probs.size(1), w = probs.size(2);
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  const int64_t row_bytes = packed ? (width + 7) / 8 : width;
  Tensor out = torch::stable::new_empty(probs, {masks, height, row_bytes},
                                        packed || threshold < 0 ? ScalarType::Byte : ScalarType::Bool);
  ask_for_huge_pages(out);

  const auto* box_data = static_cast<const Box*>(dense_boxes.const_data_ptr());
  auto* out_data = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t mask = 0; mask < masks; ++mask) {
    check(is_finite(box_data[mask]), "paste_masks: boxes must be finite; see row ", mask);
  }
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / width);
  dispatch_floating(probs.scalar_type(), "paste_masks", [&](auto zero) {
    const auto* prob_data = static_cast<const decltype(zero)*>(dense_probs.const_data_ptr());
    torch::stable::parallel_for(0, masks * height, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t mask = begin / height, first_row = begin % height;
        const int64_t last_row = std::min(height, first_row + end - begin);
        PastedLines lines(prob_data + mask * h * w, h, w, box_data[mask], height, width, Along::kRows,
                          static_cast<float>(threshold));
        paste_rows(lines, first_row, last_row, width, packed, out_data + begin * row_bytes);
        begin += last_row - first_row;
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("paste_masks", TORCH_BOX(&cascadeops::paste_masks_cpu));
}
