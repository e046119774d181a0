"""Every operator gives the same bits for any number of threads, and a thousand times over; its gradient too."""

import os

import pytest
import torch
from operator_cases import OPERATORS, arguments_of, call, identical, map_tensors
from torch import Tensor

REPEATS = int(os.environ.get("CASCADEOPS_REPEATS", 1000))
THREADS = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def values_and_gradients(operator: str) -> list:
    """The result, and the gradients of its weighted sum, for fresh arguments."""
    arguments, leaves = arguments_of(operator), []

    def require(tensor):
        leaves.append(tensor.requires_grad_())
        return tensor

    for name in OPERATORS[operator].gradients:
        arguments[name] = map_tensors(require, arguments[name])
    outputs = call(operator, arguments)
    if not leaves:
        return outputs
    total = sum((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
    gradients = list(torch.autograd.grad(total, leaves))
    return [output.detach() if isinstance(output, Tensor) else output for output in outputs] + gradients


@pytest.mark.parametrize("operator", OPERATORS)
def test_same_bits_every_time_and_for_any_number_of_threads(operator):
    torch.set_num_threads(1)
    expected = values_and_gradients(operator)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for _ in range(REPEATS // len(THREADS)):
            assert identical(values_and_gradients(operator), expected)
