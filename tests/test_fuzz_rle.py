"""scripts/fuzz_rle.py: the harness has the rules of models/data/segmentation.py, and finds nothing.

CASCADEOPS_RLE_EXECUTIONS=100000000 asks for more than the everyday 200,000 (make fuzz).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_api
from test_data_fuzz import mutated

from models.data.segmentation import MalformedAnnotation, checked_run_lengths, run_lengths

ROOT = Path(__file__).parent.parent
EXECUTIONS = int(os.environ.get("CASCADEOPS_RLE_EXECUTIONS", 200_000))


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Path:
    if shutil.which(os.environ.get("CXX", "g++")) is None or sys.platform != "linux":
        pytest.skip("needs g++ and its sanitizers")
    specification = importlib.util.spec_from_file_location("fuzz_rle", ROOT / "scripts/fuzz_rle.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.build(tmp_path_factory.mktemp("fuzz") / "rle")


def test_no_text_is_treated_wrongly(harness):
    done = subprocess.run([harness, str(EXECUTIONS), "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    accepted = int(done.stdout.split()[2])
    assert EXECUTIONS / 10 < accepted < EXECUTIONS / 2


def test_the_rules_are_those_of_the_reader(harness):
    """So what the harness shows about texts that pass holds for those that pass in Python."""
    random, lines, expected = np.random.default_rng(0), [], []
    for _ in range(3000):
        height, width = random.integers(1, 9, 2).tolist()
        mask = np.asfortranarray(random.random((height, width)) < random.random(), np.uint8)
        text = mask_api.encode(mask)["counts"]
        if random.random() < 0.7:
            text = mutated(random, text)
        elif random.random() < 0.3:
            text = random.integers(48, 112, random.integers(0, 12), np.uint8).tobytes()
        lines.append(f"{height} {width} {text.hex() or '-'}")
        try:
            counts = text.decode("ascii")
            checked_run_lengths({"size": [height, width], "counts": counts}, height, width)
            expected.append(run_lengths(text).tolist())
        except (MalformedAnnotation, UnicodeDecodeError):
            expected.append("refused")
    done = subprocess.run([harness, "--check"], input="\n".join(lines), capture_output=True, text=True, check=True)
    found = [line if line == "refused" else [int(run) for run in line.split()] for line in done.stdout.splitlines()]
    differing = [
        (line, ours, theirs) for line, ours, theirs in zip(lines, expected, found, strict=True) if ours != theirs
    ]
    assert not differing
    assert 300 < found.count("refused") < 2700


def test_on_paper(harness):
    """One run of 4 pixels is a mask of 2 x 2; one of 5 is none, nor are runs of 3 and 0."""
    lines = "2 2 34\n2 2 35\n2 2 3330\n"  # the texts "4", "5" and "30"
    done = subprocess.run([harness, "--check"], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "refused", "refused"]
