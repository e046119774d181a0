"""python -m models.report: what it shows of a run, of half of one, of two, and of one that means harm."""

import html
import html.parser
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import tiny_config, write_tiny_data
from written_runs import START, write_data, write_run

from models import report
from models.coco_evaluation import average_precision
from models.report_study import Study, study_run
from models.run_record import read_run
from models.training import train

SECTIONS = ["Curves", "Average precision", "Precision and recall", "Kinds of error", "Confusion", "Images",
            "Time and memory", "Settings"]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def page_of(folder: Path, **options) -> str:
    output = folder / "page.html"
    report.main(report.Report(folder=folder, output=output, **options))
    return output.read_text()


def words(page: str) -> str:
    """The text of a page, without its style and pictures."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_run_as_training_leaves_it(tmp_path, capsys):
    data = write_tiny_data(tmp_path / "data")
    train(tiny_config(data, tmp_path / "run"))
    capsys.readouterr()
    report.main(report.Report(folder=tmp_path / "run"))
    assert f"report: {tmp_path}/run/report.html (" in capsys.readouterr().out.replace("\n", "")
    page = (tmp_path / "run/report.html").read_text()
    assert headings(page) == SECTIONS and 'class="note"' not in page
    text = words(page)
    assert "faster_rcnn · finished after 6 steps" in text and f"6 images of 2 classes from {data}" in text
    assert "rpn objectness" in text and "weight_decay 0.0001" in text


def test_what_is_shown_of_a_run(tmp_path, data):
    page = page_of(write_run(tmp_path / "first", data))
    text = words(page)
    assert headings(page) == SECTIONS and 'class="note"' not in page
    assert "Abacus 9000" in text and "2023-11-14 22:13" in text and "torch 2.13.0" in text
    assert "1 min 04 s duration" in text and "of which evaluation 0 min 08 s" in text
    assert "images/s in training, median 24.0" in text and "peak memory, GiB 1.50" in text
    # each square is found a pixel beside its place, IoU 15/17 = 0.88: right at eight of ten thresholds
    assert "mask 0.800 1.000 1.000 0.800 - - box 0.800 1.000 1.000 0.800 - -" in text
    assert re.search(r"class lies on an object .*? calls it something else 2 0.000 2 0.000 ", text)
    assert page.count("data:image/jpeg;base64,") == 2 * 2  # two images: what is there, what was found
    assert len(page.encode()) < 5 * 2**20


def test_numbers_of_a_study_are_those_of_the_evaluation(tmp_path, data):
    run = read_run(write_run(tmp_path / "first", data, quality=5))  # IoU 11/21: right at 0.50 alone
    study = study_run(run, None)
    truth = json.loads((data / "annotations/instances_val.json").read_text())
    for kind, part in study.kinds.items():
        expected = average_precision(truth, study.entries[kind], kind)
        assert (part.ap(), part.ap(threshold=0), part.ap(threshold=5)) == (expected.ap, expected.ap50, expected.ap75)
        assert part.ap(size="small") == expected.small and math.isnan(part.ap(size="large"))
        assert [part.ap(label) for label in range(2)] == list(expected.per_class.values())
        assert part.errors.ap50 == pytest.approx(expected.ap50)
        assert np.nanmean(part.curve()) == pytest.approx(expected.ap)
    assert study.main_kind == "segm" and study.class_names == ["red", "green"]
    assert study.num_objects.tolist() == [1, 1]
    # each object is found, and taken for the other class as well by a detection that comes behind
    assert study.main.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert study.main.errors.counts["class"] == 2


def test_vocs_own_metric_is_shown_where_there_is_one(tmp_path, data):
    run = write_run(tmp_path / "first", data)
    assert "VOC" not in words(page_of(run))
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"images": 2', '"voc_map": 0.7125, "images": 2'))
    text = words(page_of(run))
    assert "0.713 VOC mAP" in text and "VOC mAP: 0.7125 at epoch 2" in text


def test_two_runs(tmp_path, data):
    first = write_run(tmp_path / "first", data)
    second = write_run(tmp_path / "second", data, rate=0.5, quality=3)
    settings = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(settings | {"seed": 7}))
    page = page_of(first, versus=second)
    text = words(page)
    assert headings(page) == SECTIONS and "first beside second" in text
    assert re.search(r"Those that differ: 2 of \d+ first second output \S+first \S+second seed 0 7 ", text)
    one, two = (read_run(folder).evaluations[-1]["mask_ap"] for folder in (first, second))
    assert f"mask, first {one:.3f}" in text and f"mask, second {two:.3f}" in text
    assert f"difference {two - one:+.3f}" in text and two < one
    assert "first does better" in text and "second does better" not in text
    assert page.count("data:image/jpeg;base64,") == 2 * 3
    report.main(report.Report(folder=first, versus=second))
    assert (first / "report-versus-second.html").is_file()


def test_two_runs_on_different_data(tmp_path, data):
    other = write_data(tmp_path / "other")
    path = other / "annotations/instances_val.json"
    content = json.loads(
        path.read_text().replace('"image_id": 10,', '"image_id": 77,').replace('"id": 10,', '"id": 77,')
    )
    path.write_text(json.dumps(content))
    page = page_of(write_run(tmp_path / "first", data), versus=write_run(tmp_path / "second", other))
    assert "evaluated on different images" in words(page)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"0.png"', '"1.png"', "were evaluated on different images"),
        ('"height": 32', '"height": 33', "were evaluated on different images"),
        ('"id": 2, "name"', '"id": 12, "name"', "have other categories"),
        ('"name": "red"', '"name": "blue"', "have other categories"),
    ],
    ids=["file name", "size", "number of a category", "name of a category"],
)
def test_two_data_sets_that_count_alike_are_not_taken_for_one(tmp_path, data, old, new, reason):
    """Most count their images from 1."""
    other = write_data(tmp_path / "other")
    second = write_run(tmp_path / "second", other)
    for kind in ("bbox", "segm"):  # masks are of the size before
        path = second / f"detections.{kind}.json"
        changed = path.read_text().replace('"category_id": 2', '"category_id": 12') if '"id": 12' in new else "[]"
        path.write_text(changed)
    path = other / "annotations/instances_val.json"
    text = path.read_text().replace(old, new, 1)
    path.write_text(text.replace('"category_id": 2', '"category_id": 12') if '"id": 12' in new else text)
    page = page_of(write_run(tmp_path / "first", data), versus=second)
    assert f"The two {reason}, so none are shown side by side." in words(page)
    assert page.count("data:image/jpeg;base64,") == 0


@pytest.mark.parametrize("far", [20, 4e8])
def test_masks_are_left_alone_where_the_detector_has_none(tmp_path, data, far):
    """Its data are opened without a look at their polygons, and pycocotools ends the process where one is 4e8 wide."""
    run = write_run(tmp_path / "first", data)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"arch": "faster_rcnn"}))
    path = data / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[0, 0, far, 1, 1, far]]
    path.write_text(json.dumps(content))
    assert study_run(read_run(run), None).kinds.keys() == {"bbox"}
    assert headings(page_of(run)) == SECTIONS


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda run, data: (run / "metrics.jsonl").write_text(""), "no step has been logged"),
        (lambda run, data: (run / "metrics.jsonl").unlink(), "The run has not been evaluated yet"),
        (lambda run, data: (run / "starts.jsonl").unlink(), "start, machine and versions are not known"),
        (lambda run, data: (run / "detections.segm.json").write_text("[{"), "detections.segm.json; Expecting property"),
        (lambda run, data: (run / "detections.bbox.json").unlink(), "No such file or directory"),
        (lambda run, data: shutil.rmtree(data), "no such data set folder"),
        (lambda run, data: shutil.rmtree(data / "annotations"), "no annotation file for the split 'val'"),
    ],
    ids=["no line", "no metrics", "no starts", "broken results", "no results", "no data", "no annotations"],
)
def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path, data, change, note):
    run = write_run(tmp_path / "first", data)
    change(run, data)
    page = page_of(run)
    assert note in words("".join(re.findall(r'<p class="note">.*?</p>', page)))
    assert "Settings" in headings(page) and "weight_decay 0.0001" in words(page)


def test_results_of_another_evaluation_are_noticed(tmp_path, data):
    run, other = (write_run(tmp_path / name, data, quality=moved) for name, moved in (("first", 1), ("second", 5)))
    for kind in ("bbox", "segm"):
        shutil.copy(other / f"detections.{kind}.json", run)
    assert "AP 0.100 by the former, 0.800 by the latter" in words(page_of(run))


def test_images_that_cannot_be_read_are_named(tmp_path, data):
    run = write_run(tmp_path / "first", data)
    (data / "val/0.png").unlink()
    page = page_of(run)
    assert "0.png: " in words(page) and page.count("data:image/jpeg;base64,") == 2


def test_data_that_were_python_objects_or_have_moved(tmp_path, data):
    described = {"val": {"name": "val_set (Blocks)", "folder": None, "images": 2, "classes": 2}}
    run = write_run(tmp_path / "first", data, data=described)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"data": None}))
    assert "were a Python object" in words(page_of(run))
    assert headings(page_of(run, data=data)) == SECTIONS
    moved = data.rename(tmp_path / "moved")
    run = write_run(tmp_path / "second", moved, data=None)
    assert headings(page_of(run)) == SECTIONS  # the settings name the folder, too


def test_data_of_other_classes_are_not_taken(tmp_path, data):
    run = write_run(tmp_path / "first", data)
    for split in ("train", "val"):
        path = data / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 3, "name": "blue"})
        path.write_text(json.dumps(content))
    assert "the run knows 2 classes, the data 3" in study_run(read_run(run), None)


def test_data_whose_name_no_file_system_takes_are_told_like_those_that_are_gone(tmp_path, data):
    run = write_run(tmp_path / "first", data)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"val_split": "x" * 300}))
    assert "File name too long" in study_run(read_run(run), None)


def test_a_run_that_was_interrupted(tmp_path, data):
    run = write_run(tmp_path / "first", data, steps=5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    page = page_of(run)
    assert "not finished: step 5, epoch 1.7 of 2" in words(page) and headings(page) == SECTIONS


# ---- folders that mean harm

SCRIPT = "<script>document.title='taken'</script><img src=http://evil.invalid/x.png onerror=alert(1)>"


class Tags(html.parser.HTMLParser):
    """The elements of a page, and all their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.names, self.attributes = set(), {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value)


