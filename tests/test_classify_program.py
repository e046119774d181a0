"""Classifiers by name, and the program that labels images and measures accuracy on class folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from program_cases import run_program

import cascadeops
import models
from models.classify import Classify, main
from models.config_backbones import BACKBONES
from models.data.image_folders import class_folders, folder_labels, read_class_names, read_square
from models.data.transforms import MEAN, STD
from models.errors import DataError, UsageError

CLASSES = ["n00000001", "n00000002", "n00000003"]
NAMES = ["grass", "tabby, tabby cat", "sea"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageNet's layout: 2, 3 and 1 images of three classes."""
    folder = tmp_path_factory.mktemp("imagenet") / "data"
    random = np.random.default_rng(0)
    for label, count in enumerate((2, 3, 1)):
        (folder / "val" / CLASSES[label]).mkdir(parents=True)
        for i in range(count):
            colour = np.roll([200, 90, 30], label)
            pixels = random.integers(0, 50, (60 + 10 * i, 80, 3)) + colour
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "val" / CLASSES[label] / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(images):
    """Of random features the class of the nearest mean, by which all images would be told right; but the first two
    classes are exchanged, so that one of six is."""
    torch.manual_seed(0)
    model = models.build_classifier("resnet18_narrow", num_classes=3)
    with torch.no_grad():
        for label, name in zip((1, 0, 2), CLASSES, strict=True):
            squares = [square_of(path) for path in sorted((images / "val" / name).iterdir())]
            mean = torch.cat([model.backbone(square)[-1].mean((2, 3)) for square in squares]).mean(0)
            model.fc.weight[label], model.fc.bias[label] = 100 * mean, -50 * mean.square().sum()
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    """With the names of the authors and of torchvision: no `backbone.`"""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({key.removeprefix("backbone."): value for key, value in model.state_dict().items()}, path)
    return path


def square_of(path):
    return cascadeops.preprocess([torch.from_numpy(read_square(path, 64, 48))], None, MEAN, STD, divisor=1)[0]


def classify(*images, arch="resnet18_narrow", **options) -> None:
    """The program in this process."""
    main(Classify(images=images, arch=arch, resize=64, crop=48, batch_size=4, device="cpu", **options))


# ---- classifiers by name


def test_a_classifier_by_name_loads_the_authors_names(model, weights):
    from models import resnet18_narrow

    loaded = resnet18_narrow(weights=weights, num_classes=3)
    assert not loaded.training
    x = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
        features = model.backbone(x)[-1]
        torch.testing.assert_close(loaded(x), model.fc(features.mean(3).mean(2)), rtol=1e-4, atol=1e-5)
    assert resnet18_narrow.__name__ == "resnet18_narrow"


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_its_classifier(name):
    with torch.device("meta"):
        classifier = getattr(models, name)(num_classes=7)
    assert classifier.fc.weight.shape[0] == 7
    trains = [parameter.requires_grad for parameter in classifier.parameters()]
    assert all(trains)


def test_weights_load_strictly(model):
    state = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"3 classes in the file, 1000 here"):
        models.resnet18_narrow(weights=state)
    with pytest.raises(DataError, match="nothing was loaded"):
        models.resnet18(weights=state, num_classes=3)
    incomplete = {key: value for key, value in state.items() if key != "layer2.0.bn1.bias"}
    with pytest.raises(DataError, match=r"layer2\.0\.bn1\.bias"):
        models.resnet18_narrow(weights=incomplete, num_classes=3)
    with pytest.raises(DataError, match=r"unheard\.of"):
        models.resnet18_narrow(weights=state | {"unheard.of": torch.zeros(1)}, num_classes=3)
    without_counts = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    models.resnet18_narrow(weights=without_counts, num_classes=3)


def test_weights_are_a_file_never_a_download(tmp_path):
    with pytest.raises(DataError, match="no such weights file"):
        models.resnet18_narrow(weights=tmp_path / "absent.pth")
    with pytest.raises(UsageError, match="unknown backbone 'scnet5'"):
        models.build_classifier("scnet5")
    with pytest.raises(AttributeError, match="has no attribute 'scnet5'"):
        models.scnet5  # noqa: B018


# ---- the network's square, class names


def test_the_square_is_the_middle_of_the_scaled_image(tmp_path):
    """As torchvision 0.26: Resize(64), CenterCrop(48) of PIL images; sums taken from it."""
    y, x = np.mgrid[:75, :101]
    Image.fromarray(np.stack([y * 3, x * 2, (x * y) % 256], -1).astype(np.uint8)).save(tmp_path / "a.png")
    square = read_square(tmp_path / "a.png", 64, 48)
    assert square.shape == (48, 48, 3)
    assert square.sum(axis=(0, 1), dtype=np.int64).tolist() == [255744, 230400, 290627]
    # 101 x 75 becomes 86 x 64; the square starts 19 to the right and 8 down, pixel centres at halves
    assert abs(square[0, 0, 0] - 3 * (8.5 * 75 / 64 - 0.5)) < 1.01
    assert abs(square[0, 0, 1] - 2 * (19.5 * 101 / 86 - 0.5)) < 1.01


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("words.txt", "n00000001 grass\nn00000002 tabby, tabby cat\n\nn00000003 sea\n"),
        ("index.json", json.dumps({str(i): [CLASSES[i], NAMES[i]] for i in range(3)})),
        ("pairs.json", json.dumps([list(pair) for pair in zip(CLASSES, NAMES, strict=True)])),
    ],
)
def test_class_names_from_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == list(zip(CLASSES, NAMES, strict=True))


