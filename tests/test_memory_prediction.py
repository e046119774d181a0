"""The predicted memory of a training step against what the allocator hands out in a real step on the CPU."""

import dataclasses
import gc
import itertools
import json

import pytest
import torch
from small_detectors import small_detector

from benchmarks import memory_prediction
from benchmarks.detector_cases import row_detector, training_batch, training_step
from benchmarks.memory_prediction import LiveBytes, predict
from models import recipes, roi_training
from models.optimization import make_optimizer
from models.published_rows import PUBLISHED_ROWS
from models.recomputation import recompute_activations

IMAGE_SIZE = (192, 256)


@pytest.mark.parametrize(
    ("arch", "dtype", "recomputing"),
    [("mask_rcnn", torch.float32, False), ("scnet", torch.bfloat16, False), ("htc", torch.float32, True)],
)
def test_the_prediction_is_what_the_allocator_hands_out(arch, dtype, recomputing, monkeypatch, tmp_path):
    """Within a thousandth, in fact; what a GPU's operators allocate for themselves is not in it."""
    config = recipes.small(arch)
    backbone = dataclasses.replace(config.detector.backbone, norm="frozen_batch")  # others cannot recompute
    config = dataclasses.replace(
        config,
        detector=dataclasses.replace(config.detector, backbone=backbone),
        checkpoint_activations=recomputing,
    )
    monkeypatch.setattr(roi_training, "used_capacity", lambda count, capacity: capacity)  # as on a GPU
    predicted = predict(small_detector(arch, backbone=backbone), config, dtype, 2, IMAGE_SIZE)
    gc.collect()  # or what an earlier profiler saw made is freed in this one's account
    # The weights are made under the profiler too: what is older than it does not appear in its account.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        detector = small_detector(arch, backbone=backbone).train()
        if recomputing:
            recompute_activations(detector)
        optimizer = make_optimizer(config, detector)
        batch = training_batch(2, IMAGE_SIZE)
        for _ in range(2):
            training_step(detector, optimizer, batch, dtype)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    measured = max(itertools.accumulate(size for _, size in changes))
    assert predicted.peak == pytest.approx(measured, rel=0.01)
    assert 0 < predicted.momentum <= predicted.weights < predicted.rest - predicted.weights  # not the optimiser's peak


def test_bytes_alive_on_paper():
    with LiveBytes() as live:
        x = torch.ones(128, requires_grad=True)  # 512 bytes
        y = x.exp()  # 512, kept for the gradient
        z = y * 2  # 512
        del y
        assert (live.now, live.peak) == (1536, 1536)
        view = z[:3]  # no storage of its own
        del z
        assert live.now == 1536
        del view  # and with it z, exp's result and the graph
        assert (live.now, live.peak) == (512, 1536)
        x.detach()[:1] + 1  # 4 bytes are handed out as 512, and freed at once
        assert (live.now, live.peak) == (512, 1536)


def test_stored_predictions_are_of_this_code():
    """One of those that the README shows. After a change of a detector's memory: the command of the message."""
    row = "scnet_r50_fpn_1x_coco"
    now = predict(row_detector(row), PUBLISHED_ROWS[row].recipe, torch.float32)
    assert now.peak == pytest.approx(memory_prediction.stored()[row]["float32"].peak, rel=0.03), (
        "python -m benchmarks.memory_prediction --all --output benchmarks/predicted_memory.json"
    )


def test_the_command_names_rows_that_do_not_exist(capsys):
    with pytest.raises(SystemExit, match="2"):
        memory_prediction.main(["htc_r51"])
    assert "no published row: htc_r51" in capsys.readouterr().err
    assert set(memory_prediction.stored()) == {name for name, row in PUBLISHED_ROWS.items() if row.memory_gb}
