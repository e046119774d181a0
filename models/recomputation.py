"""Less memory for more time in training: layers whose activations are computed twice instead of kept."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from .backbones import BLOCKS
from .heads import MaskHead, ResidualMaskHead, SemanticHead


def recompute_activations(detector: nn.Module) -> None:
    """From now on the backward pass computes anew what lies within residual blocks of the backbone, mask heads and the
    semantic branch; only what enters them is kept (Chen et al. 2016, https://arxiv.org/abs/1604.06174). The gradients
    are the same.

    Not for batch norms that learn their statistics: they would count every batch twice (`TrainConfig` refuses it).
    """
    for module in list(detector.modules()):
        if isinstance(module, tuple(BLOCKS.values())):
            recompute(module)
        elif isinstance(module, MaskHead):
            recompute(module.convs)
        elif isinstance(module, ResidualMaskHead | SemanticHead):
            recompute(module.blocks)


def recompute(module: nn.Module) -> None:
    # Without randomness inside, no state of a generator has to be restored.
    module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
