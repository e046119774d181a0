"""One step of training: the losses of its images, their gradients, what all processes make of them, the new weights."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data.batch import Batch
from .distributed import World, number_of_ranks, sum_over_ranks
from .interrupts import StopSignals
from .matching import luck_of_images
from .out_of_memory import explained_memory
from .recipes import TrainConfig
from .replay import check_finite, explained_divergence
from .resume import TrainingState
from .silent_faults import bits_of, check_repeated


class TrainingStep:
    """Makes steps; `state` is what they change.

    Args:
        output: folder of the run, for the replay of a step whose loss is not finite.
        amp_dtype: of automatic mixed precision; None: float32.
        note: told the step and what is done, for the watchdog.
    """

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        state: TrainingState,
        world: World,
        amp_dtype: torch.dtype | None,
        note: Callable[[int, str], None],
    ) -> None:
        self.config, self.output, self.state, self.world, self.amp_dtype = config, output, state, world, amp_dtype
        self._note, self._first = note, True
        self.device = state.device
        self.parameters = [parameter for parameter in state.detector.parameters() if parameter.requires_grad]
        self._losses = _Losses(state.detector)
        if world.size > 1:
            self._losses = together(self._losses, config)

    def __call__(self, step: int, rate: float, parts: Sequence[Batch], stop: StopSignals) -> tuple[dict, bool]:
        """Step `step`, from 1, on this process's images of it.

        Args:
            rate: learning rate.
            parts: batches that the images come in, from the loader.
            stop: whether this process has been asked to stop.

        Returns:
            The losses, their sum and the norm of the gradient, each over the images of all processes; and whether they
            are to stop, which all of them agree on.

        Raises:
            DataError: a loss or the gradient is not finite, in whichever process. No weight has changed then.
            MachineError: out of memory; or a step that is computed twice has two results.
        """
        state, optimizer = self.state, self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate * group["multiple"]
        with self._memory(step, parts[0], parts):
            parts = [batch.to(self.device).prepared() for batch in parts]
        twice = self.config.repeat_every > 0 and step % self.config.repeat_every == 0
        values = self._repeated(step, parts) if twice else self._gradients(step, parts)
        state.scaler.unscale_(optimizer)
        limit = self.config.optimizer.clip_gradient_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        own = values
        self._note(step, "all-reduce")
        if self.world.size > 1:
            values, must_stop = _agreed(values, stop.asked is not None)
        # In float16 the gradient may overflow: the scaler leaves such a step out and scales less.
        norms = {} if self.amp_dtype is torch.float16 else {"gradient_norm": norm}
        check_finite(self.config, self.output, self.world, step, values | norms, own, state.detector, parts)
        self._note(step, "updating")
        with self._memory(step, parts[0], parts):  # of the first step: the momentum
            state.scaler.step(optimizer)
        state.scaler.update()
        if state.averaged is not None:
            state.averaged.update_parameters(state.detector)
        if self.world.size == 1:
            must_stop = stop.asked is not None
        return values | {"gradient_norm": norm}, must_stop

    def _gradients(self, step: int, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """The losses of this process's images; the gradients are then those of all processes."""
        state = self.state
        # The first step chooses and compiles kernels, forward and backward, and may take minutes.
        forward, backward = ("first step", "first step") if self._first else ("forward", "backward")
        self._first = False
        state.optimizer.zero_grad(set_to_none=True)  # now, not after the losses: their memory is free for activations
        values: dict[str, Tensor] = {}
        for index, batch in enumerate(parts):
            self._note(step, forward)
            with (
                self._memory(step, batch, parts),
                explained_divergence(self.config, self.output, self.world, step, state.detector, parts),
                self._reducing(batch is parts[-1]),
            ):
                losses = self._part_losses(step, index, len(parts), batch)
                self._note(step, backward)
                state.scaler.scale(losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                values[name] = values.get(name, 0.0) + value.detach() / len(parts)
        return values

    def _repeated(self, step: int, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """`_gradients`, computed twice from the same weights, buffers and random numbers, and compared."""
        detector = self.state.detector
        before = [buffer.clone() for buffer in detector.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            once = self._results(self._gradients(step, parts))
        for buffer, value in zip(detector.buffers(), before, strict=True):
            buffer.copy_(value)
        values = self._gradients(step, parts)
        check_repeated(step, once, self._results(values))
        return values

    def _results(self, values: dict[str, Tensor]) -> dict[str, str]:
        detector = self.state.detector
        gradients = {f"gradient of {name}": p.grad for name, p in detector.named_parameters() if p.grad is not None}
        return bits_of(values | gradients | dict(detector.named_buffers()))

    def _part_losses(self, step: int, part: int, parts: int, batch: Batch) -> dict[str, Tensor]:
        count, device = len(batch.image_sizes), batch.image_sizes.device
        first = (self.world.rank * parts + part) * count
        with (
            luck_of_images(self.config.seed, step, first, count, device),
            torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None),
        ):
            losses = self._losses(batch)
        return losses | {"loss": sum(losses.values())}

    def _memory(self, step: int, batch: Batch, parts: Sequence[Batch]):
        return explained_memory(step, batch, len(parts), self.state.detector, self.state.optimizer)

    def _reducing(self, last: bool):
        """Gradients of a step's parts are added up here, and over the processes with the last."""
        return self._losses.no_sync() if self.world.size > 1 and not last else contextlib.nullcontext()


class _Losses(nn.Module):
    """A detector's losses as a forward pass, which is what DistributedDataParallel knows of."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch | None) -> dict[str, Tensor]:
        """None: nothing to learn, of every weight that is trained."""
        if batch is None:
            return {"nothing": sum((parameter * 0).sum() for parameter in self.parameters() if parameter.requires_grad)}
        return self.detector.losses(
            batch.images, batch.image_sizes, batch.gt_boxes, batch.gt_labels, batch.gt_masks, batch.semantic
        )


def together(losses: _Losses, config: TrainConfig) -> DistributedDataParallel:
    """Gradients become their mean over the processes while the backward pass goes on."""
    # Where a kernel is of 1 x 1 pixel, two strides mean the same memory.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    known = inspect.signature(DistributedDataParallel).parameters
    synced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # from torch 2.13 on
    parallel = DistributedDataParallel(
        losses,
        gradient_as_bucket_view=True,
        static_graph=config.accumulate == 1,
        # Only batch norms that learn their statistics without each other have buffers that differ.
        **{synced: config.detector.backbone.norm == "batch"},
    )
    if config.compress_gradients:
        parallel.register_comm_hook(None, _mean_in_bfloat16)
    # After its first backward pass, of a static graph its second, it groups the gradients anew and sums them in another
    # order. They are made before the first step, so that a run that is continued computes what it would have computed.
    for _ in range(2):
        parallel(None)["nothing"].backward()
        parallel.zero_grad(set_to_none=True)
    return parallel


def _mean_in_bfloat16(_, bucket):  # DistributedDataParallel refuses annotations that are strings
    """As PyTorch's own hook, which asks for NCCL."""
    gradients = bucket.buffer()
    compressed = (gradients / dist.get_world_size()).bfloat16()
    summed = dist.all_reduce(compressed, async_op=True).get_future()
    return summed.then(lambda done: gradients.copy_(done.value()[0]))


def _agreed(values: dict[str, Tensor], stop: bool) -> tuple[dict[str, Tensor], bool]:
    """The means of all processes' values, and whether one of them is to stop, with one message."""
    numbers = [value.float() for value in values.values()]
    total = sum_over_ranks(torch.stack([*numbers, torch.full_like(numbers[0], float(stop))])) / number_of_ranks()
    return dict(zip(values, total[:-1].unbind(), strict=True)), bool(total[-1] > 0)
