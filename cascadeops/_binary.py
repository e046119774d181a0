"""Loads the compiled kernels: _C (CPU, always) and _C_cuda (beside a CUDA build of torch).

Nothing here raises. What could not be loaded keeps its reason, which the operators' own error and
`python -m cascadeops` repeat.
"""

import ctypes
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

REBUILD = "pip install .  (in a checkout of cascadeops)"
OLDEST_TORCH = (2, 10)


@dataclass
class Binary:
    """One compiled library. Exactly one of `path` (it is loaded) and `reason` (why it is not) is set."""

    name: str
    path: Path | None = None
    reason: str | None = None
    build: dict = field(default_factory=dict)
    """Compiler, flags, torch headers, CUDA and architectures; see csrc/build_info.cpp."""
    instruction_set: str | None = None

    def load(self, version: str) -> None:
        tried = []
        for path in _candidates(f"{self.name}.abi3.so", version):
            try:
                torch.ops.load_library(str(path))
                library = ctypes.CDLL(str(path))
                library.cascadeops_build_info.restype = library.cascadeops_instruction_set.restype = ctypes.c_char_p
                self.build = json.loads(library.cascadeops_build_info())
                self.instruction_set = library.cascadeops_instruction_set().decode()
                self.path, self.reason = path, None
                return
            except (OSError, AttributeError, RuntimeError) as error:
                tried.append(f"{path} does not load: {str(error).splitlines()[0]}")
        self.reason = "; ".join(tried) or f"{self.name}.abi3.so was not built"


cpu = Binary("_C")
cuda = Binary("_C_cuda")


def load(version: str) -> None:
    """Loads what this torch can use. A binary that lies elsewhere must belong to this `version` of the sources."""
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        cpu.reason = cuda.reason = f"torch {torch.__version__} is older than 2.10: pip install 'torch>=2.10'"
        return
    cpu.load(version)
    if cpu.reason is not None:
        cuda.reason = "the CPU kernels, which declare the operators, are not loaded"
    elif torch.version.cuda is None:
        cuda.reason = f"torch {torch.__version__} is a build without CUDA"
    else:
        cuda.load(version)
        if cuda.reason is not None:
            _explain_cuda_calls()


def _candidates(file: str, version: str):
    """Where a binary can be: beside this file, or in an installed cascadeops of this version further on in sys.path.

    The second serves a checkout: `python -m models.train` finds the checkout's cascadeops/ first, which has no binaries
    after a plain `pip install .`.
    """
    here = Path(__file__).parent
    if (here / file).exists():
        yield here / file
    for folder in dict.fromkeys(Path(entry).resolve() for entry in sys.path if entry):
        installed = folder / "cascadeops" / file
        if folder != here.parent and installed.exists() and (folder / f"cascadeops-{version}.dist-info").exists():
            yield installed


def missing(operator: str):
    """A function that stands in for `operator` while the CPU kernels are not loaded."""

    def raise_reason(*args, **kwargs):
        raise RuntimeError(
            f"{operator}: the kernels of cascadeops are not loaded: {cpu.reason}. Mend it with: {REBUILD}"
        )

    raise_reason.__name__ = operator
    return raise_reason


def _explain_cuda_calls() -> None:
    """Gives every operator a CUDA kernel that says why there is none, where torch would only name a missing backend."""

    def explain(name):
        def raise_reason(*args, **kwargs):
            raise RuntimeError(
                f"{name}: the CUDA kernels of cascadeops are not loaded: {cuda.reason}. Mend it with: {REBUILD}"
            )

        return raise_reason

    global _explanations  # a library object unregisters what it holds when it is collected
    _explanations = torch.library.Library("cascadeops", "IMPL")
    for name in operator_names():
        _explanations.impl(name, explain(name), "CUDA")


def operator_names() -> list[str]:
    """Every operator that csrc/library.cpp declares, without the namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("cascadeops::") for name in names if name.startswith("cascadeops::"))
