// Input checks shared by the CPU and CUDA kernels: one function per operator, so that an error reads the same on both.
// A message names the operator, the argument, the rule and what came: "padded_nms: boxes must have shape [B, N, 4], got
// [4, 4]".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace cascadeops {

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// Elements of the dtype, and where the processor expects them: a view of bytes can begin anywhere.
inline void check_dtype(const char* op, const char* name, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType dtype) {
  check(tensor.scalar_type() == dtype, op, ": ", name, " must have dtype ", torch::headeronly::toString(dtype),
        ", got ", torch::headeronly::toString(tensor.scalar_type()));
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  check(address % tensor.element_size() == 0, op, ": ", name, " must begin at a multiple of ", tensor.element_size(),
        " bytes, got an address with remainder ", address % tensor.element_size());
}

inline void check_same_device(const char* op, const char* name, const torch::stable::Tensor& tensor,
                              const char* first_name, const torch::stable::Tensor& first) {
  check(tensor.device() == first.device(), op, ": ", name, " must be on the device of ", first_name);
}

// Row numbers of the NMS kernels have 32 bits.
constexpr int64_t kMaxCandidates = std::numeric_limits<int32_t>::max();

inline void check_nms_limits(const char* op, double iou_threshold, const char* capacity_name, int64_t capacity) {
  check(iou_threshold >= 0 && iou_threshold <= 1, op, ": iou_threshold must be in [0, 1], got ", iou_threshold);
  check(capacity >= 0 && capacity <= kMaxCandidates, op, ": ", capacity_name, " must be in [0, 2**31), got ", capacity);
}

inline void check_padded_nms(const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                             const std::optional<torch::stable::Tensor>& groups, double iou_threshold,
                             int64_t max_output) {
  constexpr const char* op = "padded_nms";
  const auto is_batch_by_rows = [&](const torch::stable::Tensor& tensor) {
    return tensor.dim() == 2 && tensor.size(0) == boxes.size(0) && tensor.size(1) == boxes.size(1);
  };
  check(boxes.dim() == 3 && boxes.size(2) == 4, op, ": boxes must have shape [B, N, 4], got ", shape_of(boxes));
  check(boxes.size(1) <= kMaxCandidates, op, ": boxes must have fewer than 2**31 rows, got ", boxes.size(1));
  check(is_batch_by_rows(scores), op, ": scores must have shape [B, N] = [", boxes.size(0), ", ", boxes.size(1),
        "], got ", shape_of(scores));
  check_dtype(op, "boxes", boxes, torch::headeronly::ScalarType::Float);
  check_dtype(op, "scores", scores, torch::headeronly::ScalarType::Float);
  check_same_device(op, "scores", scores, "boxes", boxes);
  if (groups) {
    check(is_batch_by_rows(*groups), op, ": groups must have shape [B, N] = [", boxes.size(0), ", ", boxes.size(1),
          "], got ", shape_of(*groups));
    check_dtype(op, "groups", *groups, torch::headeronly::ScalarType::Long);
    check_same_device(op, "groups", *groups, "boxes", boxes);
  }
  check_nms_limits(op, iou_threshold, "max_output", max_output);
}

inline void check_multiclass_nms(const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                                 double score_threshold, double iou_threshold, int64_t max_detections) {
  constexpr const char* op = "multiclass_nms";
  check(scores.dim() == 3, op, ": scores must have shape [B, N, C], got ", shape_of(scores));
  check(scores.size(2) <= kMaxCandidates / std::max<int64_t>(scores.size(1), 1), op,
        ": scores must have fewer than 2**31 (row, class) pairs, got ", shape_of(scores));
  const int64_t batch = scores.size(0), rows = scores.size(1), classes = scores.size(2);
  check(boxes.dim() == 3 && boxes.size(0) == batch && boxes.size(1) == rows &&
            (boxes.size(2) == 4 || boxes.size(2) == classes * 4),
        op, ": boxes must have shape [B, N, 4] or [B, N, C * 4], with scores ", shape_of(scores), ", got ",
        shape_of(boxes));
  check_dtype(op, "boxes", boxes, torch::headeronly::ScalarType::Float);
  check_dtype(op, "scores", scores, torch::headeronly::ScalarType::Float);
  check_same_device(op, "scores", scores, "boxes", boxes);
  check(score_threshold == score_threshold, op, ": score_threshold must be a number, got NaN");
  check_nms_limits(op, iou_threshold, "max_detections", max_detections);
}

