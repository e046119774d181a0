"""The scripts of examples/ run and assert what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder: Path, script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_exported_function_is_loaded_by_another_process(tmp_path):
    """Without AOTInductor, whose compilation takes half a minute: CI runs the whole script."""
    run(tmp_path, "export_pt2.py", "--without-aoti")
    assert run(tmp_path, "export_pt2.py", "--load").splitlines() == [
        "torch.export, 200 proposals: equal; [50, 50] kept",
        "torch.export, 1000 proposals: equal; [50, 50] kept",
    ]


def test_torchvision_mask_rcnn_finds_the_same_on_our_operators(tmp_path):
    pytest.importorskip("torchvision")
    assert run(tmp_path, "torchvision_mask_rcnn.py").count("100 detections: the same") == 2
