"""Configuration of the detectors: frozen dataclasses, each number with its unit and source under the field.

Section numbers such as "HTC 3.2" name the paper; "mmdetection" names the recipe of its published configuration files.
Nothing here imports torch: `--help` is built from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network (He et al. 2016, table 1), stride in the 3x3 convolution ("pytorch style")."""

    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks in layer1..layer4."""
    bottleneck: bool = True
    """True: 1x1, 3x3, 1x1 blocks with expansion 4 (ResNet-50 and deeper); False: two 3x3 convolutions."""
    width: int = 64
    """Channels of the stem and of the 3x3 convolutions of layer1; doubles at each layer."""
    norm: str = "frozen_batch"
    """frozen_batch: running statistics, trainable scale and shift (mmdetection's norm_eval); batch; group."""
    frozen_stages: int = 1
    """0: train all; n >= 1: the stem and layer1..layer{n} get no gradient. Only sensible with pretrained weights."""

    def __post_init__(self):
        _choice("backbone.norm", self.norm, ("frozen_batch", "batch", "group"))
        if not 0 <= self.frozen_stages <= 4:
            raise ValueError(f"backbone.frozen_stages must be 0..4, got {self.frozen_stages}")


BACKBONES = {
    "resnet50": ResNetConfig(),
    "resnet101": ResNetConfig(layers=(3, 4, 23, 3)),
    "resnet18_narrow": ResNetConfig(layers=(2, 2, 2, 2), bottleneck=False, width=32, norm="batch", frozen_stages=0),
}
"""Backbones by name. Note: SCNet is the detector here; the self-calibrated backbones are called scnet50, scnet101."""


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (Ren et al. 2015, section 3) with FPN (Lin et al. 2017, section 4.1)."""

    anchor_scale: float = 8.0
    """Anchor side at ratio 1, in cells of its level: 8 gives 32..512 px over strides 4..64."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width."""
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    low_quality_iou: float = 0.3
    """A ground truth without a positive anchor takes its best ones from this IoU on."""
    num_samples: int = 256
    """Anchors per image in the loss, at most half of them positive."""
    positive_fraction: float = 0.5
    top_k: int = 1000
    """Anchors per level that go into NMS, inference."""
    top_k_training: int = 2000
    nms_iou: float = 0.7
    max_proposals: int = 1000
    """Proposals per image after NMS, inference."""
    max_proposals_training: int = 2000
    smooth_l1_beta: float = 1 / 9


@dataclass(frozen=True)
class SCNetConfig:
    """SCNet, the sample-consistency detector (Vu et al. 2021); not the self-calibrated backbone of the same name."""

    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    num_classes: int = 80
    """Foreground classes; the background is class num_classes."""
    semantic: bool = True
    """The semantic branch; False trains on data without semantic maps."""
    num_semantic_classes: int = 183
    """Classes of the semantic maps (COCO-stuff: 183)."""
    channels: int = 256
    """Channels of the pyramid and of all convolutional heads."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    finest_size: float = 56.0
    """sqrt(area) in pixels from which a RoI of twice that size leaves P2 (FPN, equation 1)."""
    box_channels: int = 1024
    """Width of the two shared fully connected layers; the second one's output is relayed to the mask head."""
    mask_blocks: int = 6
    """Residual blocks of the mask head (12 convolutions)."""
    semantic_blocks: int = 2
    global_blocks: int = 2
    stage_iou: tuple[float, ...] = (0.5, 0.6, 0.7)
    """IoU from which a proposal is positive, stage by stage (Cascade R-CNN)."""
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    stage_stds: tuple[tuple[float, float, float, float], ...] = (
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )
    """Standard deviations that normalise the box deltas, stage by stage."""
    num_samples: int = 512
    """RoIs per image and stage in the loss."""
    positive_fraction: float = 0.25
    semantic_loss_weight: float = 0.2
    semantic_loss_mean: str = "valid"
    """valid: mean over pixels that are not ignored (published numbers); all: over every pixel (mmdetection 3.x)."""
    global_loss_weight: float = 3.0
    score_threshold: float = 0.001
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self):
        _choice("semantic_loss_mean", self.semantic_loss_mean, ("valid", "all"))
        stages = {len(self.stage_iou), len(self.stage_weights), len(self.stage_stds)}
        if len(stages) != 1:
            raise ValueError("stage_iou, stage_weights and stage_stds must have one entry a stage each")
        for name in ("num_classes", "channels", "box_channels", "num_samples", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
