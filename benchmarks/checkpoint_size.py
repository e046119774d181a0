"""Bytes and seconds of a checkpoint: python -m benchmarks.checkpoint_size htc_r50_fpn_1x_coco [--folder /mnt/disk]

Weights and momentum of a detector of its real size, written as a training run does (hashes, fsync), and read back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from models.build import build_from_config
from models.checkpoints import read_checkpoint, write_checkpoint
from models.loss_window import LossWindow
from models.optimization import make_optimizer
from models.published_rows import PUBLISHED_ROWS
from models.recipes import TrainConfig
from models.resume import TrainingState


def measured(name: str, folder: Path) -> dict:
    config: TrainConfig = PUBLISHED_ROWS[name].recipe
    detector = build_from_config(config.arch, config.detector)
    optimizer = make_optimizer(config, detector)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    for parameter in trained:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    device = torch.device("cpu")
    state = TrainingState(detector, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, LossWindow(), device)
    start = time.monotonic()
    tensors, facts = state.capture()
    path = write_checkpoint(folder, 1, tensors, facts)
    written = time.monotonic()
    read_checkpoint(path)
    return {
        "detector": name,
        "parameters": sum(parameter.numel() for parameter in detector.parameters()),
        "trained": sum(parameter.numel() for parameter in trained),
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "seconds to write": round(written - start, 2),
        "seconds to read and verify": round(time.monotonic() - written, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("detector", nargs="*", default=["htc_r50_fpn_1x_coco"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as room:
        for name in options.detector:
            json.dump(measured(name, Path(room) / name), sys.stdout)
            print(flush=True)
