"""Configuration of the detectors: frozen dataclasses, each number with its unit and source under the field.

Section numbers such as "HTC 3.2" name the paper; "mmdetection" names the recipe of its published configuration files.
Nothing here imports torch: `--help` is built from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .arithmetic import ARITHMETICS
from .config_backbones import BackboneConfig, check_bounded, check_choice


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
    allowed_border: int = 0
    """Pixels by which a trained anchor may leave the image (Faster R-CNN, section 3.3: 0); -1: anchors are trained
    wherever their centre lies in the image or its padding to a multiple of 32."""
    smooth_l1_beta: float = 1 / 9
    """Where the square of the box loss meets its line, in normalised deltas; 0: L1."""

    def __post_init__(self):
        check_bounded(self)


SINGLE_STAGE_RPN = RPNConfig(allowed_border=-1, smooth_l1_beta=0.0, max_proposals_training=1000)
"""mmdetection's RPN of Faster and Mask R-CNN; those of Cascade R-CNN, HTC and SCNet have RPNConfig's own values."""

CASCADE_IOU = (0.5, 0.6, 0.7)
CASCADE_WEIGHTS = (1.0, 0.5, 0.25)
CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
"""Cascade R-CNN (Cai and Vasconcelos 2018, section 5.1), as mmdetection rounds it."""


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Faster R-CNN (Ren et al. 2015) on a feature pyramid (Lin et al. 2017)."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    """Foreground classes; the background is class num_classes."""
    channels: int = 256
    """Channels of the pyramid and of the RPN."""
    rpn: RPNConfig = SINGLE_STAGE_RPN
    arithmetic: str = "mmdetection"
    """How boxes are computed with, a key of `models.arithmetic.ARITHMETICS`: mmdetection (2 and 3), mmdetection_1,
    maskrcnn_benchmark or torchvision. It goes with the weights."""
    finest_size: float = 56.0
    """sqrt(area) in pixels from which a RoI of twice that size leaves P2 (FPN, equation 1)."""
    box_channels: int = 1024
    """Width of the two shared fully connected layers."""
    class_specific_boxes: bool = True
    """One box a class; False: one for all classes."""
    positive_iou: float = 0.5
    """IoU from which a proposal is positive; below it is negative."""
    match_low_quality: bool = False
    """Every ground truth takes its best proposals, too, even where those are nearer to another one."""
    box_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """Standard deviations that normalise the box deltas."""
    smooth_l1_beta: float = 0.0
    """Where the square of the box loss meets its line, in normalised deltas; 0: L1 (mmdetection)."""
    num_samples: int = 512
    """RoIs per image in the loss."""
    positive_fraction: float = 0.25
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self):
        _check_sizes(self)


@dataclass(frozen=True)
class MaskRCNNConfig:
    """Mask R-CNN (He et al. 2017)."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    """Foreground classes; the background is class num_classes."""
    channels: int = 256
    """Channels of the pyramid and of all convolutional heads."""
    rpn: RPNConfig = SINGLE_STAGE_RPN
    arithmetic: str = "mmdetection"
    """How boxes are computed with, a key of `models.arithmetic.ARITHMETICS`: mmdetection (2 and 3), mmdetection_1,
    maskrcnn_benchmark or torchvision. It goes with the weights."""
    finest_size: float = 56.0
    """sqrt(area) in pixels from which a RoI of twice that size leaves P2 (FPN, equation 1)."""
    box_channels: int = 1024
    """Width of the two shared fully connected layers."""
    mask_convs: int = 4
    """3x3 convolutions of the mask head."""
    class_specific_boxes: bool = True
    """One box a class; False: one for all classes."""
    positive_iou: float = 0.5
    """IoU from which a proposal is positive; below it is negative."""
    match_low_quality: bool = True
    """Every ground truth takes its best proposals, too, even where those are nearer to another one."""
    box_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """Standard deviations that normalise the box deltas."""
    smooth_l1_beta: float = 0.0
    """Where the square of the box loss meets its line, in normalised deltas; 0: L1 (mmdetection)."""
    num_samples: int = 512
    """RoIs per image in the loss."""
    positive_fraction: float = 0.25
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self):
        _check_sizes(self)


@dataclass(frozen=True)
class CascadeMaskRCNNConfig:
    """Cascade Mask R-CNN (Cai and Vasconcelos 2019); without masks, Cascade R-CNN (2018)."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    """Foreground classes; the background is class num_classes."""
    masks: bool = True
    """A mask head a stage; False: Cascade R-CNN, boxes only."""
    channels: int = 256
    """Channels of the pyramid and of all convolutional heads."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    arithmetic: str = "mmdetection"
    """How boxes are computed with, a key of `models.arithmetic.ARITHMETICS`: mmdetection (2 and 3), mmdetection_1,
    maskrcnn_benchmark or torchvision. It goes with the weights."""
    finest_size: float = 56.0
    """sqrt(area) in pixels from which a RoI of twice that size leaves P2 (FPN, equation 1)."""
    box_channels: int = 1024
    """Width of the two shared fully connected layers."""
    mask_convs: int = 4
    """3x3 convolutions of each mask head."""
    stage_iou: tuple[float, ...] = CASCADE_IOU
    """IoU from which a proposal is positive, stage by stage."""
    stage_weights: tuple[float, ...] = CASCADE_WEIGHTS
    stage_stds: tuple[tuple[float, float, float, float], ...] = CASCADE_STDS
    """Standard deviations that normalise the box deltas, stage by stage."""
    match_low_quality: bool = False
    """Every ground truth takes its best proposals, too, even where those are nearer to another one."""
    smooth_l1_beta: float = 1.0
    """Where the square of the box loss meets its line, in normalised deltas; 0: L1."""
    num_samples: int = 512
    """RoIs per image and stage in the loss."""
    positive_fraction: float = 0.25
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self):
        _check_sizes(self)
        _check_stages(self)


