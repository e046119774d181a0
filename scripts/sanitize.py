"""Builds the CPU kernels with a sanitizer and runs the operator tests on them.

    python scripts/sanitize.py address     AddressSanitizer and UndefinedBehaviorSanitizer
    python scripts/sanitize.py thread      ThreadSanitizer
    python scripts/sanitize.py address tests/test_padded_nms.py -k errors     other tests, options of pytest

The build is build/sanitize/<name>/cascadeops: links to the Python files, and a _C.abi3.so of its own. PyTorch is not
instrumented, but its allocations are, so that a kernel's access beside a tensor shows. Reports end the test. Linux and
GCC only.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402  (the flags of the real build)

FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
# GCC's ThreadSanitizer instruments the functions that choose between clones, which run before it is ready.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined,float-divide-by-zero,float-cast-overflow"],
    "thread": ["-fsanitize=thread", "-DCASCADEOPS_CLONES="],
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
EXTRA = {"address": [], "thread": ["tests/native/parallel_for_threads.cpp"]}
# Python never frees some of its memory. A failed allocation has to raise, as it does without a sanitizer.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}
# A sanitizer takes three to ten times as long, so that the tests that repeat do it less often.
FEWER = {"CASCADEOPS_EXAMPLES": "200", "CASCADEOPS_REPEATS": "40"}


def operator_tests() -> list[str]:
    """The tests of each operator, and those that all share; not the tests of programs, which compile or train."""
    shared = ["tests/test_properties.py", "tests/test_threads.py", "tests/test_guarded_memory.py"]
    operators = [path.stem for path in (ROOT / "cascadeops/reference").glob("[!_]*.py")]
    return [*shared, *(f"tests/test_{name}.py" for name in sorted(operators))]


def compile_kernels(name: str, folder: Path) -> None:
    """Writes folder/_C.abi3.so, from objects beside it that are kept."""
    compiler, version = build.find_compiler()
    torch, _ = build.find_torch()
    build.OBJECTS = folder.parent / "objects"
    command = [compiler, *build.CXX_FLAGS, *FLAGS, *SANITIZERS[name], *build.DEFINES]
    command += ["-Icsrc", "-isystem", str(torch / "include")]
    information = f'-DCASCADEOPS_BUILD_INFO="{{\\"compiler\\": \\"{version}, {name} sanitizer\\"}}"'

    def compiled(source):
        return build.compile_object([*command, information] if source == build.BUILD_INFO else command, source)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        objects = list(pool.map(compiled, [*build.CPU.sources, *EXTRA[name]]))
    link = [compiler, "-shared", *SANITIZERS[name], *objects, "-Wl,-Bsymbolic", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if not build.run([*link, "-o", str(folder / "_C.abi3.so")]):
        build.fail("the sanitizer build was not linked, see above.")


def link_package(folder: Path) -> None:
    """Everything of cascadeops/ but its binaries."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "cascadeops").iterdir():
        link = folder / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not link.exists():
            link.symlink_to(path)


def runtime(name: str) -> str:
    """The sanitizer's library, which has to be loaded before everything else."""
    compiler, _ = build.find_compiler()
    names = [RUNTIME[name], "libstdc++.so.6"]  # the second, or exceptions are not intercepted
    return ":".join(build.output_of([compiler, f"-print-file-name={file}"]).strip() for file in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="files and options; default: all operator tests")
    options = parser.parse_args()
    os.chdir(ROOT)
    folder = ROOT / "build/sanitize" / options.sanitizer / "cascadeops"
    link_package(folder)
    compile_kernels(options.sanitizer, folder)
    environment = {**FEWER, **os.environ, **OPTIONS, "LD_PRELOAD": runtime(options.sanitizer), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    tests = [str(ROOT / argument) if ".py" in argument else argument for argument in options.pytest or operator_tests()]
    return subprocess.run([*command, *tests], cwd=folder.parent, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
