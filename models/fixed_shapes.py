"""A detector behind a few fixed shapes: for each its whole forward is one CUDA graph, or is compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .buckets import bucket_size
from .detections import Detections
from .errors import UsageError

Compile = Literal["none", "graph", "inductor"]
MAX_SHAPES = 32
"""Shapes that are recorded, at most; batches of further ones go through the detector as it is, results are the same."""
WARM_UPS = 3
"""Runs before a capture: what only a first call does (workspaces, choice of algorithms) must not be recorded."""

Run = Callable[[], Detections]


def with_fixed_shapes(
    detector: nn.Module, compile: Compile, device: torch.device, resize: tuple[int, int] | None
) -> nn.Module:
    """The detector itself for "none", else what runs it in one of two ways; it must stay in eval mode and on `device`.

    Args:
        compile: "graph": by CUDA graphs; "inductor": by `torch.compile`.
        resize: (short, long) limits of the pictures' sides, for `bucket_size`.

    Raises:
        UsageError: "graph" without a GPU. ValueError: another word.
    """
    if compile == "none":
        return detector
    if compile == "inductor":
        return FixedShapes(detector, resize, compile_run)
    if compile != "graph":
        raise ValueError(f'compile must be "none", "graph" or "inductor", got {compile!r}')
    if device.type != "cuda":
        raise UsageError(
            "CUDA graphs need a GPU", where='compile="graph"', why=f"the device is {device}", fix='compile="inductor"'
        )
    return FixedShapes(detector, resize, CudaGraphs(device))


class FixedShapes(nn.Module):
    """A detector whose batches come padded to their bucket, in memory that stays where it is.

    Results are, bit for bit, the detector's for the same padded batch (Inductor's: within rounding). They are not those
    for less padding: the features along a picture's right and lower border, and whatever is pooled from the whole map,
    see the padding, as they do in a batch with a larger neighbour.

    Args:
        detector: in eval mode, on its device, where it must stay.
        resize: (short, long) limits of the pictures' sides, for `bucket_size`.
        record: turns a function that runs the detector on the fixed input into a faster one that does the same; it may
            return the same memory each time. Called once for each shape, when the input holds a first batch.

    Not for two threads or two CUDA streams at a time. The autocast of a shape's first call is that of all its calls.
    """

    def __init__(self, detector: nn.Module, resize: tuple[int, int] | None, record: Callable[[Run], Run]):
        super().__init__()
        self.detector, self.config, self.resize, self.record = detector, detector.config, resize, record
        self.recordings: dict[tuple[int, int, int], tuple[Tensor, Tensor, Run]] = {}
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor, image_sizes: Tensor) -> Detections:
        """As the detector's: images [N, 3, H, W], image_sizes [N, 2]. The result is the caller's own memory."""
        number, channels, height, width = images.shape
        shape = (number, *bucket_size(height, width, self.resize))
        if shape in self.recordings:
            fixed_images, fixed_sizes, run = self.recordings[shape]
        else:
            fixed_images = images.new_empty(number, channels, *shape[1:]).contiguous(memory_format=torch.channels_last)
            fixed_sizes, run = torch.empty_like(image_sizes), None
        fixed_images.zero_()  # a picture before this one may have been larger
        fixed_images[:, :, :height, :width].copy_(images)
        fixed_sizes.copy_(image_sizes)
        if run is None:
            run = partial(_detect, self.detector, fixed_images, fixed_sizes)
            if len(self.recordings) < MAX_SHAPES:
                run = self.record(run)
                self.recordings[shape] = fixed_images, fixed_sizes, run
        return Detections(*(None if tensor is None else tensor.clone() for tensor in run()))


def _detect(detector: nn.Module, images: Tensor, image_sizes: Tensor) -> Detections:
    """The detector under the autocast around, without its cache: that is freed when autocast ends, graphs are not."""
    device = images.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        return detector(images, image_sizes)


class CudaGraphs:
    """Records runs as CUDA graphs that share one memory pool, which is as large as the largest of them needs.

    So a replay overwrites what another graph, and itself, returned before: results are to be copied out in between, on
    the same stream, and two graphs never run at a time. What a run reads must stay where it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a data loader's thread may pin memory meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                results = run()

        def replay() -> Detections:
            graph.replay()
            return results

        return replay


def compile_run(run: Run) -> Run:
    """Compiles a run by Inductor, for the shape of its input."""
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    # Dynamo gives a function up after 8 shapes, since most programs do not know theirs; ours are MAX_SHAPES at most.
    with torch._dynamo.config.patch(recompile_limit=8 + MAX_SHAPES):
        compiled()
    return compiled
