"""Heads on RoIs and on the pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BOX_SIZE, MASK_SIZE = 7, 14
"""Sides of the RoI features of box and mask heads, in cells."""


class BoxHead(nn.Module):
    """Two shared fully connected layers, then classes, and one box a class (Fast R-CNN, section 3.1) or one for all
    classes (Cascade R-CNN, section 4.1)."""

    def __init__(self, channels: int, roi_size: int, hidden: int, num_classes: int, class_specific: bool = False):
        super().__init__()
        self.fc1 = RoILinear(channels, roi_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.class_logits = nn.Linear(hidden, num_classes + 1)
        self.deltas = nn.Linear(hidden, 4 * num_classes if class_specific else 4)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.class_logits, self.deltas):
            nn.init.zeros_(layer.bias)

    def shared_features(self, roi_features: Tensor) -> Tensor:
        """[R, C, roi_size, roi_size] -> [R, hidden]"""
        return F.relu_(self.fc2(F.relu_(self.fc1(roi_features))))

    def forward(self, roi_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits [R, num_classes + 1] (background last), deltas [R, 4] or [R, num_classes * 4], and the shared
        features [R, hidden]."""
        shared = self.shared_features(roi_features)
        return self.class_logits(shared).float(), self.deltas(shared).float(), shared


class RoILinear(nn.Linear):
    """A linear layer on whole RoI features."""

    def __init__(self, channels: int, size: int, hidden: int):
        super().__init__(channels * size**2, hidden)
        self.roi_shape = (channels, size, size)

    def take_channels_last(self) -> None:
        """For inference: the weight [hidden, C * size * size] becomes [hidden, size, size, C], the order in which
        channels-last features lie in memory, so that they need no copy."""
        if self.weight.dim() == 2:
            weight = self.weight.detach().unflatten(1, self.roi_shape).permute(0, 2, 3, 1).contiguous()
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, roi_features: Tensor) -> Tensor:
        """[R, C, size, size] -> [R, hidden]"""
        if self.weight.dim() == 4:
            roi_features = roi_features.permute(0, 2, 3, 1)
        return F.linear(roi_features.flatten(1), self.weight.flatten(1), self.bias)


