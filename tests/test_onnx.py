"""Operators and whole detectors in ONNX's operators, run by onnxruntime, give what ours give.

pip install '.[export]' brings what these tests need; without it they are skipped.
"""

import dataclasses

import pytest
import torch
from small_detectors import ARCHS, random_images, small_detector
from torch import nn

import cascadeops
import models
from models.errors import DataError, UsageError
from models.package import Package, write_package
from models.parity import Agreement

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from models.onnx_operators import translations  # noqa: E402

FACTS = {"resize": "", "class_names": "\n".join("abcde")}


class Call(nn.Module):
    """A call whose tensors are those of `forward`."""

    def __init__(self, function, **settings):
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, *tensors):
        return self.function(*tensors, **self.settings)


def both(function, *tensors, **settings):
    """(ours, onnxruntime's) results of function(*tensors, **settings)."""
    call = Call(function, **settings)
    made = torch.onnx.export(
        call, tensors, dynamo=True, opset_version=18, custom_translation_table=translations(), verbose=False
    )
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [input.name for input in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    theirs = [torch.from_numpy(result) for result in session.run(None, feed)]
    ours = call(*tensors)
    return (ours if isinstance(ours, tuple) else (ours,)), theirs


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def boxes_within(number: int, width: float, height: float) -> torch.Tensor:
    corners = torch.rand(number, 2, 2) * torch.tensor([width, height])
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


@pytest.mark.parametrize(("top_k", "capacity"), [(20, 12), (50, 300)], ids=["cut", "padded"])
def test_box_proposals(top_k, capacity):
    sizes = [90, 24, 6]
    anchors = [boxes_within(size, 100, 80) for size in sizes]
    logits = [torch.randn(1, size) for size in sizes]
    deltas = [torch.randn(1, size, 4) * 0.3 for size in sizes]
    deltas[1][0, :, 2] = 50.0  # beyond what a box may grow
    anchors[0][:5] += 200  # outside the image: nothing is left of it
    logits[0][0, :5] = 9.0

    def proposals(image_sizes, *flat):
        maps = flat[:3], flat[3:6], flat[6:]
        return cascadeops.box_proposals(*map(list, maps), image_sizes, top_k, capacity, 0.7, (1.0, 1.0, 1.0, 1.0))

    ours, theirs = both(proposals, torch.tensor([[80, 100]]), *logits, *deltas, *anchors)
    assert int(ours[2]) > 0 and (int(ours[2]) == capacity) == (capacity == 12)
    same(ours, theirs)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.999])
def test_multiclass_nms(per_class, threshold):
    boxes = torch.stack([boxes_within(30, 60, 60) for _ in range(4 if per_class else 1)], dim=1).flatten(1)[None]
    settings = {"score_threshold": threshold, "iou_threshold": 0.4, "max_detections": 25}
    ours, theirs = both(cascadeops.multiclass_nms, boxes, torch.rand(1, 30, 4) * 0.99, **settings)
    assert int(ours[4]) == (25 if threshold == 0.3 else 0)
    same(ours, theirs)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("extras", [False, True])
def test_multiscale_roi_align(aligned, extras):
    maps = [torch.randn(2, 6, 64 // s, 96 // s) for s in (1, 2, 4)]
    image = torch.randint(0, 2, (40, 1)).float()
    rois = torch.cat([image, boxes_within(40, 400, 260)], dim=1)  # some reach beyond the image of 256 x 384
    rois[::7] = torch.tensor([-1.0, 0, 0, 9, 9])
    rois[1, 1:] = torch.tensor([10.0, 10, 66, 66])  # 56 x 56: exactly between two levels

    def pool(rois, *tensors):
        more = dict(zip(("extra", "image_vector"), tensors[3:], strict=False))
        if more:
            more |= {"extra_stride": 8, "extra_subdivision": 2}
        return cascadeops.multiscale_roi_align(
            list(tensors[:3]), rois, 7, [4, 8, 16], aligned=aligned, finest_size=28.0, **more
        )

    ours, theirs = both(pool, rois, *maps, *([torch.randn(2, 6, 32, 48), torch.randn(2, 6)] if extras else []))
    assert ours[0][0].abs().sum() == 0 and ours[0][1].abs().sum() > 0
    same(ours, theirs)


def test_self_calibrated_gate():
    same(*both(cascadeops.self_calibrated_gate, *(torch.randn(1, 8, *s) for s in ((9, 13), (9, 13), (2, 3)))))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_whole_detector(arch, tmp_path):
    """A file holds all that running it takes."""
    detector = small_detector(arch)
    write_package(tmp_path / "a.onnx", detector, torch.float32, (96, 128), FACTS)
    package = Package(tmp_path / "a.onnx")
    assert (package.facts["arch"], package.size, package.resize) == (arch, (96, 128), None)
    agreement = Agreement()
    for picture in random_images((96, 128), (60, 90)):
        inputs = package.input(picture)
        with torch.inference_mode():
            agreement.add(detector(*inputs), package(*inputs))
    assert agreement.found[0] == agreement.found[1] == agreement.both > 10
    assert agreement.boxes < 1e-3 and agreement.scores < 1e-5 and agreement.masks < 1e-4
    result = package.detect(picture)
    assert len(result) > 0 and set(result.names) <= set("abcde")


def test_operators_without_a_form_are_named(tmp_path):
    detector = models.build_detector("faster_rcnn", backbone="resnet18", num_classes=2, channels=32)
    detector = models.build.build_from_config(
        "faster_rcnn", dataclasses.replace(detector.config, arithmetic="torchvision")
    )
    with pytest.raises(UsageError, match="this detector has an operator without a form in ONNX") as error:
        write_package(tmp_path / "a.onnx", detector, torch.float32, (64, 64), FACTS)
    assert error.value.why == "padded_nms"
    assert not (tmp_path / "a.onnx").exists()
    (tmp_path / "a.onnx").write_bytes(b"none")
    with pytest.raises(DataError, match="not an ONNX file that can be loaded"):
        Package(tmp_path / "a.onnx")
