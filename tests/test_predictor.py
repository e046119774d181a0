"""The predictor: pictures in every form give the same results, in order, with names; and what it refuses."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program_cases import CATEGORY_IDS, CLASS_NAMES, write_weights

import models
from models import predictor as predictor_module
from models.boxes import box_iou
from models.errors import DataError, MachineError, UsageError
from models.images import read_image


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def predictor(weights):
    return models.Predictor(weights, device="cpu", batch_size=2)


def noise(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures of two sizes."""
    path = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(64, 96), (64, 96), (96, 64)]):
        Image.fromarray(noise(index, *size)).save(path / f"{index}.png")
    return path


def same(a: models.Result, b: models.Result) -> None:
    assert len(a) == len(b) > 0
    np.testing.assert_allclose(a.boxes, b.boxes, atol=0.02)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    assert a.image_size == b.image_size


def test_a_result_has_names_ids_image_and_source(predictor, folder):
    result = predictor(folder / "0.png")
    assert (result.class_names, result.category_ids) == (tuple(CLASS_NAMES), tuple(CATEGORY_IDS))
    assert (result.image_size, result.source) == ((64, 96), str(folder / "0.png"))
    np.testing.assert_array_equal(result.image, noise(0))
    assert {entry["category_id"] for entry in result.to_coco(1)} <= set(CATEGORY_IDS)


@pytest.mark.parametrize("form", ["text", "array", "tensor", "channels first", "Pillow", "grey Pillow"])
def test_one_picture_in_every_form_gives_one_result(predictor, folder, form):
    pixels, path = noise(0), folder / "0.png"
    if form == "grey Pillow":
        picture = Image.open(path).convert("L")
        pixels = np.repeat(np.asarray(picture)[:, :, None], 3, axis=2)
    else:
        picture = {
            "text": str(path),
            "array": pixels,
            "tensor": torch.from_numpy(pixels),
            "channels first": torch.from_numpy(pixels).permute(2, 0, 1),
            "Pillow": Image.open(path),
        }[form]
    same(predictor(picture), models.predict(predictor.detector, pixels))


@pytest.mark.parametrize("form", ["folder", "pattern", "list", "mixed list"])
def test_several_pictures_give_a_list_in_their_order(predictor, folder, form):
    paths = [folder / f"{index}.png" for index in range(3)]
    source = {
        "folder": folder,
        "pattern": f"{folder}/[0-9].png",
        "list": paths,
        "mixed list": [str(paths[0]), noise(1), Image.open(paths[2])],
    }[form]
    results = predictor(source)
    assert isinstance(results, list) and [result.image_size for result in results] == [(64, 96), (64, 96), (96, 64)]
    for index, result in enumerate(results):
        same(result, models.predict(predictor.detector, noise(index, *result.image_size)))
    assert predictor([]) == [] and len(predictor([noise(0)])) == 1


def test_a_generator_is_read_only_as_results_are_asked_for(predictor):
    read = []

    def camera():
        for index in range(1000):
            read.append(index)
            yield noise(index)

    stream = predictor(camera())
    assert read == []
    first = [next(stream) for _ in range(3)]
    assert len(read) <= 3 + predictor.batch_size
    for index, result in enumerate(first):
        same(result, models.predict(predictor.detector, noise(index)))


def test_a_stream_batches_pictures_of_one_size(predictor, monkeypatch):
    shapes = []

    def detect(images):
        shapes.append([image.shape[:2] for image in images])
        return models.predict(predictor.detector, images)

    monkeypatch.setattr(predictor, "_detect", detect)
    a, b = (64, 96), (96, 64)
    sizes = [a, a, a, b, a, a]
    results = list(predictor.stream(noise(index, *size) for index, size in enumerate(sizes)))
    assert shapes == [[a, a], [a], [b], [a, a]]
    assert [result.image_size for result in results] == sizes


