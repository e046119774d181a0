"""paste_masks_rle against pasting and then encoding with pycocotools: the detections of one image."""

import numpy as np
import pytest
import shapes
from pasting import grid_sample_paste

import cascadeops


@pytest.mark.parametrize(
    "implementation",
    ["cascadeops", "torchvision + pycocotools", "grid_sample + pycocotools", "cascadeops paste + pycocotools"],
)
@pytest.mark.parametrize(("count", "image_size"), [(100, (800, 1333)), (1000, (32_768, 32_768))])
def bench_paste_masks_rle(measure, device, count, image_size, implementation):
    if implementation != "cascadeops" and image_size[0] > 10_000:
        pytest.skip("a terabyte of masks")
    coco = pytest.importorskip("pycocotools.mask")
    probs, boxes = shapes.detections(count, device, image_size)

    def encoded(masks):
        return [coco.encode(np.asfortranarray(mask)) for mask in masks.cpu().numpy().view(np.uint8)]

    if implementation == "torchvision + pycocotools":
        heads = pytest.importorskip("torchvision.models.detection.roi_heads")

        def function():
            return encoded(heads.paste_masks_in_image(probs[:, None], boxes, image_size)[:, 0] >= 0.5)
    elif implementation == "grid_sample + pycocotools":
        function = lambda: encoded(grid_sample_paste(probs, boxes, image_size))  # noqa: E731
    elif implementation == "cascadeops paste + pycocotools":
        function = lambda: encoded(cascadeops.paste_masks(probs, boxes, image_size))  # noqa: E731
    else:
        function = lambda: cascadeops.paste_masks_rle(probs, boxes, image_size)  # noqa: E731

    expected = cascadeops.paste_masks_rle(probs, boxes, image_size)

    def check(result):
        areas, due = (np.array([coco.area(rle) for rle in rles], dtype=np.int64) for rles in (result, expected))
        # torchvision's boxes are whole pixels; grid_sample's sums may be rounded in another order.
        tolerance = 0.05 if "torchvision" in implementation else 1e-5 if "grid_sample" in implementation else 0
        assert abs(areas - due).sum() <= tolerance * due.sum()

    workload = f"{count:,} masks of {image_size[0]} x {image_size[1]}"
    measure(f"paste_masks_rle, {workload}", implementation, function, check)
