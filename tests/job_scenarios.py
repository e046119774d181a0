"""Faults in jobs of several ranks, one after the other, from one process (small_jobs.py); prints what came of them.

python tests/job_scenarios.py        as test_many_processes.py starts it
"""

import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pycocotools import cocoeval  # noqa: F401 (imported here, once, and not in each rank)
from small_jobs import children_of, end_of_job, prepare_process, start_job
from tiny_runs import differences, outcome, tiny_config, write_tiny_data

from models import coco_evaluation, training  # noqa: F401
from models.checkpoints import checkpoint_folders
from models.data import annotation_cache, coco
from models.faster_rcnn import FasterRCNN
from models.partial_results import PartialResults
from models.recipes import TrainConfig
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


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} within {seconds} s")
        time.sleep(0.002)


class Scenarios:
    """Runs in `room`, all with the settings `config`."""

    def __init__(self, room: Path, config: TrainConfig) -> None:
        self.room, self.config = room, config

    def run(self, name: str, ranks: int, prepare=lambda rank: None, act=lambda job: None, **fields) -> dict:
        """One life of the run `name`; `act(launcher)` is called beside it. "seconds": from `self.fault()` on."""
        fault, codes = self.room / "fault", self.room / f"{name}.log.codes"
        fault.unlink(missing_ok=True)
        codes.unlink(missing_ok=True)
        config = dataclasses.replace(self.config, output=self.room / name, **fields)
        job = start_job(config, ranks, self.room / f"{name}.log", prepare)
        act(job)
        code = end_of_job(job)
        found = {"code": code, "codes": json.loads(codes.read_text()) if codes.exists() else {}}
        if fault.exists():
            found["seconds"] = time.monotonic() - float(fault.read_text())
        return found | {"logs": [(self.room / f"{name}.log.{rank}").read_text() for rank in range(ranks)]}

    def fault(self) -> None:
        """It happens now."""
        (self.room / "fault").write_text(str(time.monotonic()))

    def differences(self, name: str, other: str = "whole") -> list[str]:
        return differences(outcome(self.room / name), outcome(self.room / other))

    def continued(self, name: str, **fields) -> dict:
        """The run goes on to its end, with two ranks."""
        return {"continued": self.run(name, 2, **fields)["code"], "differences": self.differences(name)}

    def checkpoints(self, name: str) -> list[str]:
        return [path.name for path in checkpoint_folders(self.room / name / "checkpoints")]

    def changing(self) -> dict:
        """The images of each step, for a run of one rank and for one whose ranks become 2, 4 and 1 again."""
        self.run("alone", 1, before_step(nothing, self.room / "alone.seen"))

        def stops_after(last: int):
            def action(rank: int, step: int, parts, detector) -> None:
                if rank == 0 and step == last:
                    os.kill(os.getpid(), signal.SIGTERM)

            return before_step(action, self.room / "changing.seen")

        lives = ((1, 1), (2, 2), (4, 3), (1, 99))
        codes = [self.run("changing", ranks, stops_after(last))["code"] for ranks, last in lives]
        return {"codes": codes} | {name: images_by_step(self.room / f"{name}.seen") for name in ("alone", "changing")}

    def stopped(self) -> dict:
        def stopped(rank: int, step: int, parts, detector) -> None:
            if (rank, step) == (1, 2):
                self.fault()
                os.kill(os.getpid(), signal.SIGSTOP)

        found = self.run("stopped", 2, before_step(stopped), rank_timeout=5.0)
        return found | self.continued("stopped", rank_timeout=5.0)

    def stopped_elsewhere(self) -> dict:
        """Rank 1: where the processes join their group, where the main one has something to tell before it evaluates,
        and where all is done."""

        def stop(*_, **__) -> None:
            self.fault()
            os.kill(os.getpid(), signal.SIGSTOP)

        def at_joining(rank: int) -> None:
            if rank == 1:
                torch.distributed.init_process_group = stop

        def at_evaluation(rank: int) -> None:
            is_due = training.evaluation_is_due
            if rank == 1:
                training.evaluation_is_due = lambda *position: is_due(*position) and stop()

        def at_the_end(rank: int) -> None:
            if rank == 1:
                torch.distributed.destroy_process_group = stop

        places = {"joining": at_joining, "evaluation": at_evaluation, "end": at_the_end}
        return {name: self.run(f"stopped at {name}", 2, prepare, rank_timeout=5.0) for name, prepare in places.items()}

    def nan(self) -> dict:
        def not_finite(rank: int, step: int, parts, detector) -> None:
            if (rank, step) == (1, 2):
                (self.room / "nan images").write_text(json.dumps(parts[0].image_ids))
                losses = detector.losses
                detector.losses = lambda *arguments: {k: v * float("nan") for k, v in losses(*arguments).items()}

        found = self.run("nan", 2, before_step(not_finite))
        found["images"] = json.loads((self.room / "nan images").read_text())
        found["replays"] = sorted(str(p.relative_to(self.room / "nan")) for p in self.room.glob("nan/replay/**/step-*"))
        return found | {"checkpoints": self.checkpoints("nan")}

    def memory(self) -> dict:
        def out_of_memory(rank: int, step: int, parts, detector) -> None:
            if (rank, step) == (1, 2):
                detector.losses = lambda *_: torch.empty(1 << 60)

        found = self.run("memory", 2, before_step(out_of_memory))
        return found | {"checkpoints": self.checkpoints("memory")} | self.continued("memory")

    def worker(self) -> dict:
        def kill_a_worker(job: int) -> None:
            wait_until(lambda: any(children_of(rank) for rank in children_of(job)))
            worker = next(worker for rank in children_of(job) for worker in children_of(rank))
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

        return self.run("worker", 2, act=kill_a_worker, workers=1) | {"differences": self.differences("worker")}

    def launcher(self) -> dict:
        def kill_the_launcher(job: int) -> None:
            wait_until((self.room / "launcher/checkpoints/step-00000001").exists)
            self.fault()
            os.kill(job, signal.SIGKILL)

        return self.run("launcher", 2, act=kill_the_launcher) | self.continued("launcher")

    def evaluation(self) -> dict:
        """One step, and an evaluation of two batches in each of two ranks; SIGTERM when each has done the first. What
        rank 1 has kept is of the same detector only if its batch norms had the statistics of rank 0."""
        data = write_tiny_data(self.room / "to evaluate", train=4, val=8)
        fields = {"data": data, "batch_size": 4, "epochs": 1}

        def count_passes(rank: int) -> None:
            forward = FasterRCNN.forward

            def counted(*arguments):
                with open(self.room / "passes", "a") as file:
                    print(rank, file=file)
                return forward(*arguments)

            FasterRCNN.forward = counted

        def stop_behind_the_first_batch(rank: int) -> None:
            count_passes(rank)
            add = PartialResults.add

            def add_and_wait(*arguments) -> None:
                add(*arguments)
                (self.room / f"first batch of {rank}").touch()
                if rank == 0:
                    wait_until((self.room / "first batch of 1").exists)
                    os.kill(os.getppid(), signal.SIGTERM)  # the launcher hands it on
                time.sleep(60)

            PartialResults.add = add_and_wait

        def passes() -> list[str]:
            text = (self.room / "passes").read_text()
            (self.room / "passes").unlink()
            return sorted(text.split())

        self.run("evaluated at once", 2, count_passes, **fields)
        found = {"whole": passes()} | self.run("evaluated", 2, stop_behind_the_first_batch, **fields)
        found |= {"first": passes(), "continued": self.run("evaluated", 2, count_passes, **fields)["code"]}
        return found | {"second": passes(), "differences": self.differences("evaluated", "evaluated at once")}

    def reading(self) -> dict:
        """The ranks that read annotation files, in a job of two that runs twice; the cache takes small files, too."""

        def note_readers(rank: int) -> None:
            os.environ["CASCADEOPS_CACHE"] = str(self.room / "cache")
            annotation_cache.SMALLEST = 0
            read = coco.read_annotations

            def noted(path: Path, boxes_only: bool):
                with open(self.room / "readers", "a") as file:
                    print(rank, path.name, file=file)
                return read(path, boxes_only)

            coco.read_annotations = noted

        codes = [self.run(name, 2, note_readers, max_iterations=1)["code"] for name in ("reading", "reading again")]
        return {"codes": codes, "readers": (self.room / "readers").read_text().splitlines()}


def main() -> None:
    torch.set_num_threads(1)
    prepare_process()
    with tempfile.TemporaryDirectory() as room:
        data = write_tiny_data(Path(room, "data"), train=16)
        config = tiny_config(data, Path(room, "first"), batch_size=8)
        with contextlib.redirect_stdout(None):
            training.train(config)  # what is slow the first time is done before any fork
        gc.collect()
        gc.freeze()
        scenarios = Scenarios(Path(room), config)
        assert scenarios.run("whole", 2)["code"] == 0
        names = (
            "changing",
            "stopped",
            "stopped_elsewhere",
            "nan",
            "memory",
            "worker",
            "launcher",
            "evaluation",
            "reading",
        )
        json.dump({name: getattr(scenarios, name)() for name in names}, sys.stdout)


if __name__ == "__main__":
    main()
