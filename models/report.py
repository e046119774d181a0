"""Writes a page about a training run: python -m models.report runs/scnet-small"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from .command_line import run
from .errors import printable
from .files import atomic_write

EXAMPLES = (
    "{program} runs/scnet-small",
    "{program} runs/scnet-small --versus runs/htc-small --output htc.html",
    "{program} runs/mine --data my-coco        the data have moved since",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes one HTML page about a training run; it needs no network and no other file.

    Curves, AP by class and size, kinds of error and what each costs, confusion of classes, the best and the worst
    images, time and memory, settings. The run may still be going, or have been interrupted; what is not there yet is
    named in the page.
    """

    folder: Positional[Path]
    """The run: the --output of models.train."""
    versus: Path | None = None
    """Another run, to be set beside it: curves in one chart, differences, settings that differ."""
    output: Path | None = None
    """The file to write. Default: report.html in the run's folder; with --versus report-versus-NAME.html."""
    data: Path | None = None
    """The data set's folder, if it is no longer where the run found it."""


def main(options: Report) -> None:
    from rich.console import Console

    from .report_page import report_page
    from .report_study import Subject, study_run
    from .run_record import read_run

    folders = [options.folder] if options.versus is None else [options.folder, options.versus]
    runs = [read_run(folder) for folder in folders]
    names = [one.name for one in runs]
    if len(set(names)) < len(names):  # folders of one name in different places
        names = [str(folder) for folder in folders]
    if options.versus is None:
        output = options.output or options.folder / "report.html"
    else:
        output = options.output or options.folder / f"report-versus-{runs[1].name}.html"
    subjects = [Subject(one, study_run(one, options.data), name) for one, name in zip(runs, names, strict=True)]
    text = report_page(subjects)
    with atomic_write(output, "w") as file:
        file.write(text)
    console = Console(highlight=False)
    for subject in subjects:
        if isinstance(subject.study, str):
            console.print(f"{printable(subject.name)}: {subject.study}", markup=False, soft_wrap=True)
    size = f"{len(text.encode()) / 2**20:.1f} MiB"
    console.print(f"report: {printable(str(output))} ({size})", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(Report, main, examples=EXAMPLES)
