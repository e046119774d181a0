// Every operator of CascadeOps, on one page. The CPU kernels live in this library, the CUDA kernels in
// cascadeops._C_cuda; fake kernels and autograd are registered from Python (cascadeops/<operator>.py).
//
// Only the LibTorch stable ABI is used, so that one binary serves every torch >= 2.10.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cascadeops, library) {
  // maps: L levels [N, C, H_l, W_l], finest first, and one more if extra_subdivision > 0; rois: [K, 5] (batch index,
  // x1, y1, x2, y2), index -1 = padding row; image_vector: [N, C]; count: how many rows of rois count, one number
  library.def(
      "multiscale_roi_align(Tensor[] maps, Tensor rois, int output_height, int output_width, float[] spatial_scales, "
      "int sampling_ratio, bool aligned, float finest_size, bool epsilon_inside_log, int extra_subdivision, "
      "Tensor? image_vector, Tensor? count) -> Tensor");
  library.def(
      "multiscale_roi_align_backward(Tensor grad, Tensor[] maps, Tensor rois, float[] spatial_scales, "
      "int sampling_ratio, bool aligned, float finest_size, bool epsilon_inside_log, int extra_subdivision, "
      "Tensor? count) -> Tensor[]");

  // bitmaps: all ground-truth crops, flattened one after the other; windows: [G, 4] (x0, y0, width, height)
  library.def(
      "mask_targets(Tensor bitmaps, Tensor offsets, Tensor windows, Tensor boxes, Tensor index, int output_size) -> "
      "Tensor");

  // boxes: [N, 4]; scores, idxs: [N]; the result's length depends on the data
  library.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  library.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");
  // vertices: [V, 2], of all polygons one after the other; polygon p is vertices polygon_offsets[p] to [p + 1], object
  // g is polygons object_offsets[g] to [g + 1]
  library.def(
      "polygon_mask_targets(Tensor vertices, Tensor polygon_offsets, Tensor object_offsets, Tensor boxes, "
      "Tensor index, int output_size) -> Tensor");

  // boxes: [B, N, 4]; scores: [B, N]; a score of -inf marks a padding row
  library.def(
      "padded_nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, int max_output) "
      "-> (Tensor index, Tensor count)");
  library.def(
      "multiclass_nms(Tensor boxes, Tensor scores, float score_threshold, float iou_threshold, int max_detections) "
      "-> (Tensor boxes, Tensor scores, Tensor labels, Tensor index, Tensor count)");

  // logits: L x [N, A_l]; deltas: L x [N, A_l, 4]; anchors: L x [A_l, 4]; image_sizes: [N, 2]
  library.def(
      "box_proposals(Tensor[] logits, Tensor[] deltas, Tensor[] anchors, Tensor image_sizes, int top_k, "
      "int max_proposals, float iou_threshold, float[] stds) -> (Tensor boxes, Tensor scores, Tensor count)");
  // boxes: [N, P, 4]; valid: [N, P]; gt_boxes: [N, G, 4]; gt_valid: [N, G]
  library.def(
      "match_boxes(Tensor boxes, Tensor valid, Tensor gt_boxes, Tensor gt_valid, float positive_iou, "
      "float negative_iou, float? low_quality_iou) -> Tensor");

  // probs: [N, h, w]; boxes: [N, 4]
  library.def(
      "paste_masks(Tensor probs, Tensor boxes, int height, int width, float threshold, bool packed=False) -> Tensor");
  library.def(
      "paste_masks_rle(Tensor probs, Tensor boxes, int height, int width, float threshold) "
      "-> (Tensor counts, Tensor offsets)");

  // input: [N, C, H, W]; offset: [N, offset_groups * taps * 2 (y, x), h, w]; mask: [N, offset_groups * taps, h, w]
  library.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
  library.def(
      "deform_conv2d_backward_data(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation, bool deterministic) -> "
      "(Tensor grad_input, Tensor grad_offset, Tensor grad_mask)");
  library.def(
      "deform_conv2d_backward_weight(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation) -> Tensor");

  // x, k3, grad: [N, C, H, W]; k2: [N, C, h, w]
  library.def("self_calibrated_gate(Tensor x, Tensor k3, Tensor k2) -> Tensor");
  library.def(
      "self_calibrated_gate_backward(Tensor grad, Tensor x, Tensor k3, Tensor k2) "
      "-> (Tensor grad_x, Tensor grad_k3, Tensor grad_k2)");

  // images: N of [H, W, 3]; sizes: 2 N numbers, (height, width) of each image in the batch of height x width
  library.def(
      "preprocess(Tensor[] images, int[] sizes, int height, int width, float[] mean, float[] std, ScalarType dtype, "
      "bool channels_last) -> (Tensor batch, Tensor image_sizes)");
}
