"""Builds the CPU kernels with a sanitizer and runs the operator tests on them.

    python scripts/sanitize.py address     AddressSanitizer and UndefinedBehaviorSanitizer
    python scripts/sanitize.py thread      ThreadSanitizer
    python scripts/sanitize.py narrow      UndefinedBehaviorSanitizer, and 16 bits for every int: see narrow_indices.py
    python scripts/sanitize.py address tests/test_padded_nms.py -k errors     other tests, options of pytest
    python scripts/sanitize.py thread --cases 1     of every test one case: the short run of .ci/run

The build is build/sanitize/<name>/cascadeops: links to the Python files, and a _C.abi3.so of its own. PyTorch is not
instrumented, but its allocations are, so that a kernel's access beside a tensor shows. For ThreadSanitizer the kernels
share their work among plain threads (tests/native/parallel_for_threads.cpp says why). A report ends the run. Linux and
GCC only.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import narrow_indices

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402  (the flags of the real build)

# One clone of each function: three take longer to compile, and GCC's ThreadSanitizer instruments what chooses between
# them, which runs before it is ready. The ordinary build tests the clones' arithmetic.
FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-DCASCADEOPS_CLONES="]
# Division by zero is no error of a kernel: IEEE 754 says infinity or NaN. AddressSanitizer sees null pointers and what
# lies beyond an object. Its checks are calls in functions with more than a hundred: a quarter less time to compile.
ADDRESS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=null,object-size"]
ADDRESS += ["--param=asan-instrumentation-with-call-threshold=100"]
# The warnings are those of the ordinary build, and some about loops that count with a class.
NARROW = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=null,object-size", "-w"]
NARROW += ["-include", narrow_indices.CLASS]
SANITIZERS = {"address": ADDRESS, "thread": ["-fsanitize=thread"], "narrow": NARROW}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so", "narrow": "libubsan.so"}
EXTRA = {"address": [], "thread": ["tests/native/parallel_for_threads.cpp"], "narrow": []}
# Python never frees some of its memory. A failed allocation has to raise, as it does without a sanitizer.
OPTIONS = {
    "OMP_WAIT_POLICY": "passive",  # four threads on two cores
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}
# A sanitizer takes three to ten times as long: tests that repeat do it less often, and those stay out that are about
# other things than values, that need gigabytes, or that measure memory, which a sanitizer needs itself.
FEWER = {"CASCADEOPS_EXAMPLES": "40", "CASCADEOPS_REPEATS": "8"}
LEFT_OUT = "opcheck compile export gradcheck second_order second_derivative"
LEFT_OUT += " billion 2_to_the_31 beyond_2_31 32nd_bit 268569 large_batch than_a_grid more_pixels_than"
LEFT_OUT += " memory_is memory_does memory_of memory_holds no_extra_memory one_byte_beyond"
# More boxes, pixels or distance than the limits that narrow_indices.py shrinks.
BEYOND_NARROW = "more_boxes_than_others top_k_of_a_long_level a_level_of_32_chunks large_masks_are_pycocotools"
BEYOND_NARROW += (
    " decode-2-to-the-20 changes3-image_size changes5-image_size is_what_pycocotools_draws any_polygon_and_box"
)


def operator_tests() -> list[str]:
    """The tests of each operator, and those that all share; not the tests of programs, which compile or train."""
    shared = ["tests/test_properties.py", "tests/test_threads.py", "tests/test_guarded_memory.py"]
    shared += ["tests/test_peer_faults.py", "tests/test_narrow_indices.py"]
    operators = [path.stem for path in (ROOT / "cascadeops/reference").glob("[!_]*.py")]
    return [*shared, *(f"tests/test_{name}.py" for name in sorted(operators))]


def compile_kernels(name: str, folder: Path) -> None:
    """Writes folder/_C.abi3.so, from objects beside it that are kept."""
    compiler, version = build.find_compiler()
    torch, _ = build.find_torch()
    build.OBJECTS = folder.parent / "objects"
    build.HEADERS = [header for header in build.HEADERS if header.endswith(".h")]  # not those of CUDA alone
    sources, include = build.CPU.sources, "csrc"
    if name == "narrow":
        narrow_indices.write(folder.parent)
        build.HEADERS = [narrow_indices.CLASS, *(f"{folder.parent}/{header}" for header in build.HEADERS)]
        sources, include = [f"{folder.parent}/{source}" for source in sources], f"{folder.parent}/csrc"
    command = [compiler, *build.CXX_FLAGS, *FLAGS, *SANITIZERS[name], *build.DEFINES]
    command += [f"-I{include}", "-isystem", str(torch / "include")]
    information = f'-DCASCADEOPS_BUILD_INFO="{{\\"compiler\\": \\"{version}, {name} sanitizer\\"}}"'

    def compiled(source):
        return build.compile_object([*command, information] if source.endswith(build.BUILD_INFO) else command, source)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        objects = list(pool.map(compiled, [*sources, *EXTRA[name]]))
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
    folder = Path("build/sanitize", options.sanitizer, "cascadeops")
    link_package(folder)
    compile_kernels(options.sanitizer, folder)
    environment = {**FEWER, **os.environ, **OPTIONS, "LD_PRELOAD": runtime(options.sanitizer), "OMP_NUM_THREADS": "4"}
    # cascadeops is imported before pytest puts the checkout, with the ordinary build, in front of the current folder.
    program = "import cascadeops, pytest, sys; sys.exit(pytest.main())"
    command = [sys.executable, "-c", program, "-q", "--capture=sys", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    left_out = LEFT_OUT.split() + (BEYOND_NARROW.split() if options.sanitizer == "narrow" else [])
    command += ["-k", "not (" + " or ".join(left_out) + ")"]
    tests = [] if any(".py" in argument for argument in options.pytest) else operator_tests()
    tests += options.pytest
    tests = [str(ROOT / argument) if ".py" in argument else argument for argument in tests]
    return subprocess.run([*command, *tests], cwd=folder.parent, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
