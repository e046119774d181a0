"""Where published detectors differ from each other: each as a field, with the right default, that makes the difference.

The goldens show most of them whole (tests/test_golden_*.py); here each stands alone.
"""

import dataclasses

import numpy as np
import pytest
import torch
from golden_cases import SMALL
from small_detectors import random_images, small_detector, training_batch

from models import recipes
from models.anchors import grid_anchors
from models.boxes import decode_class_boxes
from models.config import DETECTOR_CONFIGS, FasterRCNNConfig, HTCConfig, MaskRCNNConfig
from models.inference import make_batch
from models.roi_training import own_class_deltas, sample_rois
from models.rpn import trained_anchors


@pytest.mark.parametrize(
    ("arch", "border", "rpn_beta", "beta", "low_quality", "proposals", "score_threshold", "class_specific"),
    [
        ("faster_rcnn", -1, 0, 0, False, 1000, 0.05, True),
        ("mask_rcnn", -1, 0, 0, True, 1000, 0.05, True),
        ("cascade_mask_rcnn", 0, 1 / 9, 1, False, 2000, 0.05, False),
        ("htc", 0, 1 / 9, 1, True, 2000, 0.001, False),
        ("scnet", 0, 1 / 9, 1, True, 2000, 0.001, False),
    ],
)
def test_defaults_are_mmdetections(
    arch, border, rpn_beta, beta, low_quality, proposals, score_threshold, class_specific
):
    config = DETECTOR_CONFIGS[arch]()
    assert config.rpn.allowed_border == border
    assert config.rpn.smooth_l1_beta == rpn_beta
    assert config.smooth_l1_beta == beta
    assert config.match_low_quality is low_quality
    assert config.rpn.max_proposals_training == proposals
    assert config.score_threshold == score_threshold
    assert getattr(config, "class_specific_boxes", False) is class_specific


def test_defaults_are_those_of_the_published_numbers():
    assert HTCConfig().mask_average == "stages"
    assert HTCConfig().semantic_loss_mean == "valid"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mask_average": "first"}, "mask_average must be one of stages, last, got 'first'"),
        ({"semantic_fusion": ("box", "masks")}, "semantic_fusion must be one of box, mask, got 'masks'"),
        ({"stage_iou": (0.5,)}, "one entry a stage"),
        ({"num_samples": 0}, "num_samples must be 1 to 1,000,000, got 0"),
        ({"mask_convs": 1001}, "mask_convs must be 0 to 1,000, got 1001"),
        ({"nms_iou": 1.5}, "nms_iou must be 0 to 1, got 1.5"),
        ({"score_threshold": float("nan")}, "score_threshold must be 0 to 1, got nan"),
        ({"semantic_loss_weight": float("inf")}, "semantic_loss_weight must be 0 to 1,000,000, got inf"),
        ({"finest_size": 0.0}, "finest_size must be above 0, got 0.0"),
        ({"stage_stds": ((0.1, 0.1, 0.2, -0.2),)}, "stage_stds must be above 0, got -0.2"),
        ({"stage_iou": ()}, "stage_iou must have 1 to 100 entries, got 0"),
    ],
)
def test_wrong_values_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        HTCConfig(**fields)


# ---- region proposal network


def test_anchors_are_trained_inside_the_image_or_wherever_it_is_padded():
    """An image of 40 x 60, padded to 64 x 64, in a batch of 96 x 96. Anchors are centred on (x, y), 20 pixels wide."""
    centres = [(30, 20), (5, 20), (30, 35), (63, 63), (64, 20), (20, 64)]
    anchors = torch.tensor([[[x - 10.0, y - 10, x + 10, y + 10] for x, y in centres]])
    sizes = torch.tensor([[40, 60]])
    assert trained_anchors(anchors, sizes, 0).tolist() == [[True, False, False, False, False, False]]
    assert trained_anchors(anchors, sizes, 6).tolist() == [[True, True, True, False, False, False]]
    assert trained_anchors(anchors, sizes, -1).tolist() == [[True, True, True, True, False, False]]


def test_an_anchor_that_ends_at_the_image_s_end_leaves_it():
    anchors = torch.tensor([[[0.0, 0, 60, 39], [0, 0, 59, 40], [0, 0, 59, 39]]])
    assert trained_anchors(anchors, torch.tensor([[40, 60]]), 0).tolist() == [[False, False, True]]


