"""The result object: filters, masks with holes and parts in every form, and the way to other tools and back."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

import models
from models.errors import DataError, MachineError, UsageError

SIZE = (40, 60)
NAMES, IDS = ("person", "traffic light", "dog"), (1, 10, 18)


def bitmaps() -> np.ndarray:
    """bool [3, H, W]: a frame (a hole), two parts, and a mask that touches all borders of the image."""
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 5:25, 5:30], masks[0, 10:20, 10:25] = True, False
    masks[1, 3:9, 40:50] = masks[1, 20:31, 42:58] = True
    masks[2] = True
    masks[2, 1:-1, 1:-1] = np.random.default_rng(0).random((38, 58)) < 0.5
    return masks


def make_result(**fields) -> models.Result:
    masks = [mask_api.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in bitmaps()]
    boxes = torch.tensor([[5.0, 5, 30, 25], [40, 3, 58, 31], [0, 0, 60, 40]])
    values = {"image_size": SIZE, "class_names": NAMES, "category_ids": IDS, "source": "street.jpg"} | fields
    return models.Result(boxes, torch.tensor([0.9, 1 / 3, 0.1]), torch.tensor([2, 0, 2]), masks, **values)


def nothing() -> models.Result:
    return make_result()[make_result().scores > 1]


def test_names_and_length():
    assert (len(make_result()), make_result().names) == (3, ["dog", "person", "dog"])
    assert make_result(class_names=None).names == ["class 2", "class 0", "class 2"]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        (np.array([False, True, False]), [1]),
        ([False, False, True], [2]),
        ([], []),
        ("dog", [0, 2]),
        ("traffic light", []),
        (["person", "dog"], [0, 1, 2]),
    ],
)
def test_filters(which, expected):
    result = make_result()
    part = result[which]
    assert part.scores.tolist() == [result.scores[i] for i in expected]
    assert part.boxes.tolist() == result.boxes[expected].tolist() and part.boxes.shape == (len(expected), 4)
    assert part.labels.tolist() == result.labels[expected].tolist()
    assert part.masks == [result.masks[i] for i in expected]
    assert (part.class_names, part.source) == (NAMES, "street.jpg")


def test_going_through_a_result_gives_results_of_one_object():
    assert [(len(one), one.names) for one in make_result()] == [(1, ["dog"]), (1, ["person"]), (1, ["dog"])]


def test_filters_that_do_not_fit_are_refused():
    with pytest.raises(IndexError, match="the filter has shape \\[2\\], the result has 3 objects"):
        make_result()[torch.tensor([True, False])]
    with pytest.raises(IndexError):
        make_result()[3]
    with pytest.raises(UsageError, match="there is no class 'traffic lights'") as error:
        make_result()["traffic lights"]
    assert error.value.fix == "did you mean traffic light?"


def test_masks_with_holes_and_parts_are_exact_in_every_form():
    result, truth = make_result(), bitmaps()
    assert result.bitmaps().dtype == torch.bool
    np.testing.assert_array_equal(result.bitmaps(), truth)
    for rle, entry, mask in zip(result.rle(), result.to_coco(1), truth, strict=True):
        assert rle == entry["segmentation"] and json.loads(json.dumps(rle)) == rle
        np.testing.assert_array_equal(mask_api.decode(rle | {"counts": rle["counts"].encode()}), mask)
    np.testing.assert_array_equal(models.Result.from_json(result.to_json()).bitmaps(), truth)


def test_polygons_say_what_they_lose():
    frame, parts, ragged = make_result().polygons()
    assert (len(frame.outer), len(frame.holes), frame.iou) == (1, 1, 1.0)
    assert frame.filled_iou == (20 * 25 - 10 * 15) / (20 * 25)
    assert (len(parts.outer), parts.holes, parts.iou, parts.filled_iou) == (2, [], 1.0, 1.0)
    assert ragged.iou == 1.0 and ragged.filled_iou < 0.8


def test_coco_entries_have_the_original_category_ids():
    entries = make_result().to_coco(image_id=77)
    assert [entry["category_id"] for entry in entries] == [18, 1, 18]
    assert entries[1]["bbox"] == [40.0, 3.0, 18.0, 28.0] and entries[1]["image_id"] == 77
    with pytest.raises(UsageError, match="category ids of this result are not known"):
        make_result(category_ids=None).to_coco(1)


def test_json_gives_back_the_same_values():
    result = make_result()
    again = models.Result.from_json(result.to_json())
    for name in ("boxes", "scores", "labels"):
        ours, theirs = getattr(result, name), getattr(again, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert again.masks == [{"size": list(SIZE), "counts": mask["counts"]} for mask in result.masks]
    for name in ("image_size", "class_names", "category_ids", "source"):
        assert getattr(again, name) == getattr(result, name)
    boxes_only = models.Result(result.boxes, result.scores, result.labels, None)
    assert models.Result.from_json(boxes_only.to_json()).masks is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.clear(), "'format' is missing"),
        (lambda values: values.update(format="other"), "its format is 'other'"),
        (lambda values: values["scores"].pop(), "not equally many"),
        (lambda values: values["masks"][0].update(counts="zzz"), "run length"),
        (lambda values: values["masks"][0].update(size=[4, 4]), "the image has 16"),
    ],
)
def test_other_json_is_refused(change, message):
    values = json.loads(make_result().to_json())
    change(values)
    with pytest.raises(DataError, match="this is not the JSON of a result") as error:
        models.Result.from_json(json.dumps(values))
    assert message in error.value.why


def test_an_empty_result_has_every_form():
    empty = nothing()
    assert (len(empty), empty.names, empty.rle(), empty.polygons(), empty.to_coco(1)) == (0, [], [], [], [])
    assert empty.bitmaps().shape == (0, *SIZE) and empty.boxes.shape == (0, 4)
    assert models.Result.from_json(empty.to_json()).boxes.shape == (0, 4)
    image = np.full((500, 600, 3), 7, np.uint8)
    np.testing.assert_array_equal(empty.plot(image), image)
    assert empty.summary() == "street.jpg (60 x 40): nothing with a score of 0.3 or more"


def test_a_detector_without_masks_says_so():
    boxes_only = models.Result(*(getattr(make_result(), name) for name in ("boxes", "scores", "labels")), None)
    for form in (boxes_only.rle, boxes_only.bitmaps, boxes_only.polygons):
        with pytest.raises(UsageError, match="there are no masks"):
            form()
    assert boxes_only[:2].masks is None


def test_supervision_gets_arrays(monkeypatch):
    """Against a stand-in: the package brings OpenCV or PyAV, and is not among the tests' requirements."""
    stand_in = types.ModuleType("supervision")
    stand_in.Detections = lambda **fields: types.SimpleNamespace(**fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    found = make_result().to_supervision()
    assert found.xyxy.shape == (3, 4) and found.xyxy.dtype == np.float32
    np.testing.assert_array_equal(found.mask, bitmaps())
    assert found.class_id.tolist() == [2, 0, 2] and found.confidence.dtype == np.float32
    assert found.data["class_name"].tolist() == ["dog", "person", "dog"]


def test_without_supervision_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)  # makes the import fail
    with pytest.raises(MachineError) as error:
        make_result().to_supervision()
    assert error.value.fix == "pip install supervision"


def test_plot_draws_what_is_above_the_threshold_and_save_writes_it(tmp_path):
    image = np.full((*SIZE, 3), 128, np.uint8)
    with_image = make_result(image=image)
    assert (image == 128).all() and with_image.plot().shape == (480, 720, 3)
    assert not np.array_equal(with_image.plot(score_threshold=0.5), with_image.plot(score_threshold=0.2))
    with_image.save(tmp_path / "a.png", score_threshold=0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), with_image.plot(score_threshold=0.5))
    with pytest.raises(UsageError, match="keeps no image"):
        make_result().plot()
