"""The prediction program: pictures, results and what a mistake is answered with."""

import contextlib
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program_cases import CATEGORY_IDS, CLASS_NAMES, OBJECTS, SIZES, run_program, write_data, write_weights
from pycocotools.coco import COCO

import models
from models.images import read_image
from models.predict import picture_names


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "coco") / "val"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def done(images, weights, tmp_path_factory):
    """One run over a folder and a file, all detections drawn: (process, output folder)."""
    out = tmp_path_factory.mktemp("out") / "deep" / "found"
    arguments = [images, images / "11.png", "--weights", weights, "--output", out, "score_threshold=0", "batch_size=2"]
    return run_program("predict", *arguments), out


def test_each_image_once_gets_a_picture_and_all_together_the_results(done):
    process, out = done
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(out)) == [
        "11_detections.jpg",
        "12_detections.jpg",
        "13_detections.jpg",
        "detections.bbox.json",
        "detections.segm.json",
        "images.json",
    ]
    for name, (height, width) in zip(("11", "12", "13"), SIZES, strict=True):
        assert read_image(out / f"{name}_detections.jpg").shape == (height * 5, width * 5, 3)


def test_the_run_tells_where_the_pictures_are_and_what_was_found(done, images):
    process, out = done
    lines = process.stdout.splitlines()
    assert lines[0].startswith(f"{images / '11.png'} (128 x 96): ")
    assert lines[1].split() == ["object", "score", "x1", "y1", "x2", "y2"]
    assert any(line == f"  picture: {out / '11_detections.jpg'}" for line in lines)
    assert lines[-1].startswith(f"results: {out / 'detections.bbox.json'}, ")
    assert process.stderr == ""


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_results_are_those_of_the_function_and_coco_tools_read_them(done, images, weights, kind):
    _, out = done
    detector, _ = models.load_detector(weights)
    expected = [models.predict(detector, read_image(images / f"{name}.png")) for name in (11, 12, 13)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(out / "images.json")
        results = coco.loadRes(str(out / f"detections.{kind}.json"))
    assert [coco.imgs[i]["file_name"] for i in (1, 2, 3)] == [str(images / f"{name}.png") for name in (11, 12, 13)]
    assert [(category["id"], category["name"]) for category in coco.loadCats(CATEGORY_IDS)] == list(
        zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
    )
    assert sum(map(len, expected)) > 0
    for image_id, result in enumerate(expected, 1):
        entries = results.loadAnns(results.getAnnIds(imgIds=[image_id]))
        assert [entry["category_id"] for entry in entries] == [CATEGORY_IDS[label] for label in result.labels]
        np.testing.assert_allclose([entry["score"] for entry in entries], result.scores, atol=1e-5)
        if kind == "bbox":
            boxes = np.array([entry["bbox"] for entry in entries])
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_allclose(boxes, result.boxes, atol=0.02)
        else:
            assert all(entry["segmentation"]["size"] == list(SIZES[image_id - 1]) for entry in entries)


def test_nothing_found_is_a_fine_result(images, weights, tmp_path):
    options = ["--weights", weights, "--output", tmp_path, "--score-threshold", "1"]
    process = run_program("predict", images / "13.png", *options)
    assert process.returncode == 0, process.stderr
    first, second, _ = process.stdout.splitlines()
    assert first == f"{images / '13.png'} (128 x 96): nothing with a score of 1 or more"
    assert second == f"  picture: {tmp_path / '13_detections.jpg'}"


def test_images_of_one_name_get_pictures_of_their_own(images, weights, tmp_path):
    (tmp_path / "more").mkdir()
    Image.fromarray(read_image(images / "11.png")).save(tmp_path / "more" / "11.jpg")
    process = run_program(
        "predict", images / "11.png", tmp_path / "more", "--weights", weights, "--output", tmp_path / "out"
    )
    assert process.returncode == 0, process.stderr
    assert {"11_detections.jpg", "11-2_detections.jpg"} <= set(os.listdir(tmp_path / "out"))


def test_a_picture_never_takes_the_name_of_another():
    paths = [Path(name) for name in ("a/1.jpg", "b/1.jpg", "c/1-2.jpg", "d/1-2.png")]
    names = list(picture_names(paths).values())
    assert names == [f"{stem}_detections.jpg" for stem in ("1", "1-2", "1-2-2", "1-2-3")]


def test_an_unreadable_image_is_told_and_the_others_are_done(images, weights, tmp_path):
    (tmp_path / "cut.png").write_bytes((images / "11.png").read_bytes()[:1000])
    arguments = [tmp_path / "cut.png", images / "12.png", "--weights", weights, "--output", tmp_path / "out"]
    process = run_program("predict", *arguments)
    assert process.returncode == 3
    assert process.stderr.startswith(f"error: the image file is truncated or corrupt\n  where: {tmp_path}/cut.png\n")
    end = f"error: 1 of 2 images could not be read; the others are done\n  where: {tmp_path}/cut.png\n"
    assert process.stderr.endswith(end)
    assert "12_detections.jpg" in os.listdir(tmp_path / "out")
    records = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [record["file_name"] for record in records] == [str(images / "12.png")]


def test_the_result_is_the_same_at_any_batch_size_but_for_rounding(images, weights):
    """On images of one size; others are padded to the largest of their batch."""
    detector, _ = models.load_detector(weights)
    pair = [read_image(images / "11.png"), read_image(images / "13.png")]
    for together, alone in zip(
        models.predict(detector, pair), [models.predict(detector, image) for image in pair], strict=True
    ):
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=0.02)
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)


