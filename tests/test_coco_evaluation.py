"""COCO average precision: equal to pycocotools called directly, and right where it can be computed on paper."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.coco_evaluation import Metrics, average_precision, has_masks, result_entries, truth_rle, write_results
from models.data.annotations import pack_annotations
from models.errors import DataError
from models.overlaps import image_overlaps

SIZE = (120, 160)


def rectangle(x: int, y: int, width: int, height: int) -> dict:
    """Run lengths of a filled rectangle, as JSON has them."""
    mask = np.zeros(SIZE, np.uint8)
    mask[y : y + height, x : x + width] = 1
    rle = mask_api.encode(np.asfortranarray(mask))
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def truth(*objects: tuple, num_images: int = 1) -> dict:
    """A COCO file with objects (image id, category id, [x, y, width, height], more fields)."""
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": rectangle(*box),
            **(more[0] if more else {}),
        }
        for number, (image_id, category_id, box, *more) in enumerate(objects, 1)
    ]
    return {
        "images": [
            {"id": i + 1, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.jpg"} for i in range(num_images)
        ],
        "categories": [{"id": 3, "name": "disc"}, {"id": 7, "name": "star"}],
        "annotations": annotations,
    }


def found(kind: str, *detections: tuple) -> list[dict]:
    """Results (image id, category id, [x, y, width, height], score)."""
    return [
        {"image_id": image_id, "category_id": category_id, "score": score}
        | ({"bbox": box} if kind == "bbox" else {"segmentation": rectangle(*box)})
        for image_id, category_id, box, score in detections
    ]


A, B = [10, 20, 40, 30], [80, 60, 50, 50]
ONE = pytest.approx(1.0, abs=1e-12)  # pycocotools divides by (hits + false alarms + the spacing of 1.0)
both_kinds = pytest.mark.parametrize("kind", ["bbox", "segm"])


@both_kinds
def test_perfect_detections_score_one(kind):
    result = average_precision(truth((1, 3, A), (1, 7, B)), found(kind, (1, 3, A, 0.9), (1, 7, B, 0.2)), kind)
    assert (result.ap, result.ap50, result.ap75, result.medium) == (ONE, ONE, ONE, ONE)
    assert result.per_class == {"disc": ONE, "star": ONE}
    assert math.isnan(result.small) and math.isnan(result.large)


@both_kinds
def test_one_of_two_missed_scores_51_of_101(kind):
    """Precision 1 at the recalls 0, 0.01 ... 0.50, and 0 beyond: 51 of the 101 sampled recalls."""
    result = average_precision(truth((1, 3, A), (1, 3, B)), found(kind, (1, 3, A, 0.9)), kind)
    assert result.ap == pytest.approx(51 / 101, abs=1e-12)


@both_kinds
def test_a_false_alarm_above_the_hits_costs_a_third(kind):
    """In order of score: false, hit, hit. Precision 1/2 then 2/3; made monotonic, 2/3 at every recall."""
    detections = found(kind, (1, 3, [100, 5, 30, 30], 0.9), (1, 3, A, 0.8), (1, 3, B, 0.7))
    assert average_precision(truth((1, 3, A), (1, 3, B)), detections, kind).ap == pytest.approx(2 / 3, abs=1e-12)


@both_kinds
def test_an_overlap_of_062_counts_at_three_of_ten_thresholds(kind):
    """The detection covers 62 of the object's 100 columns: a hit at IoU 0.50, 0.55 and 0.60."""
    result = average_precision(truth((1, 3, [10, 10, 100, 80])), found(kind, (1, 3, [10, 10, 62, 80], 0.9)), kind)
    assert (result.ap, result.ap50, result.ap75) == (pytest.approx(0.3, abs=1e-12), ONE, 0.0)


@both_kinds
def test_nothing_found_scores_zero_and_nothing_to_find_is_undefined(kind):
    nothing_found = average_precision(truth((1, 3, A)), [], kind)
    assert nothing_found.ap == 0.0
    assert nothing_found.per_class["disc"] == 0.0 and math.isnan(nothing_found.per_class["star"])
    nothing_there = average_precision(truth(), found(kind, (1, 3, A, 0.9)), kind)
    assert math.isnan(nothing_there.ap)
    assert math.isnan(average_precision(truth(), [], kind).ap)


@both_kinds
def test_detections_in_a_crowd_neither_help_nor_hurt(kind):
    crowd = (1, 3, [60, 40, 90, 75], {"iscrowd": 1})
    in_the_crowd = [(1, 3, B, 0.95), (1, 3, [100, 50, 30, 30], 0.9)]
    with_crowd = average_precision(truth((1, 3, A), crowd), found(kind, *in_the_crowd, (1, 3, A, 0.5)), kind)
    without = average_precision(truth((1, 3, A)), found(kind, *in_the_crowd, (1, 3, A, 0.5)), kind)
    assert with_crowd.ap == ONE
    assert without.ap == pytest.approx(1 / 3, abs=1e-12)


