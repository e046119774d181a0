"""ImageNet classification from the command line: `python -m models.classify cat.jpg --arch scnet50 --weights W.pth`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from .command_line import print_error, program_name, run
from .errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import Tensor, nn

    from .data.image_folders import ClassName

EXAMPLES = (
    "{program} cat.jpg --arch scnet50 --weights scnet50-dc6a7e87.pth --class-names imagenet_class_index.json",
    "{program} data/imagenet --arch res2net50_26w4s --weights W.pth --batch-size 64 --device cuda",
)
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Names what is in images, or measures a classifier on a folder in ImageNet's layout.

    An image, or a folder of images: a table of the five likeliest classes for each. A folder FOLDER/val/CLASS/IMAGE or
    FOLDER/CLASS/IMAGE: top-1 and top-5 accuracy, and images a second with reading.
    """

    images: Positional[tuple[Path, ...]] = ()
    """JPEG, PNG, WebP or BMP files, folders of them, or one folder of class folders."""
    arch: str
    """The network: scnet50, res2net101_26w4s, resnet50, ...; an unknown name is answered with the nearest ones."""
    weights: Path
    """Its weights: a file of the authors, of torchvision (.pth), or ours (.safetensors)."""
    class_names: Path | None = None
    """Text or JSON file of class names in the order of training, or a folder of class folders. Default: the names in
    the weights file; else numbers, and class folders in sorted order."""
    resize: int = 256
    """Short side in pixels that images are scaled to."""
    crop: int = 224
    """Side in pixels of the square in their middle that the network sees."""
    batch_size: int = 32
    """Images that go through the network together."""
    workers: int = 2
    """Threads that read images ahead of the network."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1; auto takes a GPU where there is one."""

    def __post_init__(self):
        for name in ("crop", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.resize < self.crop:
            raise ValueError(f"resize must be at least crop, {self.crop}, got {self.resize}")


def main(options: Classify) -> None:
    if not options.images:
        raise UsageError("no image is named", fix=f"{program_name()} cat.jpg --arch scnet50 --weights W.pth")

    from .data.image_folders import class_folders, read_class_names
    from .images import image_files

    folders = {}
    if len(options.images) == 1 and options.images[0].is_dir():
        folders = class_folders(options.images[0])
    paths = [path for group in folders.values() for path in group] or list(image_files(options.images))
    classes = None if options.class_names is None else read_class_names(options.class_names)

    # imported here, so that --help and a mistyped option answer at once
    from rich.console import Console

    from .devices import choose_device
    from .folding import folded

    device = choose_device(options.device)
    model, names_of_weights = load_classifier(options.arch, options.weights)
    classes = classes or names_of_weights
    if classes is not None and len(classes) != model.fc.out_features:
        raise DataError(
            "the class names are not those of the weights",
            where=options.class_names or options.weights,
            why=f"{len(classes)} names, {model.fc.out_features} classes in the weights",
        )
    model = folded(model).to(device)
    console, faults = Console(highlight=False), []
    if folders:
        evaluate(model, folders, classes, options, console, faults)
    else:
        for path, probs, labels in likeliest_classes(model, paths, options, faults):
            console.print(str(path), soft_wrap=True, markup=False)
            console.print(_table(probs, labels, classes))
    if faults:
        raise DataError(
            f"{len(faults)} of {len(paths)} images could not be read; the others are done",
            where="\n".join(fault.where for fault in faults[:10]) + ("\n..." if len(faults) > 10 else ""),
        )


def load_classifier(arch: str, weights: Path) -> tuple[nn.Module, list[ClassName] | None]:
    """The classifier with as many classes as the file has, and the file's class names if it holds any."""
    from .build import backbone_config
    from .classifiers import build_classifier
    from .data.image_folders import ClassName
    from .weights.contents import read_contents

    backbone_config(arch)  # an unknown name is told before a large file is read
    contents = read_contents(weights)
    rows = [len(value) for key, value in contents.state.items() if key.endswith("fc.weight")]
    if not rows:
        raise DataError(
            "these weights have no classifier",
            where=weights,
            why="they have no tensor fc.weight: a backbone or a detector",
            fix=f"take a file of the whole ImageNet classifier {arch}",
        )
    names = contents.class_names and [ClassName(name, name) for name in contents.class_names]
    return build_classifier(arch, weights, num_classes=rows[0]), names


def evaluate(
    model: nn.Module,
    folders: dict[str, list[Path]],
    classes: Sequence[ClassName] | None,
    options: Classify,
    console: Console,
    faults: list[DataError],
) -> None:
    """Prints top-1 and top-5 accuracy over all images that can be read, and images a second with reading."""
    from .data.image_folders import folder_labels
    from .progress import Progress

    labels = folder_labels(list(folders), classes, model.fc.out_features)
    truth = {path: label for group, label in zip(folders.values(), labels, strict=True) for path in group}
    first = among_five = done = 0
    start = time.monotonic()
    with Progress("classify", total=len(truth), unit="images", console=console) as progress:
        for path, _, found in likeliest_classes(model, list(truth), options, faults):
            done += 1
            first += int(found[0] == truth[path])
            among_five += int(truth[path] in found)
            progress.advance(top_1=f"top 1 {first / done:.2%}", top_5=f"top 5 {among_five / done:.2%}")
    if done:
        rate = done / (time.monotonic() - start)
        accuracy = f"top-1 {first / done:.2%}, top-5 {among_five / done:.2%}"
        console.print(f"{accuracy} of {done} images in {len(folders)} classes; {rate:.1f} images/s", soft_wrap=True)


def likeliest_classes(
    model: nn.Module, paths: Sequence[Path], options: Classify, faults: list[DataError]
) -> Iterator[tuple[Path, list[float], list[int]]]:
    """Each image with the probabilities and labels of its five likeliest classes, in the order of `paths`.

    What cannot be read is reported, added to `faults` and left out; it ends the run only if there is nothing else.
    """
    batch: list[tuple[Path, np.ndarray]] = []
    for path, square in read_ahead(paths, options):
        if isinstance(square, DataError):
            if len(paths) == 1:
                raise square
            faults.append(square)
            print_error(square)
        else:
            batch.append((path, square))
        if len(batch) == options.batch_size:
            yield from _classified(model, batch)
            batch = []
    if batch:
        yield from _classified(model, batch)


def read_ahead(paths: Sequence[Path], options: Classify) -> Iterator[tuple[Path, np.ndarray | DataError]]:
    """Images in their order, read by threads; at most two batches wait."""
    from .data.image_folders import read_square

    def read(path: Path) -> np.ndarray | DataError:
        try:
            return read_square(path, options.resize, options.crop)
        except DataError as fault:
            return fault

    waiting = deque()
    with ThreadPoolExecutor(options.workers) as pool:
        for path in paths:
            waiting.append((path, pool.submit(read, path)))
            if len(waiting) > 2 * options.batch_size:
                path, square = waiting.popleft()
                yield path, square.result()
        for path, square in waiting:
            yield path, square.result()


def _classified(model: nn.Module, batch: list) -> Iterator[tuple[Path, list[float], list[int]]]:
    import torch

    import cascadeops

    from .data.transforms import MEAN, STD

    device = next(model.parameters()).device
    pixels: list[Tensor] = [torch.from_numpy(square).to(device) for _, square in batch]
    images, _ = cascadeops.preprocess(pixels, None, MEAN, STD, divisor=1)
    with torch.inference_mode():
        probs, labels = model(images).softmax(dim=1).topk(min(SHOWN, model.fc.out_features))
    yield from zip((path for path, _ in batch), probs.tolist(), labels.tolist(), strict=True)


def _table(probs: list[float], labels: list[int], classes: Sequence[ClassName] | None):
    from rich.table import Table

    table = Table("class", "label", "probability", box=None, padding=(0, 2), pad_edge=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for prob, label in zip(probs, labels, strict=True):
        table.add_row(classes[label].name if classes else f"class {label}", str(label), f"{prob:.4f}")
    return table


if __name__ == "__main__":
    run(Classify, main, examples=EXAMPLES)
