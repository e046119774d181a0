"""How a benchmark is timed: the device's own clock, a cold L2 cache, a checked result, and the facts of the machine.

    pytest benchmarks/ --benchmark-only                     every operator, on the CPU and on the GPU if there is one
    pytest benchmarks/bench_padded_nms.py --benchmark-only --benchmark-json=nms.json
    pytest benchmarks/ --benchmark-disable                  every check once, no times

`python -m benchmarks.report` makes tables and plots of the JSON.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata

import pytest
import torch

SECONDS, MOST_ROUNDS = 1.5, 1000
"""A case is repeated for about so many seconds, at least three times; once, when a single call takes longer."""


class DeviceStamp:
    """A moment in the GPU's stream. Their difference is the GPU's own time; asking for it waits for the GPU."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "DeviceStamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def pytest_addoption(parser):
    parser.addoption("--all-rows", action="store_true", help="time every published detector on the CPU, too")


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("device") == "cuda":
            item.add_marker(pytest.mark.benchmark(timer=DeviceStamp), append=False)


@pytest.fixture
def measure(benchmark, device):
    """measure(group, implementation, function, check, bytes_moved, least_rounds): times a function, if its result is
    right.

    Args:
        group: "operator, workload"; the implementations of one group are compared with each other.
        implementation: "cascadeops", "reference", "torchvision" ... A name that begins with "cascadeops" is ours.
        function: takes nothing; what is timed.
        check: is given the result, and raises if it is wrong; then no time is kept.
        bytes_moved: what the operator must read and write at least, once each; 0 where that says nothing.
        least_rounds: of a function that takes longer than `SECONDS`.
    """

    def run(
        group: str,
        implementation: str,
        function: Callable,
        check: Callable | None = None,
        bytes_moved: int = 0,
        least_rounds: int = 1,
    ) -> None:
        operator, _, workload = group.partition(", ")
        benchmark.group = f"{device.type}: {group}"
        benchmark.name = implementation
        benchmark.extra_info.update(
            operator=operator, workload=workload, implementation=implementation, device=device.type
        )
        start = time.perf_counter()
        result = function()  # compiles, tunes and allocates, if it does; so it is not the call that is timed
        first = time.perf_counter() - start
        if check is not None:
            check(result)
        del result
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)  # or pytest-benchmark warns of an unused fixture
            return
        # Of a function that takes long, a second call before the rounds would tell nothing new.
        once = first if first > 3 * SECONDS else _seconds(function, device)
        rounds = min(max(int(SECONDS / once), 3), MOST_ROUNDS) if once < SECONDS else least_rounds
        benchmark.pedantic(
            function, setup=_cool_gpu if device.type == "cuda" else None, rounds=rounds, warmup_rounds=rounds // 10
        )
        if bytes_moved:
            speed = bytes_moved / statistics.median(benchmark.stats.stats.data) / 1e9
            benchmark.extra_info.update(
                bytes=bytes_moved,
                gb_per_second=round(speed, 2),
                share_of_copy_bandwidth=round(speed / copy_bandwidth(device.type), 3),
            )

    return run


def _seconds(function: Callable, device: torch.device) -> float:
    """The host's time of one call, the GPU's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


_trash: list[torch.Tensor] = []


def _cool_gpu() -> None:
    """Empties the L2 cache, then keeps the GPU busy while the host queues the work, so that no launch is timed."""
    if not _trash:
        _trash.append(torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"))
    _trash[0].zero_()
    torch.cuda._sleep(400_000)  # clock cycles: about 0.2 ms


_bandwidth: dict[str, float] = {}


def copy_bandwidth(device: str) -> float:
    """GB/s (read + written) of this machine's copy of 256 MiB, median of 15: what an operator can hope for at most."""
    if device not in _bandwidth:
        source = torch.ones(2**26, device=device)
        target = torch.empty_like(source)
        seconds = []
        for _ in range(15):
            start = DeviceStamp() if device == "cuda" else time.perf_counter()
            target.copy_(source)
            seconds.append((DeviceStamp() if device == "cuda" else time.perf_counter()) - start)
        _bandwidth[device] = 2 * source.nbytes / statistics.median(seconds) / 1e9
    return _bandwidth[device]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # a host's name is nobody's business
    machine_info["cascadeops"] = {
        "commit": _output("git", "describe", "--always", "--dirty"),
        "torch": torch.__version__,
        "peers": {name: _version(name) for name in ("torchvision", "mmcv", "detectron2", "pycocotools")},
        "threads": torch.get_num_threads(),
        "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "processor": processor(),
        "cpu_copy_gb_per_second": round(copy_bandwidth("cpu"), 1),
    }
    if torch.cuda.is_available():
        machine_info["cascadeops"] |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda_copy_gb_per_second": round(copy_bandwidth("cuda"), 1),
        }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps median, quartiles and extremes; each of a thousand rounds would make megabytes of benchmarks/results."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return f"{names[0]}, {len(names)} processors"
    return platform.processor() or platform.machine()
