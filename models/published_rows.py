"""The detectors that papers and model zoos have published numbers of, by name, each with its recipe.

    python -m models.train --list
    python -m models.train --preset scnet_r50_fpn_20e_coco --data coco --backbone-weights resnet50.pth
    models.build_detector("scnet_r50_fpn_20e_coco")

Names are those of the published configuration files, where there are any; `python -m models.weights` fetches the
weights of the same name. Average precision is COCO's, in percent, on val2017 (minival 2014, the same images, for
maskrcnn-benchmark and the self-calibrated backbones). Memory and speed were measured on V100 GPUs, float32: memory in
training with 2 images a GPU (HTC's ResNeXt: 1), speed for one image of at most 800 x 1333. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .config import DETECTOR_CONFIGS, MaskRCNNConfig, RPNConfig
from .config_backbones import BACKBONES, as_maskrcnn_benchmark, with_deformable
from .recipes import OptimizerConfig, TrainConfig, presets

SCHEDULES = {"1x": (12, (8, 11)), "20e": (20, (16, 19)), "2x": (24, (16, 22))}
"""mmdetection's: epochs, and after which of them the learning rate falls to a tenth."""


@dataclass(frozen=True)
class PublishedRow:
    name: str
    recipe: TrainConfig
    source: str
    box_ap: float | None
    mask_ap: float | None = None
    memory_gb: float | None = None
    images_per_second: float | None = None
    tta_box_ap: float | None = None
    """With test-time augmentation (`models.tta`)."""
    tta_mask_ap: float | None = None
    note: str = ""


def _row(name: str, arch: str, backbone: str, schedule: str, source: str, *numbers, note: str = "", **changes):
    """A row of mmdetection's kind. changes: fields of the recipe; `deformable` and `masks`, of the detector."""
    config = BACKBONES[backbone]
    if changes.pop("deformable", False):
        config = with_deformable(config)
    fields = {"masks": changes.pop("masks")} if "masks" in changes else {}
    epochs, decay_epochs = SCHEDULES[schedule]
    recipe = TrainConfig(
        arch=arch,
        output=Path(f"runs/{name}"),
        epochs=epochs,
        decay_epochs=decay_epochs,
        detector=DETECTOR_CONFIGS[arch](backbone=config, **fields),
    )
    return PublishedRow(name, replace(recipe, **changes), source, *numbers, note=note)


