// paste_masks on the CPU: the rows of all masks are shared out among the threads; only the part of a row that its mask
// reaches is evaluated, the rest is zeroed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/paste_lines.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainPixels = 1 << 15;  // a thread gets at least this many: some 10 us of work

// Rows [begin, end) of one mask; out: its row `begin`.
void paste_rows(PastedLines& mask, int64_t begin, int64_t end, int64_t width, float threshold, uint8_t* out) {
  const Span lines = mask.lines(), pixels = mask.pixels();
  for (int64_t row = begin; row < end; ++row, out += width) {
    if (row < lines.begin || row >= lines.end) {
      std::fill_n(out, width, uint8_t{0});
      continue;
    }
    std::fill(out, out + pixels.begin, uint8_t{0});
    mask.evaluate(static_cast<int32_t>(row), threshold, out + pixels.begin);
    std::fill(out + pixels.end, out + width, uint8_t{0});
  }
}

Tensor paste_masks_cpu(const Tensor& probs,  // [N, h, w]
                       const Tensor& boxes,  // [N, 4]
                       int64_t height, int64_t width, double threshold) {
  check_paste_masks(probs, boxes, height, width, threshold);
  const int64_t masks = probs.size(0), h = probs.size(1), w = probs.size(2);
  const Tensor dense_probs = torch::stable::contiguous(probs), dense_boxes = torch::stable::contiguous(boxes);
  Tensor out =
      torch::stable::new_empty(probs, {masks, height, width}, threshold < 0 ? ScalarType::Byte : ScalarType::Bool);

  const float* prob_data = dense_probs.const_data_ptr<float>();
  const auto* box_data = static_cast<const Box*>(dense_boxes.const_data_ptr());
  auto* out_data = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t mask = 0; mask < masks; ++mask) {
    check(is_finite(box_data[mask]), "paste_masks: boxes must be finite; see row ", mask);
  }
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / width);
  torch::stable::parallel_for(0, masks * height, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t mask = begin / height, first_row = begin % height;
      const int64_t last_row = std::min(height, first_row + end - begin);
      PastedLines lines(prob_data + mask * h * w, h, w, box_data[mask], height, width, Along::kRows);
      paste_rows(lines, first_row, last_row, width, static_cast<float>(threshold), out_data + begin * width);
      begin += last_row - first_row;
    }
  });
  return out;
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("paste_masks", TORCH_BOX(&cascadeops::paste_masks_cpu));
}