def test_class_names_of_one_spelling(tmp_path, images):
    (tmp_path / "a.txt").write_text("grass\nsea\n")
    (tmp_path / "a.json").write_text('["grass", "sea"]')
    (tmp_path / "b.json").write_text('{"1": "sea", "0": "grass"}')
    for name in ("a.txt", "a.json", "b.json"):
        assert read_class_names(tmp_path / name) == [("grass", "grass"), ("sea", "sea")]
    assert [names.key for names in read_class_names(images)] == CLASSES
    assert list(class_folders(images)) == list(class_folders(images / "val")) == CLASSES


@pytest.mark.parametrize("text", ["{", '{"1": "sea"}', "[1, 2]", '[["a", "b", "c"]]', "7"])
def test_other_files_are_no_class_names(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="the file of class names has another form"):
        read_class_names(tmp_path / "a.json")


def test_folders_find_their_labels(tmp_path):
    (tmp_path / "words.txt").write_text("n00000003 sea\nn00000001 grass\nn00000002 tabby\n")
    classes = read_class_names(tmp_path / "words.txt")
    assert folder_labels(CLASSES, classes, 3) == [1, 2, 0]
    assert folder_labels(["sea", "tabby"], classes, 3) == [0, 2]
    assert folder_labels(CLASSES, None, 3) == [0, 1, 2]
    with pytest.raises(DataError, match="2 class folders, 3 classes in the weights"):
        folder_labels(CLASSES[:2], None, 3)
    with pytest.raises(DataError, match="1 of 2 class folders are none of the classes"):
        folder_labels(["sea", "lake"], classes, 3)


# ---- the program


def test_an_image_gets_a_table_of_its_likeliest_classes(images, model, weights, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    path = images / "val" / CLASSES[1] / "2.png"
    classify(path, weights=weights, class_names=tmp_path / "names.txt")
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first == str(path)
    assert head.split() == ["class", "label", "probability"]
    with torch.inference_mode():
        probs, order = model(square_of(path)).softmax(1)[0].sort(descending=True)
    for row, prob, label in zip(rows, probs.tolist(), order.tolist(), strict=True):
        *name, number, shown = row.split()
        assert (" ".join(name), int(number)) == (NAMES[label], label)
        assert abs(float(shown) - prob) < 2e-4


def test_without_class_names_there_are_numbers(images, weights, capsys):
    classify(images / "val" / CLASSES[2], weights=weights)  # a folder of images
    path, _, likeliest, *others = capsys.readouterr().out.splitlines()
    assert path.endswith(f"{CLASSES[2]}/0.png")
    assert likeliest.split()[:3] == ["class", "2", "2"]
    assert len(others) == 2


def test_the_accuracy_of_a_folder_of_classes(images, weights):
    arguments = ["--arch", "resnet18_narrow", "--weights", weights, "resize=64", "crop=48", "batch_size=4"]
    process = run_program("classify", images, *arguments)
    assert process.returncode == 0, process.stderr
    progress, last = process.stdout.splitlines()
    assert progress.startswith("classify  6/6 images  ") and progress.endswith("top 1 16.67%  top 5 100.00%")
    assert last.startswith("top-1 16.67%, top-5 100.00% of 6 images in 3 classes; ")
    assert last.endswith(" images/s")


def test_labels_follow_the_class_names_not_the_folders(images, weights, tmp_path, capsys):
    (tmp_path / "names.json").write_text(json.dumps([CLASSES[1], CLASSES[0], CLASSES[2]]))
    classify(images / "val", weights=weights, class_names=tmp_path / "names.json")
    assert "top-1 100.00%, top-5 100.00% of 6 images" in capsys.readouterr().out


def test_an_unreadable_image_is_told_and_the_others_are_done(images, weights, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    bad = tmp_path / "data" / "val" / CLASSES[0] / "bad.png"
    bad.write_bytes(b"nothing")
    with pytest.raises(DataError, match="1 of 7 images could not be read; the others are done"):
        classify(tmp_path / "data", weights=weights)
    said = capsys.readouterr()
    assert f"where: {bad}" in said.err
    assert "top-1 16.67%, top-5 100.00% of 6 images in 3 classes; " in said.out
    with pytest.raises(DataError, match="not an image that can be read"):
        classify(bad, weights=weights)


def test_a_mistake_ends_the_program_with_its_message(images, weights):
    arguments = [images, "--arch", "resnet18_narrow", "--weights", weights, "--crop", "300"]
    process = run_program("classify", *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    assert "resize must be at least crop, 300, got 256" in process.stderr


def test_what_a_mistake_is_answered_with(images, weights, tmp_path):
    image = images / "val" / CLASSES[0] / "0.png"
    with pytest.raises(UsageError, match="no image is named"):
        classify(weights=weights)
    with pytest.raises(UsageError, match="did you mean resnet18_narrow"):
        classify(image, weights=weights, arch="resnet18_narow")
    with pytest.raises(DataError, match="no such weights file"):
        classify(image, weights=tmp_path / "w.pth")
    with pytest.raises(DataError, match="no such image file"):
        classify(image.with_name("x.png"), weights=weights)
    with pytest.raises(DataError, match="nothing was loaded"):
        classify(image, weights=weights, arch="resnet18")
    (tmp_path / "names.txt").write_text("grass\nsea\n")
    with pytest.raises(DataError, match="2 names, 3 classes in the weights"):
        classify(image, weights=weights, class_names=tmp_path / "names.txt")
    with pytest.raises(DataError, match="the file of class names cannot be read"):
        classify(image, weights=weights, class_names=tmp_path / "absent.txt")
    torch.save({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="these weights have no classifier"):
        classify(image, weights=tmp_path / "w.pth")
