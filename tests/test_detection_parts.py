"""Anchors, box coder, matching, sampling, losses: against mmdetection's values and against sums done by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

import cascadeops
from cascadeops import match_boxes
from models.anchors import grid_anchors
from models.boxes import box_iou, boxes_to_rois, clip_boxes, decode_boxes, decode_class_boxes, encode_boxes
from models.config import MaskRCNNConfig
from models.data.batch import collate
from models.data.transforms import transform
from models.detections import best_detections
from models.heads import FeatureRelay, MaskHead, SemanticHead
from models.losses import box_loss, class_loss, image_label_loss, mask_loss, semantic_loss
from models.matching import IGNORED, NEGATIVE, sample_matches
from models.padding import rows_below, used_capacity

STAGE_STDS = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(Path(__file__).parent / "goldens/ops.npz").items()}


# ---- anchors


@pytest.mark.parametrize("level", range(5))
def test_anchors_equal_mmdetection(golden, level):
    stride = 4 * 2**level
    (base,) = grid_anchors([(1, 1)], [stride], 8.0, (0.5, 1.0, 2.0), torch.device("cpu"))
    torch.testing.assert_close(base, golden[f"base_anchors_{level}"])


def test_anchor_grids_equal_mmdetection(golden):
    levels = [golden[f"anchors_{level}"] for level in range(5)]
    cells = [(3, 5), (2, 3), (1, 2), (1, 1), (1, 1)]
    found = grid_anchors(cells, [4, 8, 16, 32, 64], 8.0, (0.5, 1.0, 2.0), torch.device("cpu"))
    for ours, theirs in zip(found, levels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)


def test_anchor_order_is_row_major_with_ratios_fastest():
    (anchors,) = grid_anchors([(2, 3)], [10], 2.0, (1.0, 4.0), torch.device("cpu"))
    assert anchors.shape == (12, 4)
    # cell (y=1, x=2), ratio 4: a box 10 wide and 40 high around (20, 10)
    torch.testing.assert_close(anchors[(1 * 3 + 2) * 2 + 1], torch.tensor([15.0, -10.0, 25.0, 30.0]))


# ---- boxes


@pytest.mark.parametrize(("key", "stds"), [("rpn", (1.0, 1, 1, 1)), *((f"s{i}", STAGE_STDS[i]) for i in range(3))])
def test_decode_equals_mmdetection(golden, key, stds):
    sizes = torch.tensor([[100, 110]])
    boxes = decode_boxes(golden["bc_rois"][None], golden["bc_deltas"][None], stds, sizes)
    torch.testing.assert_close(boxes[0], golden[f"bc_decode_{key}"], atol=1e-3, rtol=1e-5)


def test_encode_equals_mmdetection(golden):
    ours = encode_boxes(golden["bc_rois"], golden["bc_gt"], STAGE_STDS[0])
    torch.testing.assert_close(ours, golden["bc_encode_s0"], atol=1e-4, rtol=1e-4)


def test_encode_and_decode_by_hand():
    box, image = torch.tensor([[[10.0, 20, 110, 70]]]), torch.tensor([[256, 320]])
    delta = torch.tensor([[[1.0, -1, 2, 0.5]]])
    decoded = decode_boxes(box, delta, (0.1, 0.1, 0.2, 0.2), image)
    torch.testing.assert_close(decoded[0, 0], torch.tensor([0, 12.3707, 144.5912, 67.6293]), atol=1e-3, rtol=0)
    encoded = encode_boxes(box[0], torch.tensor([[15.0, 18, 130, 80]]), (1.0, 1, 1, 1))
    torch.testing.assert_close(encoded[0], torch.tensor([0.125, 0.08, 0.139762, 0.215111]), atol=1e-5, rtol=0)


def test_decode_inverts_encode():
    torch.manual_seed(0)
    boxes = torch.rand(1, 50, 4) * 50 + torch.tensor([0, 0, 60.0, 60.0])
    others = torch.rand(1, 50, 4) * 50 + torch.tensor([0, 0, 60.0, 60.0])
    deltas = encode_boxes(boxes, others, STAGE_STDS[2])
    torch.testing.assert_close(decode_boxes(boxes, deltas, STAGE_STDS[2], torch.tensor([[200, 200]])), others)


def test_clip_uses_each_images_own_size():
    boxes = torch.tensor([[[-5.0, -5, 500, 500]], [[-5.0, -5, 500, 500]]])
    clipped = clip_boxes(boxes, torch.tensor([[10, 20], [30, 40]]))
    assert clipped.tolist() == [[[0, 0, 20, 10]], [[0, 0, 40, 30]]]


def test_iou_by_hand():
    boxes = torch.tensor([[[0.0, 0, 2, 2]]])
    others = torch.tensor([[[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6], [1, 1, 1, 1]]])
    torch.testing.assert_close(box_iou(boxes, others)[0, 0], torch.tensor([1 / 7, 1, 0, 0]))


def test_padding_rows_get_batch_index_minus_one():
    rois = boxes_to_rois(torch.ones(2, 2, 4), torch.tensor([[True, False], [True, True]]))
    assert rois[:, 0].tolist() == [0, -1, 1, 1]


# ---- deformable convolution


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution_and_its_gradients_equal_mmdetection(golden, stride):
    """The gradients are those of the sum of the squares."""
    inputs = [golden[key].clone().requires_grad_() for key in ("dcn_x", f"dcn_off_s{stride}", "dcn_w")]
    out = cascadeops.deform_conv2d(*inputs, stride=stride, padding=1)
    torch.testing.assert_close(out, golden[f"dcn_out_s{stride}"], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for grad, key in zip(grads, ("gx", "goff", "gw"), strict=True):
        torch.testing.assert_close(grad, golden[f"dcn_{key}_s{stride}"], rtol=1e-4, atol=1e-4)


# ---- the semantic branch and the feature relay


def test_levels_are_resized_as_mmdetection_does(golden):
    """The whole semantic head, its convolutions being identities: x = relu(x) - relu(-x)."""
    head = SemanticHead(channels=3, num_levels=2, trunk=torch.nn.Identity(), num_classes=3)
    for conv in (*head.lateral_convs, head.embedding):
        torch.nn.init.dirac_(conv.weight)
    x = golden["interp_in"]
    at_fused_level = torch.zeros_like(golden["interp_out_11x13"])
    positive, negative = (head([sign * x, at_fused_level])[1] for sign in (1, -1))
    torch.testing.assert_close(positive - negative, golden["interp_out_11x13"], rtol=1e-6, atol=1e-6)


def test_the_relay_keeps_the_corners():
    relay = FeatureRelay(hidden=4, channels=1, roi_size=2)
    torch.nn.init.eye_(relay.fc.weight)
    (relayed,) = relay(torch.tensor([[0.0, 3, 6, 9]]))[0]
    torch.testing.assert_close(relayed, torch.tensor([[0.0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]))


def test_semantic_labels_are_sampled_as_mmdetection_does(golden):
    """From the map of a data set to the target of a batch."""
    image, no_boxes = np.zeros((64, 96, 3), np.uint8), np.zeros((0, 4), np.float32)
    labels = golden["seg_in"][0, 0].numpy()
    sample = transform(image, no_boxes, np.zeros(0, np.int64), None, labels, image_id=0, resize=None)
    assert torch.equal(collate([sample]).semantic.float(), golden["seg_out"][0])


# ---- matching


@pytest.mark.parametrize(
    ("key", "positive", "negative", "low_quality"),
    [
        ("as_rpn", 0.7, 0.3, 0.3),
        ("as_htc0", 0.5, 0.5, 0.5),
        ("as_htc2", 0.7, 0.7, 0.7),
        ("as_cas0", 0.5, 0.5, None),
        ("as2_htc0", 0.5, 0.5, 0.5),
        ("as2_cas0", 0.5, 0.5, None),
    ],
)
def test_matches_equal_mmdetection(golden, key, positive, negative, low_quality):
    data = key.split("_")[0]
    boxes, gt = golden[f"{data}_priors"][None], golden[f"{data}_gt"][None]
    valid, gt_valid = torch.ones(boxes.shape[:2], dtype=torch.bool), torch.ones(gt.shape[:2], dtype=torch.bool)
    match = match_boxes(boxes, valid, gt, gt_valid, positive, negative, low_quality)[0]
    theirs = golden[key]  # 0: negative, -1: ignored, i + 1: ground truth i
    expected = torch.where(theirs > 0, theirs - 1, torch.where(theirs == 0, NEGATIVE, IGNORED))
    assert torch.equal(match, expected)


def test_padded_ground_truth_and_padded_boxes_change_nothing(golden):
    boxes, gt = golden["as_priors"][None], golden["as_gt"][None]
    valid, gt_valid = torch.ones(1, 304, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    match = match_boxes(boxes, valid, gt, gt_valid, 0.5, 0.5, 0.5)
    padded = match_boxes(
        torch.cat([boxes, gt], 1),
        torch.cat([valid, ~gt_valid], 1),
        torch.cat([gt, boxes[:, :3]], 1),
        torch.cat([gt_valid, torch.zeros(1, 3, dtype=torch.bool)], 1),
        0.5,
        0.5,
        0.5,
    )
    assert torch.equal(padded[:, :304], match)
    assert (padded[:, 304:] == IGNORED).all()


def test_no_ground_truth_makes_everything_negative():
    boxes = torch.rand(1, 7, 4)
    match = match_boxes(
        boxes, torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 1, 4), torch.zeros(1, 1).bool(), 0.5, 0.5, 0.5
    )
    assert (match == NEGATIVE).all()


# ---- sampling


def test_samples_hold_positives_first_up_to_their_share_then_negatives():
    torch.manual_seed(0)
    match = torch.full((2, 100), NEGATIVE)
    match[0, 10:50] = 3
    match[1, :4] = 0
    match[1, 50:] = IGNORED
    samples = sample_matches(match, num_samples=32, positive_fraction=0.25)
    assert samples.positive.sum(1).tolist() == [8, 4]
    assert samples.valid.all()
    for row in range(2):
        chosen = match[row, samples.index[row]]
        assert (chosen[samples.positive[row]] >= 0).all()
        assert (chosen[~samples.positive[row]] == NEGATIVE).all()
        assert samples.positive[row].int().diff().max() <= 0
        assert samples.index[row].unique().numel() == 32


def test_too_few_boxes_leave_padding_rows():
    match = torch.tensor([[0, NEGATIVE, IGNORED, IGNORED]])
    samples = sample_matches(match, num_samples=10, positive_fraction=0.5)
    assert samples.valid.sum() == 2
    assert samples.positive.sum() == 1


def test_a_negative_with_the_luckiest_draw_stays_negative(monkeypatch):
    luckiest = 1 - 2.0**-24  # the largest float32 that torch.rand gives; 1 + luckiest rounds to 2
    monkeypatch.setattr(torch, "rand", lambda shape, device=None: torch.full(shape, luckiest))
    samples = sample_matches(torch.tensor([[NEGATIVE, 3, NEGATIVE, IGNORED]]), num_samples=3, positive_fraction=0.5)
    assert samples.positive.tolist() == [[True, False, False]]
    assert samples.gt_index.tolist() == [[3, 0, 0]]
    assert samples.valid.all()


def test_sampling_is_uniform():
    torch.manual_seed(0)
    match = torch.full((4000, 10), NEGATIVE)
    counts = torch.bincount(sample_matches(match, 5, 0.5).index.flatten(), minlength=10)
    assert (counts - 2000).abs().max() < 5 * (4000 * 0.25) ** 0.5


# ---- losses


def test_box_loss_by_hand():
    deltas = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0]], requires_grad=True)
    targets = torch.tensor([[0.5, 3.0, 0, 0], [torch.inf, torch.nan, 1, 1]])
    loss = box_loss(deltas, targets, torch.tensor([True, False]), torch.tensor(2), beta=1.0)
    assert loss.item() == pytest.approx((0.125 + 2.5) / 2)
    loss.backward()
    assert torch.isfinite(deltas.grad).all()


def test_class_loss_ignores_padding_rows():
    logits = torch.zeros(3, 4)
    loss = class_loss(logits, torch.tensor([0, 3, 1]), torch.tensor([True, True, False]), torch.tensor(2))
    assert loss.item() == pytest.approx(np.log(4))


def test_mask_loss_is_that_of_the_positives():
    logits = torch.tensor([20.0, -20.0, -20.0])[:, None, None].expand(-1, 2, 2)
    targets = torch.ones(3, 2, 2, dtype=torch.uint8)
    assert mask_loss(logits, targets, torch.tensor([True, False, False])).item() < 1e-6
    assert mask_loss(logits, targets, torch.tensor([True, True, False])).item() == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_are_those_of_the_own_class(layout):
    torch.manual_seed(0)
    head = MaskHead(8, num_convs=1, num_classes=5).to(memory_format=layout)
    torch.nn.init.normal_(head.logits.bias)
    features = torch.randn(4, 8, 3, 3).to(memory_format=layout).requires_grad_()
    labels, weight = torch.tensor([2, 4, 0, 2]), torch.randn(4, 6, 6)
    leaves = [features, *head.parameters()]

    every_class = head.logits(head.upsample(head.features(features)).relu())
    expected = every_class[torch.arange(4), labels]
    found = head(features, labels)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((maps * weight).sum(), leaves) for maps in (found, expected))
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        # The labels of padding rows and of the background name no mask.
        torch.testing.assert_close(head(features, torch.tensor([2, -1, 5, 2]))[::3], expected[::3])


def test_training_does_not_keep_the_upsampled_features():
    head = MaskHead(8, num_convs=1, num_classes=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        head(torch.randn(4, 8, 14, 14), torch.tensor([2, 4, 0, 2])).sum()
    assert max(kept) <= 4 * 8 * 14 * 14


def test_semantic_loss_means():
    logits = torch.zeros(1, 5, 2, 2)
    labels = torch.tensor([[[0, 1], [255, 255]]], dtype=torch.uint8)
    assert semantic_loss(logits, labels, "valid").item() == pytest.approx(np.log(5))
    assert semantic_loss(logits, labels, "all").item() == pytest.approx(np.log(5) / 2)


def test_image_labels_are_the_classes_present():
    logits = torch.tensor([[30.0, -30.0, 30.0]])
    labels, valid = torch.tensor([[2, 0, 2, -1]]), torch.tensor([[True, True, True, False]])
    assert image_label_loss(logits, labels, valid).item() < 1e-6


# ---- no proposals


def test_no_proposals_are_no_detections():
    """Of every image: then CPU code gives the heads no row at all (`used_capacity`)."""
    boxes, deltas, logits = torch.zeros(2, 0, 4), torch.zeros(0, 12), torch.zeros(0, 4)
    boxes = decode_class_boxes(boxes, deltas, STAGE_STDS[0], torch.tensor([[32, 32], [64, 32]]))
    assert boxes.shape == (2, 0, 12)
    config = MaskRCNNConfig(max_detections=3)
    boxes, scores, labels, count = best_detections(boxes, logits, torch.zeros(2, 0, dtype=torch.bool), config)
    assert boxes.shape == (2, 3, 4) and scores.shape == labels.shape == (2, 3) and count.tolist() == [0, 0]


# ---- padding


def test_rows_below_and_used_capacity():
    count = torch.tensor([0, 3])
    assert rows_below(count, 4).tolist() == [[False] * 4, [True, True, True, False]]
    assert used_capacity(count, 4) == 3
    assert used_capacity(torch.tensor([9]), 4) == 4
