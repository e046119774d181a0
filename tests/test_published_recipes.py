"""Every published row against a table of the recipes that was typed from their sources, not from our code.

mmdetection: configs/_base_/schedules and the rows' own configuration files. maskrcnn-benchmark: the yaml files of
Res2Net's tables. The schedules of self-calibrated backbones were never published; theirs are mmdetection's 2x.
"""

import pytest

from models.published_rows import PUBLISHED_ROWS
from models.recipes import OptimizerConfig, TrainConfig

SCHEDULES = {"1x": (12, (8, 11)), "20e": (20, (16, 19)), "2x": (24, (16, 22))}
"""Epochs, and those after which the rate falls to a tenth."""

BENCHMARK = {"max_iterations": 180_000, "falls": (120_000, 160_000), "steps_per_epoch": 7329}
"""MAX_ITER and STEPS; 117,266 images with objects make 7,329 steps of 16."""

ROWS = {
    "scnet_r50_fpn_1x_coco": "1x",
    "scnet_r50_fpn_20e_coco": "20e",
    "scnet_r101_fpn_20e_coco": "20e",
    "scnet_x101_64x4d_fpn_20e_coco": "20e",
    "htc_r50_fpn_1x_coco": "1x",
    "htc_r50_fpn_20e_coco": "20e",
    "htc_r101_fpn_20e_coco": "20e",
    "htc_x101_32x4d_fpn_16x1_20e_coco": "20e",
    "htc_x101_64x4d_fpn_16x1_20e_coco": "20e",
    "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco": "20e",
    "faster_rcnn_r50_fpn_2x_coco": "2x",
    "faster_rcnn_scnet50_fpn_2x_coco": "2x",
    "faster_rcnn_scnet50_v1d_fpn_2x_coco": "2x",
    "faster_rcnn_r101_fpn_2x_coco": "2x",
    "faster_rcnn_scnet101_fpn_2x_coco": "2x",
    "mask_rcnn_r50_fpn_2x_coco": "2x",
    "mask_rcnn_scnet50_fpn_2x_coco": "2x",
    "mask_rcnn_scnet50_v1d_fpn_2x_coco": "2x",
    "mask_rcnn_r101_fpn_2x_coco": "2x",
    "mask_rcnn_scnet101_fpn_2x_coco": "2x",
    "mask_rcnn_resnet50_benchmark_2x_coco": "benchmark",
    "mask_rcnn_res2net50_48w2s_benchmark_2x_coco": "benchmark",
    "mask_rcnn_res2net50_26w4s_benchmark_2x_coco": "benchmark",
    "mask_rcnn_res2net50_18w6s_benchmark_2x_coco": "benchmark",
    "mask_rcnn_res2net50_14w8s_benchmark_2x_coco": "benchmark",
    "mask_rcnn_resnet101_benchmark_2x_coco": "benchmark",
    "mask_rcnn_res2net101_26w4s_benchmark_2x_coco": "benchmark",
    "faster_rcnn_r2_101_fpn_2x_coco": "2x",
    "mask_rcnn_r2_101_fpn_2x_coco": "2x",
    "cascade_rcnn_r2_101_fpn_20e_coco": "20e",
    "cascade_mask_rcnn_r2_101_fpn_20e_coco": "20e",
    "htc_r2_101_fpn_20e_coco": "20e",
}


def optimizer(bias_lr: float, bias_decay: float) -> dict:
    """SGD with momentum and decay on all parameters, the gradient not clipped."""
    return {
        "lr": 0.02,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "bias_lr": bias_lr,
        "bias_weight_decay": bias_decay,
        "clip_gradient_norm": 0.0,
    }


def found_optimizer(config: OptimizerConfig) -> dict:
    decay = config.weight_decay if config.bias_weight_decay is None else config.bias_weight_decay
    return vars(config) | {"bias_weight_decay": decay}


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_a_row_has_its_published_recipe(name):
    recipe: TrainConfig = PUBLISHED_ROWS[name].recipe
    schedule, backbone = ROWS[name], recipe.detector.backbone
    assert (recipe.batch_size, recipe.base_batch_size, recipe.accumulate) == (16, 16, 1)
    assert (recipe.amp, recipe.ema_decay, recipe.flip, recipe.colour_jitter) == ("off", 0.0, 0.5, 0.0)
    assert recipe.scale_jitter == (1.0, 1.0) and not recipe.auto_scale_lr
    assert recipe.warmup_iterations == 500 and backbone.frozen_stages == 1  # stem and layer1
    if "mstrain_400_1400" in name:
        assert (recipe.resize, recipe.short_sides) == ((1400, 1600), (400, 1400))
        assert backbone.deformable_stages == (False, True, True, True)
    else:
        assert (recipe.resize, recipe.short_sides) == ((800, 1333), None)
        assert not any(backbone.deformable_stages)
    if schedule == "benchmark":
        steps = BENCHMARK["steps_per_epoch"]
        assert recipe.max_iterations == BENCHMARK["max_iterations"] <= recipe.epochs * steps
        assert [epoch * steps for epoch in recipe.decay_epochs] == pytest.approx(BENCHMARK["falls"])
        assert recipe.warmup_start == 1 / 3 and found_optimizer(recipe.optimizer) == optimizer(2.0, 0.0)
        assert (backbone.norm, backbone.norm_eps) == ("fixed_batch", 0.0)
    else:
        assert recipe.max_iterations is None
        assert (recipe.epochs, recipe.decay_epochs) == SCHEDULES[schedule]
        assert recipe.warmup_start == 0.001 and found_optimizer(recipe.optimizer) == optimizer(1.0, 1e-4)
        assert backbone.norm == "frozen_batch"
