"""Compiles the CUDA kernels for the CPU: build/emulation/cuda.so, in which coroutines stand for a GPU's threads.

    python scripts/emulate_cuda.py [--sanitize]
    pytest --emulate-cuda tests/test_nms.py

It needs a C++ compiler and any torch, neither nvcc nor a GPU. With --sanitize, AddressSanitizer and UBSan watch every
access, also of global memory, and the command to run the tests is printed. tests/emulation stands for CUDA's headers.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402  (finds compiler and torch)

FOLDER = Path("build/emulation")
# As the kernels are compiled, without contraction. A type is read through pointers to vectors, as CUDA allows.
FLAGS = ["-O1", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-U_FORTIFY_SOURCE", "-DUSE_CUDA", "-Wno-attributes"]
CHECKS = ["-fsanitize=alignment,bounds"]  # whose reports end in tests/emulation/undefined_behaviour.cpp
SANITIZE = ["-fsanitize=address,undefined", "-fsanitize-sections=emulated_shared", "-fno-omit-frame-pointer"]


def translate(source: str) -> str:
    """CUDA's two additions to C++ syntax, launches and arrays of dynamic shared memory, as C++.

    Everything else is left to macros and overloads in tests/emulation. Every line keeps its number.
    """
    source = re.sub(
        r"extern __shared__ (?:__align__\(\w+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = emulated_dynamic_shared<\1>();",
        source,
    )
    while (launch := source.find("<<<")) >= 0:
        name_end = len(source[:launch].rstrip())
        name_begin = begin_of_name(source, name_end)
        end = source.index(">>>", launch)
        name, gap, configuration = source[name_begin:name_end], source[name_end:launch], source[launch + 3 : end]
        text = " ".join(name.split())
        launcher = f'emulation::launcher("{text}", [&](auto&... values) {{ {name}(values...); }}, {configuration})'
        source = source[:name_begin] + launcher + "\n" * gap.count("\n") + source[end + 3 :]
    return source


def begin_of_name(source: str, end: int) -> int:
    """Where the name that ends at `end` begins: `kernel`, `kernel<float, 4>` or `cascadeops::kernel`."""
    depth = 0
    for i in range(end - 1, -1, -1):
        depth += {">": 1, "<": -1}.get(source[i], 0)
        if depth == 0 and not re.match(r"[\w:<]", source[i]):
            return i + 1
    return 0


def translated(path: Path) -> Path:
    """The translation of a file of csrc/cuda, in the folder where includes find it; unchanged files keep their time."""
    target = FOLDER / path
    text = f'#line 1 "{path}"\n' + translate(path.read_text())
    if not target.exists() or target.read_text() != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return target


def is_current(target: Path) -> bool:
    """Whether an object is newer than everything it was made of, which the compiler has listed beside it."""
    listed = target.with_suffix(".d")
    if not target.exists() or not listed.exists():
        return False
    made_of = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(os.path.exists(path) and os.stat(path).st_mtime <= target.stat().st_mtime for path in made_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    sanitize = parser.parse_args().sanitize
    os.chdir(ROOT)
    torch, _ = build.find_torch()
    compiler, _ = build.find_compiler()
    folder = FOLDER / ("sanitized" if sanitize else "plain")
    (folder / "objects").mkdir(parents=True, exist_ok=True)

    for header in sorted(Path("csrc/cuda").glob("*.cuh")):
        translated(header)
    kernels = [*Path("csrc/cuda").glob("*.cu"), *Path("tests/emulation").glob("*.cu")]
    sources = [*sorted(Path("tests/emulation").glob("*.cpp")), *(translated(kernel) for kernel in sorted(kernels))]
    includes = ["-Itests/emulation", f"-I{FOLDER}/csrc", "-Icsrc", "-isystem", str(torch / "include")]
    command = [compiler, *FLAGS, *(SANITIZE if sanitize else CHECKS), *build.DEFINES, *includes]
    objects = []
    for source in sources:
        target = folder / "objects" / f"{source.name}.o"
        objects.append(str(target))
        if is_current(target):
            continue
        target.unlink(missing_ok=True)
        as_nvcc = ["-x", "c++", "-include", "cuda_runtime.h"] if source.suffix == ".cu" else []
        if not build.run([*command, "-MMD", *as_nvcc, "-c", str(source), "-o", str(target)]):
            build.fail(f"{source} did not compile, see above.")

    library = folder / "cuda.so"
    exports = folder / "exports.map"  # the functions that stand for libtorch's are nobody else's
    exports.write_text("{ global: cascadeops_*; local: *; };\n")
    link = [compiler, "-shared", *objects, f"-Wl,--version-script={exports}", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    link += [*(SANITIZE if sanitize else []), "-Wl,--no-undefined", "-o", str(library)]
    newest = max(os.stat(item).st_mtime for item in objects)
    if (not library.exists() or library.stat().st_mtime < newest) and not build.run(link):
        build.fail("the library was not linked, see above.")
    if sanitize:  # libstdc++ too: the sanitizer looks for its exceptions when the process starts
        names = ["libasan.so", "libstdc++.so.6"]
        runtime = " ".join(build.output_of([compiler, f"-print-file-name={name}"]).strip() for name in names)
        environment = f"LD_PRELOAD={shlex.quote(runtime)} ASAN_OPTIONS=detect_leaks=0"
        print(f"{environment} python -m pytest --emulate-cuda tests/...")


if __name__ == "__main__":
    main()
