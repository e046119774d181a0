"""Polygons of masks: rings on the pixels' borders that COCO's tools draw back to the mask, and what else is lost."""

import numpy as np
import pytest
from pycocotools import mask as mask_api

from models.polygons import draw_even_odd, draw_union, mask_polygons


def rle(mask: np.ndarray) -> dict:
    return mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))


def picture(text: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in line] for line in text.split()])


def test_a_rectangle_has_its_four_corners():
    mask = np.zeros((6, 9), bool)
    mask[2:5, 3:8] = True
    found = mask_polygons(rle(mask))
    assert {tuple(corner) for corner in found.outer[0]} == {(3, 2), (8, 2), (8, 5), (3, 5)}
    assert (len(found.outer), found.holes, found.iou, found.filled_iou) == (1, [], 1.0, 1.0)


RINGS = """
    .........
    .#######.
    .#.....#.
    .#.###.#.
    .#.#.#.#.
    .#.###.#.
    .#.....#.
    .#######.
    ........."""


def test_a_hole_and_an_island_in_it_are_rings_of_their_own_and_filling_them_is_told():
    mask = picture(RINGS)
    found = mask_polygons(rle(mask))
    assert (len(found.outer), len(found.holes)) == (2, 2)
    assert found.iou == 1.0
    assert found.filled_iou == mask.sum() / 49  # COCO's polygons fill the outer ring, 7 x 7 pixels
    assert draw_union(found.outer, *mask.shape).sum() == 49


def test_parts_that_touch_by_a_corner_are_apart():
    found = mask_polygons(rle(picture("##.. ##.. ..## ..##")))
    assert [len(ring) for ring in found.outer] == [4, 4] and found.holes == []


def test_outer_rings_turn_clockwise_and_holes_the_other_way():
    def turn(ring):  # above 0: clockwise on the screen
        after = np.roll(ring, -1, axis=0)
        return (ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]).sum()

    found = mask_polygons(rle(picture(RINGS)))
    assert all(turn(ring) > 0 for ring in found.outer) and all(turn(ring) < 0 for ring in found.holes)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_random_masks_come_back_pixel_for_pixel(share):
    random = np.random.default_rng(int(100 * share))
    for _ in range(40):
        mask = random.random(random.integers(1, 24, 2)) < share
        found = mask_polygons(rle(mask))
        np.testing.assert_array_equal(draw_even_odd([*found.outer, *found.holes], *mask.shape), mask)
        filled = draw_union(found.outer, *mask.shape)
        assert found.iou == 1.0
        assert found.filled_iou == (mask.sum() / filled.sum() if mask.any() else 1.0)


def test_a_tolerance_drops_corners_and_says_what_that_costs():
    y, x = np.mgrid[:200, :300]
    mask = np.hypot(y - 90, x - 150) < 70
    exact, simple = mask_polygons(rle(mask)), mask_polygons(rle(mask), tolerance=2.0)
    assert len(simple.outer[0]) < len(exact.outer[0]) / 5
    drawn = draw_union(simple.outer, *mask.shape)
    iou = (drawn & mask).sum() / (drawn | mask).sum()
    assert simple.iou == iou and 0.9 < iou < 1


def test_a_ring_too_small_for_the_tolerance_is_kept():
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    assert mask_polygons(rle(mask), tolerance=3.0).iou == 1.0


def test_coco_reads_the_flat_lists():
    mask = picture("####.... ####.... ......## ......##")
    flat = mask_polygons(rle(mask)).coco()
    merged = mask_api.merge(mask_api.frPyObjects(flat, *mask.shape))
    np.testing.assert_array_equal(mask_api.decode(merged), mask)


def test_an_empty_mask_has_no_rings():
    found = mask_polygons(rle(np.zeros((4, 4), bool)))
    assert (found.outer, found.holes, found.iou, found.filled_iou) == ([], [], 1.0, 1.0)


def test_a_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="at least 0 pixels, got -1"):
        mask_polygons(rle(np.ones((2, 2), bool)), tolerance=-1)
