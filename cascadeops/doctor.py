"""`python -m cascadeops`: what is installed, which kernels run here and why others do not, and whether they are right.

The exit status is 1 when the CPU kernels are not loaded or a self-test fails, else 0.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

import cascadeops
from cascadeops import _binary, selftest

OPTIONAL = ["numpy", "pillow", "simplejpeg", "pycocotools", "safetensors", "tyro", "rich"]
OPTIONAL += ["tensorboard", "faster-coco-eval"]


def main(program: str = "cascadeops doctor", arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(program)
    parser.description = "Reports what is installed, which kernels run here, and whether they compute correctly."
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["healthy"] else 1


def examine() -> dict:
    """The whole report as plain data (the JSON output); runs the self-tests."""
    outcomes = []
    if _binary.cpu.path is not None:
        outcomes += selftest.run("cpu")
    if _binary.cuda.path is not None and torch.cuda.is_available():
        outcomes += selftest.run("cuda")
    return {
        "cascadeops": {"version": cascadeops.__version__, "folder": cascadeops.__path__[0]},
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {platform.machine()}",
        "torch": {"version": torch.__version__, "needs": ">= 2.10", "cuda": torch.version.cuda},
        "cpu": _describe(_binary.cpu) | {"threads": torch.get_num_threads()},
        "cuda": _describe(_binary.cuda) | {"gpus": _gpus()},
        "packages": {name: _version(name) for name in ["triton", *OPTIONAL]},
        "kernels": {name: _kernels(name) for name in _binary.operator_names()},
        "selftests": [asdict(outcome) | {"passed": outcome.passed} for outcome in outcomes],
        "healthy": _binary.cpu.path is not None and all(outcome.passed for outcome in outcomes),
    }


def _describe(binary: _binary.Binary) -> dict:
    return {
        "path": None if binary.path is None else str(binary.path),
        "reason": binary.reason,
        "build": binary.build,
        "instruction_set": binary.instruction_set,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels(operator: str) -> dict[str, bool]:
    """Which backends have a compiled kernel of this operator."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        "cpu": has_kernel(f"cascadeops::{operator}", "CPU"),
        "cuda": _binary.cuda.path is not None and has_kernel(f"cascadeops::{operator}", "CUDA"),
    }


def _gpus() -> list[dict]:
    """Name and capability of each GPU, and what keeps our kernels from running on it (None: nothing)."""
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        fault = gpu_fault(_binary.cuda.build, capability, torch._C._cuda_getDriverVersion())
        gpus.append({"name": torch.cuda.get_device_name(index), "capability": capability, "fault": fault})
    return gpus


def gpu_fault(build: dict, capability: tuple[int, int], driver: int) -> str | None:
    """Why kernels of this build cannot run on a GPU, or None.

    Args:
        build: what the CUDA binary says of itself: "cuda" ("13.0") and "architectures" (["80", "90+PTX"]).
        capability: of the GPU, (8, 6) for sm_86.
        driver: newest CUDA that the driver serves, 12040 for 12.4.
    """
    if not build:
        return "the CUDA kernels are not loaded"
    if driver // 1000 < int(build["cuda"].split(".")[0]):
        served = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"the driver serves CUDA {served}, the kernels were built with {build['cuda']}: "
            f"update the driver, or rebuild with a toolkit of CUDA {driver // 1000}"
        )
    for name in build["architectures"]:
        number, kind = re.fullmatch(r"(\d+)([af]?(?:\+PTX)?)", name).groups()
        compiled = divmod(int(number), 10)
        # Machine code runs on newer minor versions of its generation, PTX on everything newer; sm_90a only on sm_90.
        same_generation = compiled[0] == capability[0] and compiled[1] <= capability[1]
        if compiled == tuple(capability) or (not kind.startswith(("a", "f")) and same_generation):
            return None
        if kind == "+PTX" and compiled <= tuple(capability):
            return None
    rebuild = "CASCADEOPS_CUDA_ARCHITECTURES={}.{} pip install .".format(*capability)
    return f"the kernels were built for {', '.join(build['architectures'])}: {rebuild}"


def render(report: dict) -> str:
    """The report as text that can be pasted into an issue."""
    cpu, cuda = report["cpu"], report["cuda"]
    torch_cuda = f"built for CUDA {report['torch']['cuda']}" if report["torch"]["cuda"] else "CPU only"
    rows = [
        ("cascadeops", f"{report['cascadeops']['version']}  {report['cascadeops']['folder']}"),
        ("torch", f"{report['torch']['version']}, {torch_cuda}; any version {report['torch']['needs']} serves"),
        ("python", report["python"]),
        ("platform", report["platform"]),
        *_binary_rows("CPU kernels", cpu),
        ("", f"runs {cpu['instruction_set']} code in {cpu['threads']} threads") if cpu["path"] else None,
        *_binary_rows("CUDA kernels", cuda),
    ]
    if cuda["path"]:
        flags = f"CUDA {cuda['build']['cuda']} for {', '.join(cuda['build']['architectures'])}"
        rows.append(("", f"{flags}; {' '.join(cuda['build']['cuda_flags'])}"))
    for gpu in cuda["gpus"]:
        major, minor = gpu["capability"]
        rows.append(("GPU", f"{gpu['name']}, sm_{major}{minor}: {gpu['fault'] or 'served'}"))
    if not cuda["gpus"]:
        rows.append(("GPU", "torch sees none"))
    packages = dict(report["packages"])
    triton = packages.pop("triton")
    rows.append(("Triton", triton or "not installed; no operator needs it"))
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version) or "none"))
    if absent := [name for name, version in packages.items() if version is None]:
        rows.append(("absent", f"{', '.join(absent)}   (detectors: pip install 'cascadeops[detect]')"))
    lines = [f"{label:<14}{text}" for label, text in filter(None, rows)]
    return "\n".join([*lines, "", *_operator_table(report), "", _verdict(report)])


def _binary_rows(label: str, binary: dict) -> list[tuple[str, str]]:
    if binary["path"] is None:
        return [(label, f"not loaded: {binary['reason']}")]
    build = binary["build"]
    return [
        (label, binary["path"]),
        ("", f"built by {build['compiler']} with the headers of torch {build['torch']}; {' '.join(build['flags'])}"),
    ]


def _operator_table(report: dict) -> list[str]:
    lines = [f"{'operator':<34}{'CPU':<9}{'CUDA':<9}self-test against the reference"]
    for name, kernels in report["kernels"].items():
        results = []
        for outcome in report["selftests"]:
            if outcome["operator"] == name:
                result = outcome["message"] or f"error {outcome['error']:.1e}, limit {outcome['limit']:.0e}"
                results.append(f"{outcome['device']} {'passed' if outcome['passed'] else 'FAILED'} ({result})")
        compiled = {device: "kernel" if there else "none" for device, there in kernels.items()}
        text = "; ".join(results) or ("with its forward" if name.endswith("_backward") else "not run")
        lines.append(f"{name:<34}{compiled['cpu']:<9}{compiled['cuda']:<9}{text}")
    return lines


def _verdict(report: dict) -> str:
    failed = [f"{test['operator']} on {test['device']}" for test in report["selftests"] if not test["passed"]]
    if report["cpu"]["path"] is None:
        return f"NOT USABLE: {report['cpu']['reason']}. Mend it with: {_binary.REBUILD}"
    if failed:
        return f"WRONG RESULTS: {', '.join(failed)}. Rebuild ({_binary.REBUILD}); if it stays, please report this page."
    return f"healthy: all {len(report['selftests'])} self-tests passed"


if __name__ == "__main__":
    sys.exit(main())
