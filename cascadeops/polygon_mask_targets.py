"""Mask targets of a mask head, drawn from the polygons of the ground truth inside each RoI."""

import torch
from torch import Tensor

from cascadeops._arguments import check_range, check_shapes, check_tensors


def polygon_mask_targets(
    vertices: Tensor,  # float32 [V, 2] (x, y)
    polygon_offsets: Tensor,  # int64 [P + 1]
    object_offsets: Tensor,  # int64 [G + 1]
    boxes: Tensor,  # float32 [K, 4] (x1, y1, x2, y2)
    index: Tensor,  # int64 [K]
    output_size: int = 28,
) -> Tensor:
    """Draws the polygons of each box's object into the box, cut into M x M cells, by COCO's rule.

    Each polygon is moved by (-x1, -y1) and scaled by M / max(x2 - x1, 0.1) and M / max(y2 - y1, 0.1), in float64; what
    ``pycocotools.mask.frPyObjects`` makes of it in an image of M x M is its target, cell for cell. Polygons may cross
    themselves (a cell that is enclosed an even number of times is outside); the polygons of one object are united. No
    bitmap of the image's size exists. Objects of a whole batch are numbered through.

    Args:
        vertices: float32 ``[V, 2]``, (x, y) in image pixels, of all polygons one after the other. A COCO polygon
            ``[x0, y0, x1, y1, ...]`` is ``tensor.view(-1, 2)``. One of fewer than 3 vertices covers nothing.
        polygon_offsets: int64 ``[P + 1]``: polygon p has the vertices from ``polygon_offsets[p]`` on, up to and without
            ``polygon_offsets[p + 1]``.
        object_offsets: int64 ``[G + 1]``: object g has the polygons from ``object_offsets[g]`` on, up to and without
            ``object_offsets[g + 1]``.
        boxes: float32 ``[K, 4]``, (x1, y1, x2, y2) in image pixels.
        index: int64 ``[K]``, the object of each box; -1 marks a padding row, whose target is 0.
        output_size: M, the side of a target, 1 to 4096.

    Returns:
        uint8 ``[K, M, M]``, values 0 and 1. The same on CPU and CUDA.

    Raises:
        RuntimeError: wrong shape, dtype or device. On the CPU also for an index outside ``[-1, G)``, offsets that
            decrease or leave their range, or a coordinate that is not finite; on CUDA a box that needs such a value
            gives 0 and is noted for `raise_device_faults`. A vertex more than 5 * 10^7 cells away, where pycocotools
            ends the process, is drawn as if it were at that distance.

    Source: the rule is ``rleFrPoly`` of github.com/cocodataset/cocoapi, common/maskApi; drawing inside the RoI is what
    detectron2 (``rasterize_polygons_within_box``) and NVIDIA's MLPerf Mask R-CNN do.
    """
    arguments = {
        "vertices": vertices,
        "polygon_offsets": polygon_offsets,
        "object_offsets": object_offsets,
        "boxes": boxes,
        "index": index,
    }
    check_tensors("polygon_mask_targets", **arguments)
    return torch.ops.cascadeops.polygon_mask_targets(*arguments.values(), output_size)


@torch.library.register_fake("cascadeops::polygon_mask_targets")
def _(vertices, polygon_offsets, object_offsets, boxes, index, output_size):
    check_shapes(
        "polygon_mask_targets",
        vertices=(vertices, "V 2"),
        polygon_offsets=(polygon_offsets, "P+1"),
        object_offsets=(object_offsets, "G+1"),
        boxes=(boxes, "K 4"),
        index=(index, "K"),
    )
    check_range("polygon_mask_targets", "output_size", output_size, 1, 4096)
    return boxes.new_empty((boxes.size(0), output_size, output_size), dtype=torch.uint8)
