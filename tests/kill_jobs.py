"""Kills jobs of two ranks at random moments, continues them, and compares what they end with to one left alone.

    python tests/kill_jobs.py --kills 30        as test_killed_jobs.py starts it

Kinds of kill: SIGKILL of a rank, of the launcher, of a loader worker; SIGTERM to the launcher; SIGSTOP of a rank, which
the watchdog has to find. The first of each comes when the ranks train. Prints one JSON object.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from pycocotools import cocoeval  # noqa: F401 (imported here, once, and not in each rank)
from small_jobs import children_of, end_of_job, prepare_process, start_job
from tiny_runs import differences, outcome, tiny_config, write_tiny_data

from models import coco_evaluation, training  # noqa: F401
from models.watchdog import EXIT_CODE

KINDS = {"a rank": 0.6, "the launcher": 0.2, "SIGTERM": 0.1, "a worker": 0.05, "SIGSTOP": 0.05}
TIMEOUT = 5.0
"""Seconds, of the watchdog."""
ENDINGS = {"SIGTERM": {128 + signal.SIGTERM, -signal.SIGTERM, 256 - signal.SIGTERM}, "SIGSTOP": {EXIT_CODE, 256 - 9, 4}}
"""Exit codes of the launcher that these may have, beside those of a kill: a rank's signal s is 256 - s; 4: a rank whose
connection broke."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare_process()
    with tempfile.TemporaryDirectory() as room:
        json.dump(kill_and_compare(Path(room), options.kills, random.Random(options.seed)), sys.stdout)


def kill_and_compare(room: Path, wanted: int, choose: random.Random) -> dict:
    data = write_tiny_data(room / "data", train=16)
    config = tiny_config(data, room / "run", batch_size=4, rank_timeout=TIMEOUT)
    with contextlib.redirect_stdout(None):
        training.train(dataclasses.replace(config, output=room / "first"))  # what is slow the first time
    gc.collect()
    gc.freeze()
    started = time.monotonic()
    assert end_of_job(start_job(dataclasses.replace(config, output=room / "whole"), 2, room / "whole.log")) == 0
    length = time.monotonic() - started
    whole = outcome(room / "whole")

    kills, codes = collections.Counter(), collections.Counter()
    runs, named, wrong, slowest = 0, 0, [], collections.Counter()
    while kills.total() < wanted or not runs:
        missing = [kind for kind in KINDS if not (named if kind == "SIGSTOP" else kills[kind])]
        kind = missing[0] if missing else choose.choices(list(KINDS), list(KINDS.values()))[0]
        for log in room.glob("log.*"):
            log.unlink()
        launcher = start_job(dataclasses.replace(config, workers=int(kind == "a worker")), 2, room / "log")
        latest = time.monotonic() + 10
        while missing and not trains(room / "log.0") and time.monotonic() < latest:
            time.sleep(0.002)
        time.sleep(choose.random() * length * (0.1 if missing else 0.6))
        ranks = children_of(launcher)
        workers = [process for rank in ranks for process in children_of(rank)]
        candidates = {"the launcher": [launcher], "SIGTERM": [launcher], "a worker": workers}.get(kind, ranks)
        number = {"SIGTERM": signal.SIGTERM, "SIGSTOP": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        sent = time.monotonic()
        victim = choose.choice(candidates) if candidates else 0
        with contextlib.suppress(ProcessLookupError):
            if victim:
                os.kill(victim, number)
        try:
            code = end_of_job(launcher)
        except TimeoutError as error:
            logs = "".join(log.read_text(errors="replace")[-1500:] for log in room.glob("log.[01]"))
            wrong.append(f"{kind} (process {victim}): {error}: {logs}")
            continue
        codes[f"{kind}: {code}"] += 1
        taken = time.monotonic() - sent
        logs = "".join(log.read_text(errors="replace") for log in room.glob("log.[01]"))
        if code != 0 or kind == "a worker":
            kills[kind] += bool(victim)
        if kind == "SIGSTOP" and code != 0:
            taken -= TIMEOUT
            # A watchdog kills the stopped rank before it ends its own: the launcher's code is that of the kill. Before
            # it runs, and after it has ended, another rank's broken connection tells.
            if EXIT_CODE in json.loads((room / "log.codes").read_text()).values():
                named += 1
                if not re.search(rf"culprit: rank \d \(process {victim} ", logs):
                    wrong.append(f"the stopped rank was not named: {logs[-3000:]}")
        if code != 0:
            slowest[kind] = max(slowest[kind], round(taken, 2))
        allowed = {0, -signal.SIGKILL, 256 - signal.SIGKILL, 4} | ENDINGS.get(kind, set())
        if code not in allowed:
            wrong.append(f"{kind}: the job ended with {code}: {logs[-2000:]}")
        if code != 0:
            continue
        found = differences(outcome(config.output), whole)
        if found:
            wrong.append(f"run {runs}: {found[:5]}")
        runs += 1
        shutil.rmtree(config.output)
    report = {"kills": dict(kills), "runs compared": runs, "wrong": wrong, "exit codes": dict(codes), "named": named}
    return report | {"slowest": dict(slowest), "seconds alone": round(length, 2)}


def trains(log: Path) -> bool:
    """The main rank tells what it begins with; its watchdog runs then."""
    return log.exists() and log.stat().st_size > 0


if __name__ == "__main__":
    main()
