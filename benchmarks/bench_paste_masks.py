"""paste_masks against torchvision's pasting and detectron2's: the detections of one image."""

import pytest
import shapes
import torch
from pasting import grid_sample_paste

import cascadeops
from cascadeops.reference.paste_masks import paste_masks as reference


@pytest.mark.parametrize(
    "implementation", ["cascadeops", "cascadeops packed", "torchvision", "grid_sample", "reference"]
)
@pytest.mark.parametrize(("count", "image_size"), [(100, (800, 1333)), (20, (2400, 4000))])
def bench_paste_masks(measure, device, count, image_size, implementation):
    if implementation == "reference" and device.type == "cpu":
        pytest.skip("takes ten seconds and gigabytes")
    probs, boxes = shapes.detections(count, device, image_size)
    if implementation == "torchvision":
        heads = pytest.importorskip("torchvision.models.detection.roi_heads")
        function = lambda: heads.paste_masks_in_image(probs[:, None], boxes, image_size)  # noqa: E731
    elif implementation == "grid_sample":
        function = lambda: grid_sample_paste(probs, boxes, image_size)  # noqa: E731
    elif implementation == "reference":
        function = lambda: reference(probs, boxes, image_size)  # noqa: E731
    else:
        packed = implementation == "cascadeops packed"
        function = lambda: cascadeops.paste_masks(probs, boxes, image_size, packed=packed)  # noqa: E731
    expected = cascadeops.paste_masks(probs, boxes, image_size)

    def check(result):
        if implementation == "torchvision":  # float32 probabilities; its boxes are whole pixels, so outlines differ
            different = (result[:, 0] >= 0.5) != expected
            assert different.sum() < 0.05 * expected.sum()
        elif implementation == "cascadeops packed":
            bits = result[..., None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
            assert torch.equal(bits.bool().flatten(-2)[..., : image_size[1]], expected)
        else:
            assert (result != expected).sum() <= 1e-6 * expected.numel()

    bytes_written = expected.numel() // (8 if implementation == "cascadeops packed" else 1)
    workload = f"{count} masks of {image_size[0]} x {image_size[1]}"
    measure(f"paste_masks, {workload}", implementation, function, check, bytes_moved=bytes_written)
