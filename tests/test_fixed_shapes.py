"""A detector behind fixed shapes finds, bit for bit, what it finds in the same padded batch.

The graphs are here those of a stand-in, which like a CUDA graph reads one memory and writes one memory; all around the
capture is the real code. tests/test_cuda_graphs.py has the same with captures, for a GPU.
"""

from functools import partial

import pytest
import torch
from small_detectors import ARCHS, identical_detections, padded, random_images, small_detector
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import models
from models import fixed_shapes
from models.buckets import bucket_size
from models.detections import Detections
from models.errors import UsageError
from models.fixed_shapes import FixedShapes, compile_run, with_fixed_shapes
from models.images import read_image
from models.inference import make_batch
from models.predictor import SAMPLE_PICTURE

every_arch = pytest.mark.parametrize("arch", ARCHS)
RESIZE = (96, 128)


class StandIn:
    """Records by remembering: a replay runs again, and writes its results over those of the first run."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        results = run()

        def replay() -> Detections:
            for memory, new in zip(results, run(), strict=True):
                if memory is not None:
                    memory.copy_(new)
            return results

        return replay


@pytest.mark.parametrize("arch", ["faster_rcnn", "mask_rcnn"])
@torch.inference_mode()
def test_detections_are_those_of_the_same_padded_batch(arch):
    """Large pictures before small ones, so that pixels of the last one would show; each result outlives the next."""
    detector = small_detector(arch)
    fixed = FixedShapes(detector, RESIZE, StandIn())
    batches = [[(96, 128)], [(90, 100)], [(100, 70), (100, 70)], [(96, 128)]]
    found = []
    for sizes in batches:
        batch = make_batch(random_images(*sizes), None, "cpu")
        found.append((fixed(*batch), batch))
    for ours, (images, image_sizes) in found:
        assert (ours.count > 0).all()
        shape = bucket_size(*images.shape[2:], RESIZE)
        assert identical_detections(ours, detector(padded(images, shape), image_sizes))
    assert fixed.record.recorded == 2 and list(fixed.recordings) == [(1, 96, 128), (2, 128, 96)]


@torch.inference_mode()
def test_shapes_beyond_the_limit_are_not_recorded_and_found_the_same(monkeypatch):
    monkeypatch.setattr(fixed_shapes, "MAX_SHAPES", 1)
    detector = small_detector("mask_rcnn")
    fixed = FixedShapes(detector, None, StandIn())
    for size in [(64, 64), (64, 96), (64, 64)]:
        batch = make_batch(random_images(size), None, "cpu")
        assert identical_detections(fixed(*batch), detector(*batch))
    assert fixed.record.recorded == 1


def test_a_predictor_pads_to_buckets_and_finds_the_same(monkeypatch):
    """The pictures come from `Predictor` resized and in autocast, as they would on a GPU."""
    monkeypatch.setattr(fixed_shapes, "CudaGraphs", lambda device: StandIn())
    monkeypatch.setattr(
        "models.predictor.with_fixed_shapes", lambda *a: with_fixed_shapes(*a[:2], torch.device("cuda"), a[3])
    )
    monkeypatch.setattr("models.predictor.half_dtype", lambda device: torch.bfloat16)
    detector = small_detector("scnet")
    options = {"device": "cpu", "resize": RESIZE, "half": True}
    graphed = models.Predictor(detector, compile="graph", **options)
    plain = models.Predictor(detector, **options)
    for size in [(96, 128), (200, 266), (96, 128)]:  # each becomes 96 x 128, a bucket of its own shape
        (picture,) = random_images(size)
        ours, theirs = graphed(picture), plain(picture)
        assert len(ours) > 0 and torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)
        assert ours.masks == theirs.masks
    assert list(graphed._network.recordings) == [(1, 96, 128)]
    assert not graphed.detector.training


def test_more_padding_moves_results_a_little():
    """Features at the right and lower border see what biases and norms made of the padding, where a convolution's own
    zeros were; and SCNet's global context is a mean over the padding, too. Sure objects stay what they are."""
    predictor = models.Predictor(device="cpu")
    images, sizes = make_batch([read_image(SAMPLE_PICTURE)], None, "cpu")
    height, width = images.shape[2:]
    with torch.inference_mode():
        own = predictor.detector(images, sizes)
        more = predictor.detector(padded(images, (height + 32, width + 32)), sizes)
    assert not torch.equal(own.scores, more.scores)
    sure = int((own.scores > 0.95).sum())
    assert sure == 4
    assert torch.equal(own.labels[:, :sure], more.labels[:, :sure])
    torch.testing.assert_close(own.scores[:, :sure], more.scores[:, :sure], atol=0.005, rtol=0)
    torch.testing.assert_close(own.boxes[:, :sure], more.boxes[:, :sure], atol=1.0, rtol=0)
    assert (more.boxes <= torch.tensor([width, height, width, height])).all()


# Capture


class NothingFromTheHost(TorchFunctionMode):
    """Fails where Python's numbers become a tensor: on a GPU that is a copy that waits and that no graph can record."""

    FORBIDDEN = (
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.from_numpy,
        Tensor.new_tensor,
        Tensor.to,
        Tensor.cpu,
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FORBIDDEN and not (
            function is Tensor.to and all(isinstance(a, torch.dtype) for a in args[1:])
        ):
            raise AssertionError(f"{function} with {args} {kwargs}")
        return function(*args, **kwargs)


@every_arch
def test_nothing_comes_from_the_host_between_images_and_detections(arch):
    """On the meta device, where reading a value (.item(), nonzero(), a bool) raises by itself."""
    detector = small_detector(arch).to("meta")
    images = torch.empty(2, 3, 64, 96, device="meta")
    with torch.inference_mode(), NothingFromTheHost():
        found = detector(images, torch.empty(2, 2, dtype=torch.int64, device="meta"))
    assert found.count.shape == (2,)


# Inductor


class Toy(nn.Module):
    config = None

    def forward(self, images: Tensor, image_sizes: Tensor) -> Detections:
        sums = images.sum((1, 2, 3))
        return Detections(images[:, 0, :1, :4] * 2, sums, image_sizes, None, sums.long())


def test_more_shapes_are_compiled_than_dynamo_would(monkeypatch):
    """By Dynamo alone, without Inductor's minutes; without our limit it raises at the ninth shape."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    fixed = FixedShapes(Toy(), None, compile_run)
    for width in range(32, 32 * 10, 32):
        images, sizes = torch.randint(256, (1, 3, 32, width)).float(), torch.tensor([[32, width]])
        for _ in range(2):
            assert identical_detections(fixed(images, sizes), Toy()(images, sizes))
    assert len(fixed.recordings) == 9


# What is refused


def test_graphs_without_a_gpu_and_other_words():
    with pytest.raises(UsageError, match="CUDA graphs need a GPU") as error:
        models.Predictor(compile="graph", device="cpu")
    assert (error.value.why, error.value.fix) == ("the device is cpu", 'compile="inductor"')
    with pytest.raises(ValueError, match='compile must be "none", "graph" or "inductor", got \'yes\''):
        models.Predictor(compile="yes", device="cpu")
    with pytest.raises(UsageError, match="test-time augmentation runs uncompiled"):
        models.Predictor(compile="inductor", tta=models.Views(), device="cpu")
