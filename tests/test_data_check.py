"""`python -m models.data check`: every kind of fault is found, shown, and mended in a copy; a good data set is good."""

import copy
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from program_cases import ROOT, write_data
from pycocotools import mask as mask_api
from test_voc import write_voc, xml

from models.data import CocoDataset, open_dataset
from models.data.check import check_dataset
from models.data.check_page import check_page
from models.data.check_program import Check, main
from models.data.crossings import crosses_itself
from models.data.findings import KINDS
from models.data.voc_xml import read_voc_file
from models.errors import DataError, MachineError, UsageError
from models.images import read_label_map

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
BOW_TIE = [10, 10, 30, 30, 30, 10, 10, 30]
HEIGHT, WIDTH = 96, 128  # of image 11
RUNS = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}


def good(**changes) -> dict:
    base = {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    return base | {"segmentation": [SQUARE]} | changes


def lacking(key) -> dict:
    return {name: value for name, value in good().items() if name != key}


OTHER_RUNS = {"size": [9, 9], "counts": [81]}
# kind: (annotations, those after mending, as far as they differ: None is taken out)
ANNOTATIONS = {
    "annotation lacks a key": ([lacking("bbox")], [None]),
    "annotation id used twice": ([good(), good(bbox=[10, 10, 21, 20])], [{}, {"id": 2**40 + 1}]),
    "annotation of an unknown image": ([good(image_id=5)], [None]),
    "annotation of an unknown category": ([good(category_id=4)], [None]),
    "mask of another size": ([good(segmentation=OTHER_RUNS)], [None]),
    "malformed mask": ([good(segmentation=[[1, 2, "3", 4, 5, 6]])], [None]),
    "empty polygon": (
        [good(segmentation=[[1, 2], SQUARE]), good(id=2, segmentation=[])],
        [{"segmentation": [SQUARE]}, None],
    ),
    "mask without a pixel": ([good(segmentation=[[200, 200, 210, 200, 210, 210]])], [None]),
    "no mask": ([lacking("segmentation")], [{}]),
    "malformed box": ([good(bbox=["a", 0, 1, 1])], [{"bbox": [10.0, 10.0, 20.0, 20.0]}]),
    "box under 1 pixel": ([good(bbox=[10, 10, 0.2, 20])], [{"bbox": [10.0, 10.0, 20.0, 20.0]}]),
    "box outside its image": ([good(bbox=[500, 10, 20, 20])], [{"bbox": [10.0, 10.0, 20.0, 20.0]}]),
    "box reaches beyond its image": (
        [good(bbox=[-5, 0, 135, 96], segmentation=RUNS)],
        [{"bbox": [0.0, 0, 128.0, 96.0]}],
    ),
    "box disagrees with its mask": ([good(bbox=[60, 60, 20, 20])], [{"bbox": [10.0, 10.0, 20.0, 20.0]}]),
    "no area": ([good(area=0)], [{"area": 400}]),
    "same annotation twice": ([good(), good(id=2)], [{}, None]),
}


def with_annotations(folder, annotations):
    path = folder / "annotations/instances_val.json"
    content = json.loads(path.read_text()) | {"annotations": annotations}
    path.write_text(json.dumps(content))
    return content


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "coco")