def test_valid_anchors_equal_mmdetection():
    """192 x 256 in a batch of 224 x 256."""
    counts = np.load(SMALL / "ops.npz")["valid_counts_192x256_in_224x256"]
    levels = [(56, 64), (28, 32), (14, 16), (7, 8), (4, 4)]
    anchors = grid_anchors(levels, [4, 8, 16, 32, 64], 8.0, (0.5, 1.0, 2.0), torch.device("cpu"))
    found = [trained_anchors(level[None], torch.tensor([[192, 256]]), -1).sum().item() for level in anchors]
    assert found == counts.tolist()


@pytest.mark.parametrize("arch", ["mask_rcnn", "htc"])
@pytest.mark.parametrize("field", ["allowed_border", "smooth_l1_beta"])
def test_the_field_changes_the_rpns_losses(arch, field):
    config = recipes.small(arch).detector
    value = {"allowed_border": {-1: 0, 0: -1}, "smooth_l1_beta": {0: 1 / 9, 1 / 9: 0}}[field][
        getattr(config.rpn, field)
    ]
    losses = []
    for rpn in (config.rpn, dataclasses.replace(config.rpn, **{field: value})):
        detector = small_detector(arch, rpn=dataclasses.replace(rpn, num_samples=100_000)).train()
        losses.append(detector.losses(*training_batch()))
    changed = "loss_rpn_objectness" if field == "allowed_border" else "loss_rpn_box"
    assert not torch.isclose(losses[0][changed], losses[1][changed], rtol=1e-3)


def test_training_keeps_its_own_number_of_proposals():
    config = recipes.small("htc").detector.rpn
    detector = small_detector("htc", rpn=dataclasses.replace(config, max_proposals=7, max_proposals_training=9))
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    with torch.no_grad():
        outputs = detector.rpn(detector.fpn(detector.backbone(images)))
    assert detector.rpn.proposals(*outputs, sizes)[0].shape[1] == 7
    assert detector.rpn.train().proposals(*outputs, sizes)[0].shape[1] == 9


# ---- RoI heads


@pytest.mark.parametrize(("low_quality", "golden"), [(True, "as2_htc0"), (False, "as2_cas0")])
def test_low_quality_matches_equal_mmdetection(low_quality, golden):
    data = {key: torch.from_numpy(value) for key, value in np.load(SMALL / "ops.npz").items() if key[:3] == "as2"}
    priors, gt = data["as2_priors"][None], data["as2_gt"][None]
    config = dataclasses.replace(
        MaskRCNNConfig(), match_low_quality=low_quality, num_samples=1000, positive_fraction=1.0
    )
    valid = torch.ones(priors.shape[:2], dtype=torch.bool)
    samples = sample_rois(priors, valid, gt, torch.zeros(1, gt.shape[1]).long(), 0.5, config)
    found = {}
    for row in samples.proposed[0].nonzero()[:, 0].tolist():
        prior = (priors[0] == samples.boxes[0, row]).all(dim=1).nonzero().item()
        found[prior] = samples.gt_index[0, row].item() + 1 if samples.positive[0, row] else 0
    assert [found[i] for i in range(priors.shape[1])] == data[golden].tolist()
    assert not torch.equal(data["as2_htc0"], data["as2_cas0"])


def test_the_head_s_box_loss_is_l1_or_smooth_l1():
    """With every sample taken, the two differ by what lies under the smooth loss's knee."""
    losses = {}
    for beta in (0.0, 1.0):
        detector = small_detector("faster_rcnn", smooth_l1_beta=beta, num_samples=100_000).train()
        losses[beta] = detector.losses(*training_batch())["loss_box"].item()
    assert losses[1.0] < 0.9 * losses[0.0]


def test_scores_at_the_threshold_or_below_are_left_out():
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    with torch.inference_mode():
        scores = small_detector("htc").forward(images, sizes).scores[0]
        threshold = scores[3].item()
        found = small_detector("htc", score_threshold=threshold).forward(images, sizes)
    assert found.count.tolist() == [(scores > threshold).sum()]


def test_class_specific_deltas_are_the_own_class_s():
    deltas = torch.arange(24.0).view(2, 12)
    assert own_class_deltas(deltas, torch.tensor([2, 0])).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert own_class_deltas(deltas, torch.tensor([3, 0])).shape == (2, 4)  # background: any
    assert own_class_deltas(deltas[:, :4], torch.tensor([2, 0])).tolist() == deltas[:, :4].tolist()