def test_exif_orientation_turns_files_and_pillow_images(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    Image.fromarray(noise(0)).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(noise(0), -1)
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        result = predictor(source)
        assert result.image_size == (96, 64)
        np.testing.assert_array_equal(result.image, upright)


def test_pictures_beyond_the_cap_are_refused_before_they_are_decoded(predictor, monkeypatch, tmp_path):
    monkeypatch.setattr("models.images.MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="the image is too large"):
        predictor(Image.fromarray(noise(0)))


def test_an_unreadable_file_ends_the_stream_or_is_told_and_left_out(predictor, folder, tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    paths = [folder / "0.png", tmp_path / "a.png", folder / "1.png"]
    with pytest.raises(DataError, match="not an image that can be read"):
        predictor(paths)
    faults = []
    results = list(predictor.stream(paths, on_error=faults.append))
    assert [result.source for result in results] == [str(paths[0]), str(paths[2])]
    assert [fault.where for fault in faults] == [str(paths[1])]


class Video:
    """What OpenCV's VideoCapture does, for a file that holds `frames` of BGR noise."""

    frames = 3

    def __init__(self, path: str):
        self.next, self.released = 0, False

    def read(self):
        if self.next == self.frames:
            return False, None
        self.next += 1
        return True, noise(self.next - 1)[:, :, ::-1]

    def release(self):
        self.released = True


def test_a_video_gives_its_frames_in_rgb(predictor, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(VideoCapture=Video))
    (tmp_path / "clip.mp4").touch()
    stream = predictor(tmp_path / "clip.mp4")
    assert not isinstance(stream, list)
    results = list(stream)
    assert [result.source for result in results] == [f"{tmp_path}/clip.mp4, frame {index}" for index in range(3)]
    for index, result in enumerate(results):
        np.testing.assert_array_equal(result.image, noise(index))
    monkeypatch.setattr(Video, "frames", 0)
    with pytest.raises(DataError, match="the video cannot be read"):
        list(predictor(tmp_path / "clip.mp4"))


def test_a_video_without_opencv_says_what_to_install(predictor, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)  # makes the import fail
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(MachineError, match="reading a video needs OpenCV") as error:
        next(predictor(tmp_path / "clip.mp4"))
    assert error.value.fix == "pip install opencv-python-headless"


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (np.zeros((4, 4), np.uint8), ValueError, r"must have shape \[H, W, 3\], got \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), TypeError, "must be uint8, got float32"),
        (17, TypeError, "pictures come as .* got int"),
        ("/nowhere/a.png", DataError, "no such image file"),
        ("/nowhere/*.png", DataError, "no image matches this pattern"),
        ("/nowhere/a.mp4", DataError, "no such video file"),
        ("https://example.org/a.png", DataError, "nothing is fetched from the network"),
    ],
)
def test_what_is_no_picture(predictor, source, kind, message):
    with pytest.raises(kind, match=message):
        list(predictor(source))


def test_what_is_no_picture_is_refused_by_the_call_itself(predictor):
    with pytest.raises(TypeError, match="got int"):
        predictor(17)


def test_the_score_threshold_leaves_objects_out(weights, folder):
    everything = models.Predictor(weights, device="cpu")(folder / "0.png")
    threshold = everything.scores.median().item()
    some = models.Predictor(weights, device="cpu", score_threshold=threshold)(folder / "0.png")
    assert 0 < len(some) < len(everything)
    torch.testing.assert_close(some.scores, everything.scores[everything.scores >= threshold])


VIEWS = models.Views(scales=((64, 96), (96, 160)))


def test_with_augmentation_each_picture_gets_the_mean_of_its_views(weights, folder):
    predictor = models.Predictor(weights, device="cpu", batch_size=2, tta=VIEWS)
    for index, result in enumerate(predictor(folder)):
        pixels = noise(index, *result.image_size)
        same(result, models.predict(predictor.detector, pixels, tta=VIEWS))
        plain = models.predict(predictor.detector, pixels)
        assert len(plain) != len(result) or (plain.scores - result.scores).abs().max() > 1e-3
        assert result.class_names == tuple(CLASS_NAMES) and result.source == str(folder / f"{index}.png")


def test_augmentation_is_refused_where_it_cannot_be(weights):
    with pytest.raises(UsageError, match="not made for mask_rcnn"):
        models.Predictor(models.build_detector("mask_rcnn", "resnet18_narrow", 3, channels=16), tta=VIEWS)
    with pytest.raises(UsageError, match="resize and tta both set the size"):
        models.Predictor(weights, device="cpu", tta=VIEWS, resize=(64, 96))(noise(0))


def test_the_detector_given_is_left_as_it_is(weights):
    detector, facts = models.load_detector(weights)
    before = {key: value.clone() for key, value in detector.train().state_dict().items()}
    made = models.Predictor(detector, device="cpu", resize=None, class_names=facts["class_names"])
    same(made(noise(0)), models.Predictor(weights, device="cpu")(noise(0)))
    assert detector.training and all(torch.equal(before[key], value) for key, value in detector.state_dict().items())
    assert made(noise(0)).class_names == tuple(CLASS_NAMES) and made(noise(0)).category_ids is None


def test_weights_and_detectors_that_do_not_go_together(weights):
    with pytest.raises(UsageError, match="an architecture alone has random weights"):
        models.Predictor("scnet")
    with pytest.raises(UsageError, match="asked for htc, its header says scnet"):
        models.Predictor("htc", weights)
    with pytest.raises(UsageError, match="the detector has 3, got 2"):
        models.Predictor(weights, class_names=["a", "b"])
    with pytest.raises(DataError, match="no such weights file"):
        models.Predictor("scnet-r50")
    assert models.Predictor("scnet", weights, device="cpu").class_names == tuple(CLASS_NAMES)


def test_a_file_of_another_project_is_recognised_with_its_classes(tmp_path):
    """A state dict with class names in "meta", as mmdetection 3.x writes them; the names of the tensors are ours."""
    torch.manual_seed(0)
    detector = models.build_detector("mask_rcnn", backbone="resnet18", num_classes=2, channels=32, box_channels=32)
    meta = {"dataset_meta": {"classes": ("cat", "dog")}}
    torch.save({"meta": meta, "state_dict": detector.state_dict()}, tmp_path / "other.pth")
    for predictor in (
        models.Predictor(tmp_path / "other.pth", device="cpu", resize=None),
        models.Predictor("mask_rcnn", tmp_path / "other.pth", device="cpu", resize=None),
    ):
        same(predictor(noise(0)), models.predict(detector, noise(0)))
        assert (predictor.class_names, predictor.category_ids) == (("cat", "dog"), (1, 2))


def test_half_computes_in_16_bits_where_that_is_asked(weights, monkeypatch):
    monkeypatch.setattr("models.devices.choose_amp_dtype", lambda amp, device: torch.bfloat16)
    half, full = (models.Predictor(weights, device="cpu", half=half) for half in (True, False))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    result = half(noise(0))
    assert {result.boxes.dtype, result.scores.dtype} == {torch.float32} and len(result.masks) == len(result) > 0
    assert not torch.equal(result.scores[:1], full(noise(0)).scores[:1])
    torch.testing.assert_close(result.scores[:1], full(noise(0)).scores[:1], atol=0.05, rtol=0)
    monkeypatch.setattr("models.devices.choose_amp_dtype", lambda amp, device: None)
    assert models.Predictor(weights, device="cpu", half=True).dtype == torch.float32


# ---- the detector that ships in the package


def test_the_packaged_detector_finds_the_shapes_of_the_sample_picture():
    assert predictor_module.TINY_WEIGHTS.stat().st_size <= 4_000_000
    result = models.Predictor(device="cpu")(predictor_module.SAMPLE_PICTURE)
    found = result[result.scores >= 0.5]
    assert 4 <= len(found) <= 20 and len(set(found.names)) >= 3
    assert all(mask.sum() > 0 for mask in found.bitmaps())
    assert result.to_coco(1)[0]["category_id"] == result.labels[0].item() + 1


def test_with_augmentation_it_finds_the_same_shapes():
    picture = predictor_module.SAMPLE_PICTURE
    height, width = read_image(picture).shape[:2]
    short, long = sorted((height, width))
    views = models.Views(scales=((short, long), (short * 5 // 4, long * 5 // 4)))
    plain, mean = (models.Predictor(device="cpu", tta=tta)(picture) for tta in (None, views))
    sure, found = plain[plain.scores >= 0.9], mean[mean.scores >= 0.5]
    assert len(sure) >= 4 and found.image_size == (height, width)
    for box, label in zip(sure.boxes, sure.labels, strict=True):
        assert (box_iou(box[None, None], found.boxes[None, found.labels == label]) > 0.8).any()


def test_half_stored_weights_are_loaded_as_float32(weights, tmp_path):
    detector, _ = models.load_detector(weights)
    models.save_weights(tmp_path / "half.safetensors", detector, CLASS_NAMES, CATEGORY_IDS, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * Path(weights).stat().st_size
    again, _ = models.load_detector(tmp_path / "half.safetensors")
    for key, value in detector.state_dict().items():
        expected = value.half().to(value.dtype) if value.ndim > 1 else value
        assert again.state_dict()[key].dtype == value.dtype and torch.equal(again.state_dict()[key], expected), key


def test_read_image_and_pillow_pixels_agree(folder):
    from models.images import pillow_pixels

    np.testing.assert_array_equal(pillow_pixels(Image.open(folder / "2.png")), read_image(folder / "2.png"))