def test_a_good_data_set_has_no_findings_and_its_copy_is_equal(data, tmp_path):
    content = json.loads((data / "annotations/instances_val.json").read_text())
    findings, folders = check_dataset(data, fix=tmp_path / "copy")
    assert findings.all == [] and not findings.serious and folders == {"val": data / "val"}
    assert json.loads((tmp_path / "copy/annotations/instances_val.json").read_text()) == content
    assert json.loads((tmp_path / "copy/changes.json").read_text()) == []
    for path in (data / "val").iterdir():
        assert os.path.samefile(path, tmp_path / "copy/val" / path.name)  # a hard link
    assert "Nothing is wrong" in check_page(findings, data, folders)


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_each_fault_of_an_annotation_is_found_and_mended(data, tmp_path, kind):
    annotations, mended = ANNOTATIONS[kind]
    with_annotations(data, copy.deepcopy(annotations))
    findings, folders = check_dataset(data, fix=tmp_path / "copy")
    assert set(findings.counts) == {kind} and sum(findings.counts.values()) == len(findings.all)
    expected = [old | new for old, new in zip(annotations, mended, strict=True) if new is not None]
    result = json.loads((tmp_path / "copy/annotations/instances_val.json").read_text())
    assert result["annotations"] == expected
    again, _ = check_dataset(tmp_path / "copy")
    assert set(again.counts) <= {"no mask"}  # which only a person can draw
    changes = json.loads((tmp_path / "copy/changes.json").read_text())
    assert len(changes) == len(findings.all) and {change["kind"] for change in changes} == {kind}
    assert kind in check_page(findings, data, folders)
    if kind != "no mask":
        CocoDataset(tmp_path / "copy", "val")  # opens


def test_a_self_crossing_outline_keeps_its_pixels(data, tmp_path):
    with_annotations(data, [good(segmentation=[BOW_TIE])])
    findings, _ = check_dataset(data, fix=tmp_path / "copy")
    assert set(findings.counts) == {"self-crossing polygon"} and not findings.serious
    before, after = (CocoDataset(folder, "val").mask(0, 0) for folder in (data, tmp_path / "copy"))
    assert np.array_equal(before, after) and before.any()


def test_crossings():
    assert crosses_itself(BOW_TIE) and not crosses_itself(SQUARE) and not crosses_itself(SQUARE[:6])
    assert not crosses_itself([0, 0, 10, 0, 10, 10, 5, 0, 0, 10])  # touches a side with a corner
    star = [c for k in range(5) for c in (np.cos(k * 4 * np.pi / 5), np.sin(k * 4 * np.pi / 5))]
    assert crosses_itself(star)
    angles = np.sort(np.random.default_rng(0).random(300)) * 2 * np.pi
    assert not crosses_itself(np.stack([np.cos(angles), np.sin(angles)], 1).reshape(-1).tolist())


