"""Activations that are computed twice instead of kept: the same gradients from less memory."""

import copy
from dataclasses import replace

import pytest
import torch
from small_detectors import random_images, small_detector, training_batch

from models import recipes
from models.backbones import build_backbone
from models.config_backbones import BACKBONES
from models.folding import folded
from models.inference import make_batch
from models.recomputation import recompute_activations


def step(detector) -> tuple[dict, list, int]:
    """Losses, gradients, and the bytes that autograd kept for the backward pass."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(0)
    detector.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = detector.losses(*training_batch())
    sum(losses.values()).backward()
    return losses, [parameter.grad for parameter in detector.parameters()], sum(kept.values())


@pytest.mark.parametrize("arch", ["cascade_mask_rcnn", "htc", "scnet"])
def test_the_same_step_from_less_memory(arch):
    detector = small_detector(arch)
    losses, gradients, kept = step(detector)
    recompute_activations(detector)
    again = step(detector)
    torch.testing.assert_close(again[0], losses, rtol=0, atol=0)
    torch.testing.assert_close(again[1], gradients, rtol=1e-5, atol=1e-7)
    assert again[2] < 0.8 * kept


def test_frozen_layers_keep_nothing():
    backbone = build_backbone(replace(BACKBONES["resnet50"], layers=(1, 1, 1, 1), frozen_stages=1)).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = backbone.layer1(backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(torch.randn(1, 3, 32, 32))))))
        assert not kept
        backbone.layer2(x)
        assert kept


def test_copies_detect_the_same():
    detector = small_detector("htc").eval()
    batch = make_batch(random_images((64, 96)), None, "cpu")
    with torch.inference_mode():
        expected = folded(detector)(*batch)
        recompute_activations(detector)
        for other in (folded(detector), folded(copy.deepcopy(detector))):
            torch.testing.assert_close(other(*batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["batch", "sync_batch"])
def test_norms_that_learn_their_statistics_are_refused(norm):
    config = recipes.small("htc")
    detector = replace(config.detector, backbone=replace(config.detector.backbone, norm=norm))
    replace(config, detector=detector)
    with pytest.raises(ValueError, match="would count a batch twice"):
        replace(config, detector=detector, checkpoint_activations=True)
