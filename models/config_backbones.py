"""Backbones by name and number: frozen dataclasses, each number with its meaning under the field.

Nothing here imports torch: `--help` is built from these classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """ValueError unless the field `name` has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


MOST_LAYERS = 1000
MOST_UNITS = 1_000_000
LEAST = {"allowed_border": -1} | dict.fromkeys(("deep_stem", "frozen_stages", "mask_convs", "semantic_convs"), 0)
"""Of whole numbers; of all others 1."""
ABOVE_ZERO = ("anchor_scale", "anchor_ratios", "finest_size", "box_stds", "stage_stds")
SHARES = ("_iou", "_threshold", "_fraction")
"""Ends of the names of what lies between 0 and 1."""


def check_bounded(config: object) -> None:
    """ValueError for a number that no network has: a configuration may come with a stranger's weights, and one of a
    billion layers would be built until the memory is full."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, tuple) and not 0 < len(value) <= 100 and name != "semantic_fusion":
            raise ValueError(f"{name} must have 1 to 100 entries, got {len(value)}")
        for number in _numbers(value):
            if "int" in field.type:
                least = LEAST.get(name, 1)
                most = MOST_LAYERS if name.endswith(("layers", "convs", "blocks", "scale")) else MOST_UNITS
            else:
                least, most = 0, 1 if name.endswith(SHARES) else MOST_UNITS
            if name in ABOVE_ZERO and not number > 0:
                raise ValueError(f"{name} must be above 0, got {number}")
            if not least <= number <= most:
                raise ValueError(f"{name} must be {least:,} to {most:,}, got {number}")


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, tuple):
        for entry in value:
            yield from _numbers(entry)
    elif type(value) in (int, float):
        yield value


@dataclass(frozen=True)
class BackboneConfig:
    """A residual network: ResNet, ResNeXt, Res2Net or a self-calibrated network, which differ in their blocks."""

    block: str = "bottleneck"
    """basic: two 3x3 convolutions (ResNet-18, -34); bottleneck: 1x1, 3x3, 1x1 (ResNet-50 and deeper, ResNeXt); res2net:
    the 3x3 is a chain over splits; self_calibrated: one half of the 3x3 is a self-calibrated convolution."""
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks in layer1..layer4."""
    width: int = 64
    """Channels of the stem, and planes of layer1; planes double at each layer, and blocks give 4 times as many channels
    (basic: as many)."""
    groups: int = 1
    """Groups of the 3x3 convolution of a bottleneck (ResNeXt: 32 or 64)."""
    base_width: int = 64
    """Channels of one group (Res2Net: split; self_calibrated: half) of a 3x3 convolution at 64 planes."""
    scale: int = 1
    """Splits of a res2net block, at least 2."""
    deep_stem: int = 0
    """0: the stem is one 7x7 convolution; n: three 3x3 ones, of n, n and 2 n channels (He et al. 2019, ResNet-C)."""
    average_down: bool = False
    """Shortcuts shrink by average pooling, with a 1x1 convolution of stride 1 behind it (He et al. 2019, ResNet-D)."""
    average_stride: bool = False
    """self_calibrated blocks with a stride shrink by average pooling after their 3x3 convolutions ("avd")."""
    stage_pool: bool = True
    """First blocks of a res2net layer average their last split over 3x3, also where the stride is 1 (layer1): the
    authors. False: not where it is 1 (mmdetection)."""
    stride_in_1x1: bool = False
    """The stride sits in the first 1x1 convolution of a block (maskrcnn-benchmark) instead of the 3x3 one."""
    deformable_stages: tuple[bool, bool, bool, bool] = (False, False, False, False)
    """Layers whose 3x3 convolutions are deformable (Dai et al. 2017); of a self-calibrated block its plain half."""
    norm: str = "frozen_batch"
    """frozen_batch: running statistics, trainable scale and shift (mmdetection's norm_eval); fixed_batch: nothing
    trains (maskrcnn-benchmark); batch; sync_batch: statistics over all processes; group."""
    norm_eps: float = 1e-5
    """Added to the variance; 0 only with fixed_batch (maskrcnn-benchmark)."""
    frozen_stages: int = 1
    """0: train all; n >= 1: the stem and layer1..layer{n} get no gradient. Only sensible with pretrained weights."""

    def __post_init__(self):
        check_choice("backbone.block", self.block, ("basic", "bottleneck", "res2net", "self_calibrated"))
        check_choice("backbone.norm", self.norm, ("frozen_batch", "fixed_batch", "batch", "sync_batch", "group"))
        check_bounded(self)
        if sum(self.layers) * self.scale > MOST_LAYERS:
            why = f"got {sum(self.layers)} blocks of {self.scale} splits"
            raise ValueError(f"backbone.layers: at most {MOST_LAYERS:,} convolutions are built, {why}")
        if not 0 <= self.frozen_stages <= 4:
            raise ValueError(f"backbone.frozen_stages must be 0..4, got {self.frozen_stages}")
        if self.norm_eps < 0 or (self.norm_eps == 0 and self.norm != "fixed_batch"):
            raise ValueError(f"backbone.norm_eps must be above 0 (fixed_batch: or 0), got {self.norm_eps}")
        if (self.scale > 1) != (self.block == "res2net") or self.scale < 1:
            raise ValueError(f"backbone.scale must be above 1 for res2net blocks and 1 for others, got {self.scale}")
        applies = {
            "groups": (self.groups != 1, ("bottleneck",)),
            "average_stride": (self.average_stride, ("self_calibrated",)),
            "stride_in_1x1": (self.stride_in_1x1, ("bottleneck", "res2net")),
            "deformable_stages": (any(self.deformable_stages), ("bottleneck", "res2net", "self_calibrated")),
        }
        for name, (used, blocks) in applies.items():
            if used and self.block not in blocks:
                raise ValueError(f"backbone.{name} is for {' and '.join(blocks)} blocks, not for {self.block}")


