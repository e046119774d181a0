// preprocess on CUDA: uint8 images of several sizes to one normalised, padded batch, resized bilinearly on the way.
//
// batch[n, c, y, x] = (lerp(lerp(p00, p01, wx), lerp(p10, p11, wx), wy) - mean[c]) / std[c], where p are the four
// pixels of image n around (y, x), see common/resize.h; 0 beyond the image.
//
// Layouts: images [H, W, 3] uint8 with any strides, batch [N, 3, H, W] in channels-last or contiguous memory. A block
// makes a tile of 256 columns and 8 rows of one image, a thread one column of it: so the position along x, a division
// of 64-bit integers, is found once for 8 pixels, and that along y once for a row, in shared memory. Neighbouring
// threads read neighbouring pixels. A channels-last tile is gathered in shared memory and leaves in 16-byte stores; a
// contiguous one is coalesced as it is. Images are described in the launch's own parameters, 64 to a launch, so nothing
// is copied to the device before.
//
// Bytes: the images once (0.92 MB for 640 x 480), the batch once (5.2 MB for 800 x 1088 in float16): 2.0 us on an H100.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "checks_preprocess.h"
#include "common/resize.h"
#include "cuda/launch.cuh"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;      // columns of a tile
constexpr int kRows = 8;           // rows of a tile: its half-precision pixels are then 12 KiB
constexpr int kImagesAtOnce = 64;  // 3 KiB of the 4 KiB of parameters that a launch may have
constexpr int kStoreBytes = 16;

struct Image {
  const uint8_t* pixels;
  int64_t row_stride, column_stride, channel_stride;
  int32_t source_height, source_width, height, width;
};

struct Images {
  Image image[kImagesAtOnce];
};

struct Normalisation {
  float mean[3], deviation[3];
};

// The order of operations of the CPU kernel: along x, normalised, along y.
__device__ float channel_value(const uint8_t* top, const uint8_t* bottom, int64_t to_right, float weight_x,
                               float weight_y, float mean, float deviation) {
  const float upper = lerp(static_cast<float>(top[0]), static_cast<float>(top[to_right]), weight_x);
  const float lower = lerp(static_cast<float>(bottom[0]), static_cast<float>(bottom[to_right]), weight_x);
  return lerp((upper - mean) / deviation, (lower - mean) / deviation, weight_y);
}

template <typename scalar_t, bool channels_last>
__global__ void __launch_bounds__(kThreads)
    preprocess_kernel(const __grid_constant__ Images images, const Normalisation normalisation, int64_t tiles,
                      int64_t tiles_across, int64_t tiles_down, int64_t height, int64_t width,
                      scalar_t* __restrict__ batch,      // [n, 3, H, W] of the images of this launch
                      int64_t* __restrict__ image_sizes  // [n, 2]
    ) {
  __shared__ ResizeTap row_taps[kRows];
  __shared__ __align__(kStoreBytes) char tile_bytes[channels_last ? sizeof(scalar_t) * kRows * kThreads * 3 : 1];
  auto* tile_values = reinterpret_cast<scalar_t*>(tile_bytes);  // [kRows, kThreads, 3]

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t n = tile / (tiles_across * tiles_down);
    const int64_t first_row = tile / tiles_across % tiles_down * kRows, first_column = tile % tiles_across * kThreads;
    const Image& image = images.image[n];
    const int64_t x = first_column + threadIdx.x;
    const int rows = static_cast<int>(min(int64_t{kRows}, height - first_row));
    if (first_row == 0 && first_column == 0 && threadIdx.x < 2)
      image_sizes[2 * n + threadIdx.x] = threadIdx.x == 0 ? image.height : image.width;
    if (threadIdx.x < rows && first_row + threadIdx.x < image.height)
      row_taps[threadIdx.x] = resize_tap(first_row + threadIdx.x, image.source_height, image.height);
    __syncthreads();

    const ResizeTap tap = x < image.width ? resize_tap(x, image.source_width, image.width) : ResizeTap{0, 0.0f};
    const uint8_t* column = image.pixels + tap.first * image.column_stride;
    const int64_t to_right = tap.weight > 0.0f ? image.column_stride : 0;
    for (int row = 0; row < rows; ++row) {
      const int64_t y = first_row + row;
      float value[3] = {0.0f, 0.0f, 0.0f};
      if (x < image.width && y < image.height) {
        const ResizeTap down = row_taps[row];
        const uint8_t* top = column + down.first * image.row_stride;
        const uint8_t* bottom = top + (down.weight > 0.0f ? image.row_stride : 0);
        for (int c = 0; c < 3; ++c) {
          const int64_t channel = c * image.channel_stride;
          value[c] = channel_value(top + channel, bottom + channel, to_right, tap.weight, down.weight,
                                   normalisation.mean[c], normalisation.deviation[c]);
        }
      }
      for (int c = 0; c < 3; ++c) {
        if constexpr (channels_last) {
          tile_values[(row * kThreads + threadIdx.x) * 3 + c] = static_cast<scalar_t>(value[c]);
        } else if (x < width) {
          batch[((n * 3 + c) * height + y) * width + x] = static_cast<scalar_t>(value[c]);
        }
      }
    }
    __syncthreads();

    if constexpr (channels_last) {
      constexpr int kStoreValues = kStoreBytes / sizeof(scalar_t), kRowStores = kThreads * 3 / kStoreValues;
      const int64_t values = min(int64_t{kThreads}, width - first_column) * 3;
      const bool aligned = width * 3 % kStoreValues == 0;  // then every row of the batch is
      for (int i = threadIdx.x; i < rows * kRowStores; i += kThreads) {
        const int row = i / kRowStores, first = i % kRowStores * kStoreValues;
        const scalar_t* from = tile_values + row * kThreads * 3 + first;
        scalar_t* to = batch + ((n * height + first_row + row) * width + first_column) * 3 + first;
        if (aligned && first + kStoreValues <= values) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int j = 0; j < kStoreValues && first + j < values; ++j) to[j] = from[j];
        }
      }
      __syncthreads();
    }
  }
}

