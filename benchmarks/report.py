"""Tables and plots of benchmark results, from the JSON that pytest-benchmark and benchmarks/conftest.py write.

    python -m benchmarks.report build/benchmarks.json                            the tables, as markdown
    python -m benchmarks.report benchmarks/results/*.json --output build/report  also tables.md and plots (PNG)
    python -m benchmarks.report benchmarks/results/*.json --rewrite README.md    the README's marked section, in place

A marked section lies between `<!-- benchmarks: summary -->` (or `tables`, `detectors`) and `<!-- /benchmarks -->`. No
number in it is typed by hand, and none is left out: where another implementation is faster, the cell says so.
"""

import argparse
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from models.published_rows import PUBLISHED_ROWS

OURS = "cascadeops"
NOISY = 0.2
"""A median is marked when the middle half of its rounds spreads over more than this share of it, or it is one round."""


@dataclass
class Timing:
    """One implementation on one workload."""

    median: float
    """seconds"""
    iqr: float
    """seconds: the spread of the middle half of the rounds"""
    rounds: int
    gb_per_second: float | None = None
    share_of_copy: float | None = None
    memory: int | None = None
    """bytes at the peak, where that was measured"""

    @property
    def noisy(self) -> bool:
        return self.iqr > NOISY * self.median or self.rounds == 1


@dataclass
class Workload:
    """The implementations that were timed side by side."""

    operator: str
    name: str
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def ours(self) -> Timing | None:
        return self.timings.get(OURS)

    @property
    def peers(self) -> dict[str, Timing]:
        return {name: timing for name, timing in self.timings.items() if not name.startswith(OURS)}

    @property
    def fastest_peer(self) -> str | None:
        return min(self.peers, key=lambda name: self.peers[name].median, default=None)

    @property
    def gain(self) -> float | None:
        """How many times the fastest peer's time is ours; below 1 it is a loss."""
        if self.ours is None or not self.peers:
            return None
        return self.peers[self.fastest_peer].median / self.ours.median


@dataclass
class Run:
    """What one machine's file says of one device."""

    source: Path
    device: str
    facts: dict
    month: str
    workloads: list[Workload]

    @property
    def title(self) -> str:
        if self.device == "cuda":
            return self.facts["gpu"]
        return f"{self.facts['processor']}, {self.facts['threads']} of them used"

    @property
    def conditions(self) -> str:
        peers = [f"{name} {version}" for name, version in self.facts["peers"].items() if version]
        bandwidth = self.facts[f"{self.device}_copy_gb_per_second"]
        libraries = ", ".join([f"torch {self.facts['torch']}", *peers])
        pages = "; pages of 2 MiB" if self.facts.get("large_pages") else ""
        return f"{libraries}{pages}; commit {self.facts['commit']}; {self.month}; a copy moves {bandwidth:.1f} GB/s."


