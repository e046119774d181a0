"""Fixtures of all tests: a fixed seed, the devices there are, and memory that is poisoned before a kernel fills it."""

import contextlib

import pytest
import torch
from guarded_memory import GuardedArguments

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pytest_addoption(parser):
    parser.addoption("--guarded", choices=["start", "end"], help="where arguments of operators meet a forbidden page")


@pytest.fixture(autouse=True)
def guarded_arguments(request):
    """With --guarded, a read one byte beyond an argument's memory ends the run."""
    edge = request.config.getoption("--guarded")
    with contextlib.nullcontext() if edge is None else GuardedArguments(edge):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request) -> torch.device:
    """Each device that a kernel must agree on; the CUDA twin of a test is skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills every torch.empty with NaN (integers: the largest value), so that an element a kernel forgot shows."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
