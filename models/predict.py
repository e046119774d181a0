"""Finds objects in images, from the command line: `python -m models.predict street.jpg --weights W.safetensors`.

This module is the program only. The function `models.predict` lives in models/inference.py; what runs here is
`models.Predictor`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from .command_line import print_error, program_name, run
from .errors import DataError, UsageError
from .files import make_folder, write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .distributed import World
    from .predictor import Predictor
    from .results import Result
    from .watchdog import Watchdog

EXAMPLES = (
    "{program}                                              the packaged sample picture and tiny detector, to try it",
    "{program} street.jpg --weights runs/scnet/weights.safetensors",
    "{program} holiday/ more/*.png --weights W --output found --score-threshold 0.5",
    "{program} large.jpg --weights W --resize 800 1333 --device cuda",
    "{program} street.jpg --weights W --tta --tta-scales 600 900 800 1200",
    "torchrun --nproc-per-node=8 -m models.predict holiday/ --weights W   several processes share the images",
)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Finds objects in images: draws them, and writes them as COCO results.

    For each IMAGE the output folder gets NAME_detections.jpg; for all together detections.bbox.json and
    detections.segm.json (COCO results) with images.json, which tells the image ids and the categories.
    """

    images: Positional[tuple[Path, ...]] = ()
    """JPEG, PNG, WebP or BMP files, or folders of them."""
    weights: Path | None = None
    """A weights file that models.train wrote (.safetensors). Without images and weights: the packaged ones."""
    output: Path = Path("runs/predict")
    """Folder for pictures and results; made if it is not there."""
    score_threshold: float = 0.3
    """Objects below this score are not drawn and not listed; the result files hold all."""
    resize: tuple[int, int] | None = None
    """SHORT LONG: the largest size within these limits in pixels. Default: as the weights were trained."""
    tta: bool = False
    """Test-time augmentation (HTC, SCNet): every image in several sizes, plain and mirrored, and the mean of the
    answers. Better and slower; see docs/tta.md."""
    tta_scales: tuple[tuple[int, int], ...] = ()
    """SHORT LONG SHORT LONG ...: the sizes for --tta, each the largest within these limits in pixels. Default: 600 900
    800 1200 1000 1500 1200 1800 1400 2100."""
    tta_flip: bool = True
    """With --tta: each size mirrored, too."""
    batch_size: int = 4
    """Images that go through the detector together; those of one size do (with --tta: one by one)."""
    half: bool = False
    """Compute in 16 bits: bfloat16 where the hardware does, else float16 on a GPU; other CPUs stay in float32."""
    tf32: bool = False
    """On an NVIDIA GPU: linear layers, too, in TF32 (convolutions are, by PyTorch's default)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1; auto takes a GPU where there is one."""
    rank_timeout: float = 600.0
    """Several processes: seconds without progress of one after which the job ends, naming it."""

    def __post_init__(self):
        if not 0 < self.rank_timeout < math.inf:
            raise ValueError(f"rank_timeout must be above 0 seconds and finite, got {self.rank_timeout}")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {self.score_threshold}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.resize is not None and not 1 <= self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize must be SHORT LONG with 1 <= SHORT <= LONG, got {self.resize}")


def main(options: Predict) -> None:
    if options.weights is None and options.images:
        raise UsageError("a required option is missing", where="--weights", fix=f"{program_name()} IMAGE --weights W")
    if options.weights is not None and not options.images:
        raise UsageError("no image is named", fix=f"{program_name()} street.jpg --weights {options.weights}")

    # imported here, so that --help and a mistyped option answer at once
    from .images import image_files
    from .sources import is_video

    if options.images:
        paths = list(image_files(options.images))
        if clips := [path for path in paths if is_video(path)]:
            fix = f'in Python: for result in models.Predictor("{options.weights}").stream("{clips[0]}"): ...'
            raise UsageError("this program takes pictures, and no videos", where=clips[0], fix=fix)
    else:
        from .predictor import SAMPLE_PICTURE

        paths = [SAMPLE_PICTURE]

    from .distributed import own_device, world_from_environment
    from .watchdog import watched

    world = world_from_environment()
    device = own_device(options.device, world)
    timeout = options.rank_timeout if world.size > 1 else math.inf
    with watched(world, device, timeout) as watchdog:
        _predict(options, paths, world, device, watchdog)


