"""torchvision's own Mask R-CNN, once as it is and once on CascadeOps' operators: the same detections.

    python examples/torchvision_mask_rcnn.py

The weights are random with a fixed seed, so nothing is downloaded; with `weights="DEFAULT"` it is the trained model.
Replaced are RoIAlign over the pyramid, NMS in the RPN and in the box head, and the pasting of masks.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.detection import transform

import cascadeops


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """torchvision.ops.batched_nms."""
    index, count = cascadeops.padded_nms(boxes[None], scores[None], idxs[None], iou_threshold, len(boxes))
    return index[0, : count.item()]


class MultiScaleRoIAlign(torch.nn.Module):
    """torchvision.ops.MultiScaleRoIAlign of the FPN's levels with strides 4, 8, 16 and 32."""

    def __init__(self, pool: torchvision.ops.MultiScaleRoIAlign):
        super().__init__()
        self.names, self.output_size, self.sampling_ratio = pool.featmap_names, pool.output_size, pool.sampling_ratio

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> Tensor:
        rois = torch.cat([F.pad(per_image, (1, 0), value=image) for image, per_image in enumerate(boxes)])
        return cascadeops.multiscale_roi_align(
            [features[name] for name in self.names],
            rois,
            self.output_size,
            strides=[4, 8, 16, 32],
            sampling_ratio=self.sampling_ratio,
            aligned=False,
            level_rule="torchvision",
        )


def paste_masks_in_image(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """torchvision's, thresholded at 0.5: masks get a border of zeros, and boxes are cut to whole pixels."""
    padded = F.pad(masks[:, 0], (1, 1, 1, 1))
    boxes = torchvision.models.detection.roi_heads.expand_boxes(boxes, padded.shape[-1] / masks.shape[-1]).long()
    boxes[:, 2:] += 1
    return cascadeops.paste_masks(padded, boxes.float(), image_size)[:, None]


def on_cascadeops(model: torch.nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """The model's answer with its operators replaced, which are put back afterwards."""
    heads, boxes = model.roi_heads, torchvision.ops.boxes
    theirs = heads.box_roi_pool, heads.mask_roi_pool, boxes.batched_nms, transform.paste_masks_in_image
    heads.box_roi_pool, heads.mask_roi_pool = (MultiScaleRoIAlign(pool) for pool in theirs[:2])
    boxes.batched_nms, transform.paste_masks_in_image = batched_nms, paste_masks_in_image
    try:
        return model(images)
    finally:
        heads.box_roi_pool, heads.mask_roi_pool, boxes.batched_nms, transform.paste_masks_in_image = theirs


def timed(function: Callable, *arguments) -> tuple[list[dict[str, Tensor]], float]:
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    build = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = build(weights=None, weights_backbone=None, box_score_thresh=0.012, min_size=400, max_size=500).eval()
    images = [torch.rand(3, 400, 500), torch.rand(3, 320, 240)]
    theirs, their_seconds = timed(model, images)
    ours, our_seconds = timed(on_cascadeops, model, images)
    for their, our in zip(theirs, ours, strict=True):
        assert torch.equal(our["labels"], their["labels"])
        torch.testing.assert_close(our["boxes"], their["boxes"], rtol=0, atol=1e-3)  # pixels
        torch.testing.assert_close(our["scores"], their["scores"], rtol=0, atol=1e-5)
        different = our["masks"] != (their["masks"] >= 0.5)
        assert ((their["masks"][different] - 0.5).abs() < 1e-5).all()  # only pixels at the threshold may differ
        print(
            f"{len(our['labels'])} detections: the same; of {our['masks'].sum()} mask pixels {different.sum()} differ, "
            "whose probability is 0.5 to five digits"
        )
    print(f"torchvision {their_seconds:.2f} s, on CascadeOps {our_seconds:.2f} s, network included")


if __name__ == "__main__":
    main()
