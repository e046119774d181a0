"""Runs jobs of several processes: a fork server, which imports and warms up everything once.

    python tests/job_runs.py '[{"size": 2, "output": "runs/two", "data": "tiny", "fields": {"epochs": 1}}]'

Each job trains as `tiny_runs.tiny_config(data, output, **fields)` says, with the backbone's `norm`; `fault` breaks
something in one of its ranks. What a process prints is in OUTPUT/rank-0.log, ...; the exit codes of all processes are
printed as JSON, job by job.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # these three are imported here, once, and not in each process
import torch.utils.tensorboard
from pycocotools import cocoeval  # noqa: F401
from tiny_runs import tiny_config

from models import coco_evaluation, training  # noqa: F401
from models.command_line import _machine_fault, print_error
from models.errors import UserError
from models.training_step import TrainingStep


def run_jobs(jobs: list[dict]) -> list[list[int]]:
    """The exit codes of each job's processes, from a server of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, json.dumps(jobs, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_job(job: dict) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(job["size"]):
        child = os.fork()
        if child == 0:
            process(job, rank, port)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def process(job: dict, rank: int, port: int) -> None:
    """Does the work of one rank and ends."""
    code = 99
    output = Path(job["output"])
    output.mkdir(parents=True, exist_ok=True)
    try:
        log = os.open(output / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["size"] > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"], "LOCAL_WORLD_SIZE": job["size"]}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in (places | address).items()}
        if job.get("fault", {}).get("rank") == rank:
            break_step(job["fault"]["step"], FAULTS[job["fault"]["kind"]])
        train(job, output)
        code = 0
    except UserError as error:
        print_error(error)
        code = error.exit_code
    except Exception as error:
        traceback.print_exc()
        fault = _machine_fault(error)
        code = 99 if fault is None else fault.exit_code
    except KeyboardInterrupt as stop:
        print(stop)
        code = getattr(stop, "exit_code", 130)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


FAULTS = {
    "signal": lambda losses: os.kill(os.getpid(), signal.SIGTERM) or losses,
    "killed": lambda losses: os.kill(os.getpid(), signal.SIGKILL),
    "not finite": lambda losses: losses | {"loss": losses["loss"] * float("nan")},
}


def break_step(step: int, fault: Callable[[dict], dict]) -> None:
    """`fault(losses)` in a step, behind the forward pass."""
    forward = TrainingStep._part_losses

    def broken(self, at: int, *arguments):
        losses = forward(self, at, *arguments)
        return fault(losses) if at == step else losses

    TrainingStep._part_losses = broken


def train(job: dict, output: Path) -> None:
    training.save_comparison = lambda *_, **__: np.zeros((2, 2, 3), np.uint8)
    config = tiny_config(Path(job["data"]), output, **job.get("fields", {}))
    backbone = dataclasses.replace(config.detector.backbone, norm=job.get("norm", "frozen_batch"))
    training.train(dataclasses.replace(config, detector=dataclasses.replace(config.detector, backbone=backbone)))


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps([run_job(job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
