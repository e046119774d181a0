"""How many broken images a run may leave out."""

import pytest

from models.bad_images import AT_LEAST, SHARE, BadImages
from models.errors import DataError


def test_one_image_in_a_thousand_may_be_broken(tmp_path):
    images = SHARE * (AT_LEAST + 2) - 1
    told = []
    bad = BadImages(tmp_path, images, told.append)
    bad.note(f"{number}.png: cut off" for number in range(AT_LEAST + 1))
    assert len(told) == AT_LEAST + 1
    with pytest.raises(DataError) as error:
        bad.note(["another.png: cut off"])
    assert error.value.why == f"{AT_LEAST + 2} of them, more than {AT_LEAST + 1}"
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == AT_LEAST + 2  # the one too many is named, too