template <typename scalar_t>
void launch(const Images& images, int64_t count, const Normalisation& normalisation, int64_t height, int64_t width,
            bool channels_last, scalar_t* batch, int64_t* image_sizes, cudaStream_t stream) {
  const int64_t across = (width + kThreads - 1) / kThreads, down = (height + kRows - 1) / kRows;
  const int64_t tiles = count * across * down;
  const auto kernel = channels_last ? preprocess_kernel<scalar_t, true> : preprocess_kernel<scalar_t, false>;
  kernel<<<grid_blocks(tiles, 1), kThreads, 0, stream>>>(images, normalisation, tiles, across, down, height, width,
                                                         batch, image_sizes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> preprocess_cuda(const std::vector<Tensor>& images,  // N of [H, W, 3]
                                           const std::vector<int64_t>& sizes,  // 2 N: (height, width) of each
                                           int64_t height, int64_t width, const std::vector<double>& mean,
                                           const std::vector<double>& deviation, ScalarType dtype, bool channels_last) {
  check_preprocess(images, sizes, height, width, mean, deviation, dtype);
  const torch::stable::accelerator::DeviceGuard guard(images[0].get_device_index());
  const auto count = static_cast<int64_t>(images.size());
  Tensor batch = empty_map(images[0], {count, 3, height, width}, dtype,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Tensor image_sizes = torch::stable::new_empty(images[0], {count, 2}, ScalarType::Long);
  Normalisation normalisation;
  for (int c = 0; c < 3; ++c) {
    normalisation.mean[c] = static_cast<float>(mean[c]);
    normalisation.deviation[c] = static_cast<float>(deviation[c]);
  }

  for (int64_t first = 0; first < count; first += kImagesAtOnce) {
    const int64_t some = std::min<int64_t>(kImagesAtOnce, count - first);
    Images described{};
    for (int64_t i = 0; i < some; ++i) {
      const Tensor& image = images[first + i];
      described.image[i] = {image.const_data_ptr<uint8_t>(),
                            image.stride(0),
                            image.stride(1),
                            image.stride(2),
                            static_cast<int32_t>(image.size(0)),
                            static_cast<int32_t>(image.size(1)),
                            static_cast<int32_t>(sizes[2 * (first + i)]),
                            static_cast<int32_t>(sizes[2 * (first + i) + 1])};
    }
    dispatch_floating(dtype, "preprocess", [&](auto zero) {
      using scalar_t = decltype(zero);
      if constexpr (!std::is_same_v<scalar_t, double>) {  // which the check has refused
        launch(described, some, normalisation, height, width, channels_last,
               static_cast<scalar_t*>(batch.mutable_data_ptr()) + first * 3 * height * width,
               image_sizes.mutable_data_ptr<int64_t>() + 2 * first, current_stream(batch));
      }
    });
  }
  return {batch, image_sizes};
}

}  // namespace
}  // namespace cascadeops

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CUDA, library) {
  library.impl("preprocess", TORCH_BOX(&cascadeops::preprocess_cuda));
}
