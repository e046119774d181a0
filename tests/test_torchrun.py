"""Trainings that torchrun itself starts: two launchers on two addresses, a rank killed, SIGTERM to the launcher."""

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


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Data, and the configuration of a run of two ranks: 2 epochs of 6 steps."""
    room = tmp_path_factory.mktemp("torchrun")
    config = tiny_config(write_tiny_data(room / "data", train=24), room / "run", batch_size=4, evaluate_every=0)
    (room / "config.json").write_text(json.dumps(as_json(config)))
    return room


def launch(room: Path, name: str, *options: str) -> subprocess.Popen:
    """torchrun, in a process group of its own; what it prints goes to the file `name`.txt."""
    program = ["-m", "models.train", "--preset", str(room / "config.json"), "--output", str(room / name.split("@")[0])]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(room / f"{name}.txt", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(room: Path, name: str, step: int, launchers: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:]) >= step for path in checkpoint_folders(room / name / "checkpoints")):
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.01)


@pytest.fixture
def ended():
    """Launchers that are put in are ended with the test, with all that they have started."""
    launchers: list[subprocess.Popen] = []
    yield launchers
    for launcher in launchers:
        for process in [*descendants(launcher.pid), launcher.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def test_two_launchers_and_a_killed_rank_end_as_a_run_that_was_left_alone(room, ended):
    """One launcher for each of two loopback addresses. The rank that does not write is killed in the middle of an
    epoch; torchrun starts both again, and nobody gives --resume."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for node in (0, 1):
        options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=1"]
        options += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr=127.0.0.{node + 1}"]
        options += [f"--log-dir={room}/logs{node}", "--redirects=3", "--tee=0:3"]
        ended.append(launch(room, f"run@{node}", *options))
    wait_for_step(room, "run", 2, ended)
    attempts = {path.parent.name: path for path in room.glob("logs*/*/attempt_0/*")}
    assert len(list(room.glob("logs*/*/attempt_0/*"))) == 2, attempts
    victims = [p for launcher in ended for p in descendants(launcher.pid) if b"models.train" in _command(p)]
    ranks = {_variable(process, "RANK"): process for process in victims}
    assert set(ranks) == {"0", "1"}
    os.kill(ranks["1"], signal.SIGKILL)
    codes = [launcher.wait(timeout=180) for launcher in ended]
    text = "".join((room / f"run@{node}.txt").read_text() for node in (0, 1))
    assert codes == [0, 0], text
    assert "continued after step" in text
    assert len(list(room.glob("logs*/*/attempt_1/*/stderr.log"))) == 2  # a log for each rank and attempt

    whole = launch(room, "whole", "--standalone", "--nproc-per-node=2")
    ended.append(whole)
    assert whole.wait(timeout=180) == 0
    assert differences(outcome(room / "run"), outcome(room / "whole")) == []


def test_sigterm_to_the_launcher_saves_and_ends_within_10_seconds(room, ended):
    launcher = launch(room, "stopped", "--standalone", "--nproc-per-node=2")
    ended.append(launcher)
    wait_for_step(room, "stopped", 2, ended)
    sent = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    code = launcher.wait(timeout=30)
    assert time.monotonic() - sent < 10
    text = (room / "stopped.txt").read_text()
    assert code != 0 and "which is saved: --resume goes on" in text
    last = checkpoint_folders(room / "stopped/checkpoints")[-1]
    assert f"after step {int(last.name[5:])}, which is saved" in text


def _command(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def _variable(process: int, name: str) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(each.split("=", 1) for each in variables if "=" in each)[name]
