"""What a step that ran out of memory says: the sum, and the flags that make it smaller."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .data.batch import Batch
from .data.transforms import padded_size
from .errors import MachineError


@contextlib.contextmanager
def explained_memory(step: int, batch: Batch, parts: int, detector: torch.nn.Module, optimizer) -> Iterator[None]:
    """Turns running out of memory, on the device or the host, into a MachineError. The run ends with it: nothing that
    was half done is saved.

    parts: batches that this process takes its images of a step in.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        asked = _asked_for(error)
        if asked is None:
            raise
        device = batch.image_sizes.device
        parameters = list(detector.parameters())
        count, (height, width) = len(batch.image_ids), padded_size(*batch.image_sizes.amax(0).tolist())
        states = (value for entries in optimizer.state.values() for value in entries.values())
        used = {
            "weights": _gib(parameters),
            "gradients": _gib(parameter for parameter in parameters if parameter.requires_grad),
            "momentum": _gib(value for value in states if isinstance(value, Tensor)),
            "images": count * 3 * height * width * 4 / 2**30,
        }
        peak, total = _peak_and_total(device)
        used["activations and the rest"] = max(peak - sum(used.values()), 0.0)
        sums = " + ".join(f"{name} {size:.2f}" for name, size in used.items())
        smaller = f"--accumulate {2 * parts}, " if count % 2 == 0 else "a smaller --batch-size, " if count > 1 else ""
        raise MachineError(
            f"out of memory at step {step}",
            where=f"{count} images padded to {height} x {width}, with up to {batch.gt_labels.shape[1]} objects: "
            f"{batch.image_ids}",
            why=f"{sums} = {sum(used.values()):.2f} GiB{asked}; {device} has {total:.2f} GiB",
            fix=f"{smaller}a smaller --resize SHORT LONG, or --amp bfloat16, in a run of their own;\n"
            "the last checkpoint is intact: --resume goes on with these settings where there is more memory",
        ) from error


def _asked_for(error: BaseException) -> str | None:
    """ ", and 0.25 GiB more were asked for"; None if `error` is of another kind."""
    text = str(error)
    if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text):
        return None
    found = re.search(r"(?:allocate|Unable to allocate) ([\d.]+) (bytes|[KMGT]iB)", text)
    if found is None:
        return ", and more was asked for"
    unit = {"bytes": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}[found[2]]
    return f", and {float(found[1]) * 1024.0**unit / 2**30:.2f} GiB more were asked for"


def _gib(tensors: Iterable[Tensor]) -> float:
    return sum(value.numel() * value.element_size() for value in tensors) / 2**30


def _peak_and_total(device: torch.device) -> tuple[float, float]:
    """GiB: the most that was used, and what there is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.mem_get_info(device)[1] / 2**30
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = physical if limit == resource.RLIM_INFINITY else min(limit, physical)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, total / 2**30
