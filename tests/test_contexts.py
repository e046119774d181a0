"""Every operator in the circumstances that a program calls it in: the bits of a plain call, or a clear error."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from operator_cases import OPERATORS, arguments_of, call, identical, map_tensors
from torch import Tensor

SECONDS = 60
each_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture
def deterministic():
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)


@each_operator
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(operator, context):
    expected = call(operator, arguments_of(operator))
    with context():
        assert identical(call(operator, arguments_of(operator)), expected)


@each_operator
def test_deterministic_mode(operator, deterministic):
    """Allocations are filled in this mode, so that an element that no kernel wrote shows."""
    assert identical(call(operator, arguments_of(operator)), call(operator, arguments_of(operator)))


@each_operator
def test_python_threads_at_once(operator):
    expected = call(operator, arguments_of(operator))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: call(operator, arguments_of(operator)), range(40)))
    assert all(identical(result, expected) for result in results)


@each_operator
def test_a_forked_process(operator):
    """As a data loader's worker, which PyTorch gives one thread: the parent's threads do not exist there."""
    expected = call(operator, arguments_of(operator))
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        torch.set_num_threads(1)
        os._exit(0 if identical(call(operator, arguments_of(operator)), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@each_operator
def test_compiled_for_any_shape(operator):
    compiled = torch.compile(call, backend="aot_eager", dynamic=True)
    assert identical(compiled(operator, arguments_of(operator)), call(operator, arguments_of(operator)))


@each_operator
def test_vmap_is_a_loop_or_an_error(operator):
    arguments = arguments_of(operator)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    stacked = {name: torch.stack([tensor, tensor]) for name, tensor in tensors.items()}
    try:
        results = torch.vmap(lambda given: tuple(call(operator, arguments | given)))(stacked)
    except (RuntimeError, ValueError, TypeError) as error:
        assert "vmap" in str(error) or operator in str(error)
        return
    for both, once in zip(results, call(operator, arguments), strict=True):
        assert identical([both[0], both[1]], [once, once])


@each_operator
def test_second_derivative_or_an_error(operator):
    if not OPERATORS[operator].gradients:
        pytest.skip("no gradient")
    leaves = []

    def require(tensor):
        leaves.append(tensor.double().requires_grad_())
        return leaves[-1]

    arguments = arguments_of(operator)
    for name in OPERATORS[operator].gradients:
        arguments[name] = map_tensors(require, arguments[name])
    (output,) = call(operator, arguments)
    gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    try:
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves, allow_unused=True)
    except RuntimeError as error:
        assert operator in str(error)
        return
    assert all(gradient is None or gradient.isfinite().all() for gradient in second)
    assert any(gradient is not None and gradient.any() for gradient in second)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@each_operator
def test_a_thousand_calls_and_errors_leave_no_memory_behind(operator):
    good = arguments_of(operator)
    # Each tensor one dimension short, which the kernels refuse or the wrapper does.
    bad = [good | {name: value[0]} for name, value in good.items() if isinstance(value, Tensor) and value.dim()]

    def calls(count):
        for i in range(count):
            call(operator, good)
            if bad:
                with contextlib.suppress(RuntimeError, TypeError, ValueError):
                    call(operator, bad[i % len(bad)])

    calls(200)
    before = resident_bytes()
    calls(1000)
    assert resident_bytes() - before < 2**20  # 1 KiB left behind by each call would be all of it
