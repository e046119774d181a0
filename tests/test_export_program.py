"""A detector as a package: sizes, what the table counts, the program; and, where that is asked for, the compilation and
the C++ program, which prints what Python finds digit for digit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program_cases import ROOT, write_data, write_weights
from small_detectors import padded, random_images

import models
from cascadeops import _binary
from models import export
from models.command_line import parse
from models.detections import Detections
from models.errors import DataError, MachineError, UsageError
from models.images import read_image
from models.inference import make_batch
from models.onnx_package import write_onnx
from models.package import DetectorTuple, Package, as_detections, fitting_limits, make_input
from models.parity import Agreement
from models.predictor import SAMPLE_PICTURE


def detections(*rows: tuple[int, float, float]) -> Detections:
    """One image's, of 3 rows, from (label, x1, score): boxes of 10 x 10 pixels, mask probabilities like the score."""
    boxes, scores, labels = torch.zeros(1, 3, 4), torch.full((1, 3), -torch.inf), torch.full((1, 3), -1)
    for i, (label, x, score) in enumerate(rows):
        boxes[0, i], scores[0, i], labels[0, i] = torch.tensor([x, 0, x + 10, 10]), score, label
    masks = scores.clamp(min=0)[..., None, None].expand(1, 3, 28, 28)
    return Detections(boxes, scores, labels, masks, torch.tensor([len(rows)]))


def test_agreement_by_hand():
    agreement = Agreement()
    agreement.add(detections((0, 0, 0.9), (1, 50, 0.8)), detections((1, 50.25, 0.5), (0, 0, 0.9), (1, 80, 0.1)))
    assert (agreement.found, agreement.both) == ([2, 3], 2)
    assert (agreement.boxes, round(agreement.scores, 6), round(agreement.masks, 6)) == (0.25, 0.3, 0.3)
    agreement.add(detections((0, 0, 0.9)), detections((0, 1.5, 0.9)))  # too far
    agreement.add(detections((0, 0, 0.9)), detections((1, 0, 0.9)))  # another class
    agreement.add(detections((0, 0, 0.9), (0, 0.5, 0.8)), detections((0, 0.5, 0.9)))  # one of two
    agreement.add(detections((0, 0, 0.9)), detections())
    assert (agreement.found, agreement.both, agreement.boxes) == ([7, 6], 3, 0.25)


@pytest.mark.parametrize(
    ("picture", "resize", "size", "limits"),
    [
        ((480, 640), (800, 1333), (800, 1344), (800, 1333)),
        ((640, 480), (800, 1333), (800, 1344), (1344, 800)),  # upright in a wide input: 600 x 800 in it
        ((100, 200), None, (128, 256), None),
        ((200, 100), None, (128, 256), (256, 128)),
    ],
)
def test_limits_within_an_input_by_hand(picture, resize, size, limits):
    assert fitting_limits(*picture, resize, size) == limits


def test_an_input_is_the_usual_batch_with_more_padding():
    for shape, seen in [((60, 90), (60, 90)), ((200, 100), (64, 32))]:
        (picture,) = random_images(shape)
        images, sizes = make_input(picture, None, (64, 128), "cpu")
        assert images.shape == (1, 3, 64, 128) and images.is_contiguous(memory_format=torch.channels_last)
        assert sizes.tolist() == [list(seen)]
        usual, _ = make_batch([picture], None if shape == seen else (64, 64), "cpu")
        assert torch.equal(images, padded(usual, (64, 128)))


# The program


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def main(*arguments: object) -> None:
    export.main(parse(export.Export, [str(argument) for argument in arguments], "export", export.EXAMPLES))


class Exported:
    """A package without its compilation: what torch.export made of the detector, run by PyTorch."""

    run, shift = None, 0.0

    @classmethod
    def write(cls, path, detector, dtype, size, facts):
        if cls.run is None:  # every test has the same weights and size
            arguments = torch.zeros(1, 3, *size).contiguous(memory_format=torch.channels_last), torch.tensor([size])
            with torch.no_grad():
                cls.run = torch.export.export(DetectorTuple(detector, dtype), arguments).module()
        cls.size = size
        path.write_bytes(bytes(2**20))

    def __init__(self, path):
        self.facts = {"arch": "scnet", "dtype": "float32"}

    def __call__(self, images, image_sizes):
        found = as_detections(self.run(images, image_sizes))
        return found._replace(boxes=found.boxes + self.shift)

    def input(self, image):
        return make_input(image, None, self.size, torch.device("cpu"))


