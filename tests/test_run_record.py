"""models/run_record.py: what is no run, how long one took, and folders that would take the reader's time or memory."""

import json
import math
import os
import time
from pathlib import Path

import pytest
from written_runs import write_data, write_run

from models import report
from models.errors import DataError
from models.run_record import RunRecord, read_run


def test_the_time_between_an_interruption_and_the_next_start_does_not_count():
    def record(times, starts):
        steps = [{"step": i + 1.0, "time": time} for i, time in enumerate(times)]
        return RunRecord(Path("x"), {}, steps, [], [{"time": start} for start in starts])

    assert record([10, 20, 1010, 1020], [0]).seconds() == 1020
    assert record([10, 20, 1010, 1020], [0, 1000]).seconds() == 20 + 20
    assert record([10, 20, 1010], [0, 500, 1000]).seconds() == 20 + 10  # a start that came to nothing
    assert math.isnan(record([], [0]).seconds()) and math.isnan(record([10], []).seconds())


def test_a_run_that_was_started_ever_so_often_does_not_hold_the_reader_up():
    """28 s of the processor, when each line looked at each start; a log may have a million of either."""
    times = [float(second) for second in range(20_000)]
    lines = [{"step": start, "time": start + 0.75, "images": 1.0} for start in times]
    record = RunRecord(Path("x"), {}, [], lines, [{"time": start} for start in times])
    begin = time.process_time()
    assert record.seconds() == 0.75 * len(times) and record.evaluation_seconds() == 0.75 * (len(times) - 1)
    assert time.process_time() - begin < 5


def test_nor_does_one_whose_epochs_only_its_first_line_knows():
    record = RunRecord(Path("x"), {}, [{"step": 1.0, "epoch": 0.5}, *({"step": 2.0} for _ in range(20_000))], [], [])
    begin = time.process_time()
    assert [record.epoch(step) for step in range(20_000)] == [step / 2 for step in range(20_000)]
    assert time.process_time() - begin < 5


def test_a_line_of_no_step_says_nothing_about_epochs():
    record = RunRecord(Path("x"), {}, [{"step": 3.0, "epoch": 1.0}, {"step": 0.0, "epoch": 1.0}], [], [])
    assert record.epoch(6) == 2


DEEP = '{"a": ' * 200 + "1" + "}" * 200
"""The reader of JSON takes it; on top of what calls it, its printing may take more calls than Python allows."""


@pytest.mark.parametrize(
    ("make", "where", "why"),
    [
        (lambda folder: None, "nothing-here", "there is no such folder"),
        (lambda folder: folder.mkdir(), "nothing-here", "it has no config.json"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("[")), "config.json", "Expecting value"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text("[]")),
            "config.json",
            "expected an object",
        ),
        (lambda f: (f.mkdir(), (f / "config.json").write_text("[" * 99999)), "config.json", "recursion"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text(DEEP)), "config.json", "deeper than"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text("{}"), os.mkfifo(f / "metrics.jsonl")), "config", "pipe"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text(" " * 2**20 + "{}")), "config", "too large"),
    ],
    ids=["no folder", "empty", "broken", "a list", "deep", "less deep", "a pipe", "large"],
)
def test_what_is_no_run_is_refused(tmp_path, make, where, why):
    make(tmp_path / "nothing-here")
    with pytest.raises(DataError) as error:
        report.main(report.Report(folder=tmp_path / "nothing-here"))
    assert where in error.value.where and why in error.value.why
    assert not (tmp_path / "nothing-here/report.html").exists()


def test_a_folder_of_runs_names_them(tmp_path):
    write_run(tmp_path / "runs/mine", write_data(tmp_path / "data"))
    with pytest.raises(DataError) as error:
        read_run(tmp_path / "runs")
    assert error.value.fix == f"python -m models.report {tmp_path}/runs/mine"


LONG = "k" * 100_000


@pytest.mark.parametrize(
    "settings",
    [
        {LONG: {str(i): 0 for i in range(3000)}},
        {LONG: {str(i): {} for i in range(3000)}},
        {"a": json.loads("[" * 200 + "]" * 200)},
    ],
    ids=["a long name over many", "... over nothing", "deep lists"],
)
def test_settings_that_would_unfold_to_far_more_than_they_are_get_refused(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"why: +it(s dotted names together| nests deeper)"):
        read_run(tmp_path)
