"""Few shapes cover a data set, and little is padded for it."""

from collections import Counter

import pytest

from models.buckets import bucket_size
from models.data.transforms import padded_size, resized_size

PUBLISHED = (800, 1333)
SIDES = range(1, 2001, 7)


def bucket_of_picture(height: int, width: int) -> tuple[int, int]:
    return bucket_size(*resized_size(height, width, *PUBLISHED), PUBLISHED)


@pytest.mark.parametrize(
    ("picture", "bucket"),
    [
        ((480, 640), (800, 1088)),  # 4:3 becomes 800 x 1067
        ((375, 500), (800, 1088)),
        ((427, 640), (800, 1216)),  # 3:2 becomes 800 x 1199
        ((426, 640), (800, 1216)),
        ((360, 640), (800, 1344)),  # 16:9 becomes 750 x 1333
        ((640, 640), (800, 832)),
        ((640, 480), (1088, 800)),
        ((640, 427), (1216, 800)),
        ((200, 640), (544, 1344)),
    ],
)
def test_common_pictures_by_hand(picture, bucket):
    assert bucket_of_picture(*picture) == bucket


@pytest.mark.parametrize("resize", [PUBLISHED, (160, 192), (100, 1001), (640, 640)])
def test_a_bucket_holds_its_picture_and_keeps_the_limits(resize):
    short, long = padded_size(*resize)
    for side in SIDES:
        for size in ((side, 333), (333, side), (side, side)):
            bucket = bucket_size(*size, resize)
            assert all(b >= s and b % 32 == 0 for b, s in zip(bucket, size, strict=True))
            if min(size) <= short and max(size) <= long:
                assert min(bucket) <= short and max(bucket) <= long


def test_without_limits_each_padded_size_is_a_bucket():
    assert {bucket_size(height, 100, None) for height in range(1, 97)} == {(32, 128), (64, 128), (96, 128)}


def test_what_the_documentation_says_of_coco():
    """docs/export.md: pictures of 640 pixels on the long side, every short side from 360 (16:9) to 640, both ways."""
    pictures = [(short, 640) for short in range(360, 641)] + [(640, short) for short in range(360, 640)]
    resized = [resized_size(*picture, *PUBLISHED) for picture in pictures]
    buckets = Counter(bucket_size(*size, PUBLISHED) for size in resized)
    own_shapes = Counter(padded_size(*size) for size in resized)
    assert (len(buckets), len(own_shapes)) == (10, 37)
    picture, bucket, own = (
        sum(h * w for h, w in sizes) for sizes in (resized, buckets.elements(), own_shapes.elements())
    )
    assert (round(bucket / picture, 3), round(own / picture, 3)) == (1.059, 1.017)
