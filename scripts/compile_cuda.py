"""Compiles every CUDA source for all architectures, warnings as errors, and prints what the kernels use of a GPU.

    python scripts/compile_cuda.py [--architectures 80 90] [--jobs 2]

It needs nvcc and any torch (for its headers), not a GPU. Exit status 1 if a source does not compile.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402  (the flags of the real build)

STRICT = ["-Werror=all-warnings", "-Xcompiler=-Werror", "-Xptxas=-v"]
USAGE = {
    "registers": r"Used (\d+) registers",
    "spill bytes": r"(\d+) bytes spill stores",
    "stack bytes": r"(\d+) bytes stack frame",
    "shared bytes": r"(\d+) bytes smem",
}


def compile_source(source: str, architectures: list[str], nvcc: str, torch: Path) -> tuple[bool, str]:
    """(whether it compiled, the compiler's messages). One call for all architectures: the host's part is the same."""
    includes = ["-Icsrc", "-isystem", str(torch / "include")]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *build.NVCC_FLAGS, *STRICT, *build.gencode(architectures), "-DUSE_CUDA", *build.DEFINES]
        command += [*includes, "-c", source, "-o", f"{folder}/object.o"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.returncode == 0, result.stdout + result.stderr


def kernels_of(messages: str) -> list[tuple[str, str, dict[str, int]]]:
    """[(architecture, kernel's name, its use of each resource)], from the output of ptxas -v."""
    found = []
    for block in re.split(r"Compiling entry function ", messages)[1:]:
        mangled, architecture = re.match(r"'(\w+)' for '(\w+)'", block).groups()
        numbers = {name: re.search(pattern, block) for name, pattern in USAGE.items()}
        found.append((architecture, mangled, {name: int(match[1]) if match else 0 for name, match in numbers.items()}))
    command = ["c++filt", *(name for _, name, _ in found)]
    names = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    kernels = [(arch, short_name(name), usage) for name, (arch, _, usage) in zip(names, found, strict=False)]
    return sorted(kernels, key=lambda kernel: kernel[0])


def short_name(demangled: str) -> str:
    """Name and template arguments of a kernel, without namespaces and parameters."""
    name = re.sub(r"\((anonymous namespace|unnamed)\)::|\b(\w+)::", "", demangled.removeprefix("void "))
    depth = itertools.accumulate({"<": 1, ">": -1}.get(letter, 0) for letter in name)
    end = next(
        (i for i, (letter, level) in enumerate(zip(name, depth, strict=True)) if letter == "(" and level == 0), None
    )
    return name[:end]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=["80", "90"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    nvcc = build.find_nvcc()
    if nvcc is None:
        build.fail("there is no nvcc in $CUDA_HOME/bin, PATH or /usr/local/cuda/bin.")
    nvcc, _, version = build.find_toolkit(nvcc)
    torch, torch_version = build.find_torch()
    sources, architectures = build.CUDA.sources[1:], options.architectures
    targets = " and ".join(f"sm_{name}" for name in architectures)
    print(f"CUDA {version}, headers of torch {torch_version}, {len(sources)} sources for {targets}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda source: compile_source(source, architectures, nvcc, torch), sources))
    print("".join(f"{name:>14}" for name in ["architecture", *USAGE]) + "  kernel")
    for source, (compiled, messages) in zip(sources, results, strict=True):
        print(source + ("" if compiled else f" DID NOT COMPILE\n{messages}"))
        for architecture, name, usage in kernels_of(messages) if compiled else []:
            numbers = "".join(f"{value:>14}" for value in [architecture, *usage.values()])
            print(f"{numbers}  {name if len(name) <= 80 else name[:77] + '...'}")
    failed = sum(not compiled for compiled, _ in results)
    print(f"{len(sources) - failed} of {len(sources)} compiled for {targets}")
    return 1 if failed or not sources else 0


if __name__ == "__main__":
    sys.exit(main())
