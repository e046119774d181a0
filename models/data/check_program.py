"""Program: python -m models.data check DIR"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..errors import DataError, printable
from ..files import atomic_write

EXAMPLES = (
    "{program} my-coco                         what is wrong with it, as a table",
    "{program} my-coco --page check.html       and with pictures",
    "{program} my-coco --fix mended            and a copy in which it is mended",
    "{program} VOCdevkit/VOC2012 --split train val",
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Looks through a data set in COCO's or VOC's layout: images and annotations, all that training would stumble over.

    Ends with 0 if nothing is wrong, or nothing that keeps training from using it; with 3 otherwise. With --fix it ends
    with 0 once the mended copy is written.
    """

    folder: Positional[Path]
    """The data set."""
    split: tuple[str, ...] = ()
    """Which splits to look at: train, val2017 ... Default: all that there are."""
    page: Path | None = None
    """HTML page to write: the table, and pictures of the first of each kind."""
    fix: Path | None = None
    """New folder for a mended copy; changes.json in it lists every change. Images are hard links where the disk has
    them. The data set itself is not touched."""
    quick: bool = False
    """Read only the headers of images: quick, but truncated images and duplicates go unseen."""
    workers: int = 2
    """Processes that read images."""


def main(options: Check) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .check import check_dataset
    from .check_page import check_page
    from .findings import KINDS

    findings, folders = check_dataset(options.folder, options.split, options.fix, options.quick, options.workers)
    console = Console(highlight=False)
    if not findings.all:
        console.print(f"nothing is wrong with {options.folder}", markup=False, soft_wrap=True)
    else:
        table = Table("what", "how many", "in training", "the first", box=None, padding=(0, 2), pad_edge=False)
        table.columns[1].justify = "right"
        for kind, count in findings.counts.most_common():
            first = findings.examples[kind][0][0]
            where = f"{first.split}/{first.image}" + ("" if first.annotation is None else f" #{first.annotation}")
            table.add_row(kind, f"{count:,}", KINDS[kind], Text(printable(f"{where}: {first.detail}")))
        console.print(table)
    if options.page is not None:
        with atomic_write(options.page, "w") as file:
            file.write(check_page(findings, options.folder, folders))
        console.print(f"page:         {options.page}", markup=False, soft_wrap=True)
    if options.fix is not None:
        console.print(f"mended copy:  {options.fix} (changes.json: {len(findings.all)})", markup=False, soft_wrap=True)
    elif findings.serious:
        raise DataError(
            "the data set has faults that stop training, or are left out of it",
            where=options.folder,
            fix=f"python -m models.data check {options.folder} --fix {options.folder}-mended",
        )
