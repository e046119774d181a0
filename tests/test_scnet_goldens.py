"""SCNet (the detector) against mmdetection 3.3.0 on the golden weights: features to masks, losses, gradients.

Tolerances are a few times the noise floor that mmdetection shows against itself with other convolution kernels.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

import models
from models.boxes import box_iou
from models.checkpoint import translate_names
from models.config import RPNConfig
from models.data.batch import PackedMasks
from models.inference import make_batch, unpack_detections

GOLDENS = Path(__file__).parent / "goldens"


def golden_state() -> dict[str, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDENS / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = json.loads((GOLDENS / "scnet_r50_keys.json").read_text())["state_dict"]
    return {key: torch.from_numpy(np.asarray(module.fill_array(key, tuple(shape)))) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def state():
    return golden_state()


@pytest.fixture(scope="module")
def detector(state):
    detector = models.build_detector("scnet", backbone="resnet50", num_classes=80, semantic=True)
    models.load_weights(detector, state)
    return detector


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDENS / "scnet_r50_infer.npz"))


@pytest.fixture(scope="module")
def run(detector, golden):
    """One forward pass with what went through every part of it."""
    seen = {}

    def record(name):
        def hook(module, inputs, output):
            seen.setdefault(name, []).append((inputs, output))

        return hook

    parts = {
        name: getattr(detector, name)
        for name in ("backbone", "fpn", "rpn", "semantic_head", "global_context_head", "mask_head", "feature_relay")
    }
    parts |= {f"box_head{i}": head for i, head in enumerate(detector.box_heads)}
    handles = [module.register_forward_hook(record(name)) for name, module in parts.items()]
    original = detector.box_features

    def box_features(context, rois):
        seen.setdefault("rois", []).append(rois)
        return original(context, rois)

    detector.box_features = box_features
    images, sizes = make_batch([golden["image_rgb"]], None, "cpu")
    with torch.inference_mode():
        seen["detections"] = detector(images, sizes)
    seen["images"], seen["sizes"] = images, sizes
    del detector.box_features
    for handle in handles:
        handle.remove()
    return seen


def close(ours: torch.Tensor, golden: np.ndarray, atol: float, fraction: float = 1.0) -> None:
    """At least `fraction` of the elements within atol."""
    assert tuple(ours.shape) == golden.shape
    error = np.abs(ours.detach().double().numpy() - golden)
    assert (error <= atol).mean() >= fraction, (
        f"largest error {error.max():.2e}, {(error > atol).mean():.2%} above {atol}"
    )


def stats_close(ours: torch.Tensor, golden: np.ndarray, rtol: float = 1e-4) -> None:
    x = ours.detach().double()
    stats = np.array([x.mean(), x.std(correction=0), x.abs().max(), x.norm()])
    np.testing.assert_allclose(stats[1:], golden[1:], rtol=rtol)
    assert abs(stats[0] - golden[0]) < rtol * golden[1]


def test_every_golden_weight_has_a_place(detector, state):
    assert len(detector.state_dict()) == len(state) == 426
    golden = json.loads((GOLDENS / "scnet_r50_keys.json").read_text())
    assert sum(p.numel() for p in detector.parameters()) == golden["num_params"]


def test_input_is_normalised_then_padded(run, golden):
    assert run["images"].shape == tuple(golden["input_shape"])
    assert run["images"].double().abs().sum() == pytest.approx(float(golden["input_abssum64"]), rel=1e-9)
    close(run["images"][0, :, ::8, ::8], golden["input_sub"], 1e-6)


def test_backbone_features(run, golden):
    ((_, features),) = run["backbone"]
    for i, x in enumerate(features, start=2):
        stats_close(x, golden[f"C{i}_stats"])
        close(x[0, ::32, ::2, ::2], golden[f"C{i}_sub"], 1e-4)


STEPS = [(8, 4), (8, 2), (8, 1), (4, 1), (2, 1)]
"""(channel, space) strides of the golden samples of P2..P6."""


def test_pyramid(run, golden):
    ((_, features),) = run["fpn"]
    for i, (x, (channel, space)) in enumerate(zip(features, STEPS, strict=True), start=2):
        stats_close(x, golden[f"P{i}_stats"])
        close(x[0, ::channel, ::space, ::space], golden[f"P{i}_sub"], 2e-4)


def test_rpn_outputs(run, golden):
    ((_, (logits, deltas, _)),) = run["rpn"]
    for level, space in enumerate((4, 2, 1, 1, 1)):
        _, height, width = golden[f"rpn_cls_{level}"].shape
        close(logits[level].view(height, width, 3).permute(2, 0, 1), golden[f"rpn_cls_{level}"], 3e-4)
        boxes = deltas[level].view(height, width, 12).permute(2, 0, 1)
        close(boxes[:, ::space, ::space], golden[f"rpn_reg_{level}_sub"], 3e-4)


def nearest_rows(ours: torch.Tensor, golden: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """For each golden box the row of ours with the highest IoU, and that IoU."""
    iou, row = box_iou(torch.from_numpy(golden)[None].double(), ours[None].double())[0].max(dim=1)
    return row, iou


def test_proposals(detector, run, golden):
    ((_, outputs),) = run["rpn"]
    boxes, scores, count = detector.rpn.proposals(*outputs, run["sizes"])
    assert count.tolist() == [1000]
    row, iou = nearest_rows(boxes[0], golden["proposals"])
    assert (iou > 0.99).double().mean() >= 0.99
    close(scores[0][row], golden["proposal_scores"], 1e-4, fraction=0.99)
    close(scores[0], golden["proposal_scores"], 1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_box_stages(run, golden, stage):
    rois = run["rois"][stage]
    (inputs, (logits, deltas, _)) = run[f"box_head{stage}"][0]
    row, iou = nearest_rows(rois[:, 1:], golden[f"stage{stage}_rois"])
    assert (iou > 0.99).double().mean() >= 0.99
    close(inputs[0][row][::100, ::16, ::2, ::2], golden[f"stage{stage}_bbox_feats_sub"], 5e-3, fraction=0.99)
    close(logits[row][::10], golden[f"stage{stage}_cls_score_sub"], 1e-2, fraction=0.99)
    close(deltas[row], golden[f"stage{stage}_bbox_pred"], 1e-2, fraction=0.99)


def test_semantic_branch(run, golden):
    ((_, (logits, embedding)),) = run["semantic_head"]
    stats_close(logits, golden["sem_logits_stats"])
    stats_close(embedding, golden["sem_feat_stats"])
    close(logits[0, ::3, ::2, ::2], golden["sem_logits_sub"], 1e-3)
    close(embedding[0, ::8, ::2, ::2], golden["sem_feat_sub"], 1e-3)
    assert (logits[0].argmax(0).numpy() == golden["sem_argmax"]).mean() > 0.998


def test_global_context(run, golden):
    ((_, (logits, context)),) = run["global_context_head"]
    close(logits[0], golden["glbctx_logits"], 1e-3)
    close(context[0, :, 0, 0], golden["glbctx_feat"], 1e-3)


def test_detections(run, golden):
    found = run["detections"]
    assert found.count.tolist() == [100]
    close(found.scores[0], golden["scores"], 1e-3)
    row, iou = nearest_rows(found.boxes[0], golden["boxes"])
    assert (iou > 0.99).all()
    assert (found.labels[0][row].numpy() == golden["labels"]).all()
    close(found.boxes[0][row], golden["boxes"], 5e-2)


def test_mask_branch(run, golden):
    found = run["detections"]
    row, _ = nearest_rows(found.boxes[0], golden["boxes"])
    chosen = row[torch.from_numpy(golden["mask_sel"])]
    (((relay_in,), relay_out),) = run["feature_relay"]
    stats_close(relay_in, golden["relay_in_stats"], rtol=1e-3)
    stats_close(relay_out, golden["relay_out_stats"], rtol=1e-3)
    close(relay_in[chosen][:, ::8], golden["relay_in_sub"], 5e-3, fraction=0.99)
    close(relay_out[chosen][:, ::16, ::2, ::2], golden["relay_out_sub"], 5e-3, fraction=0.99)
    (((mask_in,), logits),) = run["mask_head"]
    close(mask_in[chosen][:, ::16, ::2, ::2], golden["mask_feats_in_sub"], 1e-2, fraction=0.99)
    stats_close(logits, golden["mask_logits_stage0_stats"], rtol=1e-3)
    close(found.mask_probs[0][chosen], golden["mask_prob_final"], 5e-3, fraction=0.99)


def test_masks_in_the_image(run, golden):
    size = golden["image_rgb"].shape[:2]
    (result,) = unpack_detections(run["detections"], run["sizes"], [size])
    row, _ = nearest_rows(result.boxes, golden["boxes"])
    counts = json.loads(str(golden["masks_rle"]))
    truth = [{"size": list(size), "counts": text.encode()} for text in counts]
    iou = [mask_api.iou([result.masks[i]], [other], [0])[0, 0] for i, other in zip(row.tolist(), truth, strict=True)]
    assert min(iou) > 0.98
    assert np.mean(iou) > 0.9995


# ---- training


@pytest.fixture(scope="module")
def training(state):
    """Losses and gradients with every sample taken, as the goldens were made."""
    golden = dict(np.load(GOLDENS / "scnet_r50_train.npz"))
    detector = models.build_detector(
        "scnet", num_samples=1_000_000, semantic_loss_mean="all", rpn=RPNConfig(num_samples=1_000_000)
    )
    models.load_weights(detector, state)
    detector.train()
    images, sizes = make_batch([golden["image_rgb_0"], golden["image_rgb_1"]], None, "cpu")
    gt_boxes, gt_labels = torch.zeros(2, 6, 4), torch.full((2, 6), -1)
    semantic = np.full((2, *images.shape[2:]), 255, np.uint8)
    bitmaps, offsets, windows = [], torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, 4, dtype=torch.int32)
    total = 0
    for i in range(2):
        count = len(golden[f"gt_labels_{i}"])
        gt_boxes[i, :count] = torch.from_numpy(golden[f"gt_boxes_{i}"])
        gt_labels[i, :count] = torch.from_numpy(golden[f"gt_labels_{i}"])
        height, width = golden[f"gt_sem_{i}"].shape
        semantic[i, :height, :width] = golden[f"gt_sem_{i}"]
        masks = np.unpackbits(golden[f"gt_masks_{i}"], axis=-1)[..., :width]
        for j, mask in enumerate(masks):
            offsets[i, j], windows[i, j] = total, torch.tensor([0, 0, width, height])
            bitmaps.append(torch.from_numpy(mask).flatten())
            total += mask.size
    masks = PackedMasks(torch.cat(bitmaps), offsets, windows)
    semantic = torch.from_numpy(semantic[:, ::8, ::8].copy())
    losses = detector.losses(images, sizes, gt_boxes, gt_labels, masks, semantic)
    sum(losses.values()).backward()
    return golden, detector, losses


GOLDEN_LOSS = {
    "loss_rpn_cls": "loss_rpn_objectness",
    "loss_rpn_bbox": "loss_rpn_box",
    "loss_semantic_seg": "loss_semantic",
    "loss_glbctx": "loss_global_context",
    "loss_mask": "loss_mask",
    **{f"s{i}.loss_cls": f"stage{i}.loss_class" for i in range(3)},
    **{f"s{i}.loss_bbox": f"stage{i}.loss_box" for i in range(3)},
}


def test_every_loss(training):
    golden, _, losses = training
    truth = {key: value for key, value in json.loads(str(golden["losses_json"])).items() if "loss" in key}
    assert set(truth) == set(GOLDEN_LOSS)
    assert set(losses) == set(GOLDEN_LOSS.values())
    for name, value in truth.items():
        assert losses[GOLDEN_LOSS[name]].item() == pytest.approx(np.sum(value), rel=1e-4), name
    assert sum(losses.values()).item() == pytest.approx(float(golden["total_loss"]), rel=1e-5)


def ours_of(names: list[str]) -> list[str]:
    # roi_head. is what mmdetection's names are recognised by
    return [name for name in translate_names(dict.fromkeys([*names, "roi_head."])) if name != "roi_head."]


def test_gradients(training):
    golden, detector, _ = training
    names = json.loads(str(golden["grad_names_json"]))
    ours = dict(detector.named_parameters())
    renamed = dict(zip(ours_of(names), names, strict=True))
    norms = dict(zip(names, golden["grad_norms"], strict=True))
    errors = {}
    for mine, theirs in renamed.items():
        norm = ours[mine].grad.double().norm().item()
        errors[theirs] = abs(norm - norms[theirs]) / (norms[theirs] + 1e-8)
    worst = max(errors, key=errors.get)
    assert np.median(list(errors.values())) < 2e-4
    assert errors[worst] < 2e-3, worst
    without = {name for name, parameter in ours.items() if parameter.grad is None}
    assert without == set(ours_of(json.loads(str(golden["no_grad_names_json"]))))
    representatives = json.loads(str(golden["grad_rep_names_json"]))
    back = {theirs: mine for mine, theirs in renamed.items()}
    for i, name in enumerate(representatives):
        flat = ours[back[name]].grad.contiguous().flatten()
        values = flat[:: max(1, flat.numel() // 64)][:64].double().numpy()
        truth = golden[f"grad_rep_{i}"]
        assert np.abs(values - truth).max() <= 5e-3 * np.abs(truth).max() + 1e-7, name
