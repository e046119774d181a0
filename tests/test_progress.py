"""Progress on a terminal and in a file; the metrics log, also across an interruption."""

import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models.loss_window import compact_losses
from models.progress import MetricsLog, Progress


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, color_system=None)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_plain_lines_where_there_is_no_terminal():
    out = console(False)
    with Progress("evaluate", total=4, unit="images", every_seconds=0, console=out) as progress:
        progress.advance(1, loss=1.23456)
        progress.advance(3, epoch="2/5", images_per_second=20.0, memory="0.63 GiB", details="class 1/0.5")
    first, last = out.file.getvalue().splitlines()
    assert first == "evaluate  1/4 images  0:00 gone, 0:00 left  loss 1.235"
    assert last == (
        "evaluate  epoch 2/5  4/4 images  0:00 gone, 0:00 left  images per second 20  0.63 GiB  class 1/0.5"
    )


def test_plain_lines_come_now_and_then_and_at_the_end():
    out = console(False)
    with Progress("train", total=100, every_seconds=3600, console=out) as progress:
        for _ in range(100):
            progress.advance()
    assert out.file.getvalue().splitlines() == ["train  100/100 steps  0:00 gone, 0:00 left"]


def test_the_time_left_counts_from_where_a_resumed_run_started(monkeypatch):
    clock = iter([0.0, 60.0])
    monkeypatch.setattr("models.progress.time.monotonic", lambda: next(clock))
    out = console(False)
    progress = Progress("train", total=100, done=80, console=out)
    progress.advance(10)  # 10 steps in 60 s, 10 to go
    assert out.file.getvalue() == "train  90/100 steps  1:00 gone, 1:00 left\n"


def test_the_end_is_told_once_though_processes_that_share_the_work_count_too_far():
    out = console(False)
    with Progress("evaluate", total=5, unit="images", every_seconds=3600, console=out) as progress:
        for _ in range(4):
            progress.advance(2)
    assert out.file.getvalue().splitlines() == ["evaluate  5/5 images  0:00 gone, 0:00 left"]


def test_a_bar_on_a_terminal():
    out = console(True)
    with Progress("train", total=8, console=out) as progress:
        progress.advance(8, epoch="1/2", loss=0.5, details="class 0.3/[0.1]")
        progress.print("epoch 1: [mask AP] 0.31")
    text = out.file.getvalue()
    assert "8/8" in text and "loss 0.5" in text and "epoch 1: [mask AP] 0.31" in text
    lines = text.splitlines()
    bar = max(i for i, line in enumerate(lines) if "8/8 steps eta 0:00 loss 0.5" in line)
    assert "train epoch 1/2" in lines[bar] and "class 0.3/[0.1]" in lines[bar + 1]


def test_a_part_has_its_own_bar_below_and_leaves_the_other():
    out = console(True)
    with Progress("train", total=8, console=out) as progress:
        progress.advance(4, epoch="1/2", details="class 0.3")
        with Progress("evaluate", total=30, unit="images", inside=progress) as part:
            part.advance(10, speed="7.0 images/s")
            part._bar.refresh()
            shown = out.file.getvalue()
        progress.advance(4, epoch="2/2")
    rows = [line for line in shown.splitlines() if "evaluate" in line]
    assert "10/30 images eta 0:00 7.0 images/s" in rows[-1]
    assert "train epoch 2/2" in out.file.getvalue() and "evaluate" not in out.file.getvalue().splitlines()[-1]


def test_a_part_is_plain_lines_between_the_others():
    out = console(False)
    with Progress("train", total=8, every_seconds=0, console=out) as progress:
        progress.advance(4)
        with Progress("evaluate", total=3, unit="images", inside=progress) as part:
            part.advance(3)
        progress.advance(4)
    assert [line.split("  ")[:2] for line in out.file.getvalue().splitlines()] == [
        ["train", "4/8 steps"],
        ["evaluate", "3/3 images"],
        ["train", "8/8 steps"],
    ]


def test_parts_of_a_loss_in_one_line():
    means = {"loss": 3.0, "loss_rpn_objectness": 0.0527, "loss_rpn_box": 0.0143, "loss_semantic": 0.122}
    means |= {"stage0.loss_class": 0.509, "stage0.loss_box": 0.281, "stage1.loss_class": 12.34, "gradient_norm": 3.0}
    assert compact_losses(means) == "rpn 0.053/0.014  semantic 0.12  class 0.51/12  box 0.28"


def test_metrics_are_one_json_object_a_line(tmp_path):
    log = MetricsLog(tmp_path)
    before = time.time()
    log.write(1, {"loss": 0.5})
    first = read(tmp_path / "metrics.jsonl")  # already there, not only at the end
    assert before - 0.001 <= first[0].pop("time") <= time.time() + 0.001
    assert first == [{"step": 1, "loss": 0.5}]
    log.write(2, {"loss": math.nan, "rate": math.inf})
    log.close()
    assert without_time(read(tmp_path / "metrics.jsonl"))[1] == {"step": 2, "loss": None, "rate": None}


def test_a_resumed_log_reads_as_if_the_run_had_never_stopped(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')  # cut off by a crash
    log = MetricsLog(tmp_path, resume_step=20)
    log.write(30, {"loss": 2.0})
    log.close()
    lines = without_time(read(tmp_path / "metrics.jsonl"))
    assert lines == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 1.0}, {"step": 30, "loss": 2.0}]


def test_a_new_run_starts_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_reads_what_was_logged(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path)
    log.write(3, {"loss": 0.5, "images_per_second": 20.0})
    log.write(3, {"images": 8, "images_per_second": 60.0, "mask_ap": 0.25})
    log.picture(3, "detections", np.zeros((4, 6, 3), np.uint8))
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars == {
        "loss": [(3, 0.5)],
        "images_per_second": [(3, 20.0)],
        "evaluation/images": [(3, 8.0)],
        "evaluation/images_per_second": [(3, 60.0)],
        "evaluation/mask_ap": [(3, 0.25)],
    }
    assert [(image.width, image.height) for image in events.Images("detections")] == [(6, 4)]
