"""A detector for one input size in a file that runs without its source code: `.pt2`, compiled ahead of time, or ONNX.

What runs a .pt2 needs torch and the operators' binary; examples/cpp is such a program without Python.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import ARITHMETICS
from .data.transforms import DIVISOR, MEAN, STD, resized_size
from .detections import Detections
from .errors import DataError, MachineError, UsageError
from .files import atomic_path
from .inference import make_batch, unpack_detections
from .onnx_package import open_onnx, write_onnx
from .results import Result
from .sources import checked_pixels

FORMAT = "cascadeops-detector-1"


class DetectorTuple(nn.Module):
    """What is exported: a detector in its precision, whose result is the fields of `Detections` that it has."""

    def __init__(self, detector: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.detector, self.dtype = detector, dtype
        self.eval()

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        if self.dtype is torch.float32:
            found = self.detector(images, image_sizes)
        else:
            with torch.autocast(images.device.type, self.dtype):
                found = self.detector(images, image_sizes)
        return tuple(tensor for tensor in found if tensor is not None)


def as_detections(tensors: Sequence[Tensor]) -> Detections:
    """The result of `DetectorTuple` or of a package, as a detector's."""
    boxes, scores, labels, *mask_probs, count = tensors
    return Detections(boxes, scores, labels, mask_probs[0] if mask_probs else None, count)


def write_package(
    path: Path, detector: nn.Module, dtype: torch.dtype, size: tuple[int, int], facts: dict[str, str]
) -> None:
    """Exports a detector: `.pt2`: compiled for the processor, or the GPU, on which it is; `.onnx`: as ONNX's operators.

    Args:
        detector: in eval mode, batch norms folded.
        dtype: float32, or what its network computes in.
        size: (height, width) of its input, multiples of 32: one image [1, 3, height, width], channels last.
        facts: what else readers should know; see `Package`.

    Raises:
        UsageError: another size. MachineError: no C++ compiler, no onnxscript, or what `atomic_path` raises.
    """
    height, width = size
    if height < 1 or width < 1 or height % DIVISOR or width % DIVISOR:
        raise UsageError(
            f"height and width must be multiples of {DIVISOR}", where="--size", why=f"got {height} {width}"
        )
    device = next(detector.parameters()).device
    images = torch.zeros(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    values = {"size": size, "mean": MEAN, "std": STD}
    facts = facts | {name: " ".join(map(str, numbers)) for name, numbers in values.items()}
    facts |= {"format": FORMAT, "arch": detector.arch, "arithmetic": detector.config.arithmetic}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    write = write_onnx if path.suffix == ".onnx" else write_compiled
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch
        program = torch.export.export(DetectorTuple(detector, dtype), (images, torch.tensor([size], device=device)))
        made = Path(folder) / path.name
        write(made, program, facts)
        with atomic_path(path) as temporary:
            shutil.copyfile(made, temporary)


def write_compiled(path: Path, program: torch.export.ExportedProgram, facts: dict[str, str]) -> None:
    """Compiles a program by AOTInductor."""
    from torch._inductor.exc import InvalidCxxCompiler

    on_cpu = all(tensor.device.type == "cpu" for tensor in program.state_dict.values())
    # Freezing lays weights out for the processor's kernels: 1.10x less time for SCNet R-50, in a file 1.17x as large.
    options = {"aot_inductor.metadata": facts, "freezing": on_cpu}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except InvalidCxxCompiler as error:
        raise MachineError(
            "no C++ compiler was found", why="AOTInductor writes C++", fix="apt install g++; or CXX=/path/to/g++"
        ) from error


def open_compiled(path: Path) -> tuple[Callable[[Tensor, Tensor], Sequence[Tensor]], dict[str, str]]:
    """What runs a file of `write_compiled`, and its metadata. Raises DataError for what is none."""
    try:
        program = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise DataError("not a package that can be loaded", where=path, why=str(error).splitlines()[0]) from error
    return program, program.loader.get_metadata()


class Package:
    """A file that `write_package` wrote; an ONNX file runs in onnxruntime, on the CPU.

        result = Package("scnet.pt2").detect(pixels)

    Called as the detector is, with `images` and `image_sizes`, it gives `Detections`. `facts` are texts: format, arch,
    arithmetic, dtype, torch (its version); numbers with blanks between: size (height, width), mean, std, resize (short,
    long; empty for pictures as they are); class_names, one a line.

    Raises:
        DataError: not such a file. MachineError: no onnxruntime.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self._run, metadata = open_onnx(path) if path.suffix == ".onnx" else open_compiled(path)
        if metadata.get("format") != FORMAT:
            raise DataError("this package holds no detector of ours", where=path, fix="python -m models.export")
        self.device = torch.device(metadata.get("AOTI_DEVICE_KEY", "cpu"))
        self.facts = {key: value for key, value in metadata.items() if not key.startswith("AOTI_")}
        self.size = tuple(map(int, self.facts["size"].split()))
        self.resize = tuple(map(int, self.facts["resize"].split())) or None

    def __call__(self, images: Tensor, image_sizes: Tensor) -> Detections:
        return as_detections(self._run(images, image_sizes))

    def input(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the package takes for uint8 [H, W, 3]."""
        return make_input(image, self.resize, self.size, self.device)

    @torch.inference_mode()
    def detect(self, image: np.ndarray) -> Result:
        """Finds objects in a picture, uint8 RGB [H, W, 3] of any size."""
        images, sizes = self.input(checked_pixels(image))
        arithmetic = ARITHMETICS[self.facts["arithmetic"]]
        (result,) = unpack_detections(self(images, sizes), sizes, [image.shape[:2]], arithmetic)
        return replace(result, class_names=tuple(self.facts["class_names"].split("\n")), image=image)


def make_input(
    image: np.ndarray, resize: tuple[int, int] | None, size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """uint8 [H, W, 3] -> normalised, zero-padded [1, 3, *size], and [1, 2] (height, width) before padding.

    The picture is resized to at most (short, long) pixels (None: left as it is); where it would not fit into `size`, to
    the largest that does.
    """
    limits = fitting_limits(*image.shape[:2], resize, size)
    images, sizes = make_batch([image], limits, device)
    padding = (0, size[1] - images.shape[3], 0, size[0] - images.shape[2])
    return F.pad(images, padding).contiguous(memory_format=torch.channels_last), sizes


def fitting_limits(
    height: int, width: int, resize: tuple[int, int] | None, size: tuple[int, int]
) -> tuple[int, int] | None:
    """(short, long) limits, None for none, with which a picture fits into (height, width) `size`."""
    as_asked = (height, width) if resize is None else resized_size(height, width, *resize)
    if as_asked[0] <= size[0] and as_asked[1] <= size[1]:
        return resize
    return (size[0], size[1]) if height <= width else (size[1], size[0])
