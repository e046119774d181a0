"""The generated data set: deterministic, valid COCO, masks of what is visible, written whole or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from models.data import figures, shapes
from models.data.materials import MATERIALS
from models.data.outline import outline_polygons, rasterise
from models.data.scene import CLASSES, FIGURES, GROUND_OF, UNLABELLED, SceneSettings, draw_scene
from models.data.shapes import ShapesSettings, cache_root, default_dataset, write_dataset
from models.errors import MachineError, UsageError

SETTINGS = ShapesSettings(train=24, val=8, scene=SceneSettings(crowd_share=0.3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    write_dataset(path, SETTINGS, workers=2, quiet=True)
    return path


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_settings_give_the_same_bytes_for_any_number_of_workers(folder, tmp_path):
    write_dataset(tmp_path / "again", SETTINGS, workers=1, quiet=True)
    assert _digest(tmp_path / "again") == _digest(folder)


def test_another_seed_gives_other_pictures_and_another_fingerprint(folder, tmp_path):
    other = ShapesSettings(train=24, val=8, seed=1, scene=SETTINGS.scene)
    write_dataset(tmp_path / "other", other, workers=2, quiet=True)
    ours, theirs = _digest(folder), _digest(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert not any(ours[name] == theirs[name] for name in ours if name.endswith(".jpg"))
    assert other.fingerprint() != SETTINGS.fingerprint()


def test_train_and_val_share_no_picture(folder):
    digests = _digest(folder)
    train = {value for name, value in digests.items() if name.startswith("train/")}
    val = {value for name, value in digests.items() if name.startswith("val/")}
    assert (len(train), len(val)) == (24, 8) and not train & val


@pytest.mark.parametrize("split", ["train", "val"])
def test_pycocotools_reads_it_and_boxes_and_areas_are_those_of_the_masks(folder, split, capsys):
    coco = COCO(folder / "annotations" / f"instances_{split}.json")
    kinds = set()
    for annotation in coco.dataset["annotations"]:
        mask = coco.annToMask(annotation)
        image = coco.imgs[annotation["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        assert annotation["area"] == mask.sum() >= (1 if annotation["iscrowd"] else 35)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation["bbox"] == extent
        segmentation = annotation["segmentation"]
        kinds.add("polygon" if isinstance(segmentation, list) else type(segmentation["counts"]).__name__)
        if annotation["iscrowd"]:
            assert isinstance(segmentation["counts"], list)
    assert kinds == {"polygon", "str", "list"}
    assert any(annotation["iscrowd"] for annotation in coco.dataset["annotations"])
    assert {coco.imgs[i]["height"] for i in coco.imgs} == {160, 192}


def test_masks_are_the_visible_parts_and_agree_with_the_stuff_maps(folder):
    coco = json.loads((folder / "annotations" / "instances_train.json").read_text())
    overlap = pixels = agreeing = 0
    for image in coco["images"]:
        ids = np.asarray(Image.open(folder / "stuffthingmaps" / "train" / image["file_name"].replace("jpg", "png")))
        assert set(np.unique(ids)) <= {*range(len(CLASSES) + 4), UNLABELLED}
        covered = np.zeros(ids.shape, int)
        for annotation in coco["annotations"]:
            if annotation["image_id"] == image["id"] and not annotation["iscrowd"]:
                mask = _decode(annotation["segmentation"], *ids.shape)
                covered += mask
                pixels += mask.sum()
                agreeing += (ids[mask] == annotation["category_id"] - 1).sum()
        overlap += (covered > 1).sum()
    assert agreeing > 0.97 * pixels  # polygons smooth the outline by parts of a pixel
    assert overlap < 0.01 * pixels


def test_classes_of_one_figure_stand_on_different_ground():
    assert [FIGURES[name] for name in GROUND_OF] == [figures.disc, figures.disc, figures.star, figures.star]
    assert len(set(GROUND_OF.values())) == len(GROUND_OF)
    seen = {name: [] for name in GROUND_OF}
    for index in range(80):
        scene = draw_scene(np.random.default_rng(index), 160, 192, SceneSettings(things=(3, 4), sticks=0))
        for thing in scene.things:
            if CLASSES[thing.label] in seen and not thing.crowd:
                rows, columns = np.nonzero(thing.mask)
                y, x = np.clip([rows.mean(), columns.mean()], 0, None).astype(int)
                reach = int(np.sqrt(thing.mask.sum() / np.pi)) + 4
                around = scene.semantic[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach]
                ground = around[(around >= len(CLASSES)) & (around != UNLABELLED)]
                if ground.size > 50:
                    seen[CLASSES[thing.label]].append(np.bincount(ground).argmax() - len(CLASSES))
    for name, grounds in seen.items():
        assert len(grounds) > 10 and np.mean(np.equal(grounds, MATERIALS.index(GROUND_OF[name]))) > 0.9


def test_nothing_is_kept_of_which_too_little_is_seen():
    settings = SceneSettings(things=(12, 12), min_visible_area=60, sticks=0, crowd_share=0)
    for index in range(10):
        scene = draw_scene(np.random.default_rng(index), 160, 192, settings)
        assert all(thing.mask.sum() >= 60 for thing in scene.things)
        things = set(np.unique(scene.semantic)) & set(range(len(CLASSES)))
        assert things == {thing.label for thing in scene.things}, "something is visible and not annotated"


@pytest.mark.parametrize("name", ["ring", "frame", "cross", "star", "crescent"])
def test_a_filled_box_is_a_bad_mask_of_every_figure_but_the_disc(name):
    """A mask head that fills its box has, over the rotations, a mean IoU below 0.6 on each (0.785 on a disc)."""
    y, x = np.mgrid[-1.2:1.2:200j, -1.2:1.2:200j]
    shares = []
    for angle in np.linspace(0, np.pi, 12, endpoint=False):
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        inside = getattr(figures, name)(u, v) < 0
        shares.append(inside.sum() / (np.count_nonzero(inside.any(1)) * np.count_nonzero(inside.any(0))))
        assert np.hypot(u[inside], v[inside]).max() < 1.12
    assert np.mean(shares) < 0.6


def test_outline_of_a_rectangle_and_of_diagonal_pixels_by_hand():
    mask = np.zeros((8, 9), bool)
    mask[2:5, 3:8] = True
    polygons = outline_polygons(mask, tolerance=0)
    assert np.array_equal(rasterise(polygons, 8, 9), mask)
    assert min(polygons[0][::2]) == 3 and max(polygons[0][::2]) == 8
    assert min(polygons[0][1::2]) == 2 and max(polygons[0][1::2]) == 5
    apart = np.zeros((40, 40), bool)
    apart[2:20, 2:20] = apart[20:38, 20:38] = True  # touch by a corner only
    assert len(outline_polygons(apart)) == 2
    holed = np.zeros((40, 40), bool)
    holed[5:35, 5:35] = True
    holed[15:25, 15:25] = False
    assert outline_polygons(holed) is None
    assert outline_polygons(np.zeros((5, 5), bool)) is None


def test_cache_folder_obeys_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("CASCADEOPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "cascadeops"
    monkeypatch.setenv("CASCADEOPS_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("CASCADEOPS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "cascadeops"


def test_default_dataset_draws_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CASCADEOPS_CACHE", str(tmp_path))
    settings = ShapesSettings(train=2, val=1)
    first = default_dataset(settings, workers=1)
    assert "3 pictures" in capsys.readouterr().err
    before = _digest(first)
    assert default_dataset(settings, workers=1) == first
    assert capsys.readouterr().err == "" and _digest(first) == before
    assert default_dataset(ShapesSettings(train=3, val=1), workers=1, quiet=True) != first


def test_a_killed_run_leaves_no_half_data_set(tmp_path):
    target = tmp_path / "set"
    command = [sys.executable, "-m", "models.data", "--out", str(target), "--train", "5000", "--val", "10"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".set.partial-*/train/*.jpg")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not target.exists()
    write_dataset(target, ShapesSettings(train=2, val=1), workers=1, quiet=True)
    assert len(list((target / "train").iterdir())) == 2


def test_what_a_killed_run_left_a_day_ago_is_removed(tmp_path):
    old, new = tmp_path / ".set.partial-old", tmp_path / ".set.partial-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    write_dataset(tmp_path / "set", ShapesSettings(train=1, val=1), workers=1, quiet=True)
    assert not old.exists() and new.exists()


def test_a_killed_drawing_process_is_explained_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_write_picture", _die)
    with pytest.raises(MachineError, match="a process that draws pictures was killed"):
        write_dataset(tmp_path / "set", ShapesSettings(train=3, val=1), workers=1, quiet=True)
    assert list(tmp_path.iterdir()) == []


def _die(task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"the folder is not empty[\s\S]*it holds files of something else"):
        write_dataset(tmp_path, ShapesSettings(train=1, val=1), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_of_other_settings_is_refused_and_the_same_settings_do_nothing(folder):
    before = _digest(folder)
    write_dataset(folder, SETTINGS, quiet=True)
    with pytest.raises(UsageError, match="it holds a data set drawn with other settings"):
        write_dataset(folder, ShapesSettings(train=1, val=1), quiet=True)
    assert _digest(folder) == before


def test_a_full_disk_is_explained_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MachineError, match=r"No space left on device"):
        write_dataset(tmp_path / "set", ShapesSettings(train=1, val=1), workers=1, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"size": (192, 160)}, {"size": (10, 20)}, {"seed": -1}], ids=lambda wrong: str(wrong)
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^shapes: "):
        ShapesSettings(**wrong)


def test_program_writes_any_size_without_torch(tmp_path):
    out = tmp_path / "deep" / "set"
    command = ["--out", str(out), "--train", "2", "--val", "2", "--size", "96", "128", "--seed", "7"]
    script = (
        "import runpy, sys; sys.argv[0] = 'data'\n"
        "try: runpy.run_module('models.data', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert Image.open(out / "train" / "000000000001.jpg").size == (128, 96)
    assert Image.open(out / "train" / "000000000002.jpg").size == (96, 128)
    assert Image.open(out / "contact_sheet.png").width > 300


def test_help_starts_with_examples():
    done = subprocess.run([sys.executable, "-m", "models.data", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("Examples:\n  python -m models.data ")
    assert "--train" in done.stdout


def _decode(segmentation, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        return rasterise(segmentation, height, width)
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)
