"""Pictures of detections: what is painted where, on images of any size, and names that stay inside the picture."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from models import visualise
from models.images import read_image
from models.visualise import PALETTE, comparison_grid, overlay, save_picture

GREY = 128


def rle(mask: np.ndarray) -> dict:
    return mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def disc_mask(height: int, width: int, hole: bool = False) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2)
    return (distance < height / 4) & ~(hole & (distance < height / 8))


def test_an_image_without_objects_is_left_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (500, 640, 3), dtype=np.uint8)
    np.testing.assert_array_equal(overlay(image, np.zeros((0, 4)), [], ["a"], [], []), image)


def test_the_mask_is_translucent_its_edge_opaque_and_nothing_else_is_touched():
    mask = disc_mask(600, 800, hole=True)
    picture = overlay(grey(600, 800), [[250, 150, 550, 450]], [0], ["thing"], None, [rle(mask)])
    blend = np.floor(GREY * (1 - visualise.OPACITY) + np.array(PALETTE[0]) * visualise.OPACITY)
    np.testing.assert_allclose(picture[300, 400 - 110], blend, atol=1)
    assert (picture[300, 400] == GREY).all(), "the hole stays a hole"
    row = np.flatnonzero(mask[300])
    assert (picture[300, row[0]] == PALETTE[0]).all() and (picture[300, row[-1]] == PALETTE[0]).all()
    untouched = ~mask
    untouched[:460, 240:560] = False  # the box and its name
    assert (picture[untouched] == GREY).all()
    assert mask[:110].sum() == 0


def test_the_box_is_drawn_on_its_own_border():
    picture = overlay(grey(600, 800), [[100, 200, 300, 400]], [2], ["a", "b", "c"])
    for x, y in ((100, 300), (299, 300), (200, 399)):
        assert (picture[y, x] == PALETTE[2]).all()
    for x, y in ((99, 300), (300, 300), (200, 400), (200, 300), (105, 300)):
        assert (picture[y, x] == GREY).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((96, 128), 5), ((160, 192), 3), ((480, 640), 1), ((1080, 1920), 1), ((1, 1), 480)]
)
def test_small_images_are_enlarged_so_that_names_can_be_read(size, scale):
    height, width = size
    mask = np.ones(size)
    picture = overlay(grey(*size), [[0, 0, width, height]], [0], ["thing"], [0.5], [rle(mask)])
    assert picture.shape == (height * scale, width * scale, 3)


def test_masks_land_on_the_same_place_when_enlarged():
    mask = disc_mask(100, 100)
    picture = overlay(grey(100, 100), np.zeros((1, 4)), [0], [""], None, [rle(mask)])
    scale = picture.shape[0] // 100
    painted = (picture != GREY).any(axis=2)
    painted[: 10 * scale, : 10 * scale] = False  # the box and name of the empty box, in the corner
    wanted = mask.repeat(scale, axis=0).repeat(scale, axis=1)
    assert (painted & wanted).sum() / (painted | wanted).sum() > 0.97


@pytest.mark.parametrize(
    "box",
    [[0, 0, 5, 5], [790, 0, 800, 10], [0, 590, 10, 600], [795, 595, 800, 600], [0, 0, 800, 600], [-50, -50, 900, 700]],
)
def test_names_stay_inside_the_picture(box, monkeypatch):
    places = []
    original = visualise._write_name
    monkeypatch.setattr(visualise, "_write_name", lambda *a: places.append(original(*a)) or places[-1])
    overlay(grey(600, 800), [box], [0], ["a rather long name"], [0.99])
    x1, y1, x2, y2 = places[0]
    assert 0 <= x1 < x2 <= 800 and 0 <= y1 < y2 <= 600


def test_names_avoid_each_other(monkeypatch):
    places = []
    original = visualise._write_name
    monkeypatch.setattr(visualise, "_write_name", lambda *a: places.append(original(*a)) or places[-1])
    boxes = [[200, 200, 500, 400], [200, 202, 500, 398], [202, 200, 498, 400]]
    overlay(grey(600, 800), boxes, [0, 1, 2], ["person", "bicycle", "dog"], [0.9, 0.8, 0.7])
    assert len(set(places)) == 3
    for i, place in enumerate(places):
        assert sum(visualise._overlap(place, other) for other in places[:i]) == 0


@pytest.mark.parametrize("box", [[10, 10, 10, 10], [10, 10, 10.2, 300], [300, 300, 200, 200], [1e6, 1e6, 2e6, 2e6]])
def test_degenerate_boxes_and_empty_masks_are_no_fault(box):
    picture = overlay(grey(600, 800), [box], [0], ["thing"], [0.5], [rle(np.zeros((600, 800)))])
    assert picture.shape == (600, 800, 3)


def test_classes_have_colours_of_their_own():
    colours = [visualise._colour(label) for label in range(3 * len(PALETTE))]
    assert len(set(colours)) == len(colours)
    assert colours[: len(PALETTE)] == list(PALETTE)


def test_small_objects_are_painted_over_large_ones():
    large, small = np.zeros((600, 800)), np.zeros((600, 800))
    large[100:500, 100:500], small[200:300, 200:300] = 1, 1
    boxes = np.array([[200, 200, 300, 300], [100, 100, 500, 500]])
    picture = overlay(grey(600, 800), boxes, [1, 0], ["large", "small"], None, [rle(small), rle(large)])
    once = np.floor(GREY * (1 - visualise.OPACITY) + np.array(PALETTE[0]) * visualise.OPACITY)
    twice = np.floor(once * (1 - visualise.OPACITY) + np.array(PALETTE[1]) * visualise.OPACITY)
    np.testing.assert_allclose(picture[280, 280], twice, atol=1)


def test_a_grid_holds_every_pair():
    rows = [
        (np.full((480, 600, 3), 10 * i, np.uint8), np.full((480, 600, 3), 10 * i + 5, np.uint8)) for i in range(1, 4)
    ]
    sheet = comparison_grid(rows)
    present = {tuple(colour) for colour in sheet.reshape(-1, 3)}
    assert all((value,) * 3 in present for value in (10, 15, 20, 25, 30, 35))
    assert comparison_grid([]).ndim == 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_pictures_are_saved_by_their_name(tmp_path, name):
    pixels = np.full((48, 64, 3), (200, 30, 90), np.uint8)
    save_picture(tmp_path / name, pixels)
    with Image.open(tmp_path / name) as image:
        assert image.format == ("PNG" if name == "a.png" else "JPEG")
    np.testing.assert_allclose(read_image(tmp_path / name), pixels, atol=0 if name == "a.png" else 3)