def _predict(options: Predict, paths: Sequence[Path], world: World, device: torch.device, watchdog: Watchdog) -> None:
    from rich.console import Console

    from .coco_evaluation import result_entries
    from .devices import allow_tf32
    from .distributed import gather, on_main
    from .predictor import Predictor
    from .tta import chosen_views

    folder = Path(on_main(lambda: make_folder(options.output)))
    console = Console(highlight=False)
    if not options.images and world.main:
        console.print("no image is named: the packaged detector, which knows drawn shapes, on its sample picture")
    views = chosen_views(options.tta, options.tta_scales, options.tta_flip, options.resize)
    if views is not None:
        console.print(str(views), soft_wrap=True, markup=False)
    if options.tf32:
        allow_tf32()
    predictor = Predictor(
        options.weights,
        device=str(device),
        half=options.half,
        resize=options.resize or "trained",
        tta=views,
        batch_size=options.batch_size,
    )

    found: list[dict] = []
    faults: list[DataError] = []

    def leave_out(fault: DataError) -> None:
        faults.append(fault)
        print_error(fault)

    pictures = picture_names(paths)
    place = {path: index for index, path in enumerate(paths)}
    own = paths[world.rank :: world.size]
    watchdog.note(0, "detecting")
    for result in predictor.stream(own, on_error=leave_out if len(paths) > 1 else None) if own else ():
        height, width = result.image_size
        record = {"file_name": result.source, "height": height, "width": width}
        objects = (result.boxes.numpy(), result.scores.numpy(), result.labels.numpy(), result.masks)
        entries = result_entries(0, *objects, predictor.category_ids)
        found.append({"place": place[Path(result.source)], "record": record, "entries": entries})
        picture = folder / pictures[Path(result.source)]
        result.save(picture, score_threshold=options.score_threshold)
        console.print(result.summary(options.score_threshold), soft_wrap=True, markup=False)
        shown = result[result.scores >= options.score_threshold]
        if len(paths) <= 3 and len(shown):
            console.print(_table(shown))
        console.print(f"  picture: {picture}", soft_wrap=True, markup=False)
        watchdog.note(len(found), "detecting")
    watchdog.note(len(found), "waiting")
    shares = gather({"found": found, "faults": [fault.where for fault in faults]})
    if shares is not None:  # the main process has them
        _write(folder, predictor, paths, shares, console)


def _write(folder: Path, predictor: Predictor, paths: Sequence[Path], shares: list[dict], console: Console) -> None:
    """The result files, of what all processes have found, in the order of `paths`."""
    from .coco_evaluation import write_results

    entries: dict[str, list[dict]] = {"bbox": []}
    records: list[dict] = []
    for one in sorted((one for share in shares for one in share["found"]), key=lambda one: one["place"]):
        records.append({"id": len(records) + 1} | one["record"])
        for kind, new in one["entries"].items():
            entries.setdefault(kind, []).extend(entry | {"image_id": records[-1]["id"]} for entry in new)
    files = write_results(folder, entries)
    names = zip(predictor.category_ids, predictor.class_names, strict=True)
    categories = [{"id": key, "name": name} for key, name in names]
    write_json(folder / "images.json", {"images": records, "categories": categories, "annotations": []})
    where = f"results: {', '.join(map(str, files))} (COCO results; ids: {folder / 'images.json'})"
    console.print(where, soft_wrap=True, markup=False)
    faults = [where for share in shares for where in share["faults"]]
    if faults:
        raise DataError(
            f"{len(faults)} of {len(paths)} images could not be read; the others are done",
            where="\n".join(faults[:10]) + ("\n..." if len(faults) > 10 else ""),
        )


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for the picture of each image; images of one stem (a/1.jpg, b/1.png) are numbered."""
    names, taken = {}, set()
    for path in dict.fromkeys(paths):
        stems = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
        stem = next(stem for stem in stems if stem not in taken)
        taken.add(stem)
        names[path] = f"{stem}_detections.jpg"
    return names


def _table(result: Result):
    from rich.table import Table

    table = Table("object", "score", "x1", "y1", "x2", "y2", box=None, padding=(0, 2), pad_edge=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for box, score, name in zip(result.boxes.tolist(), result.scores.tolist(), result.names, strict=True):
        table.add_row(name, f"{score:.3f}", *(f"{x:.1f}" for x in box))
    return table


if __name__ == "__main__":
    run(Predict, main, examples=EXAMPLES)
