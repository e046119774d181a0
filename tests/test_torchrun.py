"""A training that torchrun starts, by two launchers on two addresses: a rank is killed, then the job is stopped."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_jobs import descendants
from tiny_runs import differences, outcome, tiny_config, write_tiny_data

from models.checkpoints import checkpoint_folders
from models.config_files import as_json

ROOT = Path(__file__).parent.parent
CONTINUE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from small_jobs import end_of_job, prepare_process, start_job
from models.config_files import read_config

torch.set_num_threads(1)
prepare_process()
room = Path(sys.argv[1])
config = read_config(room / "config.json")
for name in ("run", "whole"):
    assert end_of_job(start_job(replace(config, output=room / name), 2, room / f"{name}.log")) == 0
"""
"""Ends the run, and makes one that was left alone."""


@pytest.fixture
def launchers(tmp_path):
    """torchrun for each of two loopback addresses, with one rank each; ended with the test, with all that they started.
    What they print goes to 0.txt and 1.txt."""
    config = tiny_config(write_tiny_data(tmp_path / "data", train=64), tmp_path / "run", batch_size=4, evaluate_every=0)
    (tmp_path / "config.json").write_text(json.dumps(as_json(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for node in (0, 1):
        options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=1"]
        options += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr=127.0.0.{node + 1}"]
        options += [f"--log-dir={tmp_path}/logs{node}", "--redirects=3", "--tee=0:3"]
        program = ["-m", "models.train", "--preset", str(tmp_path / "config.json")]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *program]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(tmp_path / f"{node}.txt", "w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    yield started
    for launcher in started:
        for process in [*descendants(launcher.pid), launcher.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def last_step(room: Path) -> int:
    folders = checkpoint_folders(room / "run/checkpoints")
    return int(folders[-1].name[5:]) if folders else 0


def wait_for(condition, launchers) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.005)


def test_a_killed_rank_and_a_stopped_job_end_as_a_run_that_was_left_alone(launchers, tmp_path):
    """The rank that does not write is killed in the middle of an epoch: torchrun starts both again, and nobody gives
    --resume. Then the launchers get SIGTERM: the job is saved within 10 s, and ends."""
    wait_for(lambda: last_step(tmp_path) >= 2, launchers)
    assert len(list(tmp_path.glob("logs*/*/attempt_0/*"))) == 2  # a folder for each rank
    started = [process for launcher in launchers for process in descendants(launcher.pid)]
    ranks = {variable(process, "RANK"): process for process in started}
    (machine,) = (node for node in (0, 1) if ranks["1"] in descendants(launchers[node].pid))
    os.kill(ranks["1"], signal.SIGKILL)
    text = lambda: "".join((tmp_path / f"{node}.txt").read_text() for node in (0, 1))  # noqa: E731
    wait_for(lambda: "continued after step" in text(), launchers)
    assert len(list(tmp_path.glob(f"logs{machine}/*/attempt_1/0/stderr.log"))) == 1
    before = last_step(tmp_path)
    wait_for(lambda: last_step(tmp_path) > before, launchers)

    sent = time.time()
    for launcher in launchers:
        launcher.send_signal(signal.SIGTERM)
    assert 0 not in [launcher.wait(timeout=60) for launcher in launchers]
    step = last_step(tmp_path)
    assert (tmp_path / f"run/checkpoints/step-{step:08}").stat().st_mtime - sent < 10
    assert before < step < 32 and f"after step {step}, which is saved: --resume goes on" in text()

    command = [sys.executable, "-c", CONTINUE, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []


def variable(process: int, name: str) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(each.split("=", 1) for each in variables if "=" in each).get(name)
