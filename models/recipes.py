"""How a detector is trained: every number of a run, and the presets. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

from .config import DETECTOR_CONFIGS, CascadeMaskRCNNConfig, FasterRCNNConfig, HTCConfig, MaskRCNNConfig, SCNetConfig
from .config_backbones import BACKBONES


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent with momentum, as all published recipes have it."""

    lr: float = 0.02
    """Learning rate, for a step of --batch-size images."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_lr: float = 1.0
    """Biases learn at this multiple of the rate (maskrcnn-benchmark: 2)."""
    bias_weight_decay: float | None = None
    """Weight decay of biases (maskrcnn-benchmark: 0); None: as all parameters'."""
    clip_gradient_norm: float = 0.0
    """Largest norm of the gradient; 0: not clipped (the norm is reported all the same)."""

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr must be positive, got {self.lr}")
        for name in ("momentum", "weight_decay", "bias_lr", "bias_weight_decay", "clip_gradient_norm"):
            if (getattr(self, name) or 0.0) < 0:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """Train an instance-segmentation detector; --arch decides which --detector options there are.

    Without --data it trains on the embedded data set of shapes, which is drawn on first use (no download). The output
    folder gets the weights, metrics.jsonl, TensorBoard files and pictures of detections beside the ground truth.
    """

    arch: Literal["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "htc", "scnet"] = "scnet"
    """Detector: scnet is the sample-consistency detector (not the self-calibrated backbones scnet50, scnet101)."""
    data: Path | None = None
    """Folder in COCO layout (annotations/*.json, image folders, stuffthingmaps/ if there are any), or in VOC's
    (VOCdevkit/VOC2012)."""
    train_split: str = "train"
    """What of --data is trained on: train, trainval, train2014 ...; several, joined, as trainval2007+trainval2012."""
    val_split: str = "val"
    """What of --data is evaluated on: val, test, minival2014 ..."""
    output: Path = Path("runs/scnet")
    """Folder for everything that the run writes."""
    resume: bool = False
    """Continue the run in --output from its last intact checkpoint, with its own settings; the result is that of a run
    without the break."""
    weights: Path | None = None
    """Start from these weights of a whole detector (fine-tuning)."""
    backbone_weights: Path | None = None
    """Start the backbone from these ImageNet weights (torchvision's names)."""
    epochs: int = 12
    batch_size: int = 16
    """Images per step, over all processes of the job."""
    accumulate: int = 1
    """Parts that each process takes its images of a step in, one after the other: the memory is that of one part."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the weights are changed."""
    auto_scale_lr: bool = False
    """Multiply --optimizer.lr by --batch-size / --base-batch-size (linear scaling)."""
    base_batch_size: int = 16
    """Images per step that --optimizer.lr is meant for."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights, which is then what is evaluated and written: 0.9998, say; 0: none."""
    warmup_iterations: int = 500
    """Steps over which the learning rate rises linearly."""
    warmup_start: float = 0.001
    """Share of the learning rate that the rise begins with (maskrcnn-benchmark: a third)."""
    decay_epochs: tuple[float, ...] = (8, 11)
    """The learning rate is multiplied by 0.1 after each of these epochs."""
    resize: tuple[int, int] | None = (800, 1333)
    """Largest (short, long) side in pixels; None: images as they are."""
    short_sides: tuple[int, int] | None = None
    """Multi-scale training: for each image the limit of the short side is drawn from these two and all whole numbers
    between, instead of --resize's (with --resize 1400 1600, the published "400~1400" is 400 1400)."""
    flip: float = 0.5
    """Probability that a training image is mirrored."""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """Training images are scaled by a factor drawn from this interval."""
    colour_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation, 0..1."""
    semantic: Literal["auto", "yes", "no"] = "auto"
    """The semantic branch of htc and scnet; auto: if the data has stuffthingmaps."""
    semantic_padding: Literal[255, 0] = 255
    """Semantic class beyond an image: 255, ignored (mmdetection 3.x), or 0 (mmdetection up to 2.x, Paddle)."""
    amp: Literal["off", "auto", "bfloat16", "float16"] = "off"
    """Automatic mixed precision; auto: bfloat16 where the hardware computes with it, else off."""
    tf32: bool = False
    """On an NVIDIA GPU, without amp: linear layers, too, in TF32 (convolutions are, by PyTorch's default)."""
    checkpoint_activations: bool = False
    """Less memory, slower: the backward pass computes anew what is within backbone blocks, mask heads and the semantic
    branch. Not with norms that learn their statistics (batch, sync_batch)."""
    compress_gradients: bool = False
    """Several processes: gradients travel in bfloat16, half the bytes."""
    repeat_every: int = 0
    """Every so many steps the losses and gradients are computed twice and compared bit by bit, which finds a memory or
    a processor that errs; 0: never. For CPUs, and GPUs whose kernels all add in a fixed order."""
    rank_timeout: float = 600.0
    """Seconds without progress of a process after which the run ends, naming process, step and stacks. What takes long
    by nature (saving, evaluating, the first step) has longer. Below 500, the run ends before a process that hangs twice
    while it reads the same images is named with them."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes CUDA where it is, each process of a job a GPU of its own."""
    workers: int = 2
    """Processes that read and prepare images, for each that trains; 0: the training process itself."""
    seed: int = 0
    max_iterations: int | None = None
    """Stop after this many steps in all (the schedule is not shortened)."""
    evaluate_every: int = 1
    """Epochs between evaluations on the validation images; 0: only at the end."""
    max_evaluation_images: int | None = None
    """Evaluate on the first images only."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_every_steps: int = 0
    """Steps between further checkpoints; 0: none but those of epochs."""
    on_bad_image: Literal["stop", "substitute"] = "stop"
    """An image that cannot be read, or whose annotations are broken: stop and name it; or name it, count it, and train
    on another one in its place, up to one image in 1,000."""
    keep_checkpoints: int = 3
    """How many of the last checkpoints are kept, beside the one that scored best."""
    log_every: int = 20
    """Steps between lines of metrics."""
    detector: FasterRCNNConfig | MaskRCNNConfig | CascadeMaskRCNNConfig | HTCConfig | SCNetConfig = field(
        default_factory=SCNetConfig
    )
    """The architecture. Numbers of classes are taken from the data."""

    def __post_init__(self):
        ones = ("epochs", "batch_size", "accumulate", "base_batch_size", "log_every", "checkpoint_every")
        ones += ("keep_checkpoints", "max_iterations", "max_evaluation_images")
        zeros = ("checkpoint_every_steps", "repeat_every", "workers", "evaluate_every", "warmup_iterations")
        for name, least in (dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0)).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if wrong := next(_not_finite(self), None):
            raise ValueError(f"{wrong[0]} must be a finite number, got {wrong[1]}")
        if self.short_sides is not None and not 0 < self.short_sides[0] <= self.short_sides[1]:
            raise ValueError(f"short_sides must be (least, most) pixels above 0, got {self.short_sides}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.rank_timeout <= 0:
            raise ValueError(f"rank_timeout must be positive, got {self.rank_timeout}")
        if type(self.detector) is not DETECTOR_CONFIGS[self.arch]:
            raise ValueError(f"arch {self.arch} needs a detector of {DETECTOR_CONFIGS[self.arch].__name__}")
        if self.semantic == "yes" and not hasattr(self.detector, "semantic"):
            raise ValueError(f"{self.arch} has no semantic branch")
        if self.checkpoint_activations and self.detector.backbone.norm in ("batch", "sync_batch"):
            raise ValueError(f"checkpoint_activations: {self.detector.backbone.norm} norms would count a batch twice")
        if self.weights and self.backbone_weights:
            raise ValueError("weights and backbone_weights exclude each other")


def _not_finite(config: object, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of the numbers in a configuration that are NaN or infinite, which JSON does not hold."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from _not_finite(value, f"{prefix}{entry.name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                yield prefix + entry.name, number


def small(arch: str) -> TrainConfig:
    """All heads and losses of a detector on 2 CPU cores, from scratch."""
    config = DETECTOR_CONFIGS[arch]
    return TrainConfig(
        arch=arch,
        output=Path(f"runs/{arch}-small"),
        epochs=5,
        batch_size=8,
        base_batch_size=8,
        optimizer=OptimizerConfig(lr=0.03, clip_gradient_norm=10.0),
        warmup_iterations=100,
        decay_epochs=(3.8, 4.6),
        resize=None,
        amp="auto",
        workers=0,
        evaluate_every=2,
        detector=config(
            backbone=BACKBONES["resnet18_narrow"],
            channels=64,
            rpn=replace(
                config().rpn,
                anchor_scale=4.0,
                num_samples=128,
                top_k=300,
                top_k_training=300,
                max_proposals=200,
                max_proposals_training=200,
            ),
            finest_size=28.0,
            box_channels=256,
            num_samples=64,
            score_threshold=0.01,
            max_detections=30,
        ),
    )


def tiny() -> TrainConfig:
    """The SCNet that ships in the package (models/assets): 1.9 million parameters, below 4 MB in float16."""
    config = small("scnet")
    detector = replace(
        config.detector,
        backbone=replace(BACKBONES["resnet18_narrow"], layers=(2, 2, 2, 1), width=20),
        channels=48,
        box_channels=96,
        mask_blocks=3,
        semantic_blocks=1,
        global_blocks=1,
    )
    output = Path("runs/scnet-tiny")
    return replace(config, output=output, epochs=8, decay_epochs=(6.2, 7.4), evaluate_every=0, detector=detector)


def coco(arch: str) -> TrainConfig:
    """The published recipe of all these detectors: ResNet-50, 12 epochs, 16 images a step, rate 0.02 (mmdetection's
    configurations *_r50_fpn_1x_coco)."""
    return TrainConfig(arch=arch, output=Path(f"runs/{arch}-r50-coco"), detector=DETECTOR_CONFIGS[arch]())


def voc(arch: str) -> TrainConfig:
    """PASCAL VOC 2007 and 2012, tested on 2007: mmdetection's *_r50_fpn_1x_voc0712, whose 4 epochs take each image 3
    times. With `--data VOCdevkit`."""
    return replace(
        coco(arch),
        output=Path(f"runs/{arch}-r50-voc"),
        train_split="trainval2007+trainval2012",
        val_split="test2007",
        decay_epochs=(9,),
        optimizer=OptimizerConfig(lr=0.01),
        warmup_iterations=0,
        resize=(600, 1000),
    )


def presets(arch: str) -> dict[str, TrainConfig]:
    """What `--preset` chooses from; the first is the default."""
    return {"small": small(arch), "coco": coco(arch), "voc": voc(arch)} | ({"tiny": tiny()} if arch == "scnet" else {})
