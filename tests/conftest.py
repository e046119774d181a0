"""Fixtures of all tests: a fixed seed, the devices there are, and memory that is poisoned before a kernel fills it."""

import contextlib
import os
import random
import re
from collections.abc import Callable

import emulated_cuda
import pytest
import torch
from emulated_cuda import EmulatedCuda
from guarded_memory import GuardedArguments

import cascadeops

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ABOUT_A_KERNEL = "opcheck|compile|export|gradcheck|second_order|second_derivative|autocast|errors"
TOO_LARGE = "billion|2_to_the_31|268569|large_batch|large_masks|more_boxes_than|more_masks_than_a_grid|at_scale"
NOT_EMULATED = re.compile(f"{ABOUT_A_KERNEL}|{TOO_LARGE}")
"""Tests of what surrounds a kernel rather than of its values, and those that would take minutes."""


def pytest_addoption(parser):
    parser.addoption("--guarded", choices=["start", "end"], help="where arguments of operators meet a forbidden page")
    parser.addoption("--emulate-cuda", action="store_true", help="run operators with their CUDA kernels, on the CPU")
    parser.addoption("--cases", type=int, help="run at most so many cases of every parametrised test")


def pytest_configure(config):
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))
    if config.getoption("--emulate-cuda"):
        emulation = contextlib.ExitStack()
        emulation.enter_context(EmulatedCuda())
        config.add_cleanup(emulation.close)


def pytest_collection_modifyitems(config, items):
    chosen = items
    if config.getoption("--emulate-cuda"):
        on_cpu = [item for item in chosen if "device" in item.fixturenames and item.callspec.params["device"] == "cpu"]
        chosen = [item for item in on_cpu if not NOT_EMULATED.search(item.name)]
    if config.getoption("--cases") is not None:
        tests = {}
        for item in chosen:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
        sample = random.Random(0).sample  # of no pattern, so that every parameter shows all its values in some test
        chosen = [item for cases in tests.values() for item in sample(cases, min(len(cases), config.option.cases))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--emulate-cuda"):
        terminalreporter.write_line(f"emulated CUDA: {emulated_cuda.launches()} kernels were launched")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A COCO folder of six images of 32 x 32 pixels; not to be changed."""
    from tiny_runs import write_tiny_data  # not for the tests of operators, which need none of it

    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def no_pictures(monkeypatch):
    """Training draws no detections beside the ground truth."""
    from tiny_runs import black_picture

    monkeypatch.setattr("models.training.save_comparison", black_picture)


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


@pytest.fixture
def kernels(device, request) -> str:
    """Whose kernels run on the device, "cpu" or "cuda"."""
    return "cuda" if request.config.getoption("--emulate-cuda") else device.type


@pytest.fixture
def raise_faults(device, request) -> Callable[[], None]:
    """`cascadeops.raise_device_faults` for the kernels that run on the device."""
    if request.config.getoption("--emulate-cuda"):
        return emulated_cuda.raise_device_faults
    return lambda: cascadeops.raise_device_faults(device)


@pytest.fixture(autouse=True)
def no_fault_is_left():
    """What CUDA kernels found wrong in the data of one test is not raised in the next."""
    yield
    for raise_device_faults in (emulated_cuda.raise_device_faults, cascadeops.raise_device_faults):
        with contextlib.suppress(RuntimeError):
            raise_device_faults()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def determinism_is_a_wish_of_one_test():
    yield
    if torch.are_deterministic_algorithms_enabled():  # the call imports PyTorch's compiler: more than a second
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_memory():
    """Fills every torch.empty with NaN (integers: the largest value), so that an element a kernel forgot shows."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
