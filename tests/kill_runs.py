"""Kills training runs at random moments, continues them, and compares what they end with to a run that was left alone.

    LD_PRELOAD=faulty_files.so python tests/kill_runs.py --kills 500        as test_faulty_files.py starts it

A fork server: this process imports and warms up everything once, and each life of a run is a child of it. Four kinds of
kill: SIGKILL at a random moment; SIGKILL at a random file operation (native/faulty_files.c), so that saves and removals
are hit more often than by their share of time; SIGKILL of a loader worker, which the run has to survive; SIGTERM.
Prints one JSON object.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from pycocotools import cocoeval  # noqa: F401 (imported here, once, and not in each life)
from small_jobs import children_of, end_of_job
from tiny_runs import black_picture, differences, outcome, tiny_config, write_tiny_data

from models import coco_evaluation, progress, training  # noqa: F401
from models.command_line import _machine_fault
from models.errors import UserError

KILL_BEFORE, KILL_AFTER = 1, 2
WORKER = "SIGKILL of a worker"
KINDS = {"SIGKILL": 0.44, "SIGKILL at a file operation": 0.44, WORKER: 0.04, "SIGTERM": 0.08}
"""With the share of each."""
ENDINGS = {
    "SIGKILL": {0, -signal.SIGKILL},
    "SIGKILL at a file operation": {0, -signal.SIGKILL},
    WORKER: {0},
    "SIGTERM": {0, 128 + signal.SIGTERM, -signal.SIGTERM},
}
"""Exit codes that lives may have. 0: it ended before the kill, or went on with a new worker; -15: it did not listen to
signals yet."""
OPERATIONS = 40
"""File operations of a life at one of which it may be killed: two saves and what is before them."""


def live(config, prepare) -> int:
    """One life of a run in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        prepare()
        resume = (config.output / "config.json").exists()
        training.train(dataclasses.replace(config, resume=resume))
        code = 0
    except KeyboardInterrupt as stop:
        code = getattr(stop, "exit_code", 130)
    except Exception as error:
        # As `models.command_line.run` would end it.
        fault = error if isinstance(error, UserError) else _machine_fault(error)
        code = 99 if fault is None else fault.exit_code
        if fault is None:
            traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="this kind of kill alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    choose = random.Random(options.seed)
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    # Neither is of what a run computes, and each costs more than the rest of a life.
    training.save_comparison = black_picture
    progress.importlib.util.find_spec = lambda name: None
    with tempfile.TemporaryDirectory() as room:
        json.dump(kill_and_compare(Path(room), options.kills, options.only, choose, shim), sys.stdout)


def kill_and_compare(room: Path, wanted: int, only: str | None, choose: random.Random, shim: ctypes.CDLL) -> dict:
    data = write_tiny_data(room / "data")
    with contextlib.redirect_stdout(None):
        training.train(tiny_config(data, room / "first"))  # what is slow the first time is done before any fork
    gc.collect()
    gc.freeze()
    started = time.monotonic()
    end_of_job(live(tiny_config(data, room / "whole"), lambda: None))
    length = time.monotonic() - started
    whole = outcome(room / "whole")

    kills, codes, phases = collections.Counter(), collections.Counter(), collections.Counter()
    runs, wrong, slowest = 0, [], 0.0
    config = tiny_config(data, room / "run")
    while kills.total() < wanted:
        (kind,) = [only] if only else choose.choices(list(KINDS), list(KINDS.values()))
        at_operation = kind == "SIGKILL at a file operation"
        prepare = lambda: None  # noqa: E731
        if at_operation:
            fault, number = choose.choice((KILL_BEFORE, KILL_AFTER)), choose.randint(1, OPERATIONS)
            prepare = lambda fault=fault, number=number: shim.arm(fault, number, 0)  # noqa: E731
        process = live(dataclasses.replace(config, workers=2 if kind == WORKER else 0), prepare)
        if not at_operation:
            time.sleep(choose.random() * length * (1 if kind == WORKER else 0.4))
            victims = children_of(process) if kind == WORKER else [process]
            sent = time.monotonic()
            for victim in choose.sample(victims, min(1, len(victims))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
                    kills[kind] += kind == WORKER
        status = end_of_job(process)
        if kind == "SIGTERM":
            slowest = max(slowest, time.monotonic() - sent)
        codes[status] += 1
        if status not in ENDINGS[kind]:
            wrong.append(f"{kind}: a life ended with {status}")
        if status != 0:
            kills[kind] += 1
            names = {path.name for path in (config.output / "checkpoints").glob("*")}
            part = any(name.endswith(".part") for name in names)
            phases["in a save" if part else "in a removal" if any("old" in n for n in names) else "elsewhere"] += 1
            continue
        found = differences(outcome(config.output), whole)
        if found:
            wrong.append(f"run {runs}: {found[:5]}")
        runs += 1
        shutil.rmtree(config.output)
    report = {"kills": dict(kills), "runs compared": runs, "wrong": wrong, "exit codes": dict(codes)}
    return report | {"killed": dict(phases), "slowest SIGTERM": round(slowest, 2), "seconds alone": round(length, 2)}


if __name__ == "__main__":
    main()
