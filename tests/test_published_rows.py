"""The published detectors by name: `models.train --list`, `--preset NAME`, `models.build_detector(NAME)`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from models.config_backbones import BACKBONES
from models.data import Augmentation
from models.data.transforms import _varied_size
from models.errors import UsageError
from models.optimization import learning_rate, make_optimizer
from models.published_rows import PUBLISHED_ROWS, presets_for
from models.weights.published import PUBLISHED

ROOT = Path(__file__).parent.parent


def test_every_published_row_has_its_name():
    # MODELS: 4 of SCNet, 6 of HTC, 5 + 5 with self-calibrated backbones, 7 of maskrcnn-benchmark, 5 with Res2Net-101.
    assert len(PUBLISHED_ROWS) == 32
    with_numbers = [row for row in PUBLISHED_ROWS.values() if row.box_ap is not None or row.mask_ap is not None]
    assert len(with_numbers) == 32


def test_published_weights_of_a_detector_belong_to_a_row():
    files = {published.name for published in PUBLISHED if published.purpose == "detector, COCO"}
    assert files and files <= PUBLISHED_ROWS.keys()


# Millions of parameters, of the published detectors on mmdetection's side.
SIZES = {
    "scnet_r50_fpn_1x_coco": 94.799,
    "htc_r50_fpn_20e_coco": 80.258,
    "htc_x101_64x4d_fpn_16x1_20e_coco": 138.157,
    "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco": 143.300,
    "faster_rcnn_r50_fpn_2x_coco": 41.753,
    "mask_rcnn_r50_fpn_2x_coco": 44.396,
}


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_every_row_is_built_by_its_name(name):
    with torch.device("meta"):
        detector = models.build_detector(name)
    recipe = PUBLISHED_ROWS[name].recipe
    assert (detector.arch, detector.config) == (recipe.arch, recipe.detector)
    if name in SIZES:
        assert sum(parameter.numel() for parameter in detector.parameters()) / 1e6 == pytest.approx(SIZES[name], 1e-5)


def test_a_row_is_changed_by_fields():
    with torch.device("meta"):
        detector = models.build_detector("htc_r50_fpn_1x_coco", num_classes=3, semantic=False, interleaved=False)
        assert models.build_detector("htc_r50_fpn_1x_coco", "resnet101").config.backbone == BACKBONES["resnet101"]
    assert (detector.config.num_classes, detector.semantic_head, detector.config.interleaved) == (3, None, False)
    with pytest.raises(UsageError, match="unknown field of HTCConfig 'interleave'"):
        models.build_detector("htc_r50_fpn_1x_coco", interleave=False)


def rate(name: str, step: int, steps_per_epoch: int = 7330) -> float:
    return learning_rate(PUBLISHED_ROWS[name].recipe, step, steps_per_epoch)


def test_the_learning_rate_of_mmdetections_rows():
    assert rate("scnet_r50_fpn_20e_coco", 0) == pytest.approx(0.02 * 0.001)
    assert rate("scnet_r50_fpn_20e_coco", 500) == 0.02
    assert rate("scnet_r50_fpn_20e_coco", 16 * 7330 - 1) == 0.02
    assert rate("scnet_r50_fpn_20e_coco", 16 * 7330) == pytest.approx(0.002)
    assert rate("scnet_r50_fpn_20e_coco", 19 * 7330) == pytest.approx(0.0002)
    assert PUBLISHED_ROWS["scnet_r50_fpn_20e_coco"].recipe.epochs == 20


def test_the_recipe_of_maskrcnn_benchmarks_rows():
    name = "mask_rcnn_res2net50_26w4s_benchmark_2x_coco"
    recipe, steps_per_epoch = PUBLISHED_ROWS[name].recipe, 117266 // 16
    assert rate(name, 0, steps_per_epoch) == pytest.approx(0.02 / 3)
    assert rate(name, 250, steps_per_epoch) == pytest.approx(0.02 * 2 / 3)
    for step, expected in ((119_999, 0.02), (120_001, 0.002), (160_001, 0.0002)):
        assert rate(name, step, steps_per_epoch) == pytest.approx(expected)
    assert recipe.max_iterations == 180_000 <= recipe.epochs * steps_per_epoch
    backbone = recipe.detector.backbone
    assert (backbone.norm, backbone.norm_eps, backbone.stride_in_1x1) == ("fixed_batch", 0.0, True)
    with torch.device("meta"):
        weights, biases = make_optimizer(recipe, models.build_detector(name)).param_groups
    assert (weights["multiple"], weights["weight_decay"]) == (1.0, 1e-4)
    assert (biases["multiple"], biases["weight_decay"]) == (2.0, 0.0)
    assert all(parameter.dim() == 1 for parameter in biases["params"])


def test_other_recipes_treat_all_parameters_alike():
    detector = torch.nn.Conv2d(2, 2, 1)
    (group,) = make_optimizer(PUBLISHED_ROWS["htc_r50_fpn_1x_coco"].recipe, detector).param_groups
    assert (group["multiple"], group["weight_decay"], len(group["params"])) == (1.0, 1e-4, 2)


def test_multi_scale_training_draws_the_short_side():
    recipe = PUBLISHED_ROWS["htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco"].recipe
    assert (recipe.short_sides, recipe.resize) == ((400, 1400), (1400, 1600))
    augmentation = Augmentation(short_sides=range(recipe.short_sides[0], recipe.short_sides[1] + 1))
    random = np.random.default_rng(0)
    sizes = [_varied_size((480, 480), recipe.resize, augmentation, random) for _ in range(300)]
    assert min(sizes)[0] < 450 and max(sizes)[0] > 1350
    with pytest.raises(ValueError, match=r"short_sides must be \(least, most\) pixels above 0, got \(1400, 400\)"):
        replace(recipe, short_sides=(1400, 400))


def test_a_published_preset_decides_the_arch():
    found = presets_for("htc_r50_fpn_20e_coco", None)
    assert found["htc_r50_fpn_20e_coco"] == PUBLISHED_ROWS["htc_r50_fpn_20e_coco"].recipe
    assert {preset.arch for preset in found.values()} == {"htc"}
    assert list(presets_for(None, "htc")) == list(found)
    plain = presets_for(None, None)
    assert next(iter(plain)) == "small" and {preset.arch for preset in plain.values()} == {"scnet"}


def test_the_list_shows_each_row_whole_without_importing_torch():
    code = "import sys; from models.published_rows import print_rows; print_rows(); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert lines["False"] == []
    for name, row in PUBLISHED_ROWS.items():
        numbers = row.box_ap, row.mask_ap, row.tta_box_ap, row.tta_mask_ap, row.memory_gb, row.images_per_second
        assert lines[name][:6] == ["-" if number is None else str(number) for number in numbers]
