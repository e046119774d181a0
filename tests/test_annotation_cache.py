"""Cached annotations: the same as read ones, made again when the file or the cache is another, shared by processes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models.data import (
    CocoDataset,
    annotation_cache,
    annotation_columns,
    annotation_json,
    annotations,
    segmentation,
)
from models.data.annotations import read_annotations
from models.errors import DataError
from models.images import MAX_PIXELS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """1000 annotations of 1203 classes, with crowds."""
    path = tmp_path_factory.mktemp("file") / "instances_train.json"
    command = [sys.executable, "scripts/coco_sized.py", str(path), "--images", "150", "--annotations", "1000"]
    subprocess.run([*command, "--classes", "1203"], cwd=ROOT, check=True)
    return path


@pytest.fixture
def file(original, tmp_path, monkeypatch) -> Path:
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "train").mkdir()
    monkeypatch.setenv("CASCADEOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "SMALLEST", 0)
    return Path(shutil.copy2(original, tmp_path / "set" / "annotations"))


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that were read, and not taken from the cache."""
    done = []

    def read(path, boxes_only):
        done.append(path)
        return read_annotations(path, boxes_only)

    monkeypatch.setattr("models.data.coco.read_annotations", read)
    return done


CLEANING = {2: "0a47771bcc785b09"}
"""Version of the cache: hash of the code that decides what is in it."""


def test_the_version_is_raised_when_the_cleaning_changes():
    """Comments and docstrings do not matter."""
    text = f"{MAX_PIXELS}\n"
    for module in (annotations, annotation_columns, segmentation):
        source = re.sub(r'(?ms)^ *""".*?"""$', "", Path(module.__file__).read_text())
        lines = (re.sub(r"(^| +)#.*", "", line).rstrip() for line in source.splitlines())
        text += "".join(f"{line}\n" for line in lines if line)
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert {annotation_cache.VERSION: found} == CLEANING, (
        f"the code that checks and cleans annotations has changed: where that changes what it gives or refuses, raise "
        f"annotation_cache.VERSION, or old caches go past it; then write {{VERSION: {found!r}}} here"
    )


def open_it(file: Path, **options) -> CocoDataset:
    return CocoDataset(file.parent.parent, "train", **options)


def cached_files(file: Path) -> list[Path]:
    return sorted((file.parent.parent.parent / "cache" / "annotations").glob("*.safetensors"))


def everything(annotations) -> dict:
    parts = {**vars(annotations), **(vars(annotations.segmentations) if annotations.segmentations else {})}
    parts.pop("segmentations")
    return parts


def assert_same(one, other):
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == other[name].dtype and np.array_equal(value, other[name]), name
        else:
            assert value == other[name] and type(value) is type(other[name]), name


@pytest.mark.parametrize("boxes_only", [False, True])
def test_what_comes_from_the_cache_is_what_was_read(file, reads, boxes_only):
    plain = read_annotations(file, boxes_only)
    first, second = open_it(file, boxes_only=boxes_only), open_it(file, boxes_only=boxes_only)
    assert len(reads) == 1 and len(cached_files(file)) == 1
    assert_same(first.annotations, plain)
    assert_same(second.annotations, plain)
    assert second.num_classes == 1203 and second.objects_left_out.keys() == {"a crowd"}
    if not boxes_only:
        assert np.array_equal(second.mask(3, 0), first.mask(3, 0)) and second.mask(3, 0).any()
    with pytest.raises(ValueError, match="read-only"):
        second.annotations.boxes[0] = 0


def test_masks_and_boxes_alone_are_cached_apart(file, reads):
    open_it(file)
    assert open_it(file, boxes_only=True).annotations.segmentations is None and len(reads) == 2


def test_another_time_size_or_content_is_another_file(file, reads):
    open_it(file)
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    open_it(file)
    text = file.read_text()
    file.write_text(text.replace('"class 7"', '"klass 7"'))  # within the last bytes, of the same length
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert open_it(file).class_names[6] == "klass 7"
    file.write_text(text + " ")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    open_it(file)
    assert len(reads) == 4
    file.write_text(text)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    open_it(file)
    assert len(reads) == 4


def test_a_cache_of_another_version_is_not_used(file, reads, monkeypatch):
    open_it(file)
    monkeypatch.setattr(annotation_cache, "VERSION", annotation_cache.VERSION - 1)
    open_it(file)
    assert len(reads) == 2


def test_a_damaged_cache_is_made_again(file, reads):
    plain = read_annotations(file)
    open_it(file)
    (path,) = cached_files(file)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [whole[:length] for length in (0, 3, 20, len(whole) // 2, len(whole) - 1)] + [whole + b"x"]
    for at in [0, 9, *random.integers(0, len(whole), 20).tolist(), len(whole) - 1]:
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << random.integers(8)]) + whole[at + 1 :])
    for count, data in enumerate(damaged):
        path.unlink()  # and so a new file: the old one is mapped
        path.write_bytes(data)
        with pytest.raises((OSError, ValueError, KeyError, TypeError)):
            annotation_cache.load(path)
        if count < 4:
            assert_same(open_it(file).annotations, plain)
            assert len(reads) == count + 2 and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(file, reads, monkeypatch):
    blocker = file.parent.parent / "a file"
    blocker.touch()
    monkeypatch.setenv("CASCADEOPS_CACHE", str(blocker))
    assert len(open_it(file).annotations.labels) > 950
    monkeypatch.setattr(annotation_cache, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setenv("CASCADEOPS_CACHE", str(file.parent / "cache"))
    assert len(open_it(file).annotations.labels) > 950 and len(reads) == 2


def test_small_files_are_not_cached_and_old_ones_are_discarded(file, reads, monkeypatch):
    monkeypatch.setattr(annotation_cache, "KEPT", 2)
    for step in range(4):
        os.utime(file, ns=(0, step))
        open_it(file)
        time.sleep(0.01)
    assert len(cached_files(file)) == 2
    open_it(file)
    assert len(reads) == 4  # the newest is among them
    monkeypatch.setattr(annotation_cache, "SMALLEST", 2**40)
    open_it(file)
    assert len(reads) == 5


def test_processes_that_start_together_read_the_file_once(file, tmp_path):
    code = (
        "import sys; from models.data import CocoDataset, annotation_cache, coco\n"
        "annotation_cache.SMALLEST = 0\n"
        "read = coco.read_annotations\n"
        "coco.read_annotations = lambda *a: print('read') or read(*a)\n"
        "print(len(CocoDataset(sys.argv[1], 'train').annotations.labels))"
    )
    command = [sys.executable, "-c", code, str(file.parent.parent)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in running]
    assert sorted(map(len, outputs)) == [1, 2] and len({output[-1] for output in outputs}) == 1


def test_both_json_readers_give_the_same(file, monkeypatch):
    pytest.importorskip("msgspec")
    fast = read_annotations(file)
    monkeypatch.setattr(annotation_json, "msgspec", None)
    assert_same(read_annotations(file), fast)


def test_a_file_beyond_the_limit_is_refused(file, monkeypatch):
    monkeypatch.setattr(annotation_json, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"where: .*instances_train.json\n  why: .*too large: .* at most 1,000"):
        open_it(file)


def test_a_fault_in_the_last_of_many_annotations_is_named(file):
    content = json.loads(file.read_text())
    content["annotations"][-1]["bbox"] = [1, 2, 3]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="annotation 1000"):
        open_it(file)
    file.write_text(json.dumps(content).replace('"bbox": [1, 2, 3]', '"bbox": [1, 2, NaN, 3]'))
    with pytest.raises(DataError, match="contains NaN"):
        open_it(file)
