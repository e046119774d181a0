"""Files and folders of strangers: each of the zoo is refused by name, at once, in little memory, and runs nothing.

The zoo: malicious_weights.py, malicious_files.py, malicious_runs.py. malicious_runner.py reads all of it in one process
under an audit hook.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECONDS, MEBIBYTES, CHARACTERS = 1.0, 256, 40_000


def run(folder: Path, *options: str) -> list[dict]:
    """What malicious_runner.py says of each case."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/malicious_runner.py"), str(folder), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> list[dict]:
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    folder = tmp_path_factory.mktemp("zoo")
    found = run(folder)
    assert not list(folder.rglob("owned")) and not list(folder.rglob("victim"))
    return found


def names(cases) -> list[str]:
    return [f"{case['name']}: {case['error']} {case['text'][:200]} {case['events'][:3]}" for case in cases]


def test_the_zoo_is_whole(zoo):
    """As many of each kind as there were, so that none is lost unseen."""
    counts = Counter(case["reader"] for case in zoo)
    least = {
        "weights": 380,
        "annotations": 60,
        "check": 60,
        "image": 55,
        "detector": 40,
        "checkpoint": 36,
        "config": 30,
    }
    least |= {"voc xml": 24, "data": 9, "cache": 8, "replay": 8, "result": 8, "label map": 5, "voc": 5}
    least |= {"class names": 6, "metrics": 1, "partial": 1}
    assert counts.keys() == least.keys()
    assert all(counts[reader] >= number for reader, number in least.items()), counts
    assert len({(case["reader"], case["name"]) for case in zoo}) == len(zoo)


def test_each_is_refused_with_an_error_that_names_it(zoo):
    refused = [case for case in zoo if case["expected"] == "refused"]
    assert len(refused) > 650
    assert names(case for case in refused if not case["typed"]) == []
    assert names(case for case in zoo if case["error"] and not case["typed"]) == []
    # a result comes as a text, which has no file
    assert names(case for case in refused if case["reader"] != "result" and case["path"] not in case["text"]) == []


def test_what_is_harmless_is_read(zoo):
    """Beside something that is wrong and is not used."""
    assert names(case for case in zoo if case["expected"] == "left alone" and case["error"]) == []


def test_nothing_is_run(zoo):
    """No import, no code, no process, no socket, no file outside of the folder, none that is written."""
    assert names(case for case in zoo if case["events"]) == []


def test_each_is_answered_at_once_and_in_little_memory(zoo):
    assert names(case for case in zoo if case["seconds"] > SECONDS) == []
    assert names(case for case in zoo if case["mebibytes"] > MEBIBYTES) == []


def test_no_message_steers_the_terminal_or_fills_it(zoo):
    assert names(case for case in zoo if not case["text"].replace("\n", "").isprintable()) == []
    assert names(case for case in zoo if len(case["text"]) > CHARACTERS) == []


def test_the_watch_sees_an_unsafe_reader(tmp_path):
    """The same file, given to Python's own unpickler: so the tests above can fail."""
    (case,) = run(tmp_path, "--unsafe")
    assert {event.split()[0] for event in case["events"]} >= {"pickle.find_class", "os.system"}
    assert list(tmp_path.rglob("victim"))
