"""No program asks for the network unless a person does: a library that is preloaded notes and refuses every attempt.

`models.weights NAME` is the only one that fetches anything, and has a test of its own (test_weight_downloads.py). The
processes of one training run talk to each other over the addresses that torchrun gives them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import built_library

from models.weights.published import PUBLISHED

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return built_library("no_network", tmp_path_factory.mktemp("network"))


def run(library: Path, folder: Path, *options: str) -> tuple[dict, list[str]]:
    """(exit code by program, attempts)"""
    log = folder / "network.log"
    environment = os.environ | {"LD_PRELOAD": str(library), "NETWORK_LOG": str(log), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "CASCADEOPS_CACHE": str(folder / "cache")}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "tests/network_runs.py"), str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), log.read_text().splitlines() if log.exists() else []


def test_no_program_asks_for_the_network(library, tmp_path):
    codes, attempts = run(library, tmp_path)
    assert len(codes) == 10
    assert [name for name, code in codes.items() if code] == []
    assert (tmp_path / "run/weights.safetensors").is_file() and (tmp_path / "check.html").is_file()
    assert (tmp_path / "run/report.html").is_file()
    assert attempts == []


def test_an_attempt_is_seen(library, tmp_path):
    """So the test above can fail; also one by a process that was started."""
    _, attempts = run(library, tmp_path, "--ask")
    assert "connect" in attempts and "sendto" in attempts


def test_published_files_are_fetched_over_https():
    assert PUBLISHED
    assert all(file.url.startswith("https://") for file in PUBLISHED)
