"""Pyramid, RPN and heads of HTC, SCNet and Mask R-CNN against mmdetection, on weights, maps and RoIs made from names.

The numbers were taken from mmdetection; the weights' generator is the backbones'.
"""

import functools

import numpy as np
import pytest
import torch
from golden_cases import CASES, all_class_logits, all_keys
from test_backbone_fingerprints import uniform, weight

from models.heads import BOX_SIZE, MASK_SIZE
from models.names_mmdetection import rename

FINGERPRINTS = {
    "FPN.P2": ((2, 256, 64, 80), 5.887124e-03, 1.151946e00, 1.859665e-01, -8.648039e-01, 1.195817e00),
    "FPN.P6": ((2, 256, 4, 5), -8.142567e-03, 5.402531e-01, -5.432399e-01, -3.208415e-01, 2.947792e-01),
    "RPN.cls.P2": ((2, 3, 64, 80), -7.982441e-02, 4.507886e-01, 3.385732e-01, 3.593138e-01, -1.225183e-01),
    "RPN.reg.P6": ((2, 12, 4, 5), -9.564846e-02, 3.391517e-01, 3.384027e-01, -2.075312e-01, 5.873135e-02),
    "HTC.sem.logits": ((2, 183, 32, 40), 1.842346e-03, 2.099174e-01, -3.150364e-02, -1.159490e-01, 7.281043e-02),
    "HTC.sem.feat": ((2, 256, 32, 40), 8.901421e-02, 1.305815e-01, 0.0, 0.0, 0.0),
    "HTC.s0.cls": ((5, 81), -2.489132e-02, 1.539104e-01, -4.714365e-02, -1.169670e-01, 1.136604e-01),
    "HTC.s0.reg": ((5, 4), -3.810590e-02, 1.009538e-01, 1.093675e-01, -1.250516e-01, -3.832661e-03),
    "HTC.s1.cls": ((5, 81), -3.698107e-02, 1.763920e-01, -7.685670e-02, -3.616552e-01, -5.264059e-02),
    "HTC.s1.reg": ((5, 4), 2.618021e-02, 1.581647e-01, 4.008508e-02, -1.433992e-01, 2.012684e-01),
    "HTC.s2.cls": ((5, 81), 2.779965e-02, 1.848870e-01, -6.138638e-02, 1.954987e-01, -1.785738e-01),
    "HTC.s2.reg": ((5, 4), 5.375973e-02, 1.082222e-01, 1.086018e-01, 4.252730e-02, 9.356575e-02),
    "HTC.mask.s0": ((5, 80, 28, 28), -2.435918e-03, 7.842146e-02, 7.872484e-02, -1.860995e-01, 4.416268e-02),
    "HTC.mask.s1": ((5, 80, 28, 28), 8.800996e-03, 8.128515e-02, -5.748473e-02, 1.047674e-01, -7.468433e-03),
    "HTC.mask.s2": ((5, 80, 28, 28), 5.676192e-03, 7.923423e-02, -1.179437e-01, 7.072805e-02, -2.583202e-02),
    "SCNet.sem.logits": ((2, 183, 32, 40), 5.772575e-02, 1.540943e00, -2.277642e-01, -8.587657e-01, -1.346055e00),
    "SCNet.sem.feat": ((2, 256, 32, 40), 5.770914e-01, 9.308446e-01, 0.0, 0.0, 0.0),
    "SCNet.glb.logits": ((2, 80), -2.955053e-02, 3.378775e-01, 2.781872e-01, 2.242003e-01, -2.012878e-01),
    "SCNet.glb.feat": ((2, 256, 1, 1), 1.099965e-02, 2.868069e-01, -1.407152e-01, -1.396535e-01, -1.086671e-01),
    "SCNet.s0.cls": ((5, 81), -5.344901e-02, 5.824169e-01, -1.733283e-01, 7.568034e-01, 1.548413e00),
    "SCNet.s0.reg": ((5, 4), -2.577029e-01, 4.077336e-01, -1.465561e-01, 7.747718e-02, -5.771810e-01),
    "SCNet.s1.cls": ((5, 81), -1.449184e-01, 5.989624e-01, 3.584313e-02, -6.113463e-01, -5.395052e-01),
    "SCNet.s1.reg": ((5, 4), 2.325212e-02, 4.062911e-01, -2.410472e-01, 1.674368e-02, 7.285084e-01),
    "SCNet.s2.cls": ((5, 81), 3.727179e-02, 5.680784e-01, -4.823939e-02, 7.780672e-01, -2.868631e-01),
    "SCNet.s2.reg": ((5, 4), -2.659168e-02, 5.396406e-01, -1.730753e-01, 1.633176e-01, -4.828878e-01),
    "SCNet.relay": ((5, 256, 14, 14), 6.707830e-03, 4.075868e-01, 6.157582e-01, 3.009397e-01, -1.805311e-01),
    "SCNet.mask": ((5, 80, 28, 28), -1.102852e-01, 1.180984e00, 6.073529e-01, 5.529835e-01, -9.984076e-01),
    "MaskRCNN.cls": ((5, 81), 2.728764e-02, 1.456823e-01, -4.322643e-02, -1.875321e-01, 4.443345e-01),
    "MaskRCNN.reg": ((5, 320), -3.964358e-03, 1.386667e-01, -9.765097e-02, 2.464626e-01, -8.116007e-03),
    "MaskRCNN.mask": ((5, 80, 28, 28), 8.930213e-03, 7.160435e-02, 1.822224e-02, 1.507068e-01, 4.461758e-02),
}
"""Shape, mean, population standard deviation, first, middle and last element."""

