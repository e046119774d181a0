"""How the weights are changed: the optimiser with the recipe's groups, its learning rate by step, and their average."""

from __future__ import annotations

import dataclasses

import torch
from torch.optim.swa_utils import AveragedModel

from .recipes import TrainConfig


def scaled(config: TrainConfig) -> TrainConfig:
    """With the learning rate of --auto-scale-lr in it: linear in the batch (Goyal et al. 2017, section 2.1)."""
    if not config.auto_scale_lr:
        return config
    lr = config.optimizer.lr * config.batch_size / config.base_batch_size
    optimizer = dataclasses.replace(config.optimizer, lr=lr)
    return dataclasses.replace(config, optimizer=optimizer, auto_scale_lr=False, base_batch_size=config.batch_size)


def make_optimizer(config: TrainConfig, detector: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD. Biases are those that are called so: the shift of a norm, too (as in maskrcnn-benchmark)."""
    settings = config.optimizer
    trained = [(name, parameter) for name, parameter in detector.named_parameters() if parameter.requires_grad]
    decay = settings.weight_decay if settings.bias_weight_decay is None else settings.bias_weight_decay
    if (settings.bias_lr, decay) == (1.0, settings.weight_decay):
        groups = [{"params": [parameter for _, parameter in trained], "multiple": 1.0}]
    else:
        biases = {"multiple": settings.bias_lr, "weight_decay": decay}
        groups = [
            {"params": [parameter for name, parameter in trained if "bias" not in name], "multiple": 1.0},
            {"params": [parameter for name, parameter in trained if "bias" in name], **biases},
        ]
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True
    )


def learning_rate(config: TrainConfig, iteration: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a tenth of it from each decay epoch on."""
    decays = sum(iteration >= epoch * steps_per_epoch for epoch in config.decay_epochs)
    start = config.warmup_start
    warming = iteration < config.warmup_iterations
    warmup = start + (1 - start) * iteration / config.warmup_iterations if warming else 1.0
    return config.optimizer.lr * warmup * 0.1**decays


def averaged_weights(detector: torch.nn.Module, decay: float) -> AveragedModel:
    """A copy of the detector (`.module`) whose weights follow its own: each step they keep the share `decay` of
    themselves, less in the first steps, that the random weights of the start are forgotten soon."""

    @torch.no_grad()
    def update(averages, current, steps) -> None:
        keep = min(decay, (1 + int(steps)) / (10 + int(steps)))
        torch._foreach_lerp_(averages, current, 1 - keep)

    return AveragedModel(detector, multi_avg_fn=update)
