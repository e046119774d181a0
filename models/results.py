"""What was found in one image. Masks are COCO run lengths throughout: holes and several parts stay exact."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .classes import find_classes
from .errors import DataError, MachineError, UsageError

FORMAT = "cascadeops-result-1"


@dataclass(frozen=True, eq=False)
class Result:
    """What was found in one image, best first; every field has length 0 when nothing was.

    `result[3]`, `result[:10]`, `result[result.scores > 0.5]`, `result["person"]` and `result[["cat", "dog"]]` are the
    results of some objects; `for one in result` goes through them one by one.
    """

    boxes: Tensor
    """[D, 4] float32 (x1, y1, x2, y2) in pixels of the image that was given."""
    scores: Tensor
    """[D] float32 in [0, 1]."""
    labels: Tensor
    """[D] int64, 0-based."""
    masks: list[dict] | None
    """D COCO run-length encodings {"size": [H, W], "counts": bytes} at the size of the image that was given; None from
    a detector without masks (Faster R-CNN)."""
    image_size: tuple[int, int] | None = None
    """(height, width) of the image that was given."""
    class_names: tuple[str, ...] | None = None
    """By label; None where the detector was used without its weights file (`models.predict`)."""
    category_ids: tuple[int, ...] | None = None
    """By label: the ids of the data set that the detector was trained on; None as above."""
    source: str | None = None
    """Where the image is from: "street.jpg", "clip.mp4, frame 12"; None for pixels that were given."""
    image: np.ndarray | None = dataclasses.field(default=None, repr=False)
    """The image, uint8 RGB [H, W, 3], upright; what `plot` draws on. No copy, and no part of `to_json`."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of each object; "class 3" where the names are not known."""
        table = self._class_table()
        return [table[label] for label in self.labels.tolist()]

    def __getitem__(self, which) -> Result:
        """The result of some objects, in the order asked for.

        Args:
            which: an index (IndexError beyond the last), a slice, [D] bool, indices, a class name, or several names.

        Raises:
            UsageError: no such class; names the nearest ones. IndexError: an index out of range, or a filter that is
                not as long as the result.
        """
        keep = self._indices(which)
        return dataclasses.replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            masks=None if self.masks is None else [self.masks[i] for i in keep.tolist()],
        )

    def __iter__(self) -> Iterator[Result]:
        return (self[i] for i in range(len(self)))

    def summary(self, score_threshold: float = 0.3) -> str:
        """One line: "street.jpg (640 x 480): 2 person, 1 dog with a score of 0.3 or more"."""
        counts = Counter(self[self.scores >= score_threshold].names)
        found = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        size = f" ({self.image_size[1]} x {self.image_size[0]})" if self.image_size else ""
        return f"{self.source or 'image'}{size}: {found} with a score of {score_threshold:g} or more"

    # ---- masks in other forms

    def rle(self) -> list[dict]:
        """Masks as COCO's results files hold them, {"size": [H, W], "counts": text}: `masks`, ready for JSON."""
        return [{"size": list(mask["size"]), "counts": mask["counts"].decode()} for mask in self._masks("rle")]

    def bitmaps(self) -> Tensor:
        """Masks as bool [D, H, W]. That takes D * H * W bytes: 830 MB for 100 objects of a 4K picture, whose run
        lengths take about 0.1 MB; `result[i].bitmaps()` makes them one by one."""
        from pycocotools import mask as mask_api

        masks = self._masks("bitmaps")
        if not masks:
            return torch.zeros((0, *(self.image_size or (0, 0))), dtype=torch.bool)
        bitmaps = torch.empty((len(masks), *masks[0]["size"]), dtype=torch.bool)
        for bitmap, mask in zip(bitmaps, masks, strict=True):  # one by one: decoding all at once takes twice the memory
            bitmap.copy_(torch.from_numpy(mask_api.decode(mask)))
        return bitmaps

    def polygons(self, tolerance: float = 0.0) -> list:
        """A `models.polygons.Polygons` for each object: its rings, holes apart, and how much of the mask is lost (IoU).

        Args:
            tolerance: 0: along the pixels' borders, exact; else corners that lie no further, in pixels, from the line
                that remains are dropped.
        """
        from .polygons import mask_polygons

        return [mask_polygons(mask, tolerance) for mask in self._masks("polygons")]

    # ---- for other tools

    def to_coco(self, image_id: int) -> list[dict]:
        """The objects as entries of a COCO results file, with the category ids of the data set that was trained on.

        {"image_id", "category_id", "score", "bbox": [x, y, width, height]}, with "segmentation" (RLE) from a detector
        with masks. Boxes are rounded to a thousandth of a pixel.

        Raises:
            UsageError: the category ids are not known.
        """
        from .coco_evaluation import result_entries

        if self.category_ids is None:
            raise UsageError(
                "the category ids of this result are not known",
                where="to_coco",
                why="models.predict knows the detector, and not the weights file, which holds the classes",
                fix="models.Predictor(weights)(image).to_coco(image_id)",
            )
        fields = (self.boxes.numpy(), self.scores.numpy(), self.labels.numpy(), self.masks, self.category_ids)
        entries = result_entries(image_id, *fields)
        return [box | mask for box, mask in zip(entries["bbox"], entries.get("segm", [{}] * len(self)), strict=True)]

    def to_supervision(self):
        """The same as `supervision.Detections`: xyxy, mask (bool [D, H, W], see `bitmaps` for its memory), confidence,
        class_id, and data["class_name"].

        Raises:
            MachineError: the package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise MachineError("this needs a package", where="supervision", fix="pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            mask=None if self.masks is None else self.bitmaps().numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_json(self) -> str:
        """Everything but the image as JSON; `Result.from_json` gives back the same values, bit for bit."""
        values = {
            "format": FORMAT,
            "source": self.source,
            "image_size": self.image_size,
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "labels": self.labels.tolist(),
            "masks": None if self.masks is None else self.rle(),
        }
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Inverse of `to_json`. Raises DataError for any other text."""
        from .data.segmentation import checked_run_lengths

        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
            masks = values["masks"]
            if masks is not None:  # checked, since pycocotools can end the process on run lengths that are wrong
                masks = [{**mask, "counts": checked_run_lengths(mask, *_mask_size(mask))} for mask in masks]
            result = cls(
                torch.tensor(values["boxes"], dtype=torch.float32).reshape(-1, 4),
                torch.tensor(values["scores"], dtype=torch.float32),
                torch.tensor(values["labels"], dtype=torch.int64),
                masks,
                *(values[key] and tuple(values[key]) for key in ("image_size", "class_names", "category_ids")),
                source=values["source"],
            )
            if len({len(x) for x in (result.boxes, result.scores, result.labels, masks or result.labels)}) > 1:
                raise ValueError("boxes, scores, labels and masks are not equally many")
            return result
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DataError("this is not the JSON of a result", why=why, fix="give what to_json returned") from error

    # ---- pictures

    def plot(self, image: np.ndarray | None = None, score_threshold: float = 0.3) -> np.ndarray:
        """The image with the objects drawn on it: uint8 RGB [H * n, W * n, 3], small images enlarged n times.

        Args:
            image: uint8 RGB [H, W, 3]; default: the one that the result keeps. UsageError where it keeps none.
        """
        from .visualise import overlay

        image = self.image if image is None else image
        if image is None:
            raise UsageError(
                "the result keeps no image to draw on",
                where="plot",
                why="it is from JSON, or from models.predict",
                fix="result.plot(image)",
            )
        shown = self[self.scores >= score_threshold]
        boxes, labels, scores = (x.numpy() for x in (shown.boxes, shown.labels, shown.scores))
        return overlay(image, boxes, labels, self._class_table(), scores, shown.masks)

    def save(self, path: str | os.PathLike, image: np.ndarray | None = None, score_threshold: float = 0.3) -> None:
        """Writes what `plot` draws, as .png or .jpg by the name of `path`."""
        from .visualise import save_picture

        save_picture(path, self.plot(image, score_threshold))

    # ----

    def _class_table(self) -> Sequence[str]:
        """A name for every label that occurs."""
        return self.class_names or [f"class {label}" for label in range(max([-1, *self.labels.tolist()]) + 1)]

    def _masks(self, method: str) -> list[dict]:
        if self.masks is None:
            raise UsageError(
                "there are no masks",
                where=method,
                why="the detector finds boxes only",
                fix='a detector with masks: "mask_rcnn", "cascade_mask_rcnn", "htc", "scnet"',
            )
        return self.masks

    def _indices(self, which) -> Tensor:
        """int64 [n]: rows of the objects that an index, slice, filter or class means."""
        everything = torch.arange(len(self))
        if isinstance(which, str) or _is_names(which):
            return everything[torch.isin(self.labels, torch.tensor(find_classes(which, self._class_table())))]
        if isinstance(which, slice):
            return everything[which]
        index = torch.as_tensor(which)
        if index.dtype == torch.bool and index.shape != everything.shape:
            raise IndexError(f"Result: the filter has shape {list(index.shape)}, the result has {len(self)} objects")
        if index.numel() == 0:
            index = index.long()
        return everything[index].reshape(-1)


def _mask_size(mask: dict) -> tuple[int, int]:
    """Of run lengths that may be anybody's. pycocotools counts pixels in 32 bits."""
    height, width = mask["size"]
    if type(height) is not int or type(width) is not int or min(height, width) < 1 or height * width >= 2**31:
        raise ValueError(f"a mask has a size that is not possible: {mask['size']!r:.80}")
    return height, width


def _is_names(which) -> bool:
    return isinstance(which, Sequence) and len(which) > 0 and all(isinstance(name, str) for name in which)
