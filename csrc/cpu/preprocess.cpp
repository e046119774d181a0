// preprocess on the CPU: a row of the batch is the mean of two rows of its image, weighted. Each of these is stretched
// to the batch's width and normalised once, and then serves all rows of the batch between it and its neighbours: so the
// scattered reads are made per row of the image, and what is done per row of the batch runs over vectors.
//
// Threads share the rows of all images. Layouts: images [H, W, 3] uint8 with any strides, batch [N, 3, H, W] in
// channels-last or contiguous memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "checks_preprocess.h"
#include "common/resize.h"
#include "cpu/fresh_pages.h"
#include "cpu/simd.h"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainValues = 1 << 16;  // a thread gets at least this many: some 20 us of work
constexpr int64_t kBlock = 48;             // the least multiple of three channels and of a vector of floats

typedef float Pixel __attribute__((vector_size(16)));  // three channels, and one lane that is overwritten
typedef uint8_t PixelBytes __attribute__((vector_size(4)));

struct Normalisation {
  float mean[kBlock], deviation[kBlock];  // channel after channel, again and again
};

struct Image {
  const uint8_t* pixels;
  int64_t row_stride, column_stride, channel_stride;
  int64_t source_height, source_width, height, width;
  std::vector<ResizeTap> taps;  // of each column; empty if the width stays
};

CASCADEOPS_INLINE Pixel load_pixel(const uint8_t* from) {
  PixelBytes bytes;
  memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Pixel);
}

// One row of an image -> width pixels and one float more.
CASCADEOPS_CLONES void stretch(const uint8_t* row, const ResizeTap* taps, int64_t width,
                               const Normalisation& normalisation, float* __restrict out) {
  Pixel mean, deviation;
  memcpy(&mean, normalisation.mean, sizeof(mean));
  memcpy(&deviation, normalisation.deviation, sizeof(deviation));
  for (int64_t x = 0; x < width; ++x, out += 3) {
    const uint8_t* pixel = row + 3 * int64_t{taps[x].first};
    const Pixel first = load_pixel(pixel), second = load_pixel(pixel + 3);
    const Pixel value = (first + taps[x].weight * (second - first) - mean) / deviation;
    memcpy(out, &value, sizeof(value));
  }
}

// The same where the width stays; a whole number of blocks.
CASCADEOPS_CLONES void normalise(const uint8_t* __restrict row, int64_t count, const Normalisation& normalisation,
                                 float* __restrict out) {
  for (int64_t i = 0; i < count; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j)
      out[i + j] = (static_cast<float>(row[i + j]) - normalisation.mean[j]) / normalisation.deviation[j];
  }
}

template <typename scalar_t>
CASCADEOPS_INLINE void blend_rows(const float* first, const float* second, float weight, int64_t count, scalar_t* out) {
  using Vector = Lanes<float>::type;
  for (int64_t i = 0; i < count; i += Lanes<float>::count) {
    Vector a, b;
    load_lanes(first + i, a);
    load_lanes(second + i, b);
    const Vector value = a + weight * (b - a);
    store_lanes(value, out + i, 1, std::min(count - i, Lanes<float>::count));
  }
}

CASCADEOPS_CLONES void blend(const float* first, const float* second, float weight, int64_t count, float* out) {
  blend_rows(first, second, weight, count, out);
}
CASCADEOPS_CLONES void blend(const float* first, const float* second, float weight, int64_t count, Half* out) {
  blend_rows(first, second, weight, count, out);
}
CASCADEOPS_CLONES void blend(const float* first, const float* second, float weight, int64_t count, BFloat16* out) {
  blend_rows(first, second, weight, count, out);
}

// The rows of one image at the batch's width, the last two of them kept.
class StretchedRows {
 public:
  StretchedRows(const Image& image, const Normalisation& normalisation, bool channels_last)
      : image_(image), normalisation_(normalisation), channels_last_(channels_last) {
    // Room for whole blocks and vectors, and for the pixel after the last, which a weight of 0 multiplies.
    bytes_.resize(3 * image.source_width / kBlock * kBlock + 2 * kBlock);
    for (Row& row : rows_) row.values.resize(3 * image.width / kBlock * kBlock + 2 * kBlock);
    if (!channels_last) pixels_.resize(rows_[0].values.size());
  }

  // 3 * width values, pixel by pixel or channel by channel, readable up to the next vector.
  const float* row(int64_t y) {
    Row& kept = rows_[y % 2];
    if (kept.y != y) {
      kept.y = y;
      fill(y, kept.values.data());
    }
    return kept.values.data();
  }

 private:
  struct Row {
    int64_t y = -1;
    std::vector<float> values;
  };