def load(path: Path) -> list[Run]:
    """The runs of a file, one for each device; operators and workloads in the order they were timed.

    Raises:
        ValueError: names the file, which cannot be read, holds no benchmarks, or is not by `benchmarks/conftest.py`.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict) or "cascadeops" not in document.get("machine_info", {}):
        raise ValueError(f"{path}: not written by `pytest benchmarks/ --benchmark-only --benchmark-json=FILE`")
    if not document["benchmarks"]:
        raise ValueError(f"{path}: holds no benchmarks")
    devices = defaultdict(dict)
    for entry in document["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        key = info["operator"], info["workload"]
        workload = devices[info["device"]].setdefault(key, Workload(*key))
        workload.timings[info["implementation"]] = Timing(
            stats["median"],
            stats["iqr"],
            stats["rounds"],
            info.get("gb_per_second"),
            info.get("share_of_copy_bandwidth"),
            info.get("memory"),
        )
    facts, month = document["machine_info"]["cascadeops"], document["datetime"][:7]
    return [Run(path, device, facts, month, list(workloads.values())) for device, workloads in devices.items()]


# Tables


def tables(runs: list[Run]) -> str:
    """Every workload of every operator: a table for each operator, a column for each implementation."""
    parts = []
    for run in runs:
        parts.append(f"## {run.title}\n\n{run.conditions} File: `{run.source.name}`.")
        for operator in dict.fromkeys(workload.operator for workload in run.workloads):
            rows = [workload for workload in run.workloads if workload.operator == operator]
            parts.append(f"### {operator}\n\n{_operator_table(rows)}")
    return "\n\n".join(parts)


def _operator_table(rows: list[Workload]) -> str:
    names = dict.fromkeys(name for row in rows for name in row.timings)
    names = sorted(names, key=lambda name: (name != OURS, not name.startswith(OURS), name == "reference"))
    speeds = any(row.ours and row.ours.gb_per_second is not None for row in rows)
    header = ["workload", *names, *(["GB/s", "of a copy's"] if speeds else [])]
    lines = []
    for row in rows:
        cells = [row.name or "-", *(_cell(row, name) for name in names)]
        if speeds:
            known = row.ours and row.ours.gb_per_second is not None
            cells += [f"{row.ours.gb_per_second:.3g}", f"{row.ours.share_of_copy:.0%}"] if known else ["", ""]
        lines.append(cells)
    return markdown(header, lines)


def _cell(row: Workload, name: str) -> str:
    if name not in row.timings:
        return ""
    time = duration(row.timings[name])
    if row.timings[name].memory:
        time += f", {row.timings[name].memory / 2**20:,.0f} MiB"
    if name in row.peers and row.ours:
        return f"{time} ({ratio(row.timings[name].median / row.ours.median)})"
    return time


def summary(runs: list[Run]) -> str:
    """For every operator the workload where it gains least over its fastest peer, and the one where it gains most."""
    parts = []
    for run in runs:
        lines = []
        for operator in dict.fromkeys(workload.operator for workload in run.workloads):
            rows = [row for row in run.workloads if row.operator == operator and row.gain is not None]
            rows.sort(key=lambda row: row.gain)
            for row in rows[:1] + rows[1:][-1:]:
                peer = f"{row.fastest_peer} {duration(row.peers[row.fastest_peer])}"
                lines.append([f"`{operator}`", row.name, duration(row.ours), peer, ratio(row.gain)])
        header = ["operator", "workload", "CascadeOps", "fastest of the others", "ratio"]
        parts.append(f"{run.title}. {run.conditions}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def detectors(runs: list[Run]) -> str:
    """Memory and speed of the published detectors: as published, as predicted, and measured where that was done."""
    document = json.loads(PREDICTED.read_text())
    gpu, cpu = (next((run for run in reversed(runs) if run.device == device), None) for device in ("cuda", "cpu"))
    header = ["detector", "GiB: published", *(f"predicted, {variant}" for variant in VARIANTS), "GPU"]
    header += ["images/s: published", "GPU", "CPU: one image"]
    lines, seen = [], []
    for name, predicted in document["rows"].items():
        row = PUBLISHED_ROWS[name]
        if row.recipe.detector in seen:  # another schedule of the same detector
            continue
        seen.append(row.recipe.detector)
        step, image = _ours(gpu, "train", name), _ours(gpu, "detect", name)
        image_on_cpu = _ours(cpu, "detect to RLE", name)
        lines.append(
            [
                f"`{name}`",
                f"{row.memory_gb:.1f}",
                *(f"{predicted[variant]['peak'] / 2**30:.1f}" for variant in VARIANTS),
                f"{step.memory / 2**30:.1f}" if step and step.memory else NOT_MEASURED,
                f"{row.images_per_second:.1f}" if row.images_per_second else "-",
                f"{1 / image.median:.1f}" if image else NOT_MEASURED,
                duration(image_on_cpu) if image_on_cpu else "-",
            ]
        )
    machines = [f"{kind}: {run.title if run else NOT_MEASURED}" for kind, run in (("GPU", gpu), ("CPU", cpu))]
    return f"{ABOUT_DETECTORS.format(**document)} {'; '.join(machines)}.\n\n{markdown(header, lines)}"


NOT_MEASURED = "not measured"
PREDICTED = Path(__file__).parent / "predicted_memory.json"
VARIANTS = "float32", "bfloat16", "bfloat16, recomputing"
ABOUT_DETECTORS = """\
Published: V100, float32. GiB: peak of a training step of 2 images of 800 x 1333 (published for HTC's ResNeXt: 1 image).
**Predicted is not measured**: it is computed from tensors without data (`python -m benchmarks.memory_prediction`, torch
{torch}); recomputing: `--checkpoint-activations`. Images/s: network and post-processing, batch 1. One image on the CPU:
float32, to run lengths on the host."""


def _ours(run: Run | None, operator: str, name: str) -> Timing | None:
    """Ours in float32, if it was timed."""
    workloads = run.workloads if run else []
    return next((row.ours for row in workloads if (row.operator, row.name) == (operator, name)), None)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def duration(timing: Timing) -> str:
    """Three significant digits and a unit; ~ before a median whose rounds spread widely."""
    value, unit = next((timing.median / size, unit) for size, unit in UNITS if timing.median >= size or unit == "ns")
    return f"{'~' if timing.noisy else ''}{_three_digits(value)} {unit}"


UNITS = [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")]


def ratio(value: float) -> str:
    """12.3x, say; a loss is bold and says that it is one."""
    text = f"{value:.2f}x" if value < 10 else f"{_three_digits(value)}x"
    return text if value >= 1 else f"**{text}: a loss**"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


# Files


SECTION = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
CONTENT = {"summary": summary, "tables": tables, "detectors": detectors}
NOTHING = "No results are stored yet."


def rewritten(text: str, runs: list[Run]) -> str:
    """`text` with its marked sections made anew."""
    return SECTION.sub(lambda match: f"{match[1]}\n{CONTENT[match[2]](runs) or NOTHING}\n\n{match[3]}", text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON of pytest-benchmark", metavar="FILE.json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write tables.md and a PNG for each file and device")
    parser.add_argument("--rewrite", type=Path, nargs="+", default=[], metavar="FILE.md", help="files with marks")
    options = parser.parse_args(arguments)
    try:
        runs = [run for file in options.files for run in load(file)]
    except ValueError as error:
        parser.error(str(error))
    for path in options.rewrite:
        text = path.read_text()
        if not SECTION.search(text):
            raise SystemExit(f"{path}: has no section between <!-- benchmarks: ... --> and <!-- /benchmarks -->")
        path.write_text(rewritten(text, runs))
    if options.output:
        from benchmarks.plot import draw  # Pillow, which the tables do not need

        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "tables.md").write_text(tables(runs) + "\n")
        for run in runs:
            draw(run, options.output / f"{run.source.stem}_{run.device}.png")
    if not options.rewrite:
        print(tables(runs))
    if options.output:
        print(f"\nThe same, and plots: {options.output}")


if __name__ == "__main__":
    main()
