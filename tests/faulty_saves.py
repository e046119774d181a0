"""Saves and removes checkpoints with a fault at each of their file operations; started by test_faulty_files.py with
native/faulty_files.c preloaded. Prints one JSON object: how many points there are, of which calls, and what went wrong.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from models.checkpoints import checkpoint_folders, newest_checkpoint, prune, write_checkpoint
from models.errors import MachineError

KILL_BEFORE, KILL_AFTER, ERROR, SHORT, SHORT_THEN_FULL = range(1, 6)
FAULTS = {
    "kill before": (KILL_BEFORE, 0),
    "kill after": (KILL_AFTER, 0),
    "EIO": (ERROR, errno.EIO),
    "ENOSPC": (ERROR, errno.ENOSPC),
    "ESTALE": (ERROR, errno.ESTALE),
    "EINTR": (ERROR, errno.EINTR),
    "short write": (SHORT, 0),
    "short write, then a full disk": (SHORT_THEN_FULL, 0),
}
SAVED, REFUSED = 0, 7


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((300,), float(step)), "b": torch.arange(step)}


def save_and_prune(folder: Path) -> int:
    """What a run does at step 4, with 3 checkpoints there and 2 to keep."""
    try:
        write_checkpoint(folder, 4, tensors(4), {"step": 4})
        prune(folder, keep=2)
    except MachineError as error:
        return REFUSED if error.where and error.why else 1
    return SAVED


def in_a_child(work) -> int:
    """The exit code of `work` in a process of its own; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(work())
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_as_saved(folder: Path, steps: set[int]) -> str | None:
    """None, or what is wrong: the newest must be one of `steps`, and nothing there may be damaged."""
    told = []
    found = newest_checkpoint(folder, told.append)
    if told or found is None or found.step not in steps:
        return f"step {found and found.step} {told}"
    wanted = tensors(found.step)
    if found.facts != {"step": found.step} or any(
        not torch.equal(found.tensors[name], wanted[name]) for name in wanted
    ):
        return f"step {found.step} has another content"
    return None


def main() -> None:
    torch.set_num_threads(1)
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.called.restype = ctypes.c_char_p
    room = Path(tempfile.mkdtemp())
    before = room / "before"
    for step in (1, 2, 3):
        write_checkpoint(before, step, tensors(step), {"step": step})

    folder = room / "counted"
    shutil.copytree(before, folder)
    shim.arm(0, 0, 0)
    save_and_prune(folder)
    points, names = shim.disarm(), shim.called().decode().split()
    wrong, outcomes = [], {}
    for name, (kind, code) in FAULTS.items():
        for point in range(1, points + 1):
            if kind >= SHORT and names[point - 1] != "write":
                continue
            folder = room / "faulty"
            shutil.copytree(before, folder)

            def work(folder=folder, kind=kind, point=point, code=code) -> int:
                shim.arm(kind, point, code)
                return save_and_prune(folder)

            ended = in_a_child(work)
            outcomes.setdefault(name, {}).setdefault(str(ended), 0)
            outcomes[name][str(ended)] += 1
            allowed = {SAVED: {4}, REFUSED: {3, 4}, -9: {3, 4}}.get(ended, set())
            problem = is_as_saved(folder, allowed)
            if not problem:  # what the fault has left is in nobody's way
                if not (folder / "step-00000004").exists():
                    write_checkpoint(folder, 4, tensors(4), {"step": 4})
                prune(folder, keep=2)
                kept = sorted(os.listdir(folder))
                if kept != [path.name for path in checkpoint_folders(folder)] or len(kept) != 2:
                    problem = f"left behind: {kept}"
            if problem:
                wrong.append(f"{name} at call {point} ({names[point - 1]}), ended with {ended}: {problem}")
            shutil.rmtree(folder)
    shutil.rmtree(room)
    json.dump({"points": points, "calls": names, "outcomes": outcomes, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main()
