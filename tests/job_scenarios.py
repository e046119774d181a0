"""Faults in jobs of several ranks, one after the other, from one process (small_jobs.py); prints what came of them.

python tests/job_scenarios.py        as test_many_processes.py starts it
"""

import contextlib
import dataclasses
import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from pycocotools import cocoeval  # noqa: F401 (imported here, once, and not in each rank)
from small_jobs import descendants, end_of_job, prepare_process, start_job
from tiny_runs import differences, outcome, tiny_config, write_tiny_data

from models import coco_evaluation, training  # noqa: F401
from models.training_step import TrainingStep


def before_step(action, seen: Path | None = None):
    """A `prepare` for start_job: `action(rank, step, parts, detector)` before each step; `seen` gets their images."""

    def prepare(rank: int) -> None:
        made = TrainingStep.__call__

        def step_and_action(self, step, rate, parts, stop):
            if seen is not None:
                with open(seen, "a") as file:
                    print(json.dumps([step, rank, [i for part in parts for i in part.image_ids]]), file=file)
            action(rank, step, parts, self.state.detector)
            return made(self, step, rate, parts, stop)

        TrainingStep.__call__ = step_and_action

    return prepare


def nothing(rank: int, step: int, parts, detector) -> None:
    pass


def images_by_step(seen: Path) -> list[list[int]]:
    """Of every step its images, in the order of ranks."""
    lines = sorted(json.loads(line) for line in seen.read_text().splitlines())
    steps = sorted({step for step, *_ in lines})
    return [[image for step, _, images in lines if step == at for image in images] for at in steps]


def main() -> None:
    torch.set_num_threads(1)
    prepare_process()
    room = Path(tempfile.mkdtemp())
    data = write_tiny_data(room / "data", train=16)
    config = tiny_config(data, room / "first", batch_size=8)
    with contextlib.redirect_stdout(None):
        training.train(config)  # what is slow the first time is done before any fork
    gc.collect()
    gc.freeze()
    report: dict = {}

    def run(name: str, ranks: int, prepare=lambda rank: None, act=None, **fields) -> dict:
        """One life of the run `name`."""
        job = start_job(dataclasses.replace(config, output=room / name, **fields), ranks, room / f"{name}.log", prepare)
        start = time.monotonic()
        if act is not None:
            act(job)
        code = end_of_job(job)
        logs = [(room / f"{name}.log.{rank}").read_text() for rank in range(ranks)]
        codes = Path(f"{room / name}.log.codes")
        rank_codes = json.loads(codes.read_text()) if codes.exists() else {}
        return {"code": code, "codes": rank_codes, "seconds": time.monotonic() - start, "logs": logs}

    # The images of each step, for a run of one rank and for one whose ranks become 2, 4 and 1 again.
    run("alone", 1, before_step(nothing, room / "alone.seen"))

    def stops_after(last: int):
        def action(rank: int, step: int, parts, detector) -> None:
            if rank == 0 and step == last:
                os.kill(os.getpid(), signal.SIGTERM)

        return before_step(action, room / "changing.seen")

    codes = [run("changing", ranks, stops_after(last))["code"] for ranks, last in ((1, 1), (2, 2), (4, 3), (1, 99))]
    report["changing"] = {
        "codes": codes,
        "alone": images_by_step(room / "alone.seen"),
        "changing": images_by_step(room / "changing.seen"),
    }

    whole = run("whole", 2)
    report["whole"] = whole["code"]

    def stopped(rank: int, step: int, parts, detector) -> None:
        if (rank, step) == (1, 2) and not (room / "was stopped").exists():
            (room / "was stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    report["stopped"] = run("stopped", 2, before_step(stopped), rank_timeout=5.0)
    report["stopped"]["continued"] = run("stopped", 2, rank_timeout=5.0)["code"]
    report["stopped"]["differences"] = differences(outcome(room / "stopped"), outcome(room / "whole"))

    def not_finite(rank: int, step: int, parts, detector) -> None:
        if (rank, step) == (1, 2):
            (room / "nan images").write_text(json.dumps(parts[0].image_ids))
            losses = detector.losses
            detector.losses = lambda *arguments: {k: v * float("nan") for k, v in losses(*arguments).items()}

    report["nan"] = run("nan", 2, before_step(not_finite))
    report["nan"]["images"] = json.loads((room / "nan images").read_text())
    report["nan"]["checkpoints"] = sorted(path.name for path in (room / "nan/checkpoints").iterdir())
    report["nan"]["replays"] = sorted(str(p.relative_to(room / "nan")) for p in room.glob("nan/replay/**/step-*"))

    def out_of_memory(rank: int, step: int, parts, detector) -> None:
        if (rank, step) == (1, 2):
            detector.losses = lambda *_: torch.empty(1 << 60)

    report["memory"] = run("memory", 2, before_step(out_of_memory))

    def kill_a_worker(job: int) -> None:
        while True:
            for process in descendants(job):
                workers = descendants(process)
                if workers and process in _ranks(job):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(workers[0], signal.SIGKILL)
                    return
            time.sleep(0.005)

    report["worker"] = run("worker", 2, act=kill_a_worker, workers=1)
    report["worker"]["differences"] = differences(outcome(room / "worker"), outcome(room / "whole"))

    def kill_the_launcher(job: int) -> None:
        while not (room / "launcher/checkpoints/step-00000001").exists():
            time.sleep(0.002)
        os.kill(job, signal.SIGKILL)

    report["launcher"] = run("launcher", 2, act=kill_the_launcher)
    report["launcher"]["continued"] = run("launcher", 2)["code"]
    report["launcher"]["differences"] = differences(outcome(room / "launcher"), outcome(room / "whole"))
    json.dump(report, sys.stdout)


def _ranks(job: int) -> list[int]:
    return [int(key) for key in re.findall(r"\d+", Path(f"/proc/{job}/task/{job}/children").read_text())]


if __name__ == "__main__":
    main()
