// paste_masks_rle on the CPU: each mask is walked down the columns it reaches, which gives its runs at once; the
// largest buffer holds one column, and only pixels near the edge of the mask are evaluated. Masks are shared out among
// the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "common/rle.h"
#include "cpu/paste_lines.h"
#include "dispatch.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Collects the runs of a mask from the positions where its value changes; position = column * height + row.
class Runs {
 public:
  // From `position` on, the value is `value`.
  void set(int64_t position, uint8_t value) {
    if (value == value_) return;
    lengths_.push_back(position - start_);
    start_ = position;
    value_ = value;
  }

  // Pixels at `position` and after; memchr finds the changes.
  void append(int64_t position, const uint8_t* pixels, int64_t count) {
    for (int64_t i = 0; i < count;) {
      const auto* change = static_cast<const uint8_t*>(std::memchr(pixels + i, 1 - value_, count - i));
      if (!change) return;
      i = change - pixels;
      set(position + i, *change);
    }
  }

  const std::vector<int64_t>& finish(int64_t total) {
    lengths_.push_back(total - start_);
    return lengths_;
  }

 private:
  std::vector<int64_t> lengths_;
  int64_t start_ = 0;  // of the current run
  uint8_t value_ = 0;
};

std::vector<uint8_t> encode_mask(PastedLines& mask, int64_t height, int64_t width) {
  const Span columns = mask.lines();
  std::vector<uint8_t> pixels(height);
  Runs runs;
  for (int32_t x = columns.begin; x < columns.end; ++x) {
    const int64_t top = x * height;
    int64_t end = top;  // of the last piece
    for (const Piece& piece : mask.move_to(x)) {
      if (top + piece.begin > end) runs.set(end, 0);
      end = top + piece.end;
      if (piece.all_in) {
        runs.set(top + piece.begin, 1);
      } else {
        mask.evaluate(piece, pixels.data());
        runs.append(top + piece.begin, pixels.data(), piece.end - piece.begin);
      }
    }
    if (end < top + height) runs.set(end, 0);
  }
  if (columns.end < width) runs.set(columns.end * height, 0);
  return encode_runs(runs.finish(height * width));
}

std::tuple<Tensor, Tensor> paste_masks_rle_cpu(const Tensor& probs,  // [N, h, w]
                                               const Tensor& boxes,  // [N, 4]
                                               int64_t height, int64_t width, double threshold) {
  check_paste_masks_rle(probs, boxes, height, width, threshold);
  const int64_t masks = probs.size(0), h = probs.size(1), w = probs.size(2);
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  const auto* box_data = static_cast<const Box*>(dense_boxes.const_data_ptr());
  for (int64_t mask = 0; mask < masks; ++mask) {
    check(is_finite(box_data[mask]), "paste_masks_rle: boxes must be finite; see row ", mask);
  }

  std::vector<std::vector<uint8_t>> encoded(masks);
  dispatch_floating(probs.scalar_type(), "paste_masks_rle", [&](auto zero) {
    const auto* prob_data = static_cast<const decltype(zero)*>(dense_probs.const_data_ptr());
    torch::stable::parallel_for(0, masks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t mask = begin; mask < end; ++mask) {
        PastedLines lines(prob_data + mask * h * w, h, w, box_data[mask], height, width, Along::kColumns,
                          static_cast<float>(threshold));
        encoded[mask] = encode_mask(lines, height, width);
      }
    });
  });

  Tensor offsets = torch::stable::new_empty(probs, {masks + 1}, ScalarType::Long);
  auto* offset_data = offsets.mutable_data_ptr<int64_t>();
  offset_data[0] = 0;
  for (int64_t mask = 0; mask < masks; ++mask) {
    offset_data[mask + 1] = offset_data[mask] + static_cast<int64_t>(encoded[mask].size());
  }
  Tensor counts = torch::stable::new_empty(probs, {offset_data[masks]}, ScalarType::Byte);
  auto* count_data = counts.mutable_data_ptr<uint8_t>();
  for (int64_t mask = 0; mask < masks; ++mask) {
    std::copy(encoded[mask].begin(), encoded[mask].end(), count_data + offset_data[mask]);
  }
  return {counts, offsets};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("paste_masks_rle", TORCH_BOX(&cascadeops::paste_masks_rle_cpu));
}