def test_class_specific_boxes_lie_class_after_class():
    boxes = torch.tensor([[[10.0, 10, 20, 20]]])
    deltas = torch.tensor([[0.0, 0, 0, 0, 5, 0, 0, 0]])
    decoded = decode_class_boxes(boxes, deltas, (0.1, 0.1, 0.2, 0.2), torch.tensor([[100, 100]]))
    assert decoded.tolist() == [[[10, 10, 20, 20, 15, 10, 25, 20]]]


def test_class_specific_heads_have_a_box_for_each_class():
    rows = {
        specific: small_detector("faster_rcnn", class_specific_boxes=specific).box_head.deltas.out_features
        for specific in (True, False)
    }
    assert rows == {True: 4 * 5, False: 4}
    assert FasterRCNNConfig().class_specific_boxes


# ---- HTC


@pytest.mark.parametrize(("interleaved", "samplings"), [(True, 6), (False, 3)])
def test_interleaved_mask_heads_see_refined_boxes(interleaved, samplings, monkeypatch):
    taken, mask_rois = [], []

    def recorded(*arguments):
        taken.append(sample_rois(*arguments))
        return taken[-1]

    monkeypatch.setattr("models.htc.sample_rois", recorded)
    detector = small_detector("htc", interleaved=interleaved).train()
    features = detector.mask_features
    detector.mask_features = lambda context, rois: mask_rois.append(rois) or features(context, rois)
    detector.losses(*training_batch())
    assert len(taken) == samplings
    for stage, rois in enumerate(mask_rois):
        samples = taken[2 * stage + 1 if interleaved else stage]
        positive = samples.boxes[samples.positive]
        assert torch.equal(rois[rois[:, 0] >= 0, 1:], positive)


@pytest.mark.parametrize("flow", [True, False])
def test_mask_information_flows_to_the_next_stage(flow):
    """With the last stage's masks alone, only the flow lets the first head matter."""
    detector = small_detector("htc", mask_info_flow=flow, mask_average="last")
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    with torch.inference_mode():
        before = detector(images, sizes).mask_probs
        detector.mask_heads[0].convs[0].weight.mul_(2)
        after = detector(images, sizes).mask_probs
    assert before.any()
    assert torch.equal(before, after) is not flow


def test_masks_are_the_mean_of_the_stages_or_the_last_stage_s():
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    detector = small_detector("htc", mask_info_flow=False)
    with torch.inference_mode():
        mean = detector(images, sizes).mask_probs
        detector.config = dataclasses.replace(detector.config, mask_average="last")
        stages = []
        for _ in range(3):
            stages.append(detector(images, sizes).mask_probs)
            detector.mask_heads = detector.mask_heads[-1:].extend(detector.mask_heads[:-1])  # each head in turn is last
    torch.testing.assert_close(sum(stages) / 3, mean, rtol=0, atol=1e-6)
    assert not torch.allclose(stages[0], mean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fusion", [("box", "mask"), ("box",), ("mask",), ()])
def test_semantic_features_reach_the_branches_that_are_named(fusion):
    detector = small_detector("htc", semantic_fusion=fusion)
    images, _ = make_batch(random_images((64, 96)), None, "cpu")
    rois = torch.tensor([[0.0, 5, 5, 60, 50]])
    with torch.inference_mode():
        _, context = detector.context(detector.fpn(detector.backbone(images)))
        without = context._replace(semantic=None)
        for branch, pool in (("box", detector.box_features), ("mask", detector.mask_features)):
            assert torch.equal(pool(context, rois), pool(without, rois)) is (branch not in fusion)


# ---- SCNet


@pytest.mark.parametrize("field", ["global_context", "feature_relay"])
def test_scnet_without_a_part_has_neither_its_weights_nor_its_loss(field):
    head = {"global_context": "global_context_head", "feature_relay": "feature_relay"}[field]
    whole, without = small_detector("scnet"), small_detector("scnet", **{field: False})
    missing = whole.state_dict().keys() - without.state_dict().keys()
    assert missing and all(name.startswith(head) for name in missing)
    losses = without.train().losses(*training_batch())
    assert ("loss_global_context" in losses) == (field != "global_context")