_LAYERS_101 = (3, 4, 23, 3)
_RES2NET = BackboneConfig(block="res2net", base_width=26, scale=4)
_RES2NET_V1D = replace(_RES2NET, deep_stem=32, average_down=True, stage_pool=False)
_SELF_CALIBRATED = BackboneConfig(block="self_calibrated", base_width=32)
_SELF_CALIBRATED_V1D = replace(_SELF_CALIBRATED, deep_stem=32, average_down=True, average_stride=True)

BACKBONES = {
    "resnet18": BackboneConfig(block="basic", layers=(2, 2, 2, 2)),
    "resnet34": BackboneConfig(block="basic"),
    "resnet50": BackboneConfig(),
    "resnet101": BackboneConfig(layers=_LAYERS_101),
    "resnext101_32x4d": BackboneConfig(layers=_LAYERS_101, groups=32, base_width=4),
    "resnext101_64x4d": BackboneConfig(layers=_LAYERS_101, groups=64, base_width=4),
    "res2net50_48w2s": replace(_RES2NET, base_width=48, scale=2),
    "res2net50_26w4s": _RES2NET,
    "res2net50_18w6s": replace(_RES2NET, base_width=18, scale=6),
    "res2net50_14w8s": replace(_RES2NET, base_width=14, scale=8),
    "res2net50_26w6s": replace(_RES2NET, scale=6),
    "res2net50_26w8s": replace(_RES2NET, scale=8),
    "res2net101_26w4s": replace(_RES2NET, layers=_LAYERS_101),
    "res2net50_v1d_26w4s": _RES2NET_V1D,
    "res2net101_v1d_26w4s": replace(_RES2NET_V1D, layers=_LAYERS_101),
    "scnet50": _SELF_CALIBRATED,
    "scnet101": replace(_SELF_CALIBRATED, layers=_LAYERS_101),
    "scnet50_v1d": _SELF_CALIBRATED_V1D,
    "scnet101_v1d": replace(_SELF_CALIBRATED_V1D, layers=_LAYERS_101, deep_stem=64),
    "resnet18_narrow": BackboneConfig(block="basic", layers=(2, 2, 2, 2), width=32, norm="batch", frozen_stages=0),
}
"""Backbones by name, as detectors use them. SCNet is the detector; scnet50 and its like are self-calibrated backbones.
The v1d Res2Nets, called v1b by their authors, follow mmdetection here (stage_pool); as classifiers their authors."""


def with_deformable(backbone: BackboneConfig) -> BackboneConfig:
    """The backbone with deformable convolutions in layer2..layer4 ("dconv c3-c5")."""
    return replace(backbone, deformable_stages=(False, True, True, True))


def as_classifier(backbone: BackboneConfig) -> BackboneConfig:
    """The backbone as an ImageNet classifier is trained: batch norm, nothing frozen, the authors' stage pool."""
    return replace(backbone, norm="batch", frozen_stages=0, stage_pool=True)


def as_maskrcnn_benchmark(backbone: BackboneConfig) -> BackboneConfig:
    """The backbone in maskrcnn-benchmark's arithmetic: fixed norms without epsilon, stride in the first 1x1."""
    return replace(backbone, norm="fixed_batch", norm_eps=0.0, stride_in_1x1=True, stage_pool=True)
