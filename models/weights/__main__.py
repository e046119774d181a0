"""Lists published weights files and fetches those that are named: `python -m models.weights scnet_r50_fpn_1x_coco`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from ..command_line import program_name, run
from .download import cache_folder, cached, fetch
from .published import PUBLISHED, Published, find

EXAMPLES = (
    "{program}                                   lists them",
    "{program} scnet_r50_fpn_1x_coco",
    "{program} resnet50 res2net50_26w_4s --folder pretrained",
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Fetches weights that other projects published; without a NAME, lists them.

    A broken download goes on where it stopped. The SHA-256 is checked. CASCADEOPS_CACHE names another cache folder;
    CASCADEOPS_OFFLINE=1 forbids the network.
    """

    names: Positional[tuple[str, ...]] = ()
    """Published files, by name."""
    folder: Path | None = None
    """Where to put them. Default: the cache folder."""


def main(options: Weights) -> None:
    console = Console(highlight=False)
    folder = options.folder or cache_folder()
    if not options.names:
        _list(console, folder)
        return
    for file in [find(name) for name in options.names]:
        console.print(f"{file.name}: licence {file.licence}", soft_wrap=True, markup=False)
        path = fetch(file, options.folder)
        console.print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True, markup=False)
        if file.purpose.startswith("detector"):
            line = f"  python -m models.convert {path} --output {file.name}.safetensors"
            console.print(line, soft_wrap=True, markup=False)


def _list(console: Console, folder: Path) -> None:
    rows = [("name", "for", "MiB", "SHA-256", "licence")]
    for file in PUBLISHED:
        rows.append((file.name, file.purpose, _size(file, folder), f"{file.sha256_prefix}...", file.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # no rich table: its cells would be cut where the output is a pipe
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(text.rstrip(), soft_wrap=True, markup=False)
    lines = (
        f"{program_name()} NAME   fetches one into {folder}; a size is known once a file is there",
        "The addresses are those of the projects' documentation; none has been tried from here.",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _size(file: Published, folder: Path) -> str:
    path = cached(file, folder)
    return "unknown" if path is None else f"{path.stat().st_size / 2**20:.1f}"


if __name__ == "__main__":
    run(Weights, main, examples=EXAMPLES)
