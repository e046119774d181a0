"""Evaluation: a detector that knows the answers scores 1, the program writes what it promises, faults are told."""

import json
import os

import numpy as np
import pytest
import torch
from program_cases import CATEGORY_IDS, OBJECTS, SIZES, run_program, write_data, write_weights
from pycocotools import mask as mask_api

from models.config import MaskRCNNConfig
from models.data import CocoDataset
from models.detections import Detections
from models.evaluate import evaluate_detector, save_comparison
from models.files import make_folder
from models.images import read_image
from models.progress import Progress

ONE = pytest.approx(1.0, abs=1e-12)


class KnowsTheAnswers(torch.nn.Module):
    """Returns the ground truth of OBJECTS, in pixels of what the network is given.

    It knows an image by its size; those of one size must come in the file's order.
    """

    def __init__(self, resized_by: float = 1.0, capacity: int = 5):
        super().__init__()
        self.config = MaskRCNNConfig()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.resized_by, self.capacity, self.waiting = resized_by, capacity, list(range(len(SIZES)))

    def forward(self, images, image_sizes):
        assert not self.training
        num_images = len(images)
        boxes = torch.full((num_images, self.capacity, 4), float("nan"))
        scores = torch.full((num_images, self.capacity), -torch.inf)
        labels = torch.full((num_images, self.capacity), -1)
        counts = []
        for i in range(num_images):
            size = (image_sizes[i] / self.resized_by).int().tolist()
            which = next(which for which in self.waiting if list(SIZES[which]) == size)
            self.waiting.remove(which)
            for k, (label, (x, y, width, height)) in enumerate(OBJECTS[which]):
                boxes[i, k] = torch.tensor([x, y, x + width, y + height]) * self.resized_by
                scores[i, k], labels[i, k] = 0.9 - 0.1 * k, label
            counts.append(len(OBJECTS[which]))
        mask_probs = torch.ones(num_images, self.capacity, 28, 28)
        return Detections(boxes, scores, labels, mask_probs, torch.tensor(counts))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_right_answers_score_one(data, batch_size, tmp_path):
    dataset = CocoDataset(data, "val", semantic="no")
    metrics = evaluate_detector(KnowsTheAnswers(), dataset, batch_size, results_folder=tmp_path)
    assert (metrics.box.ap, metrics.mask.ap, metrics.images) == (ONE, ONE, 3)
    assert metrics.mask.per_class == {"disc": ONE, "traffic light": ONE, "star": ONE}
    assert metrics.images_per_second > 0
    masks = json.loads((tmp_path / "detections.segm.json").read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in masks] == [(11, 3), (11, 8), (12, 7)]
    truth = json.loads((data / "annotations" / "instances_val.json").read_text())["annotations"]
    for entry, annotation in zip(masks, truth, strict=True):
        # a pasted mask is soft at its border, which costs a rectangle its corner pixels
        assert mask_api.iou([entry["segmentation"]], [annotation["segmentation"]], [0]).item() > 0.998


def test_boxes_and_masks_come_back_to_the_original_image(data):
    dataset = CocoDataset(data, "val", semantic="no")
    metrics = evaluate_detector(KnowsTheAnswers(resized_by=0.5), dataset, batch_size=2, resize=(48, 64))
    assert (metrics.box.ap, metrics.mask.ap) == (ONE, ONE)


def test_wrong_labels_score_zero(data):
    class SwapsLabels(KnowsTheAnswers):
        def forward(self, images, image_sizes):
            found = super().forward(images, image_sizes)
            return found._replace(labels=(found.labels + 1) % 3)

    metrics = evaluate_detector(SwapsLabels(), CocoDataset(data, "val", semantic="no"), batch_size=3)
    assert (metrics.box.ap, metrics.mask.ap) == (0.0, 0.0)