def test_the_table_compares_and_refuses_what_differs(weights, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.package.write_package", Exported.write)
    monkeypatch.setattr("models.package.Package", Exported)
    arguments = ["--weights", weights, "--data", data, "--output", tmp_path / "new/small.pt2", "--device", "cpu"]
    main(*arguments)
    printed = capsys.readouterr().out.splitlines()
    assert "new/small.pt2: 1.0 MiB, written in" in printed[0]
    assert printed[1:3] == [
        "scnet, float32 on cpu, one image of 128 x 128",
        "                        detector     package   3 images",
    ]
    name, eager, package, both, *_ = printed[3].split()
    assert name == "detections" and eager == package == both and int(eager) > 0
    assert [line.split()[-2 if "boxes" in line else -1] for line in printed[4:7]] == ["0", "0", "0"]
    for line, name in zip(printed[7:9], ("box AP", "mask AP"), strict=True):
        first, second = line.removeprefix(name).split()
        assert first == second and 0 <= float(first) <= 1
    assert printed[9].startswith("one image ") and "x as fast; medians, in turns" in printed[9]

    monkeypatch.setattr(Exported, "shift", 2.0)
    with pytest.raises(DataError, match="the package does not find what the detector finds"):
        main(*arguments, "--images", 1)


def test_data_of_other_classes_gives_no_average_precision(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.package.write_package", Exported.write)
    monkeypatch.setattr("models.package.Package", Exported)
    other = write_data(tmp_path / "data", ["disc", "square", "star"])
    main("--weights", weights, "--data", other, "--output", tmp_path / "x.pt2", "--images", 1, "--device", "cpu")
    printed = capsys.readouterr().out
    assert "AP                             -           -   the data has other classes than the detector\n" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--output", "x.pt2"], "there is nothing to export"),
        (["--weights", "w.safetensors", "--output", "x.pt"], r"the file must end in \.pt2 or \.onnx"),
        (["--arch", "scnet", "--output", "x.onnx", "--half"], "ONNX is written in float32 and on the CPU"),
        (["--weights", "w.safetensors", "--output", "x.pt2", "--images", "0"], "images must be at least 1, got 0"),
    ],
)
def test_mistakes_are_answered_before_torch_is_imported(arguments, text):
    with pytest.raises(UsageError, match=text):
        main(*arguments)


def test_sizes_and_files_that_cannot_be(weights, data, tmp_path):
    with pytest.raises(UsageError, match="height and width must be multiples of 32"):
        main("--weights", weights, "--data", data, "--output", tmp_path / "x.pt2", "--size", 100, 128)
    (tmp_path / "junk.pt2").write_bytes(b"PK")
    with pytest.raises(DataError, match="not a package that can be loaded"):
        Package(tmp_path / "junk.pt2")


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "models.onnx_operators", raising=False)
    for call in (lambda: write_onnx(tmp_path / "x.onnx", None, {}), lambda: Package(tmp_path / "x.onnx")):
        with pytest.raises(MachineError, match="ONNX needs another package") as error:
            call()
        assert error.value.where.startswith("onnx") and error.value.fix == 'pip install "cascadeops[export]"'


# With a compiler

COMPILES = pytest.mark.skipif(
    "CASCADEOPS_COMPILE" not in os.environ or shutil.which("cmake") is None,
    reason="needs CASCADEOPS_COMPILE=1 and cmake: compilers work for a minute and a half",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, str]:
    """A folder where the commands of docs/export.md have run, but for ONNX's, and what they printed."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("cascadeops", "models", "examples"):
        (folder / name).symlink_to(ROOT / name)
    text, _ = (ROOT / "docs/export.md").read_text().split("## ONNX")
    commands = re.findall(r"^    ((?:python|cmake|build/).*)", text, re.MULTILINE)
    assert len(commands) == 5
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    script = ["bash", "-ec", "\n".join(commands)]
    process = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def lines(result: models.Result) -> list[str]:
    """What the C++ program prints of a result."""
    rows = zip(result.names, result.scores.tolist(), result.boxes.tolist(), result.masks, strict=True)
    return [
        " ".join([name, *(f"{value:.9g}" for value in (score, *box)), mask["counts"].decode()])
        for name, score, box, mask in rows
    ]


@COMPILES
def test_cpp_prints_what_python_finds_digit_for_digit(page):
    folder, printed = page
    package = Package(folder / "tiny.pt2")
    (large,) = random_images((500, 300))
    Image.fromarray(large).save(folder / "large.ppm")  # does not fit, and is shrunk
    command = [folder / "build/cpp/detect", folder / "tiny.pt2", folder / "large.ppm", _binary.cpu.path]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    for picture, text in [(read_image(SAMPLE_PICTURE), printed), (large, process.stdout)]:
        expected = lines(package.detect(picture))
        assert len(expected) > 1 and text.splitlines()[-len(expected) :] == expected
    command[2] = _binary.cpu.path
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "not a binary PPM file" in process.stderr


@COMPILES
def test_a_package_finds_what_the_predictor_finds(page):
    package, predictor = Package(page[0] / "tiny.pt2"), models.Predictor(device="cpu")
    picture = np.zeros((192, 192, 3), np.uint8)  # fills the input, so that no padding differs
    picture[:160] = read_image(SAMPLE_PICTURE)
    ours, theirs = package.detect(picture), predictor(picture)
    assert len(ours) == len(theirs) > 0 and ours.names == theirs.names
    torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=0)
    assert "in both" in page[1] and "box AP" in page[1]