def faulty_images(data) -> dict[str, str]:
    """Spoils the images of a data set: {file name: kind of fault}."""
    content = json.loads((data / "annotations/instances_val.json").read_text())
    image, annotation = content["images"][0], content["annotations"][0]
    kinds = {}

    def add(kind, name, **changes):
        identity = len(content["images"]) + 100
        entry = image | {"id": identity, "file_name": name}
        content["images"].append({key: value for key, value in (entry | changes).items() if value is not None})
        content["annotations"].append(annotation | {"id": identity, "image_id": changes.get("id") or identity})
        kinds[name] = kind

    original = (data / "val/11.png").read_bytes()
    pixels = np.random.default_rng(1)
    add("missing image", "gone.png")
    (data / "val/cut.png").write_bytes(original[: len(original) // 2])
    add("unreadable image", "cut.png")
    (data / "val/page.png").write_text("<script>alert(1)</script>")
    add("unreadable image", "page.png")
    (data / "secret.png").write_bytes(original)
    (data / "val/link.png").symlink_to(data / "secret.png")
    add("image outside its folder", "link.png")
    add("image outside its folder", "../secret.png")
    add("image outside its folder", str(data / "val/11.png"))
    add("image entry that cannot be used", "12.png", height=0)
    Image.fromarray(pixels.integers(0, 255, (50, 60, 3), np.uint8)).save(data / "val/small.png")
    add("size other than annotated", "small.png")
    (data / "val/twin.png").write_bytes(original)
    add("same image twice", "twin.png")
    Image.fromarray(pixels.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(data / "val/id.png")
    add("image id used twice", "id.png", id=11)
    (data / "annotations/instances_val.json").write_text(json.dumps(content))
    return kinds


@pytest.mark.parametrize("workers", [1, 2])
def test_faults_of_images(data, tmp_path, workers):
    kinds = faulty_images(data)
    findings, folders = check_dataset(data, fix=tmp_path / "copy", workers=workers)
    found = {finding.image: finding.kind for finding in findings.all if finding.annotation is None}
    assert found == kinds
    assert findings.counts["annotation of an image taken out"] == len(kinds) - 1  # the one of id 11 is image 11's now
    copy = CocoDataset(tmp_path / "copy", "val")
    assert [copy.image_info(i).file_name for i in range(len(copy))] == ["11.png", "12.png", "13.png"]
    assert sorted(path.name for path in (tmp_path / "copy/val").iterdir()) == ["11.png", "12.png", "13.png"]
    page = check_page(findings, data, folders)
    assert "<script>" not in page and "src=" in page and "http:" not in page and "https:" not in page
    headers, _ = check_dataset(data, quick=True)
    assert {"missing image", "size other than annotated"} <= set(headers.counts)


def long_name(content: dict) -> None:
    content["images"][0]["file_name"] = "x" * 1001


def text_for_an_id(content: dict) -> None:
    content["categories"][0]["id"] = str(content["categories"][0]["id"])


REFUSED_LISTS = {
    "category id used twice": (
        lambda content: content["categories"].append(dict(content["categories"][0])),
        "category that cannot be used",
    ),
    "category without a name": (lambda content: content["categories"][1].pop("name"), "category that cannot be used"),
    "category without an id": (lambda content: content["categories"][0].pop("id"), "category that cannot be used"),
    "category that is a number": (lambda content: content["categories"].append(7), "category that cannot be used"),
    "category id that is a text": (text_for_an_id, "category that cannot be used"),
    "no categories": (lambda content: content["categories"].clear(), "no images or no categories"),
    "no images": (lambda content: content["images"].clear(), "no images or no categories"),
    "long file name": (long_name, "image entry that cannot be used"),
    "file name with a zero byte": (
        lambda content: content["images"][0].update(file_name="a\0"),
        "image entry that cannot be used",
    ),
    "file name of half a character": (
        lambda content: content["images"][0].update(file_name="\ud800.png"),
        "image entry that cannot be used",
    ),
}


@pytest.mark.parametrize("case", REFUSED_LISTS)
def test_what_the_reader_refuses_in_the_lists_is_found(data, tmp_path, case):
    spoil, kind = REFUSED_LISTS[case]
    path = data / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError):
        CocoDataset(data, "val")
    findings, _ = check_dataset(data, fix=tmp_path / "copy")
    assert kind in findings.counts and findings.serious
    if kind != "no images or no categories":
        opened = CocoDataset(tmp_path / "copy", "val")
        assert check_dataset(tmp_path / "copy")[0].all == []
        assert ("category 7" if case == "category without a name" else "traffic light") in opened.class_names


def test_an_image_in_two_splits_is_taken_out_of_training(data, tmp_path):
    (data / "train").mkdir()
    content = json.loads((data / "annotations/instances_val.json").read_text())
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    (data / "train/a.png").write_bytes((data / "val/11.png").read_bytes())
    content["images"][0]["file_name"] = "a.png"
    (data / "annotations/instances_train.json").write_text(json.dumps(content))
    findings, _ = check_dataset(data)
    first = findings.all[0]
    assert (first.kind, first.split, first.image) == ("same image twice", "train", "a.png")
    assert "val/11.png" in first.detail


def test_voc_folders_are_checked(tmp_path):
    folder = write_voc(tmp_path)
    assert check_dataset(folder, ("train",))[0].all == []
    (folder / "Annotations/2007_000027.xml").write_text("<!DOCTYPE a><annotation/>")
    (folder / "Annotations/2007_000032.xml").write_text(xml([("dog", (50, 30, 90, 39), 0)]))
    findings, _ = check_dataset(folder, ("train",))
    assert findings.counts["unreadable annotation of an image"] == 2  # in the list of boxes and in that of masks
    assert findings.counts["box reaches beyond its image"] == 2


def test_a_voc_folder_is_mended_in_its_own_layout(tmp_path):
    folder = write_voc(tmp_path / "devkit")
    assert check_dataset(folder.parent, fix=tmp_path / "good")[0].all == []
    good_copy = tmp_path / "good/VOC2012"
    assert open_dataset(tmp_path / "good", "train").voc == (False, True)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        other = good_copy / path.relative_to(folder)
        assert other.read_bytes() == path.read_bytes(), path
        assert path.suffix == ".txt" or os.path.samefile(path, other)

    names = [f"2007_0000{number}" for number in (27, 32, 33)]
    boxes = [("dog", (11, 6, 30, 25), 0), ("cat", (31, 1, 31, 40), 0), ("person", (31, 1, 70, 45), 0)]
    maps = np.full((40, 60), 255, np.uint8)
    maps[30:38, 1:9], maps[6:20, 35:55] = 1, 3  # the dog is elsewhere, and of the narrow cat there is no pixel
    Image.fromarray(maps).save(folder / f"SegmentationObject/{names[0]}.png")
    (folder / f"Annotations/{names[0]}.xml").write_text(xml(boxes))
    (folder / f"JPEGImages/{names[1]}.jpg").write_text("no image")
    (folder / f"Annotations/{names[2]}.xml").write_text("<!DOCTYPE a><annotation/>")
    (folder / "ImageSets/Main/dog_train.txt").write_text("\n".join(f"{name}  1" for name in names))
    content = {"images": [{"id": 1, "file_name": f"{names[0]}.jpg", "height": 40, "width": 60}]}
    square = {"segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0}
    annotations = [square | {"id": i, "image_id": 1, "category_id": key} for i, key in ((1, 12), (2, 99))]
    categories = [{"id": 12, "name": "dog"}]
    text = json.dumps(content | {"annotations": annotations, "categories": categories})
    (folder / "Annotations/pascal_sbd2012.json").write_text(text)
    (folder / "SegmentationObject/out.png").symlink_to("/etc/hostname")

    findings, _ = check_dataset(folder, fix=tmp_path / "mended")
    mended = tmp_path / "mended/VOC2012"
    assert findings.counts.keys() >= {"box under 1 pixel", "box disagrees with its mask", "unreadable image"}
    again, _ = check_dataset(mended)
    assert again.all == []
    after = read_voc_file(mended / f"Annotations/{names[0]}.xml").objects
    assert [(thing.name, thing.box) for thing in after] == [("dog", (2, 31, 9, 38)), ("person", (36, 7, 55, 20))]
    assert (mended / f"Annotations/{names[0]}.xml").read_text().count("<part>") == 2  # all else is as it was
    masks = read_label_map(mended / f"SegmentationObject/{names[0]}.png")
    assert (
        np.array_equal(masks == 1, maps == 1)
        and np.array_equal(masks == 2, maps == 3)
        and set(masks.flat) == {1, 2, 255}
    )
    assert (mended / "ImageSets/Segmentation/train.txt").read_text() == f"{names[0]}\n"
    assert (mended / "ImageSets/Main/dog_train.txt").read_text() == f"{names[0]}  1\n"
    assert sorted(path.name for path in (mended / "JPEGImages").iterdir()) == [f"{names[0]}.jpg"]
    assert [path.name for path in (mended / "SegmentationObject").iterdir()] == [f"{names[0]}.png"]
    kept = json.loads((mended / "Annotations/pascal_sbd2012.json").read_text())["annotations"]
    assert [entry["id"] for entry in kept] == [1]
    (folder / f"SegmentationObject/{names[0]}.png").unlink()  # boxes alone: the person's is cut at the border
    check_dataset(folder, ("train",), fix=tmp_path / "boxes")
    alone = read_voc_file(tmp_path / f"boxes/VOC2012/Annotations/{names[0]}.xml").objects
    assert [(thing.name, thing.box) for thing in alone] == [("dog", (11, 6, 30, 25)), ("person", (31, 1, 60, 40))]
    changes = json.loads((tmp_path / "mended/changes.json").read_text())
    assert len(changes) == len(findings.all) and all(change["change"] for change in changes)


def test_a_voc_image_of_more_objects_than_its_map_can_number_is_mended(tmp_path):
    folder, name = write_voc(tmp_path / "devkit"), "2007_000027"
    objects = [("dog", (1, 1, 9, 9), 0)] + [("dog", (1 + i % 40, 1 + i // 40, 55, 35), 0) for i in range(298)]
    (folder / f"Annotations/{name}.xml").write_text(xml([*objects, ("cat", (31, 1, 31, 40), 0)]))
    findings, _ = check_dataset(folder, fix=tmp_path / "mended")
    assert {f.split for f in findings.all if f.kind == "unreadable annotation of an image"} == {
        f"{split} (masks)" for split in ("train", "trainval", "val")
    }
    mended = tmp_path / "mended/VOC2012"
    assert len(read_voc_file(mended / f"Annotations/{name}.xml").objects) == 299  # without the narrow cat
    assert name not in (mended / "ImageSets/Segmentation/val.txt").read_text()
    maps = [read_label_map(root / f"SegmentationObject/{name}.png") for root in (folder, mended)]
    assert np.array_equal(*maps)


def test_the_copy_goes_nowhere_else(data, tmp_path):
    with pytest.raises(UsageError, match="is not new"):
        check_dataset(data, fix=data)
    with_annotations(data, 5)
    with pytest.raises(DataError, match="it has no list annotations"):
        check_dataset(data, fix=tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco"]


def test_only_what_cannot_be_written_is_told_as_that(data, tmp_path, monkeypatch):
    with monkeypatch.context() as inner, pytest.raises(DataError, match="annotation file cannot be read") as error:
        inner.setattr("models.data.annotation_json.MAX_BYTES", 10)
        check_dataset(data, fix=tmp_path / "copy")
    assert error.value.where == str(data / "annotations/instances_val.json") and "too large" in error.value.why

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("models.data.mended_copy._link", no_space)
    with pytest.raises(MachineError, match="cannot write") as error:
        check_dataset(data, fix=tmp_path / "copy")
    assert error.value.where == str(tmp_path / "copy") and "MiB free" in error.value.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco"]


def program(*arguments):
    command = [sys.executable, "-m", "models.data", "check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})


def test_the_program(data, tmp_path):
    done = program(data)
    assert done.returncode == 0 and "nothing is wrong" in done.stdout, done.stderr
    with_annotations(data, [good(category_id=99), good(id=2)])
    done = program(data, "--page", tmp_path / "page.html")
    assert done.returncode == 3 and "annotation of an unknown category" in done.stdout
    assert f"--fix {data}-mended" in done.stderr
    assert "data:image/jpeg;base64," in (tmp_path / "page.html").read_text()
    done = program(data, "--fix", tmp_path / "mended")
    assert done.returncode == 0 and program(tmp_path / "mended").returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\\[/x].jpg", "a\\[/x].jpg"),
        ("[red]b[/red].jpg", "[red]b[/red].jpg"),
        ("\x1b]0;pwned\a.jpg", r"\x1b]0;pwned\x07.jpg"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\ud800.jpg", r"\ud800.jpg"),
    ],
    ids=ascii,
)
def test_no_name_disturbs_the_table_or_the_page(data, tmp_path, capsys, monkeypatch, name, shown):
    monkeypatch.setenv("COLUMNS", "300")
    path = data / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"id": 99, "file_name": name})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError):
        main(Check(folder=data, page=tmp_path / "page.html"))
    out = capsys.readouterr().out
    assert f"val/{shown}: " in out and not any(c in out for c in "\x1b\a\u202e\ud800")
    page = (tmp_path / "page.html").read_bytes().decode()
    assert f"<div>val/{shown}</div>" in page and not any(c in page for c in "\x1b\a\u202e\ud800")


def test_kinds_are_all_tested(data):
    kinds = {*ANNOTATIONS, *faulty_images(data).values(), "self-crossing polygon"}
    kinds |= {kind for _, kind in REFUSED_LISTS.values()} | {
        "annotation of an image taken out",
        "unreadable annotation of an image",
        "unusable stuff map",
    }
    assert kinds == set(KINDS) and mask_api.area(mask_api.frPyObjects([SQUARE], HEIGHT, WIDTH)).sum() == 400
