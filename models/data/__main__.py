"""Writes the generated data set: `python -m models.data --out DIR`; checks any: `check DIR`. Drawing needs no torch."""

import sys
from dataclasses import dataclass
from pathlib import Path

from ..command_line import run
from .shapes import ShapesSettings, default_dataset, write_dataset

EXAMPLES = (
    "{program}                     # the default data set, into the cache",
    "{program} --out shapes        # ... into the folder shapes",
    "{program} --out big --train 20000 --val 2000 --size 480 640 --seed 1",
    "{program} check my-coco      # what is wrong with a data set (check --help)",
)


@dataclass(frozen=True)
class Data:
    """Draws a data set of shapes and writes it as a folder in COCO's layout.

    Pictures of eight kinds of things that hide one another on four materials, with masks (annotations/), maps of the
    materials (stuffthingmaps/) and contact_sheet.png to look at. The same options write the same files. For 2300
    pictures of 160 x 192 it takes less than a minute.
    """

    out: Path | None = None
    """Folder to write; it must be new or empty. Default: in the cache, where training looks for it."""
    train: int = ShapesSettings.train
    """Pictures to train on."""
    val: int = ShapesSettings.val
    """Pictures to evaluate on."""
    size: tuple[int, int] = ShapesSettings.size
    """SHORT LONG side of a picture in pixels; half of them stand upright."""
    seed: int = ShapesSettings.seed
    """Another seed draws other pictures."""
    workers: int | None = None
    """Processes that draw. Default: one for each processor."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        self.settings()

    def settings(self) -> ShapesSettings:
        return ShapesSettings(self.train, self.val, self.size, self.seed)


def main(options: Data) -> None:
    if options.out is None:
        folder = default_dataset(options.settings(), workers=options.workers)
    else:
        folder = options.out
        write_dataset(folder, options.settings(), workers=options.workers)
    print(f"data set:       {folder}\ncontact sheet:  {folder / 'contact_sheet.png'}")
    print(f"train on it:    python -m models.train --data '{folder}'")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        from . import check_program

        examples = [line.replace("{program}", "{program} check") for line in check_program.EXAMPLES]
        run(check_program.Check, check_program.main, examples=examples, arguments=sys.argv[2:])
    run(Data, main, examples=EXAMPLES)
