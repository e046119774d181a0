"""Annotations taken column by column are those that are taken one by one, and faults are named alike."""

import copy
from pathlib import Path

import numpy as np
import pytest

from models.data import annotations as module
from models.data.annotation_columns import take_columns
from models.data.annotations import pack_annotations
from models.errors import DataError

RUNS = {"size": [40, 60], "counts": [0, 2400]}
UNUSUAL = {  # of which the first five are left out or read by themselves, and the others refused
    "a crowd": {"iscrowd": 1, "segmentation": RUNS},
    "ignored": {"ignore": 1},
    "narrow": {"bbox": [3, 4, 0.5, 9]},
    "outside": {"bbox": [60, 4, 5, 5]},
    "run lengths": {"segmentation": RUNS},
    "one short polygon": {"segmentation": [[1, 2], [1, 1, 9, 1, 9, 9]]},
    "short polygons": {"segmentation": [[1, 2]]},
    "odd polygon": {"segmentation": [[1, 1, 9, 1, 9, 9, 5]]},
    "no area": {"area": 0},
    "no known area": {"area": None},
    "text": {"segmentation": [[1, 1, 9, 1, 9, "9"]]},
    "far": {"segmentation": [[1, 1, 9, 1, 9, 2e5]]},
    "far box": {"bbox": [1, 1, 9, 2e5]},
    "three sides": {"bbox": [1, 1, 9]},
    "a box of texts": {"bbox": ["1", 1, 9, 9]},
    "area of text": {"area": "1"},
    "no mask": {"segmentation": None},
    "a list of numbers": {"segmentation": [1, 1, 9, 1, 9, 9]},
    "id twice": {"id": 3},
    "huge id": {"id": 2**63},
    "lowest id": {"id": -(2**63)},
    "true": {"id": True},
    "unknown image": {"image_id": 9},
    "unknown category": {"category_id": [1]},
}


def content(changes: list[dict]) -> dict:
    random = np.random.default_rng(0)
    annotations = []
    for number in range(1, 31):
        x, y, w, h = np.round(random.uniform(2, 20, 4), 2).tolist()
        polygons = [[x, y, x + w, y, x + w, y + h]] * int(random.integers(1, 3))
        entry = {"id": number, "image_id": int(random.integers(1, 4)), "category_id": int(random.integers(1, 3))}
        annotations.append(entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": polygons})
    for change, place in zip(changes, (10, 20, 7), strict=False):
        annotations[place] |= change
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in (1, 2)]}


def outcome(given: dict, boxes_only: bool):
    try:
        found = pack_annotations(copy.deepcopy(given), Path("a.json"), boxes_only)
    except DataError as error:
        return str(error)
    values = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(found).items()}
    packed = values.pop("segmentations")
    return values | {"masks": [packed and packed.decode(i, 40, 60).tolist() for i in range(len(found.labels))]}


@pytest.mark.parametrize("boxes_only", [False, True])
@pytest.mark.parametrize("names", [["a crowd", "narrow"], *([name] for name in UNUSUAL), []], ids="+".join)
def test_columns_are_what_is_taken_one_by_one(monkeypatch, names, boxes_only):
    given = content([UNUSUAL[name] for name in names])
    by_columns = outcome(given, boxes_only)
    monkeypatch.setattr(module, "take_columns", lambda *_: None)
    one_by_one = outcome(given, boxes_only)
    assert by_columns == one_by_one
    assert isinstance(by_columns, dict) or names


def test_what_is_left_out_does_not_send_the_others_the_slow_way():
    annotations = content([UNUSUAL["a crowd"], UNUSUAL["outside"], UNUSUAL["run lengths"]])["annotations"]
    rows, labels, sizes = {1: 0, 2: 1, 3: 2}, {1: 0, 2: 1}, np.array([[40, 60]] * 3)
    columns = take_columns(annotations, rows, labels, sizes, set(), boxes_only=False)
    assert np.flatnonzero(~columns.plain).tolist() == [7, 10, 20] and len(columns.segmentations) == 27
    assert columns.boxes[0].tolist() == pytest.approx(
        [*annotations[0]["bbox"][:2], *np.add(annotations[0]["bbox"][:2], annotations[0]["bbox"][2:])]
    )
    for entry in annotations:
        del entry["segmentation"]
    assert take_columns(annotations, rows, labels, sizes, set(), boxes_only=True).plain.sum() == 28
    assert take_columns(annotations, rows, labels, sizes, {5}, boxes_only=True) is None
