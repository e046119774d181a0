"""What became faster or slower between two runs of the benchmarks on one machine, as far as it is more than noise.

    python -m benchmarks.compare OLD.json NEW.json          changes beyond noise, what is missing, what is new
    python -m benchmarks.compare OLD.json NEW.json --all    every benchmark

Files are those that `pytest benchmarks/ --benchmark-only --benchmark-json=FILE` writes. A change counts when the
medians differ by more than half the spread of the rounds of both runs (the interquartile ranges) and the drift of the
machine together. The drift is what the two runs say of code that did not change between them: the third quartile of the
changes of all other implementations (torchvision's, the references). A benchmark of a single round has no spread, and
is listed without a verdict. The exit status is 0, or 1 if one of our implementations became slower, or 2 for files that
cannot be compared.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import OURS, Run, Timing, duration, load

Key = tuple[str, str, str, str]
"""device, operator, workload, implementation"""

FEWEST_FOR_DRIFT = 8
"""With fewer other implementations in both files the drift is unknown, and taken as 0."""


@dataclass(frozen=True)
class Change:
    key: Key
    old: Timing
    new: Timing
    drift: float

    @property
    def ours(self) -> bool:
        return self.key[-1].startswith(OURS)

    @property
    def relative(self) -> float:
        """0.1: takes a tenth longer."""
        return self.new.median / self.old.median - 1

    @property
    def noise(self) -> float:
        return spread(self.old, self.new) + self.drift

    @property
    def verdict(self) -> str:
        if min(self.old.rounds, self.new.rounds) == 1:
            return "one round"
        if abs(self.relative) <= self.noise:
            return "noise"
        return "SLOWER" if self.relative > 0 else "faster"


def spread(*timings: Timing) -> float:
    """The half interquartile ranges of the rounds, each as a share of its median, added."""
    return sum(timing.iqr / timing.median / 2 for timing in timings)


def timings(runs: list[Run]) -> dict[Key, Timing]:
    return {
        (run.device, workload.operator, workload.name, implementation): timing
        for run in runs
        for workload in run.workloads
        for implementation, timing in workload.timings.items()
    }


def compared(old: dict[Key, Timing], new: dict[Key, Timing]) -> list[Change]:
    """The benchmarks of both, in the order of the new file; the drift is the device's."""
    both = [Change(key, old[key], timing, 0.0) for key, timing in new.items() if key in old]
    drifts = {}
    for device in {change.key[0] for change in both}:
        others = [abs(c.relative) for c in both if c.key[0] == device and not c.ours and c.verdict != "one round"]
        drifts[device] = statistics.quantiles(others)[2] if len(others) >= FEWEST_FOR_DRIFT else 0.0
    return [Change(c.key, c.old, c.new, drifts[c.key[0]]) for c in both]


def check_same_machine(old: list[Run], new: list[Run]) -> None:
    """Raises ValueError where processor, threads or GPU differ: times would say nothing of the code."""
    for name in ("processor", "threads", "gpu"):
        facts = [runs[0].facts.get(name) for runs in (old, new)]
        if facts[0] != facts[1]:
            raise ValueError(f"not the same machine: {name} is {facts[0]} in {old[0].source}, {facts[1]} in the other")


def table(changes: list[Change]) -> list[str]:
    rows = [["device", "benchmark", "implementation", "old", "new", "change", "noise", ""]]
    for change in changes:
        device, operator, workload, implementation = change.key
        benchmark = f"{operator}, {workload}" if workload else operator
        times = duration(change.old), duration(change.new)
        shares = f"{change.relative:+.1%}", f"{change.noise:.1%}"
        rows.append([device, benchmark, implementation, *times, *shares, change.verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Names to the left, numbers to the right.
    sides = "<<<>>>><"
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def report(old: list[Run], new: list[Run], everything: bool) -> tuple[str, bool]:
    """The text, and whether one of our implementations became slower."""
    before, after = timings(old), timings(new)
    changes = compared(before, after)
    lines = [f"{name}  {runs[0].source}  {runs[0].conditions}" for name, runs in (("old", old), ("new", new))]
    for device, drift in sorted({(change.key[0], change.drift) for change in changes}):
        lines.append(f"drift of the machine ({device}), from code that did not change: {drift:.1%}")
    shown = [change for change in changes if everything or (change.ours and change.verdict in ("SLOWER", "faster"))]
    shown.sort(key=lambda change: -change.relative)
    if shown:
        lines += ["", *table(shown)]
    for title, keys in (("missing", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        lines += ["", f"{title}:"] + ["  " + ", ".join(key) for key in sorted(keys)] if keys else []
    counts = {verdict: 0 for verdict in ("SLOWER", "faster", "noise", "one round")}
    for change in changes:
        counts[change.verdict] += change.ours
    lines += ["", "of ours: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]
    return "\n".join(lines), counts["SLOWER"] > 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--all", action="store_true", help="show every benchmark, other implementations included")
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
        check_same_machine(old, new)
    except ValueError as error:
        parser.error(str(error))
    text, slower = report(old, new, options.all)
    print(text)
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