@pytest.mark.parametrize("max_images", [1, 2])
def test_only_the_first_images_are_scored_when_asked(data, max_images):
    dataset = CocoDataset(data, "val", semantic="no")
    with Progress("evaluate", total=max_images, unit="images") as progress:
        metrics = evaluate_detector(KnowsTheAnswers(), dataset, 2, max_images=max_images, progress=progress)
    assert (metrics.images, progress.done) == (max_images, max_images)
    assert (metrics.box.ap, metrics.mask.ap) == (ONE, ONE)
    assert np.isnan(metrics.box.per_class["traffic light"]) == (max_images == 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_detector_is_left_in_the_mode_it_was_in(data, training):
    detector = KnowsTheAnswers().train(training)
    evaluate_detector(detector, CocoDataset(data, "val", semantic="no"), batch_size=3)
    assert detector.training is training


@pytest.mark.parametrize("half", [False, True])
def test_half_computes_in_16_bits_where_that_is_asked(data, half, monkeypatch):
    class TellsThePrecision(KnowsTheAnswers):
        def forward(self, images, image_sizes):
            precisions.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return super().forward(images, image_sizes)

    precisions = []
    monkeypatch.setattr("models.devices.choose_amp_dtype", lambda amp, device: torch.bfloat16)
    metrics = evaluate_detector(TellsThePrecision(), CocoDataset(data, "val", semantic="no"), batch_size=3, half=half)
    assert set(precisions) == {torch.bfloat16 if half else torch.float32}
    assert (metrics.box.ap, metrics.mask.ap) == (ONE, ONE)


class Stops(KnowsTheAnswers):
    """The same, for so many batches; images that are behind it already are not among the answers."""

    calls = 0  # of the class: what is evaluated is a copy

    def __init__(self, batches: int, done: tuple[int, ...] = ()):
        super().__init__()
        self.batches = batches
        self.waiting = [which for which in self.waiting if which not in done]

    def forward(self, images, image_sizes):
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        Stops.calls += 1
        return super().forward(images, image_sizes)


def interrupted(detector, dataset, path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate_detector(detector, dataset, 1, partial=path)


def test_an_interrupted_evaluation_goes_on(data, tmp_path, monkeypatch):
    """Images of one size come together: 0, 2, 1."""
    dataset = CocoDataset(data, "val", semantic="no")
    path = tmp_path / "partial.jsonl"
    whole = evaluate_detector(KnowsTheAnswers(), dataset, 1, results_folder=make_folder(tmp_path / "whole"))
    interrupted(Stops(1), dataset, path)
    interrupted(Stops(1, done=(0,)), dataset, path)
    monkeypatch.setattr(Stops, "calls", 0)
    last = Stops(9, done=(0, 2))
    metrics = evaluate_detector(last, dataset, 1, results_folder=make_folder(tmp_path / "rest"), partial=path)
    assert Stops.calls == 1, "of three images two had been done"
    assert metrics.box.per_class == whole.box.per_class and metrics.mask.per_class == whole.mask.per_class
    for name in ("detections.bbox.json", "detections.segm.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "rest" / name).read_bytes()
    assert not path.exists()


@pytest.mark.parametrize("damage", [lambda text: text[:-3], lambda text: text[:-9] + "7" + text[-8:]])
def test_what_a_crash_has_damaged_is_computed_again(data, tmp_path, monkeypatch, damage):
    dataset = CocoDataset(data, "val", semantic="no")
    path = tmp_path / "partial.jsonl"
    interrupted(Stops(2), dataset, path)
    path.write_text(damage(path.read_text()))
    monkeypatch.setattr(Stops, "calls", 0)
    assert evaluate_detector(Stops(9, done=(0,)), dataset, 1, partial=path).box.ap == ONE
    assert Stops.calls == 2


def test_another_evaluation_begins_anew(data, tmp_path, monkeypatch):
    dataset = CocoDataset(data, "val", semantic="no")
    path = tmp_path / "partial.jsonl"
    interrupted(Stops(2), dataset, path)
    monkeypatch.setattr(Stops, "calls", 0)
    other = Stops(9)
    other.unused.data += 1
    assert evaluate_detector(other, dataset, 1, partial=path).box.ap == ONE
    assert Stops.calls == 3


def test_a_comparison_shows_ground_truth_beside_detections(data, tmp_path):
    dataset = CocoDataset(data, "val", semantic="no")
    picture = save_comparison(KnowsTheAnswers(), dataset, tmp_path / "c.png", count=2)
    np.testing.assert_array_equal(read_image(tmp_path / "c.png"), picture)
    lying, standing = 480, 360  # widths; the pairs start at 0 and 984, the two of a pair touch
    truths = picture[32:, 6 : 6 + lying], picture[32:, 1470 - standing : 1470]
    founds = picture[32:, 492 : 492 + lying], picture[32:, 1476 : 1476 + standing]
    for truth, found in zip(truths, founds, strict=True):
        assert (truth != found).mean() < 0.1, "only the scores behind the names differ"
    assert (truths[0][:, :standing] != truths[1]).mean() > 0.5


def test_the_program_writes_scores_results_and_a_picture(data, weights, tmp_path):
    done = run_program("evaluate", "--weights", weights, "--data", data, "--output", tmp_path / "out", "batch_size=2")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == [
        "comparison.png",
        "detections.bbox.json",
        "detections.segm.json",
        "metrics.json",
    ]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["images"] == 3 and 0 <= metrics["box_ap"] <= 1 and 0 <= metrics["mask_ap/traffic light"] <= 1
    results = json.loads((tmp_path / "out" / "detections.bbox.json").read_text())
    assert results and {entry["category_id"] for entry in results} <= set(CATEGORY_IDS)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("evaluate  3/3 images")
    assert lines[1].split() == ["AP", "AP50", "AP75", "small", "medium", "large"]
    assert lines[-1] == f"results: {tmp_path / 'out'}"


def test_classes_that_differ_are_shown_side_by_side(tmp_path, weights):
    other = write_data(tmp_path / "coco", class_names=["disc", "lamp", "star"])
    done = run_program("evaluate", "--weights", weights, "--data", other, "--output", tmp_path / "out")
    assert done.returncode == 3
    assert done.stderr == (
        "error: the weights know other classes than the data\n"
        f"  where: {weights} and {other}/annotations/instances_val.json\n"
        "  why:   3 classes and 3; they differ in (id and name)\n"
        "         label  weights          data\n"
        "             1  7 traffic light  7 lamp\n"
        "  fix:   evaluate on data of the same classes, in the same order and with the same category ids\n"
    )


FAULTS = {
    "no such folder": (lambda c, f: None, "/nowhere", 3, ["/nowhere"]),
    "not JSON": (lambda c, f: f.write_text('{"images": [}'), None, 3, ["not JSON", "line 1"]),
    "not COCO": (lambda c, f: f.write_text("[1, 2]"), None, 3, ["not COCO", "instances_val.json"]),
    "unknown image": (lambda c, f: change(c, f, "image_id", 99), None, 3, ["unknown image", "annotation 1", "99"]),
    "unknown category": (
        lambda c, f: change(c, f, "category_id", 5),
        None,
        3,
        ["unknown category", "annotation 1", "5"],
    ),
}


def change(content: dict, file, key: str, value: int) -> None:
    content["annotations"][0][key] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("fault", FAULTS)
def test_data_that_cannot_be_used_ends_with_code_3_and_says_where(fault, tmp_path, weights):
    spoil, folder, code, said = FAULTS[fault]
    data = write_data(tmp_path / "coco")
    file = data / "annotations" / "instances_val.json"
    spoil(json.loads(file.read_text()), file)
    done = run_program("evaluate", "--weights", weights, "--data", folder or data, "--output", tmp_path / "out")
    assert done.returncode == code
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "\n  where: " in done.stderr and "\n  fix:   " in done.stderr
    for words in said:
        assert words in done.stderr


def test_a_damaged_image_among_the_data_is_named(tmp_path, weights):
    data = write_data(tmp_path / "coco")
    file = data / "val" / "12.png"
    file.write_bytes(file.read_bytes()[:2000])
    done = run_program("evaluate", "--weights", weights, "--data", data, "--output", tmp_path / "out")
    assert done.returncode == 3
    assert f"\n  where: {file}\n" in done.stderr and "Traceback" not in done.stderr
