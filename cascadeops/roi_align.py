"""RoIAlign with torchvision's interfaces: drop-in functions and modules over `multiscale_roi_align`."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascadeops._arguments import as_list, check_tensors, height_and_width
from cascadeops.multiscale_roi_align import multiscale_roi_align

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def roi_align(
    input: Tensor,  # [N, C, H, W]
    boxes: Tensor | Sequence[Tensor],  # [K, 5] (batch index, x1, y1, x2, y2), or one [L, 4] for each image
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pools boxes from one map by RoIAlign; a drop-in for ``torchvision.ops.roi_align``.

    It is `multiscale_roi_align` with a single level, whose docstring says how bins are sampled. What differs from
    torchvision (0.26), on purpose:

    * bfloat16 works, half types work on the CPU, and channels-last input is read in place (the result is then
      channels-last, too).
    * Coordinates are float32 whatever the dtype of ``input``, and sums at least that: torchvision rounds coordinates
      to the input's dtype, which is whole pixels in half types on large images. ``boxes`` may have any floating dtype.
    * A batch index of -1 marks a padding row that gives 0. A batch index outside ``[-1, N)`` and a coordinate that is
      not finite raise on the CPU; on CUDA they give 0 and are noted for `raise_device_faults`. torchvision reads
      foreign memory or crashes.
    * A reversed box gives 0. torchvision mirrors it if ``aligned`` is True and ``sampling_ratio`` positive.
    * The gradient is the same in every run, and there is a second derivative. Quantised tensors are not taken.

    Args:
        input: ``[N, C, H, W]``; float32, float16, bfloat16 or float64.
        boxes: ``[K, 5]`` (batch index, x1, y1, x2, y2), or a list of N tensors ``[L, 4]``, the boxes of each image.
        output_size: bins per box, (height, width) or one number for both.
        spatial_scale: cells of ``input`` per unit of ``boxes``: 1 / stride for boxes in image pixels.
        sampling_ratio: samples per bin along each axis; 0 or less takes as many as the bin has cells, rounded up.
        aligned: True shifts by half a cell, as detectron2 does. False: no shift, boxes at least one cell wide and high.

    Returns:
        ``[K, C, height, width]``, dtype of ``input``.

    Raises:
        RuntimeError: wrong shape, dtype or device; on the CPU a bad row, see above. In compiled functions and on CUDA a
            bad row is reported as one of `multiscale_roi_align`, to which the boxes are rois.

    Source: He et al., "Mask R-CNN", ICCV 2017, section 3.
    """
    check_tensors("roi_align", input=input)
    if input.dim() != 4 or input.size(2) == 0 or input.size(3) == 0:
        raise RuntimeError(
            f"roi_align: input must have shape [N, C, H, W] with at least one cell, got {list(input.shape)}"
        )
    if input.dtype not in _DTYPES:
        raise RuntimeError(f"roi_align: input must have dtype float32, float64, float16 or bfloat16, got {input.dtype}")
    if not isinstance(spatial_scale, int | float) or not 0 < spatial_scale < math.inf:
        raise RuntimeError(f"roi_align: spatial_scale must be positive and finite, got {spatial_scale}")
    height, width = height_and_width("roi_align", "output_size", output_size)
    rois = _rois("roi_align", boxes, input)
    options = (height, width, [spatial_scale], sampling_ratio, aligned, 1.0, True, 0, None, None)
    if torch.compiler.is_compiling():
        return torch.ops.cascadeops.multiscale_roi_align([input], rois, *options)
    try:
        return torch.ops.cascadeops.multiscale_roi_align([input], rois, *options)
    except RuntimeError as error:
        raise RuntimeError(_restated(error, "roi_align", boxes)) from None


