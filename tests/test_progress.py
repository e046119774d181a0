"""Progress on a terminal and in a file; the metrics log, also across an interruption."""

import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

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
        progress.advance(3, images_per_second=20.0)
    first, last = out.file.getvalue().splitlines()
    assert first == "evaluate  1/4 images  0:00 gone, 0:00 left  loss 1.235"
    assert last == "evaluate  4/4 images  0:00 gone, 0:00 left  images per second 20"


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


def test_a_bar_on_a_terminal():
    out = console(True)
    with Progress("train", total=8, console=out) as progress:
        progress.advance(8, loss=0.5)
        progress.print("epoch 1: [mask AP] 0.31")
    text = out.file.getvalue()
    assert "8/8" in text and "loss 0.5" in text and "epoch 1: [mask AP] 0.31" in text


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
    log.write(3, {"loss": 0.5})
    log.picture(3, "detections", np.zeros((4, 6, 3), np.uint8))
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert [(image.width, image.height) for image in events.Images("detections")] == [(6, 4)]
