"""Reading images: the right pixels of every allowed format, and an error with the file's name for everything else."""

import io

import numpy as np
import pytest
from PIL import Image

from models import images
from models.errors import DataError
from models.images import image_size, read_image


def picture(height: int = 37, width: int = 53) -> np.ndarray:
    """Smooth colours with some noise: uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([120 + 80 * np.sin(x / 9), 100 + 2 * y, 90 + 60 * np.cos((x + y) / 11)], axis=-1)
    return (smooth + np.random.default_rng(0).normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def by_pillow(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp"])
def test_lossless_formats_give_the_very_pixels(tmp_path, name):
    Image.fromarray(picture()).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    result = read_image(tmp_path / name)
    np.testing.assert_array_equal(result, picture())
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    assert image_size(tmp_path / name) == (37, 53)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (16, 7)])
def test_the_fast_path_for_jpeg_equals_pillow(tmp_path, mode, subsampling, size):
    Image.fromarray(picture(*size)).convert(mode).save(
        tmp_path / "a.jpg", subsampling=subsampling, progressive=size[0] > 16
    )
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), by_pillow(tmp_path / "a.jpg"))


def test_without_simplejpeg_the_pixels_are_the_same(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    fast = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), fast)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path, orientation):
    """Pillow's exif_transpose is the oracle; on paper: orientation 6 puts the stored left edge on top."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    from PIL import ImageOps

    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(ImageOps.exif_transpose(image)))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", upright=False), picture())
    if orientation == 6:
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], picture()[::-1, 0])


def test_the_content_decides_and_not_the_name(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.jpg").read_bytes())
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), by_pillow(tmp_path / "a.jpg"))
    assert image_size(tmp_path / "a.png") == (37, 53)


@pytest.mark.parametrize(
    "rubbish",
    [
        bytes(range(256)),
        b"",
        b"II*\0" + b"\xff" * 60,  # an offset beyond the file
        b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40,  # more entries than there are
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",  # an orientation that is a text
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\x03\xe7\0\0\0\0\0\0",  # 999
    ],
    ids=["no header", "empty", "far away", "too many", "text", "out of range"],
)
def test_rubbish_in_exif_leaves_the_picture_as_it_is_stored(tmp_path, rubbish):
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    plain = (tmp_path / "a.jpg").read_bytes()
    exif = b"Exif\0\0" + rubbish
    (tmp_path / "b.jpg").write_bytes(plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:])
    np.testing.assert_array_equal(read_image(tmp_path / "b.jpg"), by_pillow(tmp_path / "a.jpg"))


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path):
    grey = picture()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([picture(), grey])).save(tmp_path / "transparent.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 255).save(tmp_path / "deep.png")
    Image.fromarray(picture()).quantize(16).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "transparent.png"), picture())
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), by_pillow(tmp_path / "palette.png"))


def test_a_missing_file_names_what_is_there(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "street.jpg")
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "sreet.jpg")
    assert str(error.value) == (
        f"no such image file\n  where: {tmp_path}/sreet.jpg\n  fix:   images in {tmp_path}: street.jpg"
    )
    with pytest.raises(DataError, match="does not exist either"):
        read_image(tmp_path / "no" / "a.jpg")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"<html>not an image</html>", "it starts with b'<html>not an'"),
        (b"GIF89a" + bytes(50), "GIF89a"),
    ],
)
def test_what_is_no_image_is_told(tmp_path, content, why):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "a.jpg")
    assert error.value.what == "not an image that can be read"
    assert why in error.value.why and "none of JPEG, PNG, WEBP, BMP" in error.value.why


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(DataError, match="this is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_truncation_gives_an_error_and_never_a_picture_or_a_crash(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture(200, 300)).save(buffer, kind)
    whole = buffer.getvalue()
    for share in (0.01, 0.1, 0.5, 0.9):
        (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError) as error:
            read_image(tmp_path / "cut")
        assert error.value.where == str(tmp_path / "cut")
    assert error.value.what == "the image file is truncated or corrupt"


def test_a_small_file_that_is_huge_in_memory_is_refused_unread(tmp_path, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "bomb.png")
    assert error.value.what == "the image is too large"
    assert "at most 89,478,485 pixels" in error.value.why
    Image.new("1", (10_000, 10_000)).save(tmp_path / "warned.png")  # Pillow alone would only warn
    with pytest.raises(DataError, match="too large"):
        read_image(tmp_path / "warned.png")