class RoIAlign(nn.Module):
    """`roi_align` as a module; a drop-in for ``torchvision.ops.RoIAlign``."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign over the named maps of a pyramid, in one launch; a drop-in for ``torchvision.ops.MultiScaleRoIAlign``.

    The scale of a map is the power of two that is nearest to (map height) / (largest image height), and boxes of
    ``canonical_scale`` pixels, as the square root of their area, come from ``canonical_level``: the map of stride
    2^canonical_level. Levels, samples and results are those of torchvision (boxes are not shifted: ``aligned=False``).
    What differs, on purpose, besides what `roi_align` lists:

    * The scales are taken anew in every call; torchvision keeps those of its first one.
    * Levels are counted from the finest map, as if none was missing. Boxes whose level lies beyond the last map take
      that one; torchvision leaves them at 0 where a map between is missing.
    * The border between two levels is decided without the rounding of log2.

    Args:
        featmap_names: keys of the maps to pool from, given to `forward` finest first.
        output_size: bins per box, (height, width) or one number for both.
        sampling_ratio: samples per bin along each axis; 0 or less takes as many as the bin has cells, rounded up.
        canonical_scale, canonical_level: see above.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = _pair(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Pools the boxes of every image, one image after the other: ``[K, C, height, width]``.

        Args:
            x: maps ``[N, C, H_l, W_l]`` by name, finest first; others than ``featmap_names`` are passed over.
            boxes: N tensors ``[L, 4]``, (x1, y1, x2, y2) in image pixels.
            image_shapes: (height, width) of each image in pixels.

        Raises:
            ValueError: no image, or none of the named maps.
            RuntimeError: as `multiscale_roi_align`.
        """
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"MultiScaleRoIAlign: x must hold a map of {list(self.featmap_names)}, got {list(x)}")
        if not image_shapes:
            raise ValueError("MultiScaleRoIAlign: image_shapes must hold the size of at least one image, got none")
        height = max(shape[0] for shape in image_shapes)
        strides = [2.0 ** -round(math.log2(feature.shape[2] / height)) for feature in features]
        finest_size = self.canonical_scale * strides[0] / 2.0**self.canonical_level
        rois = _rois("MultiScaleRoIAlign", boxes, features[0])
        options = (self.output_size, strides, self.sampling_ratio, False, finest_size, "torchvision")
        if torch.compiler.is_compiling():
            return multiscale_roi_align(features, rois, *options)
        try:
            return multiscale_roi_align(features, rois, *options)
        except RuntimeError as error:
            raise RuntimeError(_restated(error, "MultiScaleRoIAlign", boxes)) from None

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )


def _restated(error: RuntimeError, operator: str, boxes: Tensor | Sequence[Tensor]) -> str:
    """What `multiscale_roi_align` said about rois[row, column], in terms of the boxes that `operator` was given."""

    def place(match: re.Match) -> str:
        row, column = int(match[1]), int(match[2])
        if isinstance(boxes, Tensor):
            return f"{operator}: boxes[{row}, {column}]"
        image = 0
        while row >= len(boxes[image]):
            row -= len(boxes[image])
            image += 1
        return f"{operator}: boxes[{image}][{row}, {column - 1}]"

    text = re.sub(r"multiscale_roi_align: rois\[(\d+), (\d)\]", place, str(error))
    return text.replace("multiscale_roi_align: ", f"{operator}: ")


def _pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    return (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)


def _rois(operator: str, boxes: Tensor | Sequence[Tensor], input: Tensor) -> Tensor:
    """[K, 5] float32, from either form of boxes."""
    if isinstance(boxes, Tensor):
        _check_boxes(operator, "boxes", boxes, "K", 5, input)
        return boxes.float()
    boxes = as_list(operator, "boxes", boxes, Tensor)
    if len(boxes) > input.size(0):
        raise RuntimeError(
            f"{operator}: boxes must hold one tensor for each of {input.size(0)} images, got {len(boxes)}"
        )
    rois = [input.new_empty((0, 5), dtype=torch.float32)]
    for image, box in enumerate(boxes):
        _check_boxes(operator, f"boxes[{image}]", box, "L", 4, input)
        rois.append(torch.cat([torch.full_like(box[:, :1], image, dtype=torch.float32), box.float()], dim=1))
    return torch.cat(rois)


def _check_boxes(operator: str, name: str, boxes: Tensor, rows: str, columns: int, input: Tensor) -> None:
    check_tensors(operator, **{name: boxes})
    if boxes.dim() != 2 or boxes.size(1) != columns:
        raise RuntimeError(f"{operator}: {name} must have shape [{rows}, {columns}], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise RuntimeError(f"{operator}: {name} must have a floating dtype, got {boxes.dtype}")
    # The kernels would say so too, but where one of the devices is "meta" the call does not reach them.
    if boxes.device != input.device:
        raise RuntimeError(f"{operator}: {name} must be on the device of input, {input.device}, got {boxes.device}")
