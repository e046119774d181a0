"""What a long run shows and keeps: progress with the time left, metrics.jsonl, TensorBoard where it is installed."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

from .files import atomic_write, explained


class Progress:
    """Progress of `total` steps: a bar on a terminal; elsewhere (a file, a pipe, Slurm) one plain line now and then.

        with Progress("train", total=1250) as progress:
            progress.advance(20, epoch="1/5", loss=6.17, details="class 1.2  box 0.8")
            with Progress("evaluate", total=300, unit="images", inside=progress) as part:
                part.advance(8, speed="21.3 images/s")

    Args:
        title: shown first.
        total: how many steps there are in all; `done` of them are behind us already (a resumed run).
        every_seconds: how often a plain line is printed; the last step always is.
        console: where to; standard output by default.
        inside: a longer progress that this is a part of: its bar stays, and this one stands below until it ends.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "steps",
        done: int = 0,
        every_seconds: float = 10.0,
        console: Console | None = None,
        inside: "Progress | None" = None,
    ):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._start, self._every = done, time.monotonic(), every_seconds
        self._console = inside._console if inside else console or Console(highlight=False)
        self._last_line = self._start
        self._bar = self._task = None
        if self._console.is_terminal:
            self._bar = inside._bar if inside else _Bar(console=self._console)
            self._own_bar = inside is None
            fields = {"unit": unit, "epoch": "", "facts": "", "details": "", "end": None}
            self._task = self._bar.add_task(title, total=total, completed=done, **fields)

    def __enter__(self) -> "Progress":
        if self._bar is not None and self._own_bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            if self._own_bar:
                self._bar.stop()
            else:
                self._bar.remove_task(self._task)

    def advance(self, steps: int = 1, epoch: str = "", details: str = "", **facts: object) -> None:
        """`steps` more are done.

        Args:
            epoch: "1/5", shown behind the title.
            details: more than fits beside the bar: a line below it; in plain lines the last of all.
            facts: shown behind the time left: numbers to four digits with their names, words as they are.
        """
        was_complete = self.done >= self.total
        self.done = min(self.done + steps, self.total)  # of processes that share the work, each knows its own
        text = "  ".join(_fact(name, value) for name, value in facts.items())
        now = time.monotonic()
        left = (now - self._start) / max(self.done - self._first, 1) * (self.total - self.done)
        if self._bar is not None:
            known = {"epoch": epoch and f"epoch {epoch}", "facts": text, "details": details, "end": now + left}
            self._bar.update(self._task, completed=self.done, **known)
        elif now - self._last_line >= self._every or (self.done == self.total and not was_complete):
            self._last_line = now
            title = f"{self.title}  epoch {epoch}" if epoch else self.title
            line = (
                f"{title}  {self.done}/{self.total} {self.unit}  {_clock(now - self._start)} gone, {_clock(left)} left"
            )
            self._console.print("  ".join(filter(None, (line, text, details))), soft_wrap=True, markup=False)

    def print(self, text: object) -> None:
        """A line (or a rich table) above the bar."""
        self._console.print(text, soft_wrap=isinstance(text, str), markup=False)


class _Bar(bars.Progress):
    """Rows of bars, and below them the details of the first."""

    def __init__(self, console: Console):
        super().__init__(
            bars.TextColumn("[bold]{task.description}"),
            bars.TextColumn("{task.fields[epoch]}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[unit]}"),
            _TimeLeft(),
            bars.TextColumn("{task.fields[facts]}", markup=False),
            console=console,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        details = self.tasks[0].fields["details"] if self.tasks else ""
        if details:
            yield Text(f"  {details}", style="dim")


class _TimeLeft(bars.ProgressColumn):
    """Counts down between two steps, which may be far apart."""

    def render(self, task: bars.Task) -> Text:
        end = task.fields["end"]
        if end is None:
            return Text("eta -:--", style="cyan")
        return Text(f"eta {_clock(max(0.0, end - time.monotonic()))}", style="cyan")


class MetricsLog:
    """Numbers by step: one JSON object a line in metrics.jsonl, and TensorBoard events where it is installed.

    Args:
        folder: of the run; made by the caller.
        resume_step: a run that continues behind this step: later lines, written before the interruption, are dropped,
            so that the file reads as if the run had never stopped. None starts an empty file.
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        self.path = Path(folder) / "metrics.jsonl"
        kept = [] if resume_step is None else _lines_up_to(self.path, resume_step)
        with atomic_write(self.path, "w") as file:
            file.writelines(kept)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (kept open for the whole run)
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line {"step": ..., "time": ..., **values}, which has left the process on return.

        The time is in seconds since 1970. NaN and infinity become null.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with explained(self.path):
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | finite, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            part = "evaluation/" if "images" in values else ""  # both have images_per_second
            for name, value in values.items():
                self._board.add_scalar(part + name, value, step)

    def sync(self) -> None:
        """Returns when all lines have reached the disk."""
        with explained(self.path):
            os.fsync(self._file.fileno())

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds an image, uint8 RGB [H, W, 3], to TensorBoard; metrics.jsonl has none."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def evaluations(path: Path) -> dict[int, float]:
    """The steps that a metrics file has an evaluation of, each with its AP: of masks, or else of boxes."""
    found = {}
    for _, values in metric_lines(path):
        if "images" in values:
            score = values.get("mask_ap", values.get("box_ap"))
            found[values["step"]] = score if isinstance(score, int | float) else 0.0
    return found


def best_step(path: Path) -> int | None:
    """The evaluated step of the highest AP, the earliest of equals; None if there is none."""
    scores = evaluations(path)
    return max(scores, key=scores.__getitem__, default=None)


def metric_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(line, its values) of a metrics file; a last line cut off by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            values = json.loads(line)
            if line.endswith("\n") and type(values["step"]) is int:  # not true or false
                yield line, values
        except (ValueError, KeyError, TypeError, RecursionError):
            continue


def _lines_up_to(path: Path, step: int) -> list[str]:
    return [line for line, values in metric_lines(path) if values["step"] <= step]


def _fact(name: str, value: object) -> str:
    return f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
