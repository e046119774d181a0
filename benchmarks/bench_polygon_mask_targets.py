"""polygon_mask_targets against detectron2's way, pycocotools region by region: the regions of one image and of four."""

import math

import numpy as np
import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.polygon_mask_targets import polygon_mask_targets as reference

OBJECTS, VERTICES, SIZE = 20, 60, 28


def workload(count, device):
    """Outlines of 60 vertices that wave around an ellipse in a box, and boxes shaken around them."""
    generator = torch.Generator().manual_seed(0)
    objects = shapes.boxes(OBJECTS, "cpu", smallest=32, largest=400)
    angle = torch.arange(VERTICES) * (2 * math.pi / VERTICES)
    radius = 0.35 + 0.15 * torch.rand(OBJECTS, VERTICES, generator=generator)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    size = objects[:, 2:] - objects[:, :2]
    vertices = objects[:, None, :2] + (0.5 + radius[..., None] * circle) * size[:, None]
    index = torch.arange(count) % OBJECTS
    boxes = objects[index] + 0.1 * size.repeat(1, 2)[index] * torch.randn(count, 4, generator=generator)
    polygon_offsets, object_offsets = torch.arange(OBJECTS + 1) * VERTICES, torch.arange(OBJECTS + 1)
    arguments = vertices.flatten(0, 1), polygon_offsets, object_offsets, boxes, index
    return [tensor.to(device) for tensor in arguments]


@pytest.mark.parametrize("implementation", ["cascadeops", "pycocotools", "reference"])
@pytest.mark.parametrize("count", [128, 512])
def bench_polygon_mask_targets(measure, device, count, implementation):
    if implementation == "reference" and (count > 128 or device.type != "cpu"):
        pytest.skip("takes seconds a call")
    arguments = workload(count, device)
    expected = cascadeops.polygon_mask_targets(*arguments, SIZE)
    if implementation == "cascadeops":
        function = lambda: cascadeops.polygon_mask_targets(*arguments, SIZE)  # noqa: E731
    elif implementation == "reference":
        function = lambda: reference(*arguments, SIZE)  # noqa: E731
    else:
        coco = pytest.importorskip("pycocotools.mask")
        polygons = arguments[0].cpu().double().view(OBJECTS, VERTICES, 2).numpy()  # detectron2 keeps them on the host

        def function():
            targets = []
            for box, g in zip(arguments[3].cpu().double().numpy(), arguments[4].tolist(), strict=True):
                moved = (polygons[g] - box[:2]) * (SIZE / np.maximum(box[2:] - box[:2], 0.1))
                targets.append(coco.decode(coco.merge(coco.frPyObjects([moved.ravel().tolist()], SIZE, SIZE))))
            return torch.from_numpy(np.stack(targets)).to(device)

    def check(result):
        assert torch.equal(result, expected)

    moved = sum(argument.nbytes for argument in arguments) + expected.nbytes
    measure(f"polygon_mask_targets, {count} regions, {OBJECTS} objects", implementation, function, check, moved)