def hostile_run(folder: Path) -> Path:
    """A run in which every text that a page could show is markup."""
    data = write_data(folder / "data", (SCRIPT, '"><script>1</script>'), "\"><b>&quot;'.png")
    run = write_run(
        folder / "<i>run", data, device=SCRIPT, system=SCRIPT, versions={SCRIPT: SCRIPT}, processor=[SCRIPT]
    )
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {SCRIPT: {SCRIPT: SCRIPT}, "arch": SCRIPT}))
    lines = (run / "metrics.jsonl").read_text().replace("loss_class", 'loss_\\"><script>')
    (run / "metrics.jsonl").write_text(lines + json.dumps({"step": 7, "loss": 1e400, f"mask_ap/{SCRIPT}": 1}) + "\n")
    return run


@pytest.mark.parametrize("two", [False, True])
def test_everything_shown_is_escaped(tmp_path, two):
    run = hostile_run(tmp_path)
    page = page_of(run, versus=run if two else None)
    tags = Tags(page)
    assert {"script", "b>", "iframe", "object", "link", "form", "base"}.isdisjoint(tags.names)
    assert not any(name.startswith("on") for name in tags.attributes)
    assert all(source.startswith("data:image/jpeg;base64,") for source in tags.attributes.get("src", ()))
    assert all(target.startswith("#") for target in tags.attributes["href"])
    assert words(page).count("document.title='taken'") > 5  # it is shown, as text
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "entry",
    [
        {"image_id": 99},
        {"image_id": [10]},
        {"category_id": 9},
        {"score": math.nan},
        {"score": 10**400},
        {"score": "high"},
        {"bbox": [0, 0, 1]},
        {"bbox": [0, 0, math.inf, 1]},
        {"bbox": "0123"},
        {"segmentation": {"size": [32, 32], "counts": "0"}},
        {"segmentation": {"size": [32, 32], "counts": "\x7f\x7f"}},
        {"segmentation": {"size": [10**6, 10**6], "counts": "0"}},
        {"segmentation": []},
        None,
        7,
    ],
)
def test_results_that_cannot_be_of_these_data_are_refused_before_they_are_used(tmp_path, data, entry):
    run = write_run(tmp_path / "first", data)
    path = run / "detections.segm.json"
    entries = json.loads(path.read_text())
    entries[1] = entry if not isinstance(entry, dict) else entries[1] | entry
    path.write_text(json.dumps(entries))
    refusal = r"detections\.segm\.json; (entry 1: |it contains (NaN|Infinity), which is no number)"
    assert re.search(refusal, study_run(read_run(run), None))


