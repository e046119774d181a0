"""A model as inference wants it: fewer passes over memory, the same results."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .deformable import DeformableConv2d
from .heads import RoILinear


def folded(module: nn.Module) -> nn.Module:
    """A copy for inference alone, of a backbone, a classifier or a detector: in eval mode, and never to be trained.

    Batch norms become part of the convolutions before them. Box heads take RoI features in the order in which they lie
    in memory, channels last.
    """
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for child in module.modules():
        if isinstance(child, RoILinear):
            child.take_channels_last()
    for parent in list(module.modules()):
        for conv_parent, conv_name, norm_parent, norm_name in list(_neighbours(parent)):
            conv, norm = getattr(conv_parent, conv_name), getattr(norm_parent, norm_name)
            if isinstance(conv, nn.Conv2d | DeformableConv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(conv_parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(norm_parent, norm_name, nn.Identity())
    return module


def _neighbours(parent: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """Children that run one after the other, each as (its owner, its name).

    Every block registers a norm right behind its convolution; Res2Net a list of norms behind a list of convolutions;
    and a deep stem, with its norm behind it, ends in the last of its three convolutions.
    """
    for (name, child), (next_name, next_child) in pairwise(parent.named_children()):
        if isinstance(child, nn.ModuleList) and isinstance(next_child, nn.ModuleList):
            yield from ((child, str(i), next_child, str(i)) for i in range(min(len(child), len(next_child))))
        elif isinstance(child, nn.Sequential) and len(child):
            yield child, str(len(child) - 1), parent, next_name
        else:
            yield parent, name, parent, next_name
