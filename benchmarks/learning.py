"""Evidence that the detectors learn: each is trained several times with one budget, and scored on the same pictures.

    python -m benchmarks.learning                              trains what is not in benchmarks/learning.json yet
    python -m benchmarks.learning --rewrite docs/learning.md   no training: the page's marked table, in place
    python -m benchmarks.learning --steps 250 --results short.json   another budget, into a file of its own

A run is one process `python -m models.train` on one core, on the embedded data set as it is drawn by default. Its score
and its processor time go into the results file as soon as it has ended; started again, the program goes on behind the
last of them. The file belongs to one commit and one budget, and holds whatever came out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.conftest import processor
from benchmarks.report import markdown
from models.data import ShapesSettings
from models.files import atomic_write

STORED = Path(__file__).parent / "learning.json"
ROOT = Path(__file__).parent.parent
SEEDS = 0, 1, 2
STEPS = 1500
BATCH = 4
"""Images in a step: with 1,500 steps, each of the 2,000 training pictures is seen three times."""
STEPS_PER_EPOCH = ShapesSettings.train // BATCH


def budget(steps: int) -> list[str]:
    """What all rows share, beside the preset `small`: pyramids and heads of half its width, so that a run takes five
    minutes; a rise over the first tenth of the steps, a tenth of the rate after 80 % and 95 % of them."""
    falls = ",".join(f"{share * steps / STEPS_PER_EPOCH:g}" for share in (0.8, 0.95))
    return [
        f"--batch-size={BATCH}",
        f"--epochs={-(-steps // STEPS_PER_EPOCH)}",
        f"--max-iterations={steps}",
        f"--warmup-iterations={steps // 10}",
        f"--decay-epochs={falls}",
        "--evaluate-every=0",
        "--detector.channels=32",
        "--detector.box-channels=128",
    ]


_PAIR = ["--arch=mask_rcnn", "--detector.backbone.layers=2,2,2,2"]
ROWS = {
    "Mask R-CNN": ["--arch=mask_rcnn"],
    "Cascade Mask R-CNN": ["--arch=cascade_mask_rcnn"],
    "HTC, without semantics": ["--arch=htc", "--semantic=no"],
    "HTC": ["--arch=htc", "--semantic=yes"],
    "SCNet, without semantics": ["--arch=scnet", "--semantic=no"],
    "SCNet": ["--arch=scnet", "--semantic=yes"],
    "Mask R-CNN, plain bottlenecks": [*_PAIR, "--detector.backbone.block=bottleneck"],
    "Mask R-CNN, self-calibrated bottlenecks": [
        *_PAIR,
        "--detector.backbone.block=self_calibrated",
        "--detector.backbone.base-width=32",
    ],
}
"""Options of each row. Backbones: resnet18_narrow; in the last two rows, bottlenecks of its depth and width."""


def train_all(path: Path, train: Callable[[list[str]], dict], steps: int = STEPS, at_once: int = 1) -> None:
    """Trains every row with every seed that the results file `path` does not have.

    Args:
        path: created if it is missing.
        train: options of models.train -> what is kept of the run.
        steps: of each run.
        at_once: runs at a time, each on a core.

    Raises:
        SystemExit: the tree has changes that are not committed, or the file is of another commit or budget.
    """
    commit = _git("describe", "--always")
    if _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{STORED.relative_to(ROOT)}"):
        raise SystemExit("learning: commit first, so that the results name what was measured")
    facts = {
        "commit": commit,
        "torch": torch.__version__,
        "processor": processor(),
        "month": datetime.now(timezone.utc).strftime("%Y-%m"),
        "steps": steps,
        "batch_size": BATCH,
        "budget": budget(steps),
        "rows": ROWS,
    }
    document = json.loads(path.read_text()) if path.exists() else facts | {"runs": []}
    if other := [name for name in facts if name != "month" and document[name] != facts[name]]:
        raise SystemExit(f"learning: {path} is of another {', '.join(other)}; move it away to start anew")
    done = {(run["row"], run["seed"]) for run in document["runs"]}
    # Seed by seed, so that what there is after an interruption has as many runs of each row.
    missing = [(row, seed) for seed in SEEDS for row in ROWS if (row, seed) not in done]
    with ThreadPoolExecutor(at_once) as pool:
        runs = {
            pool.submit(train, [*ROWS[row], *budget(steps), f"--seed={seed}"]): (row, seed) for row, seed in missing
        }
        try:
            for ended in as_completed(runs):
                (row, seed), run = runs[ended], ended.result()
                document["runs"].append({"row": row, "seed": seed} | run)
                with atomic_write(path, "w") as file:
                    json.dump(document, file, indent=1)
                print(f"{row}, seed {seed}: box AP {run['box_ap']:.3f}, mask AP {run['mask_ap']:.3f}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C those that have not begun


def train_once(options: list[str]) -> dict:
    """One run in a process of its own: {"box_ap", "mask_ap", "loss" (the last one logged), "images" (of the
    evaluation), "seconds" (clock), "cpu_seconds", "millions" (of parameters)}."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "models.train", *options, f"--output={folder}"]
        start = time.monotonic()
        with open(Path(folder) / "log.txt", "w+") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)  # its own time, beside other runs
            log.seek(0)
            shown = log.read()
        if status != 0:
            raise SystemExit(f"learning: {' '.join(command)} ended:\n{shown[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    (score,) = (line for line in lines if "images" in line)
    return {
        "box_ap": score["box_ap"],
        "mask_ap": score["mask_ap"],
        "loss": lines[-2]["loss"],
        "images": score["images"],
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "millions": float(re.search(r"([\d.]+) M parameters", shown)[1]),
    }


def table(document: dict) -> str:
    """Of each row the mean over its runs and the lowest and highest; the best mean of a column is bold, among the rows
    that were trained with every seed. A row that was not says so."""
    runs = {row: [run for run in document["runs"] if run["row"] == row] for row in document["rows"]}
    whole = [found for found in runs.values() if len(found) == len(SEEDS)]
    best = {name: max((_mean(found, name) for found in whole), default=None) for name in ("box_ap", "mask_ap")}
    lines = []
    for row, found in runs.items():
        if not found:
            lines.append([row, f"0 of {len(SEEDS)}", *[""] * 6])
            continue
        count = str(len(found)) if len(found) == len(SEEDS) else f"{len(found)} of {len(SEEDS)}"
        cells = [row, count, f"{found[0]['millions']:.1f} M"]
        for name in best:
            mean, values = _mean(found, name), [run[name] for run in found]
            text = f"**{mean:.3f}**" if len(found) == len(SEEDS) and mean == best[name] else f"{mean:.3f}"
            cells += [text, f"{min(values):.3f} to {max(values):.3f}"]
        lines.append([*cells, f"{_mean(found, 'cpu_seconds'):.0f} s"])
    spread = "lowest to highest"
    header = ["detector", "runs", "parameters", "box AP: mean", spread, "mask AP: mean", spread, "time of a core"]
    about = (
        f"{document['steps']} steps of {document['batch_size']} images, seeds {', '.join(map(str, SEEDS))}; AP on "
        f"{document['runs'][0]['images']} validation images. {document['processor']}, one core a run; "
        f"torch {document['torch']}; commit {document['commit']}; {document['month']}."
    )
    return f"{about}\n\n{markdown(header, lines)}"


def _mean(runs: list[dict], name: str) -> float:
    return sum(run[name] for run in runs) / len(runs)


SECTION = re.compile(r"(<!-- learning: table -->\n).*?(<!-- /learning -->)", re.DOTALL)


def rewritten(text: str, document: dict) -> str:
    """`text` with its marked table made anew. SystemExit if it has no marks."""
    if not SECTION.search(text):
        raise SystemExit("learning: no section between <!-- learning: table --> and <!-- /learning -->")
    return SECTION.sub(lambda match: f"{match[1]}\n{table(document)}\n\n{match[2]}", text)


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=STORED, metavar="FILE.json")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time, each on a core")
    parser.add_argument("--rewrite", type=Path, metavar="FILE.md", help="a page with marks; nothing is trained")
    options = parser.parse_args(arguments)
    if options.rewrite:
        text = rewritten(options.rewrite.read_text(), json.loads(options.results.read_text()))
        options.rewrite.write_text(text)
    else:
        train_all(options.results, train_once, options.steps, options.at_once)


if __name__ == "__main__":
    main()