inline void check_paste(const char* op, const torch::stable::Tensor& probs, const torch::stable::Tensor& boxes,
                        int64_t height, int64_t width) {
  check(probs.dim() == 3, op, ": probs must have shape [N, h, w], got ", shape_of(probs));
  check(probs.size(0) == 0 || (probs.size(1) > 0 && probs.size(2) > 0), op,
        ": probs must have at least one cell each, got shape ", shape_of(probs));
  check(boxes.dim() == 2 && boxes.size(0) == probs.size(0) && boxes.size(1) == 4, op,
        ": boxes must have shape [N, 4] = [", probs.size(0), ", 4], got ", shape_of(boxes));
  using torch::headeronly::ScalarType;
  const ScalarType dtype = probs.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
            dtype == ScalarType::BFloat16,
        op, ": probs must have dtype float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  check_dtype(op, "probs", probs, dtype);
  check_dtype(op, "boxes", boxes, ScalarType::Float);
  check_same_device(op, "boxes", boxes, "probs", probs);
  // Pixel centres must be exact in float32, and cells countable in int.
  constexpr int64_t limit = int64_t{1} << 23;
  check(height > 0 && width > 0 && height <= limit && width <= limit, op,
        ": image_size (height, width) must be in [1, 2**23], got (", height, ", ", width, ")");
  check(probs.size(1) <= limit && probs.size(2) <= limit, op, ": probs must have at most 2**23 cells along an axis");
}

inline void check_paste_masks(const torch::stable::Tensor& probs, const torch::stable::Tensor& boxes, int64_t height,
                              int64_t width, double threshold, bool packed) {
  check_paste("paste_masks", probs, boxes, height, width);
  const auto compared = static_cast<float>(threshold);  // the smallest numbers become 0
  check(compared > 0 || compared < 0,
        "paste_masks: threshold must be positive, or negative for uint8 probabilities, got ", threshold);
  check(!packed || threshold > 0, "paste_masks: packed masks need a positive threshold, got ", threshold);
}

inline void check_paste_masks_rle(const torch::stable::Tensor& probs, const torch::stable::Tensor& boxes,
                                  int64_t height, int64_t width, double threshold) {
  check_paste("paste_masks_rle", probs, boxes, height, width);
  check(static_cast<float>(threshold) > 0, "paste_masks_rle: threshold must be positive, got ", threshold);
  check(height * width < int64_t{1} << 32, "paste_masks_rle: image_size must hold fewer than 2**32 pixels, got (",
        height, ", ", width, ")");
}

// maps: the features, and the extra map after them if extra_subdivision > 0.
inline void check_multiscale_roi_align(const std::vector<torch::stable::Tensor>& maps,
                                       const torch::stable::Tensor& rois, int64_t height, int64_t width,
                                       const std::vector<double>& spatial_scales, double finest_size,
                                       int64_t extra_subdivision, const std::optional<torch::stable::Tensor>& count) {
  constexpr const char* op = "multiscale_roi_align";
  const size_t extra = extra_subdivision > 0 ? 1 : 0;
  check(maps.size() > extra && maps.size() <= 8 + extra, op, ": features must hold 1 to 8 maps, got ",
        maps.size() - std::min(extra, maps.size()));
  check(extra_subdivision >= 0 && extra_subdivision <= 1024, op, ": extra_subdivision must be in [1, 1024], got ",
        extra_subdivision);
  check(rois.dim() == 2 && rois.size(1) == 5, op, ": rois must have shape [K, 5], got ", shape_of(rois));
  check(rois.size(0) <= std::numeric_limits<int32_t>::max(), op, ": rois must have fewer than 2**31 rows, got ",
        rois.size(0));
  check_dtype(op, "rois", rois, torch::headeronly::ScalarType::Float);
  const torch::stable::Tensor& first = maps[0];
  const size_t levels = maps.size() - extra;
  for (size_t i = 0; i < maps.size(); ++i) {
    const torch::stable::Tensor& map = maps[i];
    const std::string name = i < levels ? "features[" + std::to_string(i) + "]" : "extra";
    check(map.dim() == 4 && map.size(2) > 0 && map.size(3) > 0, op, ": ", name,
          " must have shape [N, C, H, W] with at least one cell, got ", shape_of(map));
    check(map.size(0) == first.size(0) && map.size(1) == first.size(1), op, ": ", name,
          " must have the batch size and channels of features[0], ", shape_of(first), ", got ", shape_of(map));
    check_dtype(op, name.c_str(), map, first.scalar_type());
    check_same_device(op, name.c_str(), map, "rois", rois);
  }
  check(height > 0 && width > 0, op, ": output_size must be positive, got (", height, ", ", width, ")");
  check(std::max<int64_t>(first.size(1), 1) <= std::numeric_limits<int32_t>::max() / height / width, op,
        ": output_size must give a RoI fewer than 2**31 values, got ", first.size(1), " channels of (", height, ", ",
        width, ")");
  check(spatial_scales.size() == maps.size(), op, ": strides must have one entry per map, ", levels, ", got ",
        spatial_scales.size() - std::min(extra, spatial_scales.size()));
  for (const double scale : spatial_scales)
    check(scale > 0 && std::isfinite(scale), op, ": strides must be positive, got ", 1 / scale);
  check(finest_size > 0, op, ": finest_size must be positive, got ", finest_size);
  if (count) {
    check(count->numel() == 1, op, ": count must hold one number, got shape ", shape_of(*count));
    check_dtype(op, "count", *count, torch::headeronly::ScalarType::Long);
    check_same_device(op, "count", *count, "rois", rois);
  }
}

