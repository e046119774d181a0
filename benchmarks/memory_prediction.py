"""How much GPU memory a training step takes, predicted without a GPU: the step runs on tensors that have no data.

    python -m benchmarks.memory_prediction htc_r50_fpn_1x_coco                  a published row, 2 images of 800 x 1333
    python -m benchmarks.memory_prediction --all --output benchmarks/predicted_memory.json

Every operator of one training step (losses, backward, SGD) runs on PyTorch's fake tensors, which have shapes, dtypes
and lifetimes but no data; the largest sum of bytes alive is the prediction of `torch.cuda.max_memory_allocated`, the
definition of the published numbers. It is a prediction and no measurement: what an operator allocates for itself alone
(cuDNN's workspace) is not in it, and mixed precision follows the CPU's list of operators, not CUDA's.
"""

from __future__ import annotations

import argparse
import copy
import json
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.detector_cases import IMAGE_SIZE, row_detector, training_batch, training_step
from models.optimization import make_optimizer
from models.published_rows import PUBLISHED_ROWS
from models.recipes import TrainConfig
from models.recomputation import recompute_activations

STORED = Path(__file__).parent / "predicted_memory.json"
GRANULE = 512
"""PyTorch's CUDA allocator hands out multiples of so many bytes."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECOMPUTING = ", recomputing"
"""Of a prediction with `--checkpoint-activations`."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    peak: int
    weights: int
    """Parameters and buffers."""
    momentum: int

    @property
    def rest(self) -> int:
        """Activations, gradients and what is on its way, at the peak."""
        return self.peak - self.weights - self.momentum


def allocated(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


class LiveBytes(TorchDispatchMode):
    """Sums up the storages that operators make, until the last tensor (or autograd's graph) lets go of each."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors) -> None:
        """Counts every tensor of a tuple, list or dict whose storage is not counted yet."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    size = allocated(storage.nbytes())
                    self.alive.add(storage._cdata)
                    self.now += size
                    # The wrapper lives as long as the storage itself, so this is called when the memory is freed.
                    weakref.finalize(storage, self._remove, storage._cdata, size)
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def predict(
    detector: torch.nn.Module,
    config: TrainConfig,
    dtype: torch.dtype,
    batch_size: int = 2,
    image_size: tuple[int, int] = IMAGE_SIZE,
) -> Memory:
    """Memory of a training step that is not the first (which makes the momentum).

    Args:
        detector: on the CPU; unchanged.
        config: the optimiser is made, and activations are computed twice or kept, as it says.
        dtype: float32, or the dtype of automatic mixed precision.
        image_size: (height, width) of every image, before padding.
    """
    mode = FakeTensorMode()
    detector = fake_copy(detector, mode).train()
    # On a GPU no count is read on the host: heads run at their whole capacity.
    whole = mock.patch("models.roi_training.used_capacity", lambda count, capacity: capacity)
    with mode, LiveBytes() as live, whole:
        live.add([*detector.parameters(), *detector.buffers()])
        weights = live.now
        if config.checkpoint_activations:
            recompute_activations(detector)
        batch = training_batch(batch_size, image_size)
        optimizer = make_optimizer(config, detector)
        training_step(detector, optimizer, batch, dtype)
        live.peak = 0
        training_step(detector, optimizer, batch, dtype)
        momentum = [value for state in optimizer.state.values() for value in state.values()]
        return Memory(live.peak, weights, sum(allocated(tensor.nbytes) for tensor in momentum))


def fake_copy(detector: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """The same modules with parameters and buffers that have no data."""
    tensors = [*detector.parameters(), *detector.buffers()]
    return copy.deepcopy(detector, memo={id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def predict_row(row: str) -> dict[str, Memory]:
    """Memory of a published row, 2 images of 800 x 1333: of both dtypes, and of both `RECOMPUTING`."""
    detector, config = row_detector(row), PUBLISHED_ROWS[row].recipe
    return {
        name + (RECOMPUTING if twice else ""): predict(detector, replace(config, checkpoint_activations=twice), dtype)
        for twice in (False, True)
        for name, dtype in DTYPES.items()
    }


def stored() -> dict[str, dict[str, Memory]]:
    """Row -> dtype -> prediction, from the file that `--all` wrote."""
    rows = json.loads(STORED.read_text())["rows"]
    return {row: {name: Memory(**sizes) for name, sizes in memory.items()} for row, memory in rows.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_prediction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="published rows; `python -m models.train --list`")
    parser.add_argument("--all", action="store_true", help="every row that has a published memory")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=f"benchmarks/{STORED.name} is the report's")
    options = parser.parse_args(arguments)
    unknown = [row for row in options.rows if row not in PUBLISHED_ROWS]
    if unknown:
        parser.error(f"no published row: {', '.join(unknown)}; `python -m models.train --list` shows them")
    rows = [name for name, row in PUBLISHED_ROWS.items() if row.memory_gb] if options.all else options.rows
    if not rows:
        parser.error("name a row, or give --all")
    predictions = {}
    print("predicted, not measured; GiB, 2 images of 800 x 1333 (ResNeXt rows of HTC are published with 1)\n")
    print(f"{'row':37} {'':21} {'peak':>6} {'weights':>8} {'momentum':>9} {'rest':>6}  published (V100, float32)")
    for row in rows:
        predictions[row] = predict_row(row)
        for name, memory in predictions[row].items():
            sizes = memory.peak, memory.weights, memory.momentum, memory.rest
            peak, weights, momentum, rest = (f"{size / 2**30:.2f}" for size in sizes)
            published = PUBLISHED_ROWS[row].memory_gb or "-"
            print(f"{row:37} {name:21} {peak:>6} {weights:>8} {momentum:>9} {rest:>6}  {published}", flush=True)
    if options.output:
        rows = {row: {name: asdict(memory) for name, memory in found.items()} for row, found in predictions.items()}
        document = {"torch": torch.__version__.partition("+")[0], "unit": "bytes, predicted", "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