ROIS = [
    [0, 10, 12, 90, 100],
    [0, 0, 0, 320, 256],
    [1, 5.5, 7.25, 30, 28],
    [1, 100, 50, 260, 200],
    [0, 200, 100, 215, 240],
]


def map_of(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy((2 * uniform(name, int(np.prod(shape)))).astype(np.float32)).view(shape)


def build(config: str) -> torch.nn.Module:
    """The detector without a backbone, on the weights of mmdetection's names."""
    with torch.device("meta"):
        detector = next(case for case in CASES if case.config == config).build()
    del detector.backbone
    shapes = all_keys()[config]["state_dict"]
    state = {
        rename(key): made_weight(key, tuple(shape)) for key, shape in shapes.items() if not key.startswith("backbone.")
    }
    detector.load_state_dict(state, assign=True)
    return detector


@functools.cache
def made_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    return weight(key, shape)


@pytest.fixture(scope="module")
def found():
    found = {}
    with torch.no_grad():
        sides = [(64, 80), (32, 40), (16, 20), (8, 10), (4, 5)]
        pyramid = [map_of(f"P{i}", 2, 256, *side) for i, side in enumerate(sides, start=2)]
        rois = torch.tensor(ROIS)
        for name, run in (("HTC", run_htc), ("SCNet", run_scnet), ("MaskRCNN", run_mask_rcnn)):
            found |= {f"{name}.{key}": value for key, value in run(pyramid, rois).items()}
    return found


def run_htc(pyramid, rois):
    detector = build("htc_r50_fpn_1x")
    (sem_logits, context), found = detector.context(pyramid), {}
    for stage, head in enumerate(detector.box_heads):
        found[f"s{stage}.cls"], found[f"s{stage}.reg"], _ = head(detector.box_features(context, rois))
    features, flow = detector.mask_features(context, rois), None
    for stage, head in enumerate(detector.mask_heads):
        flow = head.features(features, flow)
        found[f"mask.s{stage}"] = all_class_logits(head, flow)
    return found | {"sem.logits": sem_logits, "sem.feat": context.semantic}


def run_scnet(pyramid, rois):
    detector = build("scnet_r50_fpn_1x")
    (sem_logits, class_logits, context), found = detector.context(pyramid), {}
    for stage, head in enumerate(detector.box_heads):
        found[f"s{stage}.cls"], found[f"s{stage}.reg"], shared = head(detector.box_features(context, rois))
    found |= {"sem.logits": sem_logits, "sem.feat": context.semantic}
    found |= {"glb.logits": class_logits, "glb.feat": context.image, "relay": detector.feature_relay(shared)}
    features = detector.mask_head.blocks(detector.mask_features(context, rois, shared))
    return found | {"mask": all_class_logits(detector.mask_head, features)}


def run_mask_rcnn(pyramid, rois):
    detector = build("mask_rcnn_r50_fpn_1x")
    found = {}
    found["cls"], found["reg"], _ = detector.box_head(detector.roi_features(pyramid, rois, BOX_SIZE))
    features = detector.mask_head.features(detector.roi_features(pyramid, rois, MASK_SIZE))
    return found | {"mask": all_class_logits(detector.mask_head, features)}


@pytest.fixture(scope="module")
def neck():
    detector = build("mask_rcnn_r50_fpn_1x")
    sides = [(256, 64, 80), (512, 32, 40), (1024, 16, 20), (2048, 8, 10)]
    with torch.no_grad():
        levels = detector.fpn([map_of(f"C{i}", 2, *side) for i, side in enumerate(sides)])
        pyramid = [map_of(f"P{i}", 2, 256, 64 >> (i - 2), 80 >> (i - 2)) for i in range(2, 7)]
        logits, deltas, _ = detector.rpn(pyramid)
    return {
        "FPN.P2": levels[0],
        "FPN.P6": levels[4],
        "RPN.cls.P2": logits[0].view(2, 64, 80, 3).permute(0, 3, 1, 2),
        "RPN.reg.P6": deltas[4].view(2, 4, 5, 12).permute(0, 3, 1, 2),
    }


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprint(name, found, neck):
    shape, mean, std, *elements = FINGERPRINTS[name]
    x = (found | neck)[name]
    assert tuple(x.shape) == shape
    x = x.double().flatten()
    values = [x.mean(), x.std(correction=0), x[0], x[len(x) // 2], x[-1]]
    np.testing.assert_allclose(values, [mean, std, *elements], rtol=0, atol=1e-4 * std)