def says(process, code: int, *texts: str) -> None:
    assert process.returncode == code, process.stderr
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    for text in texts:
        assert text in process.stderr, process.stderr


def test_no_image_is_named(weights):
    says(run_program("predict", "--weights", weights), 2, "error: no image is named\n", "  fix:   ")


def test_no_weights_are_named(images):
    says(run_program("predict", images), 2, "error: a required option is missing\n  where: --weights\n")


def test_a_missing_image_is_told_before_anything_is_loaded(images):
    process = run_program("predict", images / "1.png", "--weights", "/nowhere")
    says(
        process,
        3,
        "error: no such image file\n",
        f"where: {images}/1.png",
        f"images in {images}: 11.png, 12.png, 13.png",
    )


def test_a_video_is_for_the_predictor(weights, tmp_path):
    (tmp_path / "clip.mp4").touch()
    says(run_program("predict", tmp_path / "clip.mp4", "--weights", weights), 2, "no videos", "Predictor(")


def test_a_folder_without_images(tmp_path, weights):
    (tmp_path / "notes.txt").touch()
    process = run_program("predict", tmp_path, "--weights", weights)
    says(process, 3, "error: no image in this folder\n", "its 1 entries end in none of .jpg")


def test_what_is_no_image(tmp_path, weights):
    (tmp_path / "a.jpg").write_text("<html>")
    process = run_program("predict", tmp_path / "a.jpg", "--weights", weights, "--output", tmp_path / "out")
    says(process, 3, "error: not an image that can be read\n", f"where: {tmp_path}/a.jpg", "it starts with b'<html>'")


def test_an_output_folder_that_is_a_file(images, weights, tmp_path):
    (tmp_path / "out").write_text("precious")
    process = run_program("predict", images, "--weights", weights, "--output", tmp_path / "out")
    says(process, 2, "because a file is in its place", f"where: {tmp_path}/out", f"--output {tmp_path}/out-2")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_full_disk_keeps_the_old_picture(images, weights, tmp_path):
    old = tmp_path / "out" / "11_detections.jpg"
    old.parent.mkdir()
    old.write_text("old")
    arguments = [images / "11.png", "--weights", weights, "--output", old.parent]
    process = run_program("predict", *arguments, largest_file=8192)
    says(process, 4, "error: cannot write the file; the old file is kept as it was\n", f"where: {old}\n", "MiB free in")
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == [old.name]


@pytest.mark.parametrize("option", ["score_threshold=1.5", "batch_size=0", "resize=800,100"])
def test_values_out_of_range(images, weights, option):
    says(run_program("predict", images, "--weights", weights, option), 2, option.split("=")[0] + " must be ")


def test_missing_weights(images, tmp_path):
    process = run_program("predict", images, "--weights", tmp_path / "w.safetensors", "--output", tmp_path / "out")
    says(process, 3, "error: no such weights file\n", f"where: {tmp_path}/w.safetensors", "python -m models.train")


class RunsCode:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("container", ["pickle", "torch"])
def test_weights_that_are_a_pickle_are_refused_and_never_run(images, tmp_path, container):
    import torch

    victim, weights = tmp_path / "ran", tmp_path / "weights.pth"
    if container == "pickle":
        weights.write_bytes(pickle.dumps(RunsCode(victim)))
    else:
        torch.save({"state_dict": RunsCode(victim)}, weights)
    process = run_program("predict", images, "--weights", weights, "--output", tmp_path / "out")
    says(process, 3, f"where: {weights}")
    assert not victim.exists()


def test_truncated_weights(images, weights, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:100_000])
    process = run_program("predict", images, "--weights", tmp_path / "cut.safetensors", "--output", tmp_path / "out")
    says(process, 3, f"where: {tmp_path}/cut.safetensors")


def test_weights_that_do_not_say_their_architecture(images, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    process = run_program("predict", images, "--weights", tmp_path / "other.safetensors", "--output", tmp_path / "out")
    says(process, 3, f"where: {tmp_path}/other.safetensors", "  why:   ")


@pytest.mark.parametrize(("device", "code"), [("gpu", 2), ("meta", 2), ("cuda:77", 4)])
def test_devices_that_are_none(images, weights, tmp_path, device, code):
    process = run_program("predict", images, "--weights", weights, "--output", tmp_path, "--device", device)
    says(process, code, f"where: --device {device}\n")


def test_the_objects_of_the_test_data_are_inside_their_images():
    for (height, width), objects in zip(SIZES, OBJECTS, strict=True):
        assert all(x + w <= width and y + h <= height for _, (x, y, w, h) in objects)
