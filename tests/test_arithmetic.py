"""Detectors in the arithmetic of other projects: against torchvision itself, and against the definitions."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_torchvision import FILE, golden_image, torchvision_state
from inclusive_reference import MASKRCNN_BENCHMARK, MMDETECTION_1, cell_anchors, detect, paste
from pycocotools import mask as mask_api
from small_detectors import random_images, small_detector, training_batch

import models
from models.anchors import grid_anchors
from models.arithmetic import ARITHMETICS
from models.boxes import box_iou, clip_boxes, decode_boxes, resize_boxes
from models.build import build_from_config
from models.config import DETECTOR_CONFIGS, MaskRCNNConfig, RPNConfig
from models.detections import best_detections
from models.inference import make_batch
from models.rpn import RPN, trained_anchors
from models.weights.contents import Contents
from models.weights.recognise import recognise_detector
from models.weights.translation import translate
from models.whole_pixel_masks import whole_pixel_masks

FAMILIES = [MMDETECTION_1, MASKRCNN_BENCHMARK]
LAST_PIXEL = torch.tensor([0.0, 0, 1, 1])


# ---- torchvision


@pytest.fixture(scope="module")
def torchvision_detector():
    state = torchvision_state()
    return recognise_detector(Contents("state dict", state, {}), translate(state, "state dict")).detector


def compare_with_torchvision(detector) -> tuple[int, float, float, int]:
    """(detections that both have, largest difference of a score, of a box, of a mask in pixels)"""
    golden = np.load(FILE)
    result = models.predict(detector, golden_image())
    overlap = box_iou(result.boxes[None], torch.from_numpy(golden["boxes"])[None])[0]
    overlap = overlap * (result.labels[:, None] + 1 == torch.from_numpy(golden["labels"]))
    ours, theirs = (overlap > 0.99).nonzero(as_tuple=True)
    masks = np.unpackbits(golden["masks"], axis=-1, count=result.image_size[1])[theirs]
    pixels = (result.bitmaps().numpy()[ours] != masks).sum(axis=(1, 2))
    if len(ours) == 0:
        return 0, np.inf, np.inf, 0
    score = (result.scores[ours] - torch.from_numpy(golden["scores"])[theirs]).abs().max().item()
    box = (result.boxes[ours] - torch.from_numpy(golden["boxes"])[theirs]).abs().max().item()
    return len(ours), score, box, pixels.max().item()


def test_torchvisions_weights_find_what_torchvision_finds(torchvision_detector):
    assert torchvision_detector.config.arithmetic == "torchvision"
    found, score, box, pixels = compare_with_torchvision(torchvision_detector)
    assert found == len(np.load(FILE)["scores"]) == 21
    assert score < 2e-4 and box < 0.02 and pixels <= 2


def test_and_not_in_mmdetections_arithmetic(torchvision_detector):
    config = dataclasses.replace(torchvision_detector.config, arithmetic="mmdetection")
    other = build_from_config("mask_rcnn", config)
    other.load_state_dict(torchvision_detector.state_dict())
    assert compare_with_torchvision(other)[0] < 15


def test_torchvisions_least_sizes():
    """A box that shrinks to nothing is neither a proposal nor a detection there."""
    logits, deltas = [torch.tensor([[2.0, 1.0]])], [torch.tensor([[[0.0, 0, 0, 0], [-9.0, 0, 0, 0]]])]
    anchors, sizes = [torch.tensor([[8.0, 8, 24, 24], [8, 8, 24, 24]])], torch.tensor([[32, 32]])
    rpn = RPN(4, (4,), RPNConfig(), ARITHMETICS["torchvision"]).eval()
    boxes, scores, count = rpn.proposals(logits, deltas, anchors, sizes)
    assert count.tolist() == [1]
    assert boxes[0].tolist() == [[8, 8, 24, 24], [0, 0, 0, 0]]
    assert scores[0].tolist() == [torch.sigmoid(torch.tensor(2.0)).item(), -torch.inf]
    narrow = torch.tensor([[[8.0, 8, 8.005, 24], [8, 8, 24, 24]]])
    config = MaskRCNNConfig(num_classes=1, arithmetic="torchvision")
    logits = torch.tensor([[5.0, 0], [3.0, 0]])
    assert best_detections(narrow, logits, torch.ones(1, 2, dtype=torch.bool), config)[3].tolist() == [1]
    config = MaskRCNNConfig(num_classes=1)
    assert best_detections(narrow, logits, torch.ones(1, 2, dtype=torch.bool), config)[3].tolist() == [2]


# ---- inclusive boxes


@pytest.mark.parametrize(("arch", "family"), [("mask_rcnn", name) for name in FAMILIES] + [("htc", MMDETECTION_1)])
def test_detections_are_those_of_the_definition(arch, family):
    rpn = dataclasses.replace(DETECTOR_CONFIGS[arch]().rpn, top_k=30, max_proposals=24)
    detector = small_detector(arch, arithmetic=family, rpn=rpn, max_detections=8, finest_size=14.0)
    images, sizes = make_batch(random_images((75, 90)), None, "cpu")
    boxes, scores, labels, masks = detect(detector, images, (75, 90), family)
    with torch.inference_mode():
        found = detector(images, sizes)
        other = build_from_config(arch, dataclasses.replace(detector.config, arithmetic="mmdetection")).eval()
        other.load_state_dict(detector.state_dict())
        others = other(images, sizes)
    count = found.count.item()
    assert count == len(scores) >= 5
    np.testing.assert_allclose(found.boxes[0, :count] - LAST_PIXEL, boxes, atol=2e-3)
    np.testing.assert_allclose(found.scores[0, :count], scores, atol=1e-5)
    np.testing.assert_array_equal(found.labels[0, :count], labels)
    np.testing.assert_allclose(found.mask_probs[0, :count], masks, atol=1e-4)
    assert np.abs((others.boxes[0, :count] - LAST_PIXEL).numpy() - boxes).max() > 0.1


@pytest.mark.parametrize(("arch", "family"), [("mask_rcnn", MASKRCNN_BENCHMARK), ("htc", MMDETECTION_1)])
def test_a_batch_is_trained_and_exported(arch, family):
    detector = small_detector(arch, arithmetic=family).train()
    losses = detector.losses(*training_batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    torch.export.export(detector.eval(), (images, sizes))


def test_maskrcnn_benchmarks_anchors_of_32_pixels():
    (found,) = grid_anchors([(1, 1)], [4], 8.0, (0.5, 1.0, 2.0), torch.device("cpu"), "centred_ratios")
    assert (found - LAST_PIXEL).tolist() == [[-22, -10, 25, 13], [-14, -14, 17, 17], [-10, -22, 13, 25]]


@pytest.mark.parametrize(("family", "rule"), [(MMDETECTION_1, "centred"), (MASKRCNN_BENCHMARK, "centred_ratios")])
@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_inclusive_anchors(family, rule, stride):
    (found,) = grid_anchors([(2, 2)], [stride], 8.0, (0.5, 1.0, 2.0), torch.device("cpu"), rule)
    shift = np.array([stride, stride] * 2)
    np.testing.assert_array_equal(found[:3] - LAST_PIXEL, cell_anchors(stride, family))
    np.testing.assert_array_equal(found[-3:] - LAST_PIXEL, cell_anchors(stride, family) + shift)


def test_torchvisions_anchors_of_32_pixels():
    (found,) = grid_anchors([(1, 1)], [4], 8.0, (0.5, 1.0, 2.0), torch.device("cpu"), "rounded")
    assert found.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_only_mmdetection_limits_shrinking():
    box, delta = torch.tensor([[[10.0, 10, 110, 110]]]), torch.tensor([[[0.0, 0, -6, -6]]])
    for name, arithmetic in ARITHMETICS.items():
        width = 100 * (16 / 1000 if name.startswith("mmdetection") else np.exp(-6))
        found = decode_boxes(box, delta, (1.0, 1.0, 1.0, 1.0), torch.tensor([[200, 200]]), arithmetic)[0, 0]
        assert (found[2] - found[0]).item() == pytest.approx(width, rel=1e-4)


def test_inclusive_boxes_keep_a_pixel_when_clipped():
    boxes = torch.tensor([[[-30.0, -30, -20, -20], [50, 50, 70, 70], [-5, 3, 90, 8]]])
    found = clip_boxes(boxes, torch.tensor([[40, 60]]), ARITHMETICS[MMDETECTION_1])
    assert found.tolist() == [[[0, 0, 1, 1], [50, 39, 60, 40], [0, 3, 60, 8]]]
    assert clip_boxes(boxes, torch.tensor([[40, 60]]))[0, 0].tolist() == [0, 0, 0, 0]


def test_the_last_pixel_is_not_resized():
    box = torch.tensor([10.0, 20, 31, 41])
    factors = torch.tensor([2.0, 0.5, 2.0, 0.5])
    assert resize_boxes(box, factors, ARITHMETICS[MMDETECTION_1]).tolist() == [20, 10, 61, 21]
    assert resize_boxes(box, factors).tolist() == [20, 10, 62, 20.5]


def test_an_inclusive_anchor_that_ends_on_the_images_last_pixel_is_trained():
    anchors = torch.tensor([[[0.0, 0, 60, 40]]])
    assert trained_anchors(anchors, torch.tensor([[40, 60]]), 0, ARITHMETICS[MMDETECTION_1]).item()
    assert not trained_anchors(anchors, torch.tensor([[40, 60]]), 0).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_pasted_into_whole_pixels(family):
    generator = np.random.default_rng(0)
    corners = generator.uniform(-8, 40, (12, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(0, 30, (12, 2))], axis=1).astype(np.float32)
    masks = generator.uniform(0, 1, (12, 28, 28)).astype(np.float32)
    border = ARITHMETICS[family].mask_border
    found = whole_pixel_masks(torch.from_numpy(masks), torch.from_numpy(boxes), (37, 45), border)
    for mask, box, run_lengths in zip(masks, boxes, found, strict=True):
        expected = paste(mask.astype(np.float64), box.astype(np.float64), (37, 45), family)
        assert (mask_api.decode(run_lengths) != expected).sum() <= 1  # a probability that rounds to one half


def test_whole_pixel_masks_of_nothing_and_outside():
    assert whole_pixel_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6), 1) == []
    outside = torch.tensor([[-50.0, -50, -20, -20], [50, 2, 60, 4], [2, 50, 4, 60]])
    for run_lengths in whole_pixel_masks(torch.ones(3, 28, 28), outside, (5, 6), 0):
        assert mask_api.area(run_lengths) == 0


def test_an_unknown_arithmetic_is_named():
    with pytest.raises(ValueError, match="arithmetic must be one of mmdetection, mmdetection_1, maskrcnn_benchmark"):
        models.build_detector("htc", arithmetic="caffe")