inline void check_roi_image_vector(const std::optional<torch::stable::Tensor>& vector,
                                   const torch::stable::Tensor& feature) {
  constexpr const char* op = "multiscale_roi_align";
  if (!vector) return;
  check(vector->dim() == 2 && vector->size(0) == feature.size(0) && vector->size(1) == feature.size(1), op,
        ": image_vector must have shape [N, C] = [", feature.size(0), ", ", feature.size(1), "], got ",
        shape_of(*vector));
  check_dtype(op, "image_vector", *vector, feature.scalar_type());
  check_same_device(op, "image_vector", *vector, "features[0]", feature);
}

inline void check_multiscale_roi_align_backward(const torch::stable::Tensor& grad,
                                                const std::vector<torch::stable::Tensor>& maps,
                                                const torch::stable::Tensor& rois,
                                                const std::vector<double>& spatial_scales, double finest_size,
                                                int64_t extra_subdivision,
                                                const std::optional<torch::stable::Tensor>& count) {
  constexpr const char* op = "multiscale_roi_align";
  check(grad.dim() == 4, op, ": grad must have shape [K, C, h, w], got ", shape_of(grad));
  check_multiscale_roi_align(maps, rois, grad.size(2), grad.size(3), spatial_scales, finest_size, extra_subdivision,
                             count);
  check(grad.size(0) == rois.size(0) && grad.size(1) == maps[0].size(1), op, ": grad must have shape [K, C, h, w] = [",
        rois.size(0), ", ", maps[0].size(1), ", h, w], got ", shape_of(grad));
  check_dtype(op, "grad", grad, maps[0].scalar_type());
  check_same_device(op, "grad", grad, "rois", rois);
}

// How many rows of rois count; rois [K, 5] contiguous and count in host memory. The values of those rows are checked.
inline int64_t check_roi_values(const torch::stable::Tensor& rois, int64_t batch_size,
                                const std::optional<torch::stable::Tensor>& count) {
  constexpr const char* op = "multiscale_roi_align";
  const int64_t rows = count ? *count->const_data_ptr<int64_t>() : rois.size(0);
  check(rows >= 0 && rows <= rois.size(0), op, ": count must be in [0, K] = [0, ", rois.size(0), "], got ", rows);
  const float* roi = rois.const_data_ptr<float>();
  for (int64_t k = 0; k < rows; ++k, roi += 5) {
    check(roi[0] == -1 || (roi[0] == std::floor(roi[0]) && roi[0] >= 0 && roi[0] < static_cast<float>(batch_size)), op,
          ": rois[", k, ", 0] must be a batch index in [-1, ", batch_size, "), got ", roi[0]);
    for (int i = 1; i < 5; ++i)
      check(roi[0] == -1 || std::isfinite(roi[i]), op, ": rois[", k, ", ", i, "] must be finite, got ", roi[i]);
  }
  return rows;
}

// A target has fewer than 2**31 cells.
constexpr int64_t kMaxTargetSide = int64_t{1} << 15;

inline void check_mask_targets(const torch::stable::Tensor& bitmaps, const torch::stable::Tensor& offsets,
                               const torch::stable::Tensor& windows, const torch::stable::Tensor& boxes,
                               const torch::stable::Tensor& index, int64_t output_size) {
  constexpr const char* op = "mask_targets";
  using torch::headeronly::ScalarType;
  check(bitmaps.dim() == 1, op, ": bitmaps must have shape [total], got ", shape_of(bitmaps));
  check(offsets.dim() == 1, op, ": offsets must have shape [G], got ", shape_of(offsets));
  check(windows.dim() == 2 && windows.size(0) == offsets.size(0) && windows.size(1) == 4, op,
        ": windows must have shape [G, 4] = [", offsets.size(0), ", 4], got ", shape_of(windows));
  check(boxes.dim() == 2 && boxes.size(1) == 4, op, ": boxes must have shape [K, 4], got ", shape_of(boxes));
  check(index.dim() == 1 && index.size(0) == boxes.size(0), op, ": index must have shape [K] = [", boxes.size(0),
        "], got ", shape_of(index));
  check_dtype(op, "bitmaps", bitmaps, ScalarType::Byte);
  check_dtype(op, "offsets", offsets, ScalarType::Long);
  check_dtype(op, "windows", windows, ScalarType::Int);
  check_dtype(op, "boxes", boxes, ScalarType::Float);
  check_dtype(op, "index", index, ScalarType::Long);
  check_same_device(op, "offsets", offsets, "bitmaps", bitmaps);
  check_same_device(op, "windows", windows, "bitmaps", bitmaps);
  check_same_device(op, "boxes", boxes, "bitmaps", bitmaps);
  check_same_device(op, "index", index, "bitmaps", bitmaps);
  check(output_size > 0 && output_size <= kMaxTargetSide, op, ": output_size must be in [1, 2**15], got ", output_size);
}

}  // namespace cascadeops
