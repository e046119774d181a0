"""The golden files of mmdetection's detectors: which detector each is of, its weights, and where the files lie.

Small copies in tests/goldens serve every run. The environment variable CASCADEOPS_GOLDENS names the folder of all of
them (with infer/, train/ and keys/); then every configuration that has a file is tested, and files come from there. Of
the small copies only SCNet's are whole; the others leave out what is the same in SCNet's (image, pyramid ...).

    python tests/golden_cases.py FOLDER     makes the small copies anew
"""

import dataclasses
import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import models

SMALL = Path(__file__).parent / "goldens"
FOLDER = os.environ.get("CASCADEOPS_GOLDENS")
KEYS = SMALL / "mmdetection_keys.json.gz"


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of mmdetection and our detector of the same name."""

    config: str
    arch: str
    backbone: str = "resnet50"
    fields: dict = dataclasses.field(default_factory=dict)
    noise: float = 1.0
    """Deep random networks amplify rounding: mmdetection differs from itself so many times more than with ResNet-50."""

    def build(self, **fields) -> torch.nn.Module:
        return models.build_detector(self.arch, self.backbone, **(self.fields | fields))

    def with_golden_weights(self, **fields) -> torch.nn.Module:
        """`build` without drawing random weights first, which takes a second and more."""
        with torch.device("meta"):
            detector = self.build(**fields)
        detector.to_empty(device="cpu")
        models.load_weights(detector, golden_state(self.config))
        return detector


NO_SEMANTIC, DEFORMABLE, V1D = {"semantic": False}, {"dcn": True}, "res2net101_v1d_26w4s"
CASES = [
    Case("faster_rcnn_r50_fpn_1x", "faster_rcnn"),
    Case("mask_rcnn_r50_fpn_1x", "mask_rcnn"),
    Case("cascade_mask_rcnn_r50_fpn_1x", "cascade_mask_rcnn"),
    Case("htc_r50_fpn_1x", "htc"),
    Case("htc_without_semantic_r50_fpn_1x", "htc", fields=NO_SEMANTIC),
    Case("scnet_r50_fpn_1x", "scnet"),
    Case("htc_r101_fpn_20e", "htc", "resnet101", noise=10),
    Case("htc_x101_32x4d_fpn_20e", "htc", "resnext101_32x4d", noise=10),
    Case("htc_x101_64x4d_fpn_20e", "htc", "resnext101_64x4d", noise=10),
    Case("htc_x101_64x4d_dconv_c3-c5_ms400-1400_20e", "htc", "resnext101_64x4d", DEFORMABLE, noise=10),
    Case("scnet_r101_fpn_20e", "scnet", "resnet101", noise=10),
    Case("scnet_x101_64x4d_fpn_20e", "scnet", "resnext101_64x4d", noise=10),
    Case("faster_rcnn_res2net101_26w_4s_fpn_2x", "faster_rcnn", V1D, noise=10),
    Case("mask_rcnn_res2net101_26w_4s_fpn_2x", "mask_rcnn", V1D, noise=10),
    Case("cascade_rcnn_res2net101_26w_4s_fpn_20e", "cascade_mask_rcnn", V1D, {"masks": False}, noise=10),
    Case("cascade_mask_rcnn_res2net101_26w_4s_fpn_20e", "cascade_mask_rcnn", V1D, noise=10),
    Case("htc_res2net101_26w_4s_fpn_20e", "htc", V1D, noise=10),
]
FILE_SUFFIX = {"infer": "_imgA_200x304", "train": ""}
SHARED = "scnet_r50_fpn_1x"
IN_REPOSITORY = [SHARED, "htc_r50_fpn_1x", "mask_rcnn_r50_fpn_1x"]


def cases_with(kind: str) -> list[Case]:
    """Those that have a golden file of this kind ("infer" or "train") here."""
    if FOLDER:
        return [case for case in CASES if whole_file(FOLDER, kind, case.config).exists()]
    return [case for case in CASES if case.config in IN_REPOSITORY]


def whole_file(folder: str, kind: str, config: str) -> Path:
    return Path(folder) / kind / f"{config}{FILE_SUFFIX[kind]}.npz"


def load_golden(kind: str, case: Case) -> dict[str, np.ndarray]:
    if FOLDER:
        return dict(np.load(whole_file(FOLDER, kind, case.config)))
    golden = dict(np.load(SMALL / f"{case.config}_{kind}.npz"))
    if case.config != SHARED:
        shared = np.load(SMALL / f"{SHARED}_{kind}.npz")
        golden |= {key: shared[key] for key in golden.pop("same_as_scnet")}
    return golden


def all_keys() -> dict[str, dict]:
    """Of each configuration "state_dict" (name -> shape), "num_params" and "num_params_requires_grad"."""
    return json.loads(gzip.decompress(KEYS.read_bytes()))


def golden_state(config: str) -> dict[str, torch.Tensor]:
    """The golden weights under mmdetection's names."""
    spec = importlib.util.spec_from_file_location("golden_weights", SMALL / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = all_keys()[config]["state_dict"]
    return {key: torch.from_numpy(np.asarray(module.fill_array(key, tuple(shape)))) for key, shape in shapes.items()}


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


def all_class_logits(mask_head: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    """What mmdetection computes, and our mask heads only for the class of each RoI: [R, num_classes, 28, 28]"""
    return mask_head.logits(mask_head.upsample(features).relu())


def make_small_copies(folder: str) -> None:
    keys = {}
    for case in CASES:
        content = json.loads((Path(folder) / "keys" / f"{case.config}.json").read_text())
        keys[case.config] = {key: content[key] for key in ("state_dict", "num_params", "num_params_requires_grad")}
    KEYS.write_bytes(gzip.compress(json.dumps(keys).encode(), mtime=0))
    for kind in FILE_SUFFIX:
        copy = SMALL / f"{SHARED}_{kind}.npz"
        copy.write_bytes(whole_file(folder, kind, SHARED).read_bytes())
        shared = dict(np.load(copy))
        for config in IN_REPOSITORY:
            if config != SHARED:
                golden = dict(np.load(whole_file(folder, kind, config)))
                same = [key for key in golden if key in shared and np.array_equal(golden[key], shared[key])]
                own = {key: value for key, value in golden.items() if key not in same}
                np.savez_compressed(SMALL / f"{config}_{kind}.npz", **own, same_as_scnet=np.array(same))


if __name__ == "__main__":
    make_small_copies(sys.argv[1])
