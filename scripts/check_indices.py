"""Shows that no index of the kernels is computed in fewer bits than it needs: clang-tidy over csrc/, CPU and CUDA.

    python scripts/check_indices.py [--jobs 2]

A product of 32-bit numbers that is then used as a 64-bit one, and a 64-bit number that becomes a 32-bit one without a
cast, are the ways in which kernels of others wrap beyond 2^31 elements. Either is an error here; a cast stands for a
value that an input check bounds. tests/test_large_tensors.py runs the kernels on such tensors. The CUDA sources are
read as scripts/emulate_cuda.py translates them; neither nvcc nor a GPU is needed.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulate_cuda as emulation

CHECKS = "-*,bugprone-implicit-widening-of-multiplication-result,bugprone-narrowing-conversions"
OPTIONS = {
    "bugprone-narrowing-conversions.WarnOnFloatingPointNarrowingConversion": "false",
    "bugprone-narrowing-conversions.WarnOnIntegerToFloatingPointNarrowingConversion": "false",
    "bugprone-narrowing-conversions.WarnOnEquivalentBitWidth": "false",  # threadIdx.x, always small, as int
}


def command_for(source: Path, torch: Path) -> list[str]:
    config = "{CheckOptions: {" + ", ".join(f'"{key}": "{value}"' for key, value in OPTIONS.items()) + "}}"
    tidy = [str(Path(sys.executable).with_name("clang-tidy")), "--quiet", f"--checks={CHECKS}", f"--config={config}"]
    tidy += ["--warnings-as-errors=*", "--header-filter=(csrc|cuda|common|cpu)/.*", str(source), "--"]
    includes = ["-Icsrc", "-isystem", str(torch / "include")]
    if source.suffix == ".cu":
        includes = ["-x", "c++", "-Itests/emulation", f"-I{emulation.FOLDER}/csrc", *includes]
        includes += ["-DUSE_CUDA", "-include", "cuda_runtime.h"]
    return [*tidy, "-std=c++17", *emulation.build.DEFINES, *includes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    jobs = parser.parse_args().jobs
    os.chdir(emulation.ROOT)
    torch, _ = emulation.build.find_torch()
    sources = sorted(Path("csrc/cpu").glob("*.cpp"))
    for path in sorted(Path("csrc/cuda").iterdir()):
        translated = emulation.translated(path)
        if path.suffix == ".cu":
            sources.append(translated)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(
            pool.map(lambda path: subprocess.run(command_for(path, torch), capture_output=True, text=True), sources)
        )
    failed = [result.stdout or result.stderr for result in results if result.returncode != 0]
    print("".join(failed), end="")
    print(f"{len(sources)} sources, {len(failed)} with an index that could wrap")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
