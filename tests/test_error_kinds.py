"""Kinds of error, confusion and image quality on scenes whose answers can be worked out on paper."""

import numpy as np
import pytest

from models.coco_evaluation import average_precision, truth_rle
from models.confusion import confusion, image_qualities
from models.error_kinds import KINDS, error_kinds
from models.overlaps import image_overlaps, taken_objects

A, B, FAR = [0, 0, 10, 10], [100, 0, 10, 10], [50, 50, 10, 10]
HALF_OFF_B = [105, 0, 10, 10]  # 50 of 150 pixels in common: IoU 1/3
CAT, DOG = 1, 2


def truth(*objects, images=1, crowd=()):
    """Objects (category, box) of image 1."""
    return {
        "images": [{"id": i + 1, "height": 200, "width": 200} for i in range(images)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": c, "bbox": box, "area": 100, "iscrowd": int(i in crowd)}
            for i, (c, box) in enumerate(objects)
        ],
    }


def found(*detections):
    """Detections (score, category, box) in image 1."""
    return [{"image_id": 1, "category_id": c, "score": s, "bbox": box} for s, c, box in detections]


def errors(ground_truth, entries):
    result = error_kinds(image_overlaps(ground_truth, entries, "bbox", [1]), 2)
    assert result.ap50 == pytest.approx(average_precision(ground_truth, entries, "bbox").ap50, abs=1e-12)
    assert result.counts.keys() == result.costs.keys() == KINDS.keys()
    counts = {kind: count for kind, count in result.counts.items() if count}
    costs = {kind: result.costs[kind] for kind in counts}
    for kind in KINDS.keys() - counts.keys():
        assert result.costs[kind] == pytest.approx(0, abs=1e-15), kind
    return result.ap50, counts, costs


def test_duplicate_localisation_and_background():
    ap, counts, costs = errors(
        truth((CAT, A), (CAT, B)), found((0.9, CAT, A), (0.8, CAT, A), (0.7, CAT, HALF_OFF_B), (0.6, CAT, FAR))
    )
    # right, wrong, wrong, wrong: precision 1 up to recall 0.5, which are 51 of the 101 recalls
    assert ap == pytest.approx(51 / 101)
    assert counts == {"duplicate": 1, "localisation": 1, "background": 1}  # B is not missed: it has the bad box
    # localised: right, wrong, right, wrong; the other 50 recalls get a precision of 2/3
    assert costs == pytest.approx({"duplicate": 0, "localisation": 50 * 2 / 3 / 101, "background": 0}, abs=1e-12)


@pytest.mark.parametrize(("box", "kind"), [(A, "duplicate"), (FAR, "background")])
def test_what_is_taken_away_costs_the_precision_of_what_comes_behind_it(box, kind):
    ap, counts, costs = errors(truth((CAT, A), (CAT, B)), found((0.9, CAT, A), (0.8, CAT, box), (0.7, CAT, B)))
    assert ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert counts == {kind: 1}
    assert costs == pytest.approx({kind: 50 / 3 / 101})


def test_wrong_class():
    ap, counts, costs = errors(truth((CAT, A), (DOG, B)), found((0.9, CAT, A), (0.8, CAT, B)))
    assert ap == pytest.approx(0.5)  # cat 1, dog 0
    assert counts == {"class": 1}  # the dog is not missed
    assert costs == pytest.approx({"class": 0.5})


def test_wrong_class_and_place_leaves_the_object_missed():
    ap, counts, costs = errors(truth((CAT, A), (DOG, B)), found((0.9, CAT, HALF_OFF_B), (0.8, CAT, A)))
    assert ap == pytest.approx(0.25)  # cat: wrong, right, so 0.5 at every recall; dog 0
    assert counts == {"both": 1, "missed": 1}
    # without the wrong detection cat 1, dog 0; without the missed dog, the mean is cat's alone
    assert costs == pytest.approx({"both": 0.25, "missed": 0.25})


def test_a_mended_detection_takes_the_object_from_one_that_is_less_sure():
    ap, counts, costs = errors(
        truth((CAT, A), (DOG, B)), found((0.8, CAT, B), (0.6, DOG, B), (0.5, CAT, A), (0.4, DOG, B))
    )
    assert ap == pytest.approx(0.75)  # cat: wrong, right; dog: right, wrong
    assert counts == {"class": 1, "duplicate": 1}
    # the first becomes a dog and the one at 0.6 goes: cat 1, dog 1 (the duplicate comes behind)
    assert costs == pytest.approx({"class": 0.25, "duplicate": 0})
    # it matters which of the two stays: 0.8 is surer than the wrong dog at 0.7, and 0.6 is not
    ap, _, costs = errors(
        truth((CAT, A), (DOG, B)), found((0.8, CAT, B), (0.7, DOG, FAR), (0.6, DOG, B), (0.5, CAT, A))
    )
    assert ap == pytest.approx(0.5) and costs["class"] == pytest.approx(0.5)
    # and that the other goes: an object that is found twice does not make up for one that is not found
    ap, _, costs = errors(truth((CAT, A), (DOG, B), (DOG, FAR)), found((0.9, CAT, A), (0.8, CAT, B), (0.6, DOG, B)))
    assert ap == pytest.approx((1 + 51 / 101) / 2) and costs["class"] == pytest.approx(0)
    # the other way round, what is mended goes, and the surer one stays
    ap, counts, costs = errors(truth((CAT, A), (DOG, B)), found((0.8, CAT, A), (0.6, DOG, B), (0.5, CAT, B)))
    assert (ap, counts) == (pytest.approx(1), {"class": 1}) and costs == pytest.approx({"class": 0})


