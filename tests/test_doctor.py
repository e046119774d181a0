"""The doctor tells the truth: healthy when the operators are right, and not otherwise."""

import json

import pytest
import torch

import cascadeops
from cascadeops import doctor, selftest


def report_of(capsys, *arguments: str) -> tuple[int, str]:
    status = doctor.main("doctor", arguments)
    return status, capsys.readouterr().out


def test_healthy_installation(capsys):
    status, text = report_of(capsys)
    assert status == 0, text
    assert f"healthy: all {len(selftest.CHECKS) * (1 + torch.cuda.is_available())} self-tests passed" in text
    assert torch.__version__ in text and str(cascadeops._binary.cpu.path) in text


def test_every_public_operator_has_a_check_and_a_cpu_kernel(capsys):
    names = set(cascadeops.__all__) - {"raise_device_faults"}  # which calls no kernel
    operators = sorted(name for name in names if name.islower())  # the others are modules that call them
    assert sorted(selftest.CHECKS) == operators
    kernels = json.loads(report_of(capsys, "--json")[1])["kernels"]
    without_own = {"roi_align", "self_calibrated_conv2d"}  # one level of a pyramid; convolutions around an operator
    assert set(operators) - without_own <= set(kernels)
    assert all(there["cpu"] for there in kernels.values())


def test_json_holds_what_the_text_says(capsys):
    report = json.loads(report_of(capsys, "--json")[1])
    assert doctor.render(report).splitlines()[:3] == report_of(capsys)[1].splitlines()[:3]
    assert report["cpu"]["build"]["version"] == cascadeops.__version__
    assert report["cpu"]["instruction_set"] in ("AVX-512", "AVX2", "baseline of the compiler")


@pytest.mark.parametrize("name", sorted(selftest.CHECKS))
def test_wrong_results_are_found(monkeypatch, name):
    """Each check fails when its operator answers a little wrong."""
    right = getattr(cascadeops, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        if name == "paste_masks_rle":
            return [*result[1:], result[0]]
        first = result[0] if isinstance(result, tuple) else result
        changed = first * 1.01 if first.dtype.is_floating_point else first.roll(1, -1)
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    monkeypatch.setattr(cascadeops, name, wrong)
    outcomes = {outcome.operator: outcome.passed for outcome in selftest.run("cpu")}
    assert outcomes == {operator: operator != name for operator in selftest.CHECKS}


@pytest.mark.parametrize(
    "result, message",
    [
        (
            torch.zeros(1, 61, 67, dtype=torch.bool),
            "ValueError: torch.bool [1, 61, 67] instead of torch.bool [10, 61, 67]",
        ),
        (torch.zeros(10, 61, 67), "ValueError: torch.float32 [10, 61, 67] instead of torch.bool [10, 61, 67]"),
    ],
)
def test_wrong_shapes_and_types_are_found(monkeypatch, capsys, result, message):
    monkeypatch.setattr(cascadeops, "paste_masks", lambda *args: result)
    status, text = report_of(capsys)
    assert status == 1
    assert f"cpu FAILED ({message})" in text
    assert "WRONG RESULTS: paste_masks on cpu" in text


def test_an_operator_that_raises_is_reported(monkeypatch, capsys):
    def broken(*args):
        raise OSError("the disk\nis gone")

    monkeypatch.setattr(cascadeops, "padded_nms", broken)
    status, text = report_of(capsys)
    assert status == 1 and "cpu FAILED (OSError: the disk)" in text


def test_missing_kernels_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(cascadeops._binary, "cpu", cascadeops._binary.Binary("_C", reason="_C.abi3.so was not built"))
    status, text = report_of(capsys)
    assert status == 1
    assert "NOT USABLE: _C.abi3.so was not built. Mend it with: pip install ." in text


BUILD = {"cuda": "13.0", "architectures": ["80", "90+PTX"]}


@pytest.mark.parametrize(
    "architectures, capability, served",
    [
        (["80", "90+PTX"], (8, 0), True),
        (["80", "90+PTX"], (8, 6), True),  # machine code of 8.0 runs on 8.6
        (["80", "90+PTX"], (7, 5), False),
        (["80", "90+PTX"], (12, 0), True),  # PTX is translated for newer GPUs
        (["80", "90"], (12, 0), False),
        (["86"], (8, 0), False),  # not the other way round
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["100"], (10, 3), True),
    ],
)
def test_which_gpus_a_build_serves(architectures, capability, served):
    fault = doctor.gpu_fault({**BUILD, "architectures": architectures}, capability, 13000)
    assert (fault is None) == served
    if not served:
        assert fault.endswith("CASCADEOPS_CUDA_ARCHITECTURES={}.{} pip install .".format(*capability))


def test_driver_older_than_the_toolkit():
    fault = doctor.gpu_fault(BUILD, (9, 0), 12040)
    assert fault.startswith("the driver serves CUDA 12.4, the kernels were built with 13.0: update the driver")
    assert doctor.gpu_fault({}, (9, 0), 13000) == "the CUDA kernels are not loaded"
