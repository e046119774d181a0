"""The emulation of CUDA: it notices what is wrong with a launch, and runs the kernels of csrc/cuda, whose answers are
those of the CPU kernels. `pytest --emulate-cuda` runs the operators' own tests on it.

    python scripts/emulate_cuda.py && pytest tests/test_emulated_cuda.py
"""

import pytest
import torch
from emulated_cuda import EmulatedCuda, is_built, launches, library, seed
from operator_cases import OPERATORS, arguments_of, call, identical

from scripts.emulate_cuda import translate

needs_build = pytest.mark.skipif(not is_built(), reason="needs python scripts/emulate_cuda.py")


def test_launch_syntax_becomes_cxx_and_lines_stay():
    source = (
        "extern __shared__ __align__(16) char bytes[];\n"
        "extern __shared__ uint32_t bits[];\n"
        "ns::fill<float, List<4>>\n    <<<dim3(2, 3), kThreads,\n  0, stream>>>(x, y);\n"
        "if (a < b) kernel<<<blocks(a, b), 32>>>(z);\n"
    )
    assert translate(source) == (
        "char* const bytes = emulated_dynamic_shared<char>();\n"
        "uint32_t* const bits = emulated_dynamic_shared<uint32_t>();\n"
        'emulation::launcher("ns::fill<float, List<4>>", [&](auto&... values) { ns::fill<float, List<4>>(values...); },'
        " dim3(2, 3), kThreads,\n  0, stream)\n(x, y);\n"
        'if (a < b) emulation::launcher("kernel", [&](auto&... values) { kernel(values...); }, blocks(a, b), 32)(z);\n'
    )


FAULTS = {
    "some threads miss the barrier": r"threads wait for each other: 40 \(first: 0\) at __syncthreads, .*cu:\d+; "
    r"24 \(first: 40\) have ended",
    "threads end before the barrier": "threads wait for each other: 40 .* 24",
    "two barriers": r"32 \(first: 0\) at __syncthreads, .*; 32 \(first: 32\) at __syncthreads",
    "divergent shuffle": r"32 \(first: 0\) at __shfl_xor_sync, .*; 32 \(first: 1\) have ended",
    "shuffle from outside of the mask": "__shfl_xor_sync reads a lane outside of its mask",
    "half a warp": "threads wait for each other: .* 16",
    "foreign mask": "the mask does not name the lane",
    "misaligned vector": "misaligned access",
    "index beyond an array": "index 64 is outside of an array",
    "beyond dynamic shared memory": "writes beyond its 100 bytes of dynamic shared memory",
    "too much dynamic shared memory": "asks for 49153 bytes of dynamic shared memory, and is allowed 49152",
    "no blocks": "0 x 1 x 1 blocks of 64 x 1 x 1 threads, which is an error on a GPU",
    "no threads": "1 x 1 x 1 blocks of 0 x 1 x 1 threads, which is an error on a GPU",
    "too many threads": "1025 x 1 x 1 threads, more than a GPU takes",
    "too many rows of blocks": "1 x 65536 x 1 blocks of 64 x 1 x 1 threads, more than a GPU takes",
    "no device guard": "without a device guard",
    "no launch check": "no launch check has followed that of good_kernel",
}
SANITIZED = ("misaligned vector", "index beyond an array", "beyond dynamic shared memory")


def run(name: str) -> int:
    with EmulatedCuda():
        return torch.ops.cascadeops_emulation.run(name)


@needs_build
@pytest.mark.parametrize("name", FAULTS)
def test_faulty_launch_is_an_error_and_the_next_one_runs(name):
    if "sanitized" in library().parts and name in SANITIZED:
        pytest.skip("ends the process, with a report of the sanitizer")
    with pytest.raises(RuntimeError, match=f"emulated CUDA: .*kernel: .*{FAULTS[name]}"):
        run(name)
    before = launches()
    assert run("good") == sum(i * i * (63 - i + (i ^ 1)) for i in range(64))
    assert launches() == before + 1


@needs_build
def test_a_race_shows_as_a_difference_between_seeds():
    results = []
    for value in range(5):
        seed(value)
        results.append(run("race"))
    assert len(set(results)) > 1
    seed(0)
    assert run("race") == results[0]


def assert_same(result, expected):
    """Equal to the bit where the CPU kernel promises it; else as close as float32 sums of another order."""
    for ours, theirs in zip(result, expected, strict=True):
        if not identical(ours, theirs):
            assert ours.is_floating_point() and ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def emulated(name, arguments):
    """The operator's result, which must have come from a CUDA kernel."""
    with EmulatedCuda():
        before = launches()
        result = call(name, arguments)
        assert launches() > before, f"{name} has launched no CUDA kernel"
    return result


@needs_build
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_kernel_equals_the_cpu_kernel_in_any_order_of_threads(name, poisoned_memory):
    with EmulatedCuda() as emulation:
        if not any(operator == name for operator in emulation.operators):
            pytest.skip("has no CUDA kernel")
    expected = call(name, arguments_of(name))
    for value in range(3):
        seed(value)
        assert_same(emulated(name, arguments_of(name)), expected)


@needs_build
def test_outside_of_the_emulation_operators_are_those_of_the_cpu():
    emulated("paste_masks", arguments_of("paste_masks"))
    before = launches()
    call("paste_masks", arguments_of("paste_masks"))
    assert launches() == before
