"""Writes a detector as a file that runs alone: `python -m models.export --weights W.safetensors --output scnet.pt2`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import run
from .errors import DataError, UsageError
from .files import make_folder

if TYPE_CHECKING:
    from .parity import Parity
    from .predictor import Predictor

EXAMPLES = (
    "{program} --weights runs/scnet/weights.safetensors --output scnet.pt2",
    "{program} --weights scnet_r50.safetensors --size 800 1344 --device cuda --half --data coco --split val2017",
    "{program} --weights scnet_r50.safetensors --output scnet.onnx",
    "{program} --arch htc --size 800 1344 --output htc.pt2        random weights, to see what it takes",
)
LEAST_SHARE = 0.95
"""Of the detections, those that the package must find, too."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a detector, from the image tensor to the detections, as one file that runs without this code.

    torch.export takes the forward whole, for one input size. As .pt2, AOTInductor compiles it for this processor or
    GPU; a C++ compiler is needed. As .onnx it is float32, of ONNX's own operators. Either ends with a table: what the
    file finds beside what the detector finds, the average precision of both, and their time.
    """

    output: Path
    """The .pt2 or .onnx file to write."""
    weights: Path | None = None
    """A weights file, of ours or of another project."""
    arch: str | None = None
    """faster_rcnn, mask_rcnn, cascade_mask_rcnn, htc or scnet; alone: random weights, ResNet-50 and 80 classes."""
    size: tuple[int, int] | None = None
    """HEIGHT WIDTH of the input, multiples of 32. Default: that of a wide picture in the size that the weights were
    trained with; where that was the pictures' own, of the largest picture of the data."""
    half: bool = False
    """Compute the network in 16 bits, where the hardware has them."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1; auto takes a GPU where there is one."""
    data: Path | None = None
    """Folder in COCO layout, for the table. Default: the embedded data set of shapes."""
    split: str = "val"
    """Which annotation file: val, train, val2017 ..."""
    images: int = 20
    """The table is made from so many of its images, the first ones."""

    def __post_init__(self):
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")


def main(options: Export) -> None:
    if options.weights is None and options.arch is None:
        raise UsageError("there is nothing to export", fix="--weights FILE, or --arch scnet for random weights")
    if options.output.suffix not in (".pt2", ".onnx"):
        raise UsageError("the file must end in .pt2 or .onnx", where=f"--output {options.output}")
    if options.output.suffix == ".onnx" and (options.half or options.device not in ("auto", "cpu")):
        raise UsageError(
            "ONNX is written in float32 and on the CPU", fix="leave --half and --device out, or write .pt2"
        )
    make_folder(options.output.parent)

    # imported here, so that --help and a mistyped option answer at once
    import torch
    from rich.console import Console

    from .arithmetic import ARITHMETICS
    from .data import CocoDataset, default_dataset
    from .data.transforms import padded_size
    from .package import DetectorTuple, Package, as_detections, write_package
    from .parity import measure_parity

    console = Console(highlight=False)
    predictor = _predictor(options, "cpu" if options.output.suffix == ".onnx" else options.device)
    dataset = CocoDataset(options.data or default_dataset(), options.split, semantic="no")
    largest = dataset.sizes.max(axis=0).tolist() if predictor.resize is None else predictor.resize
    size = options.size or padded_size(*largest)
    detector, config = predictor.detector, predictor.detector.config
    names = predictor.class_names or tuple(map(str, range(config.num_classes)))
    facts = {"resize": " ".join(map(str, predictor.resize or ())), "class_names": "\n".join(names)}
    start = time.perf_counter()
    write_package(options.output, detector, predictor.dtype, size, facts)
    took, megabytes = time.perf_counter() - start, options.output.stat().st_size / 2**20
    console.print(f"{options.output}: {megabytes:.1f} MiB, written in {took:.0f} s", soft_wrap=True, markup=False)
    eager, package = DetectorTuple(detector, predictor.dtype), Package(options.output)
    facts = package.facts
    console.print(f"{facts['arch']}, {facts['dtype']} on {predictor.device}, one image of {size[0]} x {size[1]}")

    same_classes = (names, predictor.category_ids) == (dataset.class_names, tuple(dataset.category_ids.tolist()))
    parity = measure_parity(
        lambda *inputs: as_detections(eager(*inputs)),
        package,
        package.input,
        dataset,
        options.images,
        ARITHMETICS[config.arithmetic],
        with_ap=same_classes,
    )
    for line in _table(parity, min(options.images, len(dataset)), torch.get_num_threads(), same_classes):
        console.print(line, soft_wrap=True, markup=False)
    found, both = max(parity.agreement.found), parity.agreement.both
    if both < LEAST_SHARE * found:
        raise DataError(
            "the package does not find what the detector finds",
            where=options.output,
            why=f"of {found} detections {both} are in both; at least {LEAST_SHARE:.0%} should be",
        )


def _predictor(options: Export, device: str) -> Predictor:
    from .build import build_detector
    from .predictor import Predictor

    if options.weights is None:
        return Predictor(build_detector(options.arch), device=device, half=options.half)
    detector, weights = (options.arch, options.weights) if options.arch else (options.weights, None)
    return Predictor(detector, weights, device=device, half=options.half)


def _table(parity: Parity, images: int, threads: int, same_classes: bool) -> list[str]:
    """The lines of the table: name, detector, package, and what to say of both."""
    agreement, (eager, package) = parity.agreement, parity.milliseconds
    rows = [("", "detector", "package", f"{images} images")]
    rows.append(("detections", *map(str, agreement.found), f"{agreement.both} in both; where these differ most:"))
    rows.append(("  boxes", "", "", f"{agreement.boxes:.2g} pixels"))
    rows.append(("  scores", "", "", f"{agreement.scores:.2g}"))
    rows.append(("  mask probabilities", "", "", f"{agreement.masks:.2g}"))
    for kind, name in (("bbox", "box AP"), ("segm", "mask AP")):
        if kind in parity.ap:
            rows.append((name, *(f"{value:.4f}" for value in parity.ap[kind]), ""))
    if not same_classes:
        rows.append(("AP", "-", "-", "the data has other classes than the detector"))
    speed = f"{eager / package:.2f}x as fast; medians, in turns, {threads} threads"
    rows.append(("one image", f"{eager:.1f} ms", f"{package:.1f} ms", speed))
    return [f"{name:<20}{left:>12}{right:>12}   {text}".rstrip() for name, left, right, text in rows]


if __name__ == "__main__":
    run(Export, main, examples=EXAMPLES)