def random_case(seed: int) -> tuple[dict, dict[str, list[dict]]]:
    """6 images, 2 classes, crowds; detections that are moved, wrong, doubled or missing."""
    random = np.random.default_rng(seed)
    objects, detections = [], []
    for image_id in range(1, 7):
        for _ in range(random.integers(0, 8)):
            x, y, category = random.integers(0, 100), random.integers(0, 70), int(random.choice([3, 7]))
            box = [int(x), int(y), *random.integers(8, 50, 2).tolist()]
            objects.append((image_id, category, box, {"iscrowd": int(random.random() < 0.15)}))
            for _ in range(random.integers(0, 3)):
                moved = np.array(box) + random.integers(-6, 7, 4)
                moved = [max(0, int(moved[0])), max(0, int(moved[1])), max(4, int(moved[2])), max(4, int(moved[3]))]
                wrong = 3 if random.random() < 0.1 else category
                detections.append((image_id, wrong, moved, float(np.float32(random.random()))))
    order = random.permutation(len(detections))
    detections = [detections[i] for i in order]
    return truth(*objects, num_images=6), {kind: found(kind, *detections) for kind in ("bbox", "segm")}


def by_pycocotools(annotations: dict, detections: list[dict], kind: str) -> np.ndarray:
    """AP, AP50, AP75, small, medium, large; NaN where undefined."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(annotations)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats[:6] == -1, np.nan, evaluation.stats[:6])


@both_kinds
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_pycocotools_called_directly(kind, seed):
    annotations, detections = random_case(seed)
    before = copy.deepcopy((annotations, detections))
    ours = average_precision(annotations, detections[kind], kind)
    assert (annotations, detections) == before, "the arguments must not be changed"
    theirs = by_pycocotools(annotations, detections[kind], kind)
    values = [ours.ap, ours.ap50, ours.ap75, ours.small, ours.medium, ours.large]
    np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-12)
    assert 0.05 < ours.ap < 0.95, "the case must be neither trivial nor hopeless"


def test_only_the_chosen_images_are_scored():
    annotations = truth((1, 3, A), (2, 3, B), num_images=2)
    result = average_precision(annotations, found("bbox", (1, 3, A, 0.9)), "bbox", image_ids=[1])
    assert result.ap == ONE
    with pytest.raises(DataError) as error:
        average_precision(annotations, found("bbox", (9, 3, A, 0.9)), "bbox")
    assert error.value.where == "image_id 9"


def test_an_object_with_id_zero_counts():
    """pycocotools alone takes a match with id 0 for none."""
    annotations, detections = truth((1, 3, A, {"id": 0})), found("bbox", (1, 3, A, 0.9))
    assert by_pycocotools(annotations, detections, "bbox")[0] == 0.0
    assert average_precision(annotations, detections, "bbox").ap == ONE


@pytest.mark.parametrize("segmentation", ["rle", "uncompressed", "polygon"])
def test_missing_area_and_iscrowd_are_filled_in(segmentation):
    annotations = truth((1, 3, [10, 20, 20, 20]))
    annotation = annotations["annotations"][0]
    del annotation["area"], annotation["iscrowd"]
    if segmentation == "polygon":
        annotation["segmentation"] = [[10, 20, 30, 20, 30, 40, 10, 40]]
    if segmentation == "uncompressed":
        zeros = 10 * SIZE[0] + 20
        counts = [zeros, 20, *[SIZE[0] - 20, 20] * 19]
        annotation["segmentation"] = {"size": list(SIZE), "counts": [*counts, SIZE[0] * SIZE[1] - sum(counts)]}
    result = average_precision(annotations, found("segm", (1, 3, [10, 20, 20, 20], 0.9)), "segm")
    assert (result.ap, result.small) == (ONE, ONE)


def test_boxes_without_masks():
    annotations = truth((1, 3, A))
    del annotations["annotations"][0]["segmentation"]
    assert not has_masks(annotations)
    assert average_precision(annotations, found("bbox", (1, 3, A, 0.9)), "bbox").ap == ONE
    with pytest.raises(DataError, match="annotation id 1 of image id 1"):
        average_precision(annotations, found("segm", (1, 3, A, 0.9)), "segm")


POLYGON, LINE = [80, 60, 130, 60, 130, 110, 80, 110], [1, 2, 3, 4]  # pycocotools takes 4 numbers for a box
NOT_TRAINED_ON = {
    "no polygon": {"segmentation": []},
    "short polygon": {"segmentation": [LINE]},
    "odd polygons": {"segmentation": [LINE, [], POLYGON[:7]]},
    "crowd without mask": {"segmentation": None, "iscrowd": 1},
    "ignored without mask": {"segmentation": None, "ignore": 1},
    "narrow without mask": {"segmentation": None, "bbox": [80, 60, 0.5, 50]},
}


@pytest.mark.parametrize("case", NOT_TRAINED_ON)
def test_what_is_left_out_of_training_for_its_mask_is_not_scored_by_mask(case):
    annotations = truth((1, 3, A), (1, 7, B, NOT_TRAINED_ON[case]))
    del annotations["annotations"][1]["area"]
    opened = pack_annotations(annotations, Path("a.json"))  # the reader takes it, and counts it
    assert opened.annotation_ids.tolist() == [1] and sum(count for _, count in opened.left_out) == 1
    result = average_precision(annotations, found("segm", (1, 3, A, 0.9), (1, 7, B, 0.8)), "segm")
    assert result.ap == ONE and math.isnan(result.per_class["star"])
    assert image_overlaps(annotations, found("segm", (1, 3, A, 0.9)), "segm", [1])[0].iou.tolist() == [[1.0]]
    by_box = average_precision(annotations, found("bbox", (1, 3, A, 0.9), (1, 7, B, 0.8)), "bbox")
    assert by_box.per_class["disc"] == ONE
    assert not has_masks(annotations | {"annotations": annotations["annotations"][1:]})
    assert mask_api.area(truth_rle(NOT_TRAINED_ON[case]["segmentation"], *SIZE)) == 0


def test_of_a_mask_the_short_polygons_do_not_count():
    annotations = truth((1, 7, B, {"segmentation": [LINE, POLYGON]}))
    del annotations["annotations"][0]["area"]
    before, entries = copy.deepcopy(annotations), found("segm", (1, 7, B, 0.9))
    assert average_precision(annotations, entries, "segm").medium == ONE  # 50 x 50
    assert image_overlaps(annotations, entries, "segm", [1])[0].iou.tolist() == [[1.0]]
    assert annotations == before and has_masks(annotations)


def test_a_malformed_polygon_is_named():
    with pytest.raises(DataError, match=r"malformed\n.*annotation id 1 of image id 1\n.*flat list of numbers"):
        average_precision(truth((1, 7, B, {"segmentation": [["a"] * 6]})), [], "segm")


def test_result_entries_and_files_are_what_coco_tools_read(tmp_path):
    masks = [{"size": list(SIZE), "counts": rectangle(*A)["counts"].encode()}] * 2
    boxes = np.array([[10, 20, 50, 50], [0.12345, 0.5, 3.25, 9.125]], np.float32)
    entries = result_entries(5, boxes, np.array([0.5, 0.25], np.float32), np.array([1, 0]), masks, [3, 7])
    assert entries["bbox"] == [
        {"image_id": 5, "category_id": 7, "score": 0.5, "bbox": [10.0, 20.0, 40.0, 30.0]},
        {"image_id": 5, "category_id": 3, "score": 0.25, "bbox": [0.123, 0.5, 3.127, 8.625]},
    ]
    assert entries["segm"][0] == {"image_id": 5, "category_id": 7, "score": 0.5, "segmentation": rectangle(*A)}
    assert not any("bbox" in entry for entry in entries["segm"])
    paths = write_results(tmp_path, entries)
    assert [path.name for path in paths] == ["detections.bbox.json", "detections.segm.json"]
    assert [json.loads(path.read_text()) for path in paths] == [entries["bbox"], entries["segm"]]
    coco = COCO()
    coco.dataset = truth((1, 3, A), num_images=5)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        assert coco.loadRes(str(paths[1])).loadAnns(1)[0]["area"] == 40 * 30


def test_no_detections_give_empty_entries():
    none = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    assert result_entries(5, *none, [], [3]) == {"bbox": [], "segm": []}
    assert result_entries(5, *none, None, [3]) == {"bbox": []}


def test_metrics_as_one_flat_line():
    precision = average_precision(truth((1, 3, A)), found("bbox", (1, 3, A, 0.9)), "bbox")
    assert Metrics(precision, None, images=1, images_per_second=2.0).flat() == {
        "images": 1,
        "images_per_second": 2.0,
        "box_ap": ONE,
        "box_ap50": ONE,
        "box_ap75": ONE,
        "box_ap_medium": ONE,
        "box_ap/disc": ONE,
    }


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_faster_evaluator_gives_the_same_numbers(kind, monkeypatch):
    """It is used where it is installed; then the tests above are of it, and this one is of both."""
    faster = pytest.importorskip("faster_coco_eval")
    generator = np.random.default_rng(0)
    boxes = [[int(x) for x in generator.integers([0, 0, 5, 5], [60, 60, 65, 65])] for _ in range(60)]
    ground = truth(*((i % 5 + 1, (3, 7)[i % 2], box) for i, box in enumerate(boxes[:30])), num_images=5)
    guesses = [
        (i % 5 + 1, (3, 7)[i % 2], [box[0] + i % 4, *box[1:]], float(generator.random())) for i, box in enumerate(boxes)
    ]
    results = {}
    for name, classes in {"pycocotools": (COCO, COCOeval), "faster": (faster.COCO, faster.COCOeval_faster)}.items():
        monkeypatch.setattr("models.coco_evaluation.COCO", classes[0])
        monkeypatch.setattr("models.coco_evaluation.COCOeval", classes[1])
        results[name] = average_precision(ground, found(kind, *guesses), kind)
    assert results["faster"] == results["pycocotools"] and 0 < results["faster"].ap < 1
