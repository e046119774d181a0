"""Finds objects in images, from the command line: `python -m models.predict street.jpg --weights W.safetensors`.

This module is the program only. The function `models.predict` lives in models/inference.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from .command_line import print_error, program_name, run
from .errors import DataError, UsageError
from .files import make_folder, write_json

if TYPE_CHECKING:
    import numpy as np

EXAMPLES = (
    "{program} street.jpg --weights runs/scnet/weights.safetensors",
    "{program} holiday/ more/*.png --weights W --output found --score-threshold 0.5",
    "{program} large.jpg --weights W --resize 800 1333 --device cuda",
    "{program} street.jpg --weights W --tta --tta-scales 600 900 800 1200",
)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Finds objects in images: draws them, and writes them as COCO results.

    For each IMAGE the output folder gets NAME_detections.jpg; for all together detections.bbox.json and
    detections.segm.json (COCO results) with images.json, which tells the image ids and the categories.
    """

    images: Positional[tuple[Path, ...]] = ()
    """JPEG, PNG, WebP or BMP files, or folders of them."""
    weights: Path
    """A weights file that models.train wrote (.safetensors)."""
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
    device: str = "auto"
    """auto, cpu, cuda or cuda:1; auto takes a GPU where there is one."""

    def __post_init__(self):
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {self.score_threshold}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.resize is not None and not 1 <= self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize must be SHORT LONG with 1 <= SHORT <= LONG, got {self.resize}")


def main(options: Predict) -> None:
    if not options.images:
        raise UsageError("no image is named", fix=f"{program_name()} street.jpg --weights W.safetensors")

    from .images import image_files

    paths = list(image_files(options.images))
    folder = make_folder(options.output)

    # imported here, so that --help and a mistyped option answer at once
    from rich.console import Console

    from .checkpoint import load_detector
    from .coco_evaluation import result_entries, write_results
    from .devices import choose_device
    from .inference import predict
    from .norms import fold_batch_norms
    from .tta import check_detector, chosen_views
    from .visualise import overlay, save_picture

    console = Console(highlight=False)
    views = chosen_views(options.tta, options.tta_scales, options.tta_flip, options.resize)
    device = choose_device(options.device)
    detector, facts = load_detector(options.weights)
    if views is not None:
        check_detector(detector)
        console.print(str(views), soft_wrap=True, markup=False)
    detector = fold_batch_norms(detector).to(device)
    names, ids = facts["class_names"], facts["category_ids"]
    resize = None if views is not None else options.resize or facts["extra"].get("resize")

    entries: dict[str, list[dict]] = {"bbox": []}
    records: list[dict] = []
    faults: list[DataError] = []
    pictures = picture_names(paths)
    for batch in read_batches(paths, options.batch_size, faults):
        results = predict(detector, [image for _, image in batch], resize, views)
        for (path, image), result in zip(batch, results, strict=True):
            records.append(
                {"id": len(records) + 1, "file_name": str(path), "height": image.shape[0], "width": image.shape[1]}
            )
            found = [x.numpy() for x in (result.boxes, result.scores, result.labels)]
            for kind, new in result_entries(records[-1]["id"], *found, result.masks, ids).items():
                entries.setdefault(kind, []).extend(new)
            shown = (found[1] >= options.score_threshold).nonzero()[0]
            boxes, scores, labels = (values[shown] for values in found)
            picture = folder / pictures[path]
            masks = None if result.masks is None else [result.masks[i] for i in shown]
            save_picture(picture, overlay(image, boxes, labels, names, scores, masks))
            console.print(_summary(path, image, labels, names, options.score_threshold), soft_wrap=True, markup=False)
            if len(paths) <= 3 and len(shown):
                console.print(_table(boxes, scores, labels, names))
            console.print(f"  picture: {picture}", soft_wrap=True, markup=False)
    files = write_results(folder, entries)
    categories = [{"id": key, "name": name} for key, name in zip(ids, names, strict=True)]
    write_json(folder / "images.json", {"images": records, "categories": categories, "annotations": []})
    where = f"results: {', '.join(map(str, files))} (COCO results; ids: {folder / 'images.json'})"
    console.print(where, soft_wrap=True, markup=False)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(paths)} images could not be read; the others are done",
            where="\n".join(fault.where for fault in faults[:10]) + ("\n..." if len(faults) > 10 else ""),
        )


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for the picture of each image; images of one stem (a/1.jpg, b/1.png) are numbered."""
    names, uses = {}, Counter()
    for path in paths:
        uses[path.stem] += 1
        names[path] = f"{path.stem}{'' if uses[path.stem] == 1 else f'-{uses[path.stem]}'}_detections.jpg"
    return names


def read_batches(paths: Sequence[Path], size: int, faults: list[DataError]) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Images in their order, as batches of at most `size` that have one height and width.

    So nothing is padded to a larger neighbour, and what is found in an image does not depend on the others.
    What cannot be read is reported, added to `faults` and left out; it ends the run only if there is nothing else.
    """
    from .images import read_image

    batch: list[tuple[Path, np.ndarray]] = []
    for path in paths:
        try:
            image = read_image(path)
        except DataError as fault:
            if len(paths) == 1:
                raise
            faults.append(fault)
            print_error(fault)
            continue
        if batch and (len(batch) == size or image.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((path, image))
    if batch:
        yield batch


def _summary(path: Path, image, labels, names: Sequence[str], threshold: float) -> str:
    counts = Counter(names[label] for label in labels)
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
    return f"{path} ({image.shape[1]} x {image.shape[0]}): {found} with a score of {threshold:g} or more"


def _table(boxes, scores, labels, names: Sequence[str]):
    from rich.table import Table

    table = Table("object", "score", "x1", "y1", "x2", "y2", box=None, padding=(0, 2), pad_edge=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for box, score, label in zip(boxes, scores, labels, strict=True):
        table.add_row(names[label], f"{score:.3f}", *(f"{x:.1f}" for x in box))
    return table


if __name__ == "__main__":
    run(Predict, main, examples=EXAMPLES)
