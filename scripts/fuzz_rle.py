"""Fuzzes run lengths under AddressSanitizer and UBSan: the rules by which they are read, and our writer of them.

    python scripts/fuzz_rle.py --executions 100000000
    python scripts/fuzz_rle.py --executions 100000000 --mask-api cocoapi/common     what passes is drawn by it, too

tests/native/fuzz_rle.cpp is the harness. --mask-api names a folder with pycocotools' maskApi.c, which the checked texts
are then given to; its shifts of negative numbers are not reported. One process for each core; a report ends the run.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-std=c++17", f"-I{ROOT / 'csrc'}"]


def build(target: Path, mask_api: Path | None = None) -> Path:
    """Compiles the harness as `target`."""
    compiler = os.environ.get("CXX", "g++")
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = []
    if mask_api is not None:
        drawn = ["-DMASK_API", f"-isystem{mask_api}", f"{target}.o"]
        command = [compiler, "-x", "c", "-O2", "-g1", "-fsanitize=address", "-c", mask_api / "maskApi.c"]
        subprocess.run([*command, "-o", f"{target}.o"], check=True)
    source = ROOT / "tests/native/fuzz_rle.cpp"
    subprocess.run([compiler, *FLAGS, *SANITIZERS, source, *drawn, "-o", target], check=True)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--executions", type=int, default=100_000_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask-api", type=Path, help="folder of pycocotools' maskApi.c and maskApi.h")
    options = parser.parse_args()
    harness = build(ROOT / "build/fuzz/rle", options.mask_api)
    processes = os.cpu_count() or 1
    share = str(-(-options.executions // processes))
    seeds = range(options.seed * processes, (options.seed + 1) * processes)
    return max([process.wait() for process in [subprocess.Popen([harness, share, str(seed)]) for seed in seeds]])


if __name__ == "__main__":
    sys.exit(main())
