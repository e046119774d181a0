"""ImageNet classifiers: a backbone, its last map averaged, one linear layer.

model = models.scnet50(weights="scnet50-dc6a7e87.pth")     # every backbone's name is such a function
logits = model(images)
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .backbones import build_backbone
from .build import backbone_config
from .config_backbones import BackboneConfig, as_classifier


class Classifier(nn.Module):
    """Images [N, 3, H, W], normalised as for the detectors, to logits [N, num_classes]."""

    def __init__(self, config: BackboneConfig, num_classes: int):
        super().__init__()
        self.backbone = build_backbone(config)
        self.fc = nn.Linear(self.backbone.out_channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images)[-1].mean(dim=(2, 3)))


def build_classifier(
    name: str, weights: str | os.PathLike | dict[str, Tensor] | None = None, num_classes: int = 1000
) -> Classifier:
    """The ImageNet classifier with a backbone of this name, in eval mode, channels-last. Nothing is downloaded.

    Args:
        name: a key of `models.config_backbones.BACKBONES`, "scnet50".
        weights: a file or a state dict with the names of the authors, of torchvision, or ours; every tensor must have
            its place. None: random weights.
        num_classes: rows of the last layer.

    Raises:
        UsageError: an unknown name; tells the nearest ones.
        DataError: no such file, a damaged file, or weights of another network or number of classes.
    """
    model = Classifier(as_classifier(backbone_config(name)), num_classes)
    if weights is not None:
        from .checkpoint import load_weights

        load_weights(model, weights)
    return model.to(memory_format=torch.channels_last).eval()


def classifier_function(name: str) -> Callable[..., Classifier]:
    """`build_classifier` for one name: what `models.scnet50` is."""

    def build(weights: str | os.PathLike | dict[str, Tensor] | None = None, num_classes: int = 1000) -> Classifier:
        return build_classifier(name, weights, num_classes)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"The {name} classifier; arguments and errors as of `models.classifiers.build_classifier`."
    return build