@pytest.mark.parametrize(("kind", "other"), [("bbox", "segmentation"), ("segm", "bbox")])
def test_results_of_the_other_kind_are_refused(tmp_path, data, kind, other):
    run = write_run(tmp_path / "first", data)
    path = run / f"detections.{kind}.json"
    entries = json.loads((run / f"detections.{'segm' if kind == 'bbox' else 'bbox'}.json").read_text())
    kept = ("image_id", "category_id", "score", other)
    path.write_text(json.dumps([{key: entry[key] for key in kept} for entry in entries]))
    missing = "bbox" if kind == "bbox" else "segmentation"
    assert f"detections.{kind}.json; entry 0: '{missing}' is missing" in study_run(read_run(run), None)


def test_words_that_are_no_unicode_are_shown_as_their_numbers(tmp_path, data, capsys):
    """Half of a pair, as JSON can hold it: of a file name in another encoding, or of somebody who means harm."""
    half = "\udcff\ud800"
    run = write_run(tmp_path / "a\udcff", data, system=half, versions={half: half})
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {half: half, "data": half, "arch": half}))
    page = page_of(run, versus=write_run(tmp_path / "second", data))
    assert page.count(r"\udcff\ud800") > 3 and r"a\udcff" in page
    assert r"a\udcff/page.html" in capsys.readouterr().out


