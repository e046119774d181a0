"""Readers of what strangers write: any input is read, or refused with one typed error, in bounded time.

A few hundred inputs each; CASCADEOPS_EXAMPLES=1000000 asks for more (make fuzz).
"""

import copy
import json
import os
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from test_voc import OBJECTS, xml

from models.data.annotations import read_annotations
from models.data.check import check_dataset
from models.data.segmentation import MalformedAnnotation, checked_run_lengths
from models.data.voc_xml import read_voc_file
from models.errors import DataError, UsageError

EXAMPLES = int(os.environ.get("CASCADEOPS_EXAMPLES", 400))
SECONDS = 1.0
ODD = [
    None,
    True,
    -1,
    0,
    7,
    2**31,
    2**63,
    2**70,
    1e308,
    0.5,
    "",
    "1",
    "../x",
    "\0",
    [],
    [[]],
    {},
    [1, 2],
    [[1, 2, 3]],
    "é" * 300,
]


def mutated(random: np.random.Generator, data: bytes) -> bytes:
    """With bytes changed, cut out, repeated or cut off."""
    data = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(len(data) + 1))
        kind = random.integers(4)
        if kind == 0 and at < len(data):
            data[at] = random.integers(256)
        elif kind == 1:
            del data[at : at + int(random.integers(1, 30))]
        elif kind == 2:
            data[at:at] = data[at : at + int(random.integers(1, 30))]
        elif random.random() < 0.1:
            del data[at:]
    return bytes(data)


def outcomes(read, inputs) -> dict[str, int]:
    """How many inputs were read, and how many refused. Any other error is a failure of the test, as is a slow one."""
    counts = {"read": 0, "refused": 0}
    for value in inputs:
        start = time.process_time()
        try:
            read(value)
            counts["read"] += 1
        except (DataError, UsageError, MalformedAnnotation):
            counts["refused"] += 1
        assert time.process_time() - start < SECONDS, value
    return counts


def test_voc_xml(tmp_path):
    random, whole, path = np.random.default_rng(0), xml(OBJECTS["2007_000027"]).encode(), tmp_path / "a.xml"

    def read(data):
        path.write_bytes(data)
        read_voc_file(path)

    counts = outcomes(read, (mutated(random, whole) for _ in range(EXAMPLES)))
    assert min(counts.values()) > EXAMPLES / 50, counts


def content() -> dict:
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    runs = mask_api.encode(np.asfortranarray(np.tri(40, 60, dtype=np.uint8)))["counts"].decode()
    base = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    segmentations = [[square], {"size": [40, 60], "counts": runs}, {"size": [40, 60], "counts": [0, 2400]}]
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}],
        "annotations": [base | {"id": i, "segmentation": s} for i, s in enumerate(segmentations, 1)],
        "categories": [{"id": 1, "name": "square"}],
    }


def with_odd_values(random: np.random.Generator, whole: dict) -> dict:
    """A copy with a few values, anywhere, replaced by odd ones or gone."""
    result = copy.deepcopy(whole)
    for _ in range(random.integers(1, 3)):
        place = result
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[random.integers(len(keys))]
            if not isinstance(place[key], dict | list) or random.random() < 0.2:
                if random.random() < 0.2:
                    del place[key]
                else:
                    place[key] = copy.deepcopy(ODD[random.integers(len(ODD))])
                break
            place = place[key]
    return result


@pytest.mark.parametrize("boxes_only", [False, True])
def test_coco_json(tmp_path, boxes_only):
    """What is read can be drawn: pycocotools is given nothing that ends it."""
    random, path, whole = np.random.default_rng(1), tmp_path / "a.json", json.dumps(content()).encode()

    def read(data):
        path.write_bytes(data)
        annotations = read_annotations(path, boxes_only)
        for index in range(0 if boxes_only else len(annotations.labels)):
            row = int(np.searchsorted(annotations.object_offsets, index, side="right")) - 1
            height, width = annotations.sizes[row].tolist()
            if height * width < 10**6:
                assert annotations.segmentations.decode(index, height, width).shape == (height, width)

    inputs = (
        mutated(random, whole) if random.random() < 0.5 else json.dumps(with_odd_values(random, content())).encode()
        for _ in range(EXAMPLES)
    )
    counts = outcomes(read, inputs)
    assert min(counts.values()) > EXAMPLES / 50, counts


def test_what_the_reader_refuses_the_check_finds(tmp_path):
    random, path = np.random.default_rng(3), tmp_path / "annotations/instances_val.json"
    path.parent.mkdir()
    (tmp_path / "val").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "val/1.jpg")

    def read(whole):
        path.write_text(json.dumps(whole))
        try:
            findings, _ = check_dataset(tmp_path, quick=True)
            clean = not findings.serious
        except DataError:
            clean = False
        try:
            read_annotations(path)
        except DataError:
            assert not clean, whole
            raise

    counts = outcomes(read, (with_odd_values(random, content()) for _ in range(EXAMPLES)))
    assert min(counts.values()) > EXAMPLES / 50, counts


def test_run_lengths(tmp_path):
    """What is accepted is a mask of the right size, and the one that pycocotools makes of it."""
    random = np.random.default_rng(2)

    def read(runs):
        counts = checked_run_lengths(runs, *runs["size"])
        assert mask_api.decode({"size": runs["size"], "counts": counts}).shape == tuple(runs["size"])

    def inputs():
        for _ in range(EXAMPLES):
            size = random.integers(1, 40, 2).tolist()
            mask = np.asfortranarray(random.random(size) < random.random(), np.uint8)
            text = mask_api.encode(mask)["counts"]
            if random.random() < 0.3:
                flat = random.integers(-1 if random.random() < 0.2 else 0, 50, random.integers(1, 20))
                yield {"size": size, "counts": [*flat.tolist(), max(size[0] * size[1] - int(flat.sum()), 0)]}
            elif random.random() < 0.3:
                yield {"size": size, "counts": text.decode()}
            else:
                yield {"size": size, "counts": mutated(random, text).decode("latin-1")}

    counts = outcomes(read, inputs())
    assert min(counts.values()) > EXAMPLES / 20, counts