def test_the_own_class_comes_first_where_two_kinds_hold():
    # IoU 1/3 with the dog beside it, IoU 1 with the cat
    _, counts, _ = errors(truth((DOG, HALF_OFF_B), (CAT, B)), found((0.9, DOG, B)))
    assert counts == {"localisation": 1, "missed": 1}


def test_the_limits_belong_to_the_better_side():
    # 10 of 20 rows: IoU 0.5 exactly; 2 of 20 columns: 0.1 exactly
    ground_truth = truth((CAT, [0, 0, 20, 20]))
    assert errors(ground_truth, found((0.9, CAT, [0, 0, 20, 10])))[1] == {}
    twice = found((0.9, CAT, [0, 0, 20, 20]), (0.8, CAT, [0, 0, 20, 10]))
    assert errors(ground_truth, twice)[1] == {"duplicate": 1}
    assert errors(ground_truth, found((0.9, CAT, [0, 0, 20, 2])))[1] == {"localisation": 1}
    assert errors(ground_truth, found((0.9, DOG, [0, 0, 20, 10])))[1] == {"class": 1}
    assert errors(ground_truth, found((0.9, DOG, [0, 0, 20, 2])))[1] == {"both": 1, "missed": 1}
    assert errors(ground_truth, found((0.9, DOG, [0, 0, 20, 1])))[1] == {"background": 1, "missed": 1}


def test_a_crowd_is_neither_missed_nor_an_error():
    ground_truth = truth((CAT, A), (CAT, [90, 0, 100, 100]), crowd=[1])
    _, counts, _ = errors(ground_truth, found((0.9, CAT, A), (0.8, CAT, B), (0.7, CAT, B), (0.6, DOG, B)))
    assert counts == {"background": 1}  # the dog: a crowd of cats excuses cats only


def test_nothing_found_and_nothing_there():
    ap, counts, _ = errors(truth((CAT, A)), [])
    assert (ap, counts) == (0, {"missed": 1})
    result = error_kinds(image_overlaps(truth(), found((0.9, CAT, A)), "bbox", [1]), 2)
    assert np.isnan(result.ap50) and result.counts["background"] == 1


def test_ap50_is_cocos_on_random_scenes():
    random = np.random.default_rng(0)
    for _ in range(20):
        ground_truth, entries = truth(images=6), []
        for image in range(1, 7):
            for _ in range(random.integers(0, 7)):
                box = [*random.integers(0, 60, 2).tolist(), *random.integers(10, 40, 2).tolist()]
                category = int(random.integers(1, 3))
                known = {"id": len(ground_truth["annotations"]) + 1, "image_id": image, "area": box[2] * box[3]}
                crowd = int(random.random() < 0.1)
                ground_truth["annotations"].append(known | {"category_id": category, "bbox": box, "iscrowd": crowd})
                for _ in range(random.integers(0, 3)):
                    near = [side + int(random.integers(-4, 5)) for side in box]
                    guess = {"image_id": image, "category_id": category if random.random() < 0.8 else 3 - category}
                    entries.append(guess | {"score": float(random.integers(1, 9)) / 8, "bbox": near})
        result = error_kinds(image_overlaps(ground_truth, entries, "bbox", range(1, 7)), 2)
        assert result.ap50 == pytest.approx(average_precision(ground_truth, entries, "bbox").ap50, abs=1e-9)
        wrong = sum(count for kind, count in result.counts.items() if kind != "missed")
        assert 0 < wrong < len(entries)


def test_of_equal_overlaps_the_later_object_is_taken_as_cocos_loop_does():
    assert taken_objects(np.array([[0.7, 0.7], [0.7, 0.6]]), np.zeros(2, bool), 0.5).tolist() == [1, 0]


def test_masks_decide_where_masks_are_given():
    ground_truth = truth((CAT, A))
    ground_truth["annotations"][0]["segmentation"] = [[0, 0, 10, 0, 10, 10, 0, 10]]
    lower = truth_rle([[0, 0, 10, 0, 10, 4, 0, 4]], 200, 200)
    entries = [{"image_id": 1, "category_id": CAT, "score": 1.0, "segmentation": lower}]
    (image,) = image_overlaps(ground_truth, entries, "segm", [1])
    assert image.iou.tolist() == [[0.4]]


def test_confusion():
    entries = found((0.9, CAT, A), (0.8, CAT, B), (0.7, DOG, FAR), (0.6, CAT, A), (0.2, DOG, B))
    counts = confusion(image_overlaps(truth((CAT, A), (DOG, B), (DOG, [150, 150, 9, 9])), entries, "bbox", [1]), 2)
    #       cat  dog  missed
    assert counts.tolist() == [
        [1, 0, 0],  # cat
        [1, 0, 1],  # dog: one was called a cat, one was missed; 0.2 is below the score of pictures
        [1, 1, 0],  # nothing: the second cat at A, the dog far off
    ]


def test_image_quality():
    ground_truth = truth((CAT, A), (DOG, B), images=3)
    entries = found((0.9, CAT, A), (0.8, DOG, HALF_OFF_B), (0.7, CAT, FAR), (0.1, DOG, B))
    (image,) = image_qualities(image_overlaps(ground_truth, entries, "bbox", [1, 2, 3]))  # 2 and 3 have nothing
    # one object found with IoU 1, one missed, two wrong: 1 / (1 + 1.5)
    assert image == (1, 0.4, 1, 2, 2)