def test_metrics_and_starts_of_any_kind_are_survived(tmp_path, data):
    run = write_run(tmp_path / "first", data)
    lines = [{"step": 10**400}, {"step": -1}, {"step": True}, {"step": 9, "loss": True, "images": None},
             {"step": 8, "loss": "x", "epoch": 1e300, "time": -1e300, "lr": [1]},
             {"step": 10, "time": 1e299, "memory_gib": -5}]  # fmt: skip
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    starts = [
        {"time": 1e300},
        {"time": None},
        {"time": START, "data": 3, "versions": []},
        {"time": START, "device": json.loads("[" * 900 + "]" * 900)},
        [],
        "x",
        {"time": math.nan},
    ]
    with open(run / "starts.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in starts)
    assert headings(page_of(run))[-1] == "Settings"


def test_the_command_line(monkeypatch, capsys, tmp_path, data):
    from models.command_line import run

    folder = write_run(tmp_path / "first", data)
    monkeypatch.setattr(sys, "argv", ["models/report.py", str(folder), "--output", str(tmp_path / "x.html")])
    with pytest.raises(SystemExit) as end:
        run(report.Report, report.main, examples=report.EXAMPLES)
    assert end.value.code == 0 and (tmp_path / "x.html").is_file()
    monkeypatch.setattr(sys, "argv", ["models/report.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run(report.Report, report.main, examples=report.EXAMPLES)
    assert end.value.code == 3 and "this is not the folder of a training run" in capsys.readouterr().err
    assert isinstance(study_run(read_run(folder), None), Study)