@dataclass(frozen=True)
class HTCConfig:
    """Hybrid Task Cascade (Chen et al. 2019)."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    """Foreground classes; the background is class num_classes."""
    semantic: bool = True
    """The semantic branch; False trains on data without semantic maps."""
    num_semantic_classes: int = 183
    """Classes of the semantic maps (COCO-stuff: 183)."""
    interleaved: bool = True
    """The mask branch of a stage is trained on boxes that the stage's box head has refined (HTC, 3.1); False: on the
    boxes that entered the stage, as in Cascade Mask R-CNN."""
    mask_info_flow: bool = True
    """Features of a stage's mask head flow into the next stage's (HTC, 3.1); False: the mask heads are independent."""
    semantic_fusion: tuple[Literal["box", "mask"], ...] = ("box", "mask")
    """Branches that the semantic features are added to (HTC, 3.3)."""
    mask_average: str = "stages"
    """Masks are the mean over the stages (published numbers, mmdetection up to 2.x), or the last stage's: "last"
    (mmdetection 3.x)."""
    channels: int = 256
    """Channels of the pyramid and of all convolutional heads."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    arithmetic: str = "mmdetection"
    """How boxes are computed with, a key of `models.arithmetic.ARITHMETICS`: mmdetection (2 and 3), mmdetection_1,
    maskrcnn_benchmark or torchvision. It goes with the weights."""
    finest_size: float = 56.0
    """sqrt(area) in pixels from which a RoI of twice that size leaves P2 (FPN, equation 1)."""
    box_channels: int = 1024
    """Width of the two shared fully connected layers."""
    mask_convs: int = 4
    """3x3 convolutions of each mask head."""
    semantic_convs: int = 4
    """3x3 convolutions of the semantic head."""
    stage_iou: tuple[float, ...] = CASCADE_IOU
    """IoU from which a proposal is positive, stage by stage (Cascade R-CNN)."""
    stage_weights: tuple[float, ...] = CASCADE_WEIGHTS
    stage_stds: tuple[tuple[float, float, float, float], ...] = CASCADE_STDS
    """Standard deviations that normalise the box deltas, stage by stage."""
    match_low_quality: bool = True
    """Every ground truth takes its best proposals, too, even where those are nearer to another one."""
    smooth_l1_beta: float = 1.0
    """Where the square of the box loss meets its line, in normalised deltas; 0: L1."""
    num_samples: int = 512
    """RoIs per image and stage in the loss."""
    positive_fraction: float = 0.25
    semantic_loss_weight: float = 0.2
    semantic_loss_mean: str = "valid"
    """valid: mean over pixels that are not ignored (published numbers); all: over every pixel (mmdetection 3.x)."""
    score_threshold: float = 0.001
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self):
        check_choice("mask_average", self.mask_average, ("stages", "last"))
        check_choice("semantic_loss_mean", self.semantic_loss_mean, ("valid", "all"))
        for branch in self.semantic_fusion:
            check_choice("semantic_fusion", branch, ("box", "mask"))
        _check_sizes(self)
        _check_stages(self)


