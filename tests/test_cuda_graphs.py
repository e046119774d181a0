"""Every operator of fixed result size is captured in a CUDA graph, forward and backward, and replays on new data; so
are whole detectors.

A capture fails for whatever would wait for the GPU, so it is also the test that nothing does.
"""

import pytest
import torch
from operator_cases import OPERATORS, arguments_of, call, identical, map_tensors
from small_detectors import ARCHS, identical_detections, padded, random_images, small_detector
from torch import Tensor

from models.buckets import bucket_size
from models.fixed_shapes import with_fixed_shapes
from models.inference import make_batch

WAITS = {"nms", "batched_nms", "paste_masks_rle"}
"""Their results have a size that depends on the data."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(name: str, arguments: dict) -> list[Tensor]:
    """Results, and gradients of their sum of squares."""
    leaves: list[Tensor] = []
    for argument in OPERATORS[name].gradients:
        map_tensors(lambda tensor: leaves.append(tensor.requires_grad_()), arguments[argument])
    outputs = [output for output in call(name, arguments) if isinstance(output, Tensor)]
    if not leaves:
        return outputs
    total = sum(output.square().sum() for output in outputs if output.requires_grad)
    return [output.detach() for output in outputs] + list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - WAITS))
def test_cuda_graph_replays_on_new_data(name):
    arguments = map_tensors(Tensor.cuda, arguments_of(name))
    arguments |= {key: value.detach() for key, value in arguments.items() if isinstance(value, Tensor)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocations that only a first call makes
        run(name, arguments)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, arguments)
    for _ in range(2):
        map_tensors(shuffle_, arguments)
        expected = [tensor.clone() for tensor in run(name, arguments)]
        graph.replay()
        torch.cuda.synchronize()
        assert identical(list(captured), expected)


@torch.no_grad()
def shuffle_(tensor: Tensor) -> Tensor:
    """Other values of the same kind, in place: the first dimension (images, rows) in reverse order."""
    return tensor.copy_(tensor.flip(0)) if tensor.dim() > 1 and tensor.is_floating_point() else tensor


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("arch", ARCHS)
@torch.inference_mode()
def test_a_whole_detector_is_a_graph_and_nothing_waits(arch, half):
    """Two shapes and two batches of one of them, replayed in another order than they were recorded in: what one graph
    returned is not overwritten by the others, with which it shares its memory."""
    detector, resize = small_detector(arch).cuda(), (96, 128)
    fixed = with_fixed_shapes(detector, "graph", torch.device("cuda"), resize)
    batches = [make_batch(random_images(*sizes), None, "cuda") for sizes in ([(96, 128)], [(70, 90)] * 2, [(90, 100)])]
    with torch.autocast("cuda", torch.float16, enabled=half):
        for batch in batches:
            fixed(*batch)
        assert len(fixed.recordings) == 2
        order = [0, 1, 2, 1, 0]
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [fixed(*batches[index]) for index in order]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for index, ours in zip(order, found, strict=True):
            images, sizes = batches[index]
            assert (ours.count > 0).all()
            assert identical_detections(ours, detector(padded(images, bucket_size(*images.shape[2:], resize)), sizes))


@torch.inference_mode()
def test_graphs_of_all_shapes_share_the_memory_of_the_largest():
    def reserved() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    detector = small_detector("scnet").cuda()
    fixed = with_fixed_shapes(detector, "graph", torch.device("cuda"), None)
    start = reserved()
    fixed(*make_batch(random_images((640, 800)), None, "cuda"))
    first = reserved()
    for size in [(640, 640), (800, 640)]:
        fixed(*make_batch(random_images(size), None, "cuda"))
    assert reserved() - first < (first - start) / 2
