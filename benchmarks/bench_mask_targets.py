"""mask_targets against RoIAlign of the image-size bitmaps, as mmdetection resamples them: one image's 128 regions."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.mask_targets import mask_targets as reference

OBJECTS, SIZE = 20, 28


def workload(count, device):
    """Ellipses as crops with their border of zeros, and boxes shaken around them, as positive samples lie."""
    objects = shapes.boxes(OBJECTS, "cpu", smallest=32, largest=400).round()
    crops, windows = [], []
    for x1, y1, x2, y2 in objects.long().tolist():
        height, width = y2 - y1, x2 - x1
        y, x = (torch.linspace(-1, 1, side) for side in (height, width))
        crop = torch.zeros(height + 2, width + 2, dtype=torch.uint8)
        crop[1:-1, 1:-1] = y[:, None] ** 2 + x**2 <= 1
        x0, y0 = max(x1 - 1, 0), max(y1 - 1, 0)  # at the image's edge there is no border
        crop = crop[y0 - y1 + 1 :, x0 - x1 + 1 :]
        crops.append(crop.flatten())
        windows.append([x0, y0, crop.shape[1], crop.shape[0]])
    lengths = torch.tensor([0] + [len(crop) for crop in crops[:-1]])
    index = torch.arange(count) % OBJECTS
    size = (objects[:, 2:] - objects[:, :2]).repeat(1, 2)[index]
    boxes = objects[index] + 0.1 * size * torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    arguments = torch.cat(crops), lengths.cumsum(0), torch.tensor(windows, dtype=torch.int32), boxes, index
    return [tensor.to(device) for tensor in arguments]


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision", "reference"])
@pytest.mark.parametrize("count", [128, 512])
def bench_mask_targets(measure, device, count, implementation):
    if implementation == "reference" and count > 128:
        pytest.skip("takes seconds a call")
    bitmaps, offsets, windows, boxes, index = arguments = workload(count, device)
    if implementation == "cascadeops":
        function = lambda: cascadeops.mask_targets(*arguments, SIZE)  # noqa: E731
    elif implementation == "reference":
        function = lambda: reference(*arguments, SIZE, shapes.IMAGE_SIZE)  # noqa: E731
    else:
        torchvision = pytest.importorskip("torchvision")
        images = torch.zeros(OBJECTS, 1, *shapes.IMAGE_SIZE, device=device)
        for image, begin, (x0, y0, width, height) in zip(images, offsets.tolist(), windows.tolist(), strict=True):
            crop = bitmaps[begin : begin + width * height].view(height, width)
            image[0, y0 : y0 + height, x0 : x0 + width] = crop
        rois = torch.cat([index[:, None].float(), boxes], dim=1)

        def function():
            return torchvision.ops.roi_align(images, rois, SIZE, 1.0, 0, True)[:, 0] >= 0.5

    expected = cascadeops.mask_targets(*arguments, SIZE)

    def check(result):
        # Cells that the object covers by half, to within rounding, may fall to either side.
        assert (result.to(torch.uint8) != expected).float().mean() < 1e-4

    moved = bitmaps.nbytes + boxes.nbytes + expected.nbytes
    measure(f"mask_targets, {count} regions, {OBJECTS} objects", implementation, function, check, bytes_moved=moved)
