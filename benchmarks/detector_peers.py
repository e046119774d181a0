"""What our detectors are timed beside: themselves on plain PyTorch, and Mask R-CNN R-50 FPN of other projects with
random weights, from one image on the device to COCO run lengths on the host.

torchvision's is run wherever it is installed. mmdetection's and detectron2's are written after their documentation and
have not been run: neither installs beside a torch that this library supports.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cascadeops
from benchmarks.detector_cases import CONFIDENCE, random_images, start_as_identity


@contextmanager
def definitions() -> Iterator[None]:
    """Detectors run on the operators' definitions in plain PyTorch (`cascadeops.reference`) instead of the kernels."""
    with ExitStack() as stack:
        for name in ("box_proposals", "multiclass_nms", "multiscale_roi_align", "paste_masks_rle"):
            definition = getattr(import_module(f"cascadeops.reference.{name}"), name)
            stack.enter_context(mock.patch.object(cascadeops, name, definition))
        yield


def _encoded(masks: Tensor) -> list[dict]:
    """bool [D, H, W] on any device -> D COCO run lengths, as evaluations usually get them."""
    coco = pytest.importorskip("pycocotools.mask")
    return [coco.encode(np.asfortranarray(mask)) for mask in masks.cpu().numpy().view(np.uint8)]


def _comparable(model: nn.Module, class_logits: nn.Linear) -> None:
    """Gives random weights what ours have."""
    start_as_identity(model)
    class_logits.weight.data.mul_(CONFIDENCE)


def torchvision(device: torch.device, image_size: tuple[int, int]) -> Callable[[], list[dict]]:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, min_size=min(image_size), max_size=max(image_size)
    )
    _comparable(model, model.roi_heads.box_predictor.cls_score)
    model.to(device).eval()
    image = random_images(1, image_size)[0][0, :, : image_size[0], : image_size[1]].to(device)

    @torch.inference_mode()
    def detect():
        return _encoded(model([image])[0]["masks"][:, 0] >= 0.5)

    return detect


def mmdetection(device: torch.device, image_size: tuple[int, int]) -> Callable[[], list[dict]]:
    mmdet = pytest.importorskip("mmdet")
    from mmdet.apis import init_detector
    from mmdet.structures import DetDataSample

    config = Path(mmdet.__file__).parent / ".mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    model = init_detector(str(config), None, device=str(device))
    _comparable(model, model.roi_head.bbox_head.fc_cls)
    images, _ = random_images(1, image_size)
    images = images.to(device)
    facts = {"img_shape": image_size, "ori_shape": image_size, "scale_factor": (1.0, 1.0)}
    sample = DetDataSample(metainfo=facts | {"batch_input_shape": tuple(images.shape[2:])})

    @torch.inference_mode()
    def detect():
        return _encoded(model.predict(images, [sample])[0].pred_instances.masks)

    return detect


def detectron2(device: torch.device, image_size: tuple[int, int]) -> Callable[[], list[dict]]:
    model_zoo = pytest.importorskip("detectron2.model_zoo")
    model = model_zoo.get("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", trained=False, device=str(device))
    _comparable(model, model.roi_heads.box_predictor.cls_score)
    model.eval()
    image = random_images(1, image_size)[0][0, :, : image_size[0], : image_size[1]].to(device)

    @torch.inference_mode()
    def detect():
        return _encoded(model([{"image": image}])[0]["instances"].pred_masks)

    return detect


PEERS = {"torchvision": torchvision, "mmdetection": mmdetection, "detectron2": detectron2}
