"""Libraries of tests/native that a test puts in front of the C library (LD_PRELOAD)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"


def built_library(name: str, folder: Path) -> Path:
    """native/NAME.c, compiled into `folder`; skips the test where that cannot be."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and LD_PRELOAD")
    library = folder / f"{name}.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall"]
    subprocess.run([compiler, *flags, "-o", library, NATIVE / f"{name}.c", "-ldl"], check=True)
    return library
