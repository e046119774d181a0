"""Every operator of fixed result size is captured in a CUDA graph, forward and backward, and replays on new data.

A capture fails for whatever would wait for the GPU, so it is also the test that nothing does.
"""

import pytest
import torch
from operator_cases import OPERATORS, arguments_of, call, identical, map_tensors
from torch import Tensor

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
