"""No file of a data set lies outside of its folder, and no picture of another format, or too large, is decoded."""

import os
import shutil
from pathlib import Path

import pytest
from malicious_files import data_folders, image_files, png, put
from PIL import Image, ImageFile

from models.data.check import check_dataset
from models.data.coco import CocoDataset
from models.data.contact_sheet import contact_sheet
from models.data.image_folders import read_square
from models.errors import DataError
from models.images import MAX_PIXELS, image_size, path_inside, pillow_pixels, read_image, read_label_map
from models.sources import pictures

LINKS = ["link out of the folder", "relative link out of the folder", "link to a device", "folder that is a link"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    return {case.name: Path(case.path) for case in data_folders(tmp_path_factory.mktemp("sets"))}


@pytest.mark.parametrize("name", LINKS)
def test_no_file_of_a_data_set_leads_out_of_its_folder(sets, name):
    """The picture behind the link is there, and can be read: it is the place that is refused, by all that read it."""
    root = sets[name]
    with pytest.raises(DataError, match="outside its folder"):
        CocoDataset(root, "val").image(0)
    with pytest.raises(DataError, match="outside its folder"):
        contact_sheet(root, "val")
    findings, _ = check_dataset(root)
    assert findings.counts["image outside its folder"] == 1


def test_the_pictures_behind_the_links_are_good(sets):
    assert image_size(next(sets["link out of the folder"].glob("val/*"))) == (40, 60)


def test_maps_of_stuff_are_held_as_images_are(sets, tmp_path):
    root = shutil.copytree(sets["link out of the folder"], tmp_path / "set", symlinks=True)
    (root / "val/1.png").unlink()
    put(root / "val/1.png", png(40, 60))
    (root / "stuffthingmaps/val").mkdir(parents=True)
    (root / "stuffthingmaps/val/1.png").symlink_to(put(tmp_path / "secret.png", png(40, 60)))
    data = CocoDataset(root, "val")
    assert data.image(0).shape == (40, 60, 3)
    with pytest.raises(DataError, match="outside its folder"):
        data.semantic_map(0)


def test_the_folder_itself_may_be_a_link(sets, tmp_path):
    """A person put it there: a data set on another disk. A link within the folder is fine, too."""
    root = shutil.copytree(sets["image of another size"], tmp_path / "elsewhere")
    put(root / "val/sub/2.png", png(40, 60))
    (root / "val/1.png").unlink()
    (root / "val/1.png").symlink_to("sub/2.png")
    (tmp_path / "link").symlink_to(root)
    assert CocoDataset(tmp_path / "link", "val").image(0).shape == (40, 60, 3)
    os.rename(root / "val", tmp_path / "moved")
    (root / "val").symlink_to(tmp_path / "moved")
    assert CocoDataset(root, "val").image(0).shape == (40, 60, 3)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "."])
def test_names_that_are_no_file_of_the_folder(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="outside its folder"):
        path_inside(tmp_path / "folder", name)


DECODERS = {
    "image": read_image,
    "label map": read_label_map,
    "size": image_size,
    "classifier": lambda path: read_square(path, 32, 32),
    "predictor": lambda path: list(pictures(path)),
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_has_the_allow_list_and_the_cap(tmp_path, monkeypatch, decoder):
    """By the content, whatever the file is called, and before anything is decoded. That images are opened in one place
    only is for test_unsafe_primitives.py."""
    files = {Path(case.path).stem: Path(case.path) for case in image_files(tmp_path)}
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    for kind in ("GIF", "PSD", "FITS", "ICO", "TGA", "PostScript", "TIFF whose directory is itself"):
        with pytest.raises(DataError, match="none of JPEG, PNG, WEBP, BMP"):
            DECODERS[decoder](files[kind])
    for kind in ("PNG of 4 gigapixels", "JPEG of 4 gigapixels", "BMP of 4 gigapixels", "PNG just above the limit"):
        with pytest.raises(DataError, match=f"at most {MAX_PIXELS:,} pixels"):
            DECODERS[decoder](files[kind])


def test_an_image_of_pillow_has_the_cap():
    with pytest.raises(DataError, match=f"at most {MAX_PIXELS:,} pixels"):
        pillow_pixels(Image.new("1", (9460, 9460)))
