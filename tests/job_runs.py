"""Trains in jobs of several ranks, one after the other, from one process (small_jobs.py); prints their exit codes.

python tests/job_runs.py '[{"ranks": 2, "output": "runs/two", "data": "tiny", "fields": {"epochs": 1}}]'

Each trains as `tiny_runs.tiny_config(data, output, **fields)` says, with the backbone's `norm`; a rank may get a
`signal` or have a bit of its weights flipped (`flip`) in a step; torchrun may have started the job before
(`restarted`); ranks may print what they evaluate (`fingerprints`). Or it uses the weights of another job, to
`evaluate` or to `predict`. What a rank prints is in OUTPUT.log.0 and so on.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # this and the next are imported here, once, and not in each rank
from pycocotools import cocoeval  # noqa: F401
from small_jobs import end_of_job, prepare_process, start_job
from tiny_runs import flip_a_bit, tiny_config

from models import coco_evaluation, evaluate, predictor, training  # noqa: F401
from models.partial_results import fingerprint
from models.predict import Predict
from models.predict import main as predict_images  # `models.predict` is the function
from models.training_step import TrainingStep


def run_jobs(jobs: list[dict]) -> list[int]:
    """The exit code of each job, from a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, json.dumps(jobs, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def signal_in_step(rank: int, step: int) -> Callable[[int], None]:
    """A `prepare` for start_job: this rank gets SIGTERM behind the forward pass of a step."""

    def prepare(this_rank: int) -> None:
        forward = TrainingStep._part_losses

        def and_signal(self, at: int, *arguments):
            losses = forward(self, at, *arguments)
            if (this_rank, at) == (rank, step):
                os.kill(os.getpid(), signal.SIGTERM)
            return losses

        TrainingStep._part_losses = and_signal

    return prepare


def flip_in_step(rank: int, step: int) -> Callable[[int], None]:
    """A `prepare` for start_job: one bit of this rank's weights is another before the forward pass of a step."""

    def prepare(this_rank: int) -> None:
        forward = TrainingStep._part_losses

        def of_other_weights(self, at: int, *arguments):
            if (this_rank, at) == (rank, step):
                flip_a_bit(self.state.detector)
            return forward(self, at, *arguments)

        TrainingStep._part_losses = of_other_weights

    return prepare


def restarted(_: int) -> None:
    """A `prepare` for start_job: as if torchrun had started the job before, and nobody gave --resume."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    train = training.train
    training.train = lambda config: train(dataclasses.replace(config, resume=False))


def fingerprints(_: int) -> None:
    """A `prepare` for start_job: each rank prints a hash of what it evaluates."""
    evaluate_detector = training.evaluate_detector

    def and_print(detector, *arguments, **options):
        print("evaluated", fingerprint(detector))
        return evaluate_detector(detector, *arguments, **options)

    training.evaluate_detector = and_print


def use_weights(
    program: str, weights: Path, data: Path, output: Path, hangs: int | None = None
) -> Callable[[int], None]:
    """A `prepare` for start_job: ranks evaluate or predict where they would train. Rank `hangs` does so at an image,
    and may for 2 s."""
    common = {"weights": weights, "output": output, "rank_timeout": 600.0 if hangs is None else 2.0}

    def main(_) -> None:
        if program == "evaluate":
            evaluate.main(evaluate.Evaluate(data=data, batch_size=2, pictures=0, **common))
        else:
            images = tuple(sorted((data / "val").iterdir()))
            predict_images(Predict(images=images, score_threshold=0.0, **common))

    def prepare(rank: int) -> None:
        training.train = main
        if rank == hangs:
            coco_evaluation.result_entries = lambda *_: time.sleep(1000)

    return prepare


def run_job(job: dict) -> int:
    output = Path(job["output"])
    config = tiny_config(Path(job["data"]), output, **job["fields"])
    backbone = dataclasses.replace(config.detector.backbone, norm=job.get("norm", "frozen_batch"))
    config = dataclasses.replace(config, detector=dataclasses.replace(config.detector, backbone=backbone))
    prepare = signal_in_step(*job["signal"]) if "signal" in job else lambda rank: None
    for name, own in (("restarted", restarted), ("fingerprints", fingerprints)):
        prepare = own if name in job else prepare
    if "flip" in job:
        prepare = flip_in_step(*job["flip"])
    if "program" in job:
        prepare = use_weights(job["program"], Path(job["weights"]), Path(job["data"]), output, job.get("hangs"))
    return end_of_job(start_job(config, job["ranks"], Path(f"{output}.log"), prepare))


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare_process()
    print(json.dumps([run_job(job) for job in json.loads(sys.argv[1])]))