def _benchmark_row(name: str, backbone: str, box_ap: float, mask_ap: float) -> PublishedRow:
    """Res2Net's Mask R-CNN in maskrcnn-benchmark: 180,000 steps of 16 images, falls after 120,000 and 160,000."""
    steps_per_epoch = 117266 // 16
    detector = MaskRCNNConfig(
        backbone=as_maskrcnn_benchmark(BACKBONES[backbone]),
        rpn=RPNConfig(),
        match_low_quality=False,
        smooth_l1_beta=1.0,
    )
    recipe = TrainConfig(
        arch="mask_rcnn",
        output=Path(f"runs/{name}"),
        epochs=-(-180_000 // steps_per_epoch),
        max_iterations=180_000,
        decay_epochs=(120_000 / steps_per_epoch, 160_000 / steps_per_epoch),
        warmup_start=1 / 3,
        optimizer=OptimizerConfig(bias_lr=2.0, bias_weight_decay=0.0),
        detector=detector,
    )
    note = "boxes here have no +1, and RoIAlign is aligned and adaptive: maskrcnn-benchmark's differ"
    return PublishedRow(name, recipe, "Res2Net, maskrcnn-benchmark", box_ap, mask_ap, note=note)


_SCNET, _HTC = "SCNet (Vu et al. 2021), mmdetection", "HTC (Chen et al. 2019), mmdetection"
_SELF_CALIBRATED, _RES2NET = "self-calibrated convolutions (Liu et al. 2020)", "Res2Net (Gao et al. 2019), mmdetection"
_INFERRED = "schedule and freezing are not published: inferred from the baselines"

_ROWS = [
    _row("scnet_r50_fpn_1x_coco", "scnet", "resnet50", "1x", _SCNET, 43.5, 39.2, 7.0, 6.2, 44.8, 40.9),
    _row("scnet_r50_fpn_20e_coco", "scnet", "resnet50", "20e", _SCNET, 44.5, 40.0, 7.0, 6.2, 45.8, 41.5),
    _row("scnet_r101_fpn_20e_coco", "scnet", "resnet101", "20e", _SCNET, 45.8, 40.9, 8.9, 5.8, 47.3, 42.7),
    _row(
        "scnet_x101_64x4d_fpn_20e_coco", "scnet", "resnext101_64x4d", "20e", _SCNET,
        47.5, 42.3, 13.2, 4.9, 48.9, 44.0,
    ),
    _row("htc_r50_fpn_1x_coco", "htc", "resnet50", "1x", _HTC, 42.3, 37.4, 8.2, 5.8),
    _row("htc_r50_fpn_20e_coco", "htc", "resnet50", "20e", _HTC, 43.3, 38.3, 8.2),
    _row("htc_r101_fpn_20e_coco", "htc", "resnet101", "20e", _HTC, 44.8, 39.6, 10.2, 5.5),
    _row("htc_x101_32x4d_fpn_16x1_20e_coco", "htc", "resnext101_32x4d", "20e", _HTC, 46.1, 40.5, 11.4, 5.0),
    _row("htc_x101_64x4d_fpn_16x1_20e_coco", "htc", "resnext101_64x4d", "20e", _HTC, 47.0, 41.4, 14.5, 4.4),
    _row(
        "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco", "htc", "resnext101_64x4d", "20e", _HTC,
        50.4, 43.8, deformable=True, resize=(1400, 1600), short_sides=(400, 1400),
    ),
    *(
        _row(f"faster_rcnn_{short}_fpn_2x_coco", "faster_rcnn", backbone, "2x", _SELF_CALIBRATED, ap, note=_INFERRED)
        for short, backbone, ap in (
            ("r50", "resnet50", 37.6),
            ("scnet50", "scnet50", 40.8),
            ("scnet50_v1d", "scnet50_v1d", 41.8),
            ("r101", "resnet101", 39.9),
            ("scnet101", "scnet101", 42.0),
        )
    ),
    *(
        _row(f"mask_rcnn_{short}_fpn_2x_coco", "mask_rcnn", backbone, "2x", _SELF_CALIBRATED, None, ap, note=_INFERRED)
        for short, backbone, ap in (
            ("r50", "resnet50", 35.0),
            ("scnet50", "scnet50", 37.2),
            ("scnet50_v1d", "scnet50_v1d", 38.5),
            ("r101", "resnet101", 36.7),
            ("scnet101", "scnet101", 38.4),
        )
    ),
    *(
        _benchmark_row(f"mask_rcnn_{backbone}_benchmark_2x_coco", backbone, box_ap, mask_ap)
        for backbone, mask_ap, box_ap in (
            ("resnet50", 33.9, 37.5),
            ("res2net50_48w2s", 34.2, 38.0),
            ("res2net50_26w4s", 35.6, 39.6),
            ("res2net50_18w6s", 35.7, 39.9),
            ("res2net50_14w8s", 35.3, 39.1),
            ("resnet101", 35.5, 39.6),
            ("res2net101_26w4s", 37.1, 41.8),
        )
    ),
    _row("faster_rcnn_r2_101_fpn_2x_coco", "faster_rcnn", "res2net101_v1d_26w4s", "2x", _RES2NET, 43.0, None, 7.4),
    _row("mask_rcnn_r2_101_fpn_2x_coco", "mask_rcnn", "res2net101_v1d_26w4s", "2x", _RES2NET, 43.6, 38.7, 7.9),
    _row(
        "cascade_rcnn_r2_101_fpn_20e_coco", "cascade_mask_rcnn", "res2net101_v1d_26w4s", "20e", _RES2NET,
        45.7, None, 7.8, masks=False,
    ),
    _row(
        "cascade_mask_rcnn_r2_101_fpn_20e_coco", "cascade_mask_rcnn", "res2net101_v1d_26w4s", "20e", _RES2NET,
        46.4, 40.0, 9.5,
    ),
    _row("htc_r2_101_fpn_20e_coco", "htc", "res2net101_v1d_26w4s", "20e", _RES2NET, 47.5, 41.6),
]  # fmt: skip
PUBLISHED_ROWS = {row.name: row for row in _ROWS}


def presets_for(preset: str | None, arch: str | None) -> dict[str, TrainConfig]:
    """What `--preset` may name, given what it and `--arch` name on a command line: those of the arch. A published row
    decides the arch, too."""
    if preset in PUBLISHED_ROWS:
        arch = PUBLISHED_ROWS[preset].recipe.arch
    elif arch not in DETECTOR_CONFIGS:
        arch = TrainConfig.arch
    published = {name: row.recipe for name, row in PUBLISHED_ROWS.items() if row.recipe.arch == arch}
    return presets(arch) | published


def print_rows() -> None:
    """The table of `--list`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), pad_edge=False)
    columns = "name", "box AP", "mask AP", "TTA box", "TTA mask", "memory GB", "images/s", "epochs", "source"
    for column in columns:
        table.add_column(column, justify="left" if column in ("name", "source") else "right", no_wrap=True)
    for row in _ROWS:
        numbers = row.box_ap, row.mask_ap, row.tta_box_ap, row.tta_mask_ap, row.memory_gb, row.images_per_second
        shown = ["-" if number is None else f"{number:.1f}" for number in numbers]
        table.add_row(row.name, *shown, str(row.recipe.epochs), row.source)
    # As wide as it needs to be: a name that is cut off cannot be typed.
    Console(width=200, highlight=False).print(table)
    print(
        "\nAll as published: COCO AP in percent; memory and speed on a V100 in float32. Train one by its name: --preset"
    )