  void fill(int64_t y, float* out) {
    const uint8_t* from = image_.pixels + y * image_.row_stride;
    if (image_.channel_stride == 1 && image_.column_stride == 3) {
      std::copy_n(from, 3 * image_.source_width, bytes_.data());
    } else {
      for (int64_t x = 0; x < image_.source_width; ++x)
        for (int64_t c = 0; c < 3; ++c) bytes_[3 * x + c] = from[x * image_.column_stride + c * image_.channel_stride];
    }
    float* pixels = channels_last_ ? out : pixels_.data();
    if (image_.taps.empty()) {
      normalise(bytes_.data(), 3 * image_.width, normalisation_, pixels);
    } else {
      stretch(bytes_.data(), image_.taps.data(), image_.width, normalisation_, pixels);
    }
    if (channels_last_) return;
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < image_.width; ++x) out[c * image_.width + x] = pixels_[3 * x + c];
  }

  const Image& image_;
  const Normalisation& normalisation_;
  bool channels_last_;
  std::vector<uint8_t> bytes_;
  std::array<Row, 2> rows_;
  std::vector<float> pixels_;
};

// Rows [begin, end) of one plane of the batch. A row lies in memory as one piece (channels last), or as one for each
// channel, which begin plane_stride apart.
template <typename scalar_t>
void preprocess_rows(const Image& image, const Normalisation& normalisation, bool channels_last, int64_t begin,
                     int64_t end, int64_t batch_width, int64_t plane_stride, scalar_t* plane) {
  StretchedRows rows(image, normalisation, channels_last);
  const int64_t pieces = channels_last ? 1 : 3, channels = 3 / pieces;
  const int64_t values = channels * image.width, row_stride = channels * batch_width;
  for (int64_t y = begin; y < end; ++y) {
    scalar_t* out = plane + y * row_stride;
    const bool inside = y < image.height;
    for (int64_t piece = 0; piece < pieces; ++piece, out += plane_stride)
      std::fill(out + (inside ? values : 0), out + row_stride, scalar_t(0.0f));
    if (!inside) continue;
    const ResizeTap tap = resize_tap(y, image.source_height, image.height);
    const float* first = rows.row(tap.first);
    const float* second = tap.weight > 0 ? rows.row(tap.first + 1) : first;
    out = plane + y * row_stride;
    for (int64_t piece = 0; piece < pieces; ++piece, out += plane_stride)
      blend(first + piece * values, second + piece * values, tap.weight, values, out);
  }
}

std::tuple<Tensor, Tensor> preprocess_cpu(const std::vector<Tensor>& images,  // N of [H, W, 3]
                                          const std::vector<int64_t>& sizes,  // 2 N: (height, width) of each
                                          int64_t height, int64_t width, const std::vector<double>& mean,
                                          const std::vector<double>& deviation, ScalarType dtype, bool channels_last) {
  check_preprocess(images, sizes, height, width, mean, deviation, dtype);
  const auto count = static_cast<int64_t>(images.size());
  using torch::headeronly::MemoryFormat;
  Tensor batch = empty_map(images[0], {count, 3, height, width}, dtype,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  ask_for_huge_pages(batch);
  Tensor image_sizes = torch::stable::new_empty(images[0], {count, 2}, ScalarType::Long);
  std::copy(sizes.begin(), sizes.end(), image_sizes.mutable_data_ptr<int64_t>());

  Normalisation normalisation;
  for (int64_t i = 0; i < kBlock; ++i) {
    normalisation.mean[i] = static_cast<float>(mean[i % 3]);
    normalisation.deviation[i] = static_cast<float>(deviation[i % 3]);
  }
  std::vector<Image> sources(count);
  for (int64_t n = 0; n < count; ++n) {
    const Tensor& image = images[n];
    Image& source = sources[n];
    source = {image.const_data_ptr<uint8_t>(),
              image.stride(0),
              image.stride(1),
              image.stride(2),
              image.size(0),
              image.size(1),
              sizes[2 * n],
              sizes[2 * n + 1],
              {}};
    if (source.source_width == source.width) continue;
    source.taps.resize(source.width);
    for (int64_t x = 0; x < source.width; ++x) source.taps[x] = resize_tap(x, source.source_width, source.width);
  }

  dispatch_floating(dtype, "preprocess", [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (!std::is_same_v<scalar_t, double>) {  // which the check has refused
      auto* data = static_cast<scalar_t*>(batch.mutable_data_ptr());
      const int64_t grain = std::max<int64_t>(1, kGrainValues / (3 * width));
      torch::stable::parallel_for(0, count * height, grain, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t n = begin / height, first = begin % height, last = std::min(height, first + end - begin);
          preprocess_rows(sources[n], normalisation, channels_last, first, last, width, height * width,
                          data + n * 3 * height * width);
          begin += last - first;
        }
      });
    }
  });
  return {batch, image_sizes};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("preprocess", TORCH_BOX(&cascadeops::preprocess_cpu));
}