class ConvReLU(nn.Conv2d):
    """3x3 convolution with bias, then ReLU."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), both 3x3 with bias; no norm, and no activation after the addition."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu_(self.conv1(x))).add_(x)


def conv_stack(channels: int, num_convs: int) -> nn.Sequential:
    return nn.Sequential(*(ConvReLU(channels) for _ in range(num_convs)))


def residual_blocks(channels: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(num_blocks)))


def kaiming(*layers: nn.Module) -> None:
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(layer.bias)


class MaskHead(nn.Module):
    """Convolutions, one up-sampling by 2, one mask a class (Mask R-CNN, figure 4 right).

    With `takes_previous` the features of the previous stage's mask head come in, too (HTC, equation 5).
    """

    def __init__(self, channels: int, num_convs: int, num_classes: int, takes_previous: bool = False):
        super().__init__()
        self.previous = nn.Conv2d(channels, channels, 1) if takes_previous else None
        self.convs = conv_stack(channels, num_convs)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        kaiming(self.upsample, self.logits, *([self.previous] if takes_previous else []))

    def features(self, roi_features: Tensor, previous: Tensor | None = None) -> Tensor:
        """RoI features, and `previous` features of the stage before, [R, C, 14, 14] -> [R, C, 14, 14]"""
        if previous is not None:
            roi_features = roi_features + F.relu_(self.previous(previous))
        return self.convs(roi_features)

    def mask_logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """[R, C, 14, 14] and the classes [R] -> mask logits [R, 28, 28]"""
        return own_class_logits(features, labels, self.upsample, self.logits)

    def forward(self, roi_features: Tensor, labels: Tensor, previous: Tensor | None = None) -> Tensor:
        return self.mask_logits(self.features(roi_features, previous), labels)


class ResidualMaskHead(nn.Module):
    """Residual blocks, one up-sampling by 2, one mask a class (SCNet, section 3.2)."""

    def __init__(self, channels: int, num_blocks: int, num_classes: int):
        super().__init__()
        self.blocks = residual_blocks(channels, num_blocks)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        kaiming(self.upsample, self.logits)

    def forward(self, roi_features: Tensor, labels: Tensor) -> Tensor:
        """[R, C, 14, 14] and the classes [R] -> mask logits [R, 28, 28]"""
        return own_class_logits(self.blocks(roi_features), labels, self.upsample, self.logits)


def own_class_logits(features: Tensor, labels: Tensor, upsample: nn.ConvTranspose2d, logits: nn.Conv2d) -> Tensor:
    """Mask logits [R, 2 M, 2 M] of one class a RoI, without those of the others.

    Args:
        features: [R, C, M, M]; labels: [R], any number where it does not matter.
        upsample: by 2; a ReLU follows. logits: 1x1, C -> num_classes.
    """
    labels = labels.clamp(0, logits.out_channels - 1)

    def compute(features: Tensor) -> Tensor:
        hidden = F.relu_(upsample(features))
        weight, bias = logits.weight.flatten(1)[labels], logits.bias[labels]
        own = torch.baddbmm(bias[:, None, None], weight[:, None], hidden.flatten(2))
        return own.view(len(hidden), *hidden.shape[2:]).float()

    if not torch.is_grad_enabled():
        return compute(features)
    # The up-sampled features would be the largest thing that training keeps; making them again is one layer of many.
    return checkpoint(compute, features, use_reentrant=False, preserve_rng_state=False)


class SemanticHead(nn.Module):
    """Levels summed at stride 8, a trunk, then classes and an embedding (HTC, section 3.3).

    The trunk keeps the shape: `conv_stack` in HTC, `residual_blocks` in SCNet.
    """

    fused_level = 1

    def __init__(self, channels: int, num_levels: int, trunk: nn.Module, num_classes: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(num_levels))
        self.blocks = trunk
        self.embedding = nn.Conv2d(channels, channels, 1)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        kaiming(*self.lateral_convs, self.embedding, self.logits)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """P2..P6 -> logits [N, num_classes, H/8, W/8] and embedding [N, C, H/8, W/8]"""
        size = features[self.fused_level].shape[2:]
        fused = F.relu_(self.lateral_convs[self.fused_level](features[self.fused_level]))
        for level, (conv, x) in enumerate(zip(self.lateral_convs, features, strict=True)):
            # Resizing and a 1x1 convolution may change places: each is done at the smaller size.
            if level < self.fused_level:
                x = conv(resize(x, size))
            elif level > self.fused_level:
                x = resize(conv(x), size)
            else:
                continue
            fused = fused + F.relu_(x)
        hidden = self.blocks(fused)
        return self.logits(hidden), F.relu_(self.embedding(hidden))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class GlobalContextHead(nn.Module):
    """Which classes the image holds, from the coarsest level; its pooled feature is context for RoIs (SCNet, 3.3)."""

    def __init__(self, channels: int, num_blocks: int, num_classes: int):
        super().__init__()
        self.blocks = residual_blocks(channels, num_blocks)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """P2..P6 -> class logits [N, num_classes] and context [N, C, 1, 1]"""
        context = F.adaptive_avg_pool2d(self.blocks(features[-1]), 1)
        return self.fc(context.flatten(1)), context


class FeatureRelay(nn.Module):
    """The box head's feature, unfolded onto the mask head's grid (SCNet, section 3.2)."""

    def __init__(self, hidden: int, channels: int, roi_size: int):
        super().__init__()
        self.channels, self.roi_size = channels, roi_size
        self.fc = nn.Linear(hidden, channels * roi_size**2)
        kaiming(self.fc)

    def forward(self, shared: Tensor) -> Tensor:
        """[R, hidden] -> [R, C, 2 * roi_size, 2 * roi_size]"""
        x = self.fc(shared).view(-1, self.channels, self.roi_size, self.roi_size)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