@dataclass(frozen=True)
class SCNetConfig:
    """SCNet, the sample-consistency detector (Vu et al. 2021); not the self-calibrated backbone of the same name."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    """Foreground classes; the background is class num_classes."""
    semantic: bool = True
    """The semantic branch; False trains on data without semantic maps."""
    num_semantic_classes: int = 183
    """Classes of the semantic maps (COCO-stuff: 183)."""
    global_context: bool = True
    """The branch that tells which classes the image holds, and its vector in every RoI (SCNet, 3.3)."""
    feature_relay: bool = True
    """The last box head's feature in the mask head's input (SCNet, 3.2)."""
    channels: int = 256
    """Channels of the pyramid and of all convolutional heads."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    arithmetic: str = "mmdetection"
    """How boxes are computed with, a key of `models.arithmetic.ARITHMETICS`: mmdetection (2 and 3), mmdetection_1,
    maskrcnn_benchmark or torchvision. It goes with the weights."""
    finest_size: float = 56.0
    """sqrt(area) in pixels from which a RoI of twice that size leaves P2 (FPN, equation 1)."""
    box_channels: int = 1024
    """Width of the two shared fully connected layers; the second one's output is relayed to the mask head."""
    mask_blocks: int = 6
    """Residual blocks of the mask head (12 convolutions)."""
    semantic_blocks: int = 2
    global_blocks: int = 2
    stage_iou: tuple[float, ...] = CASCADE_IOU
    """IoU from which a proposal is positive, stage by stage (Cascade R-CNN)."""
    stage_weights: tuple[float, ...] = CASCADE_WEIGHTS
    stage_stds: tuple[tuple[float, float, float, float], ...] = CASCADE_STDS
    """Standard deviations that normalise the box deltas, stage by stage."""
    match_low_quality: bool = True
    """Every ground truth takes its best proposals, too, even where those are nearer to another one."""
    smooth_l1_beta: float = 1.0
    """Where the square of the box loss meets its line, in normalised deltas; 0: L1."""
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
        check_choice("semantic_loss_mean", self.semantic_loss_mean, ("valid", "all"))
        _check_sizes(self)
        _check_stages(self)


DETECTOR_CONFIGS = {
    "faster_rcnn": FasterRCNNConfig,
    "mask_rcnn": MaskRCNNConfig,
    "cascade_mask_rcnn": CascadeMaskRCNNConfig,
    "htc": HTCConfig,
    "scnet": SCNetConfig,
}
"""The configuration of each architecture."""


def _check_sizes(config) -> None:
    check_choice("arithmetic", config.arithmetic, ARITHMETICS)
    check_bounded(config)


def _check_stages(config) -> None:
    if len({len(config.stage_iou), len(config.stage_weights), len(config.stage_stds)}) != 1:
        raise ValueError("stage_iou, stage_weights and stage_stds must have one entry a stage each")
    if any(len(stds) != 4 for stds in config.stage_stds):
        raise ValueError(f"stage_stds must have four entries a stage, got {config.stage_stds}")
