"""Where and when a run ran: a line of starts.jsonl for each time that it was started or continued."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import torch

import cascadeops

from .files import explained

NAME = "starts.jsonl"


def note_start(folder: Path, device: torch.device, first_step: int, train_set, val_set) -> None:
    """Adds this process's line to the run in `folder`; nothing in it but what a report shows.

    Raises:
        MachineError: the system refused to write.
    """
    facts = {
        "time": round(time.time(), 3),  # seconds since 1970
        "step": first_step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        "data": {"train": _data(train_set), "val": _data(val_set)},
    }
    with explained(folder / NAME), open(folder / NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def _data(dataset) -> dict:
    """Its folder is None where the data set is a Python object."""
    folder = str(dataset.root.resolve()) if isinstance(dataset.root, Path) else None
    return {"name": str(dataset.root), "folder": folder, "images": len(dataset), "classes": dataset.num_classes}


def versions() -> dict[str, str]:
    return {"cascadeops": cascadeops.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    """Its name where the system tells it, or else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
