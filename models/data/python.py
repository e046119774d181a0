"""A data set written in Python by the user, in the shape that the loaders and the evaluation work with.

    class Cells:
        class_names = ["cell", "debris"]
        def __len__(self): ...
        def __getitem__(self, index):
            return image, {"labels": [0, 1], "masks": [bitmap, polygons], "boxes": [[x1, y1, x2, y2], ...]}

`image` is uint8 RGB [H, W, 3]. `labels` are indices into `class_names`. A mask is an array [H, W] of 0 and 1 or bool,
a COCO RLE dict, or a list of polygons [x1, y1, x2, y2, ...]; all masks may be one array [g, H, W]. `boxes` may be left
out: they are then the masks' own. `category_ids`, an attribute beside `class_names`, is 1, 2, 3 ... by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as mask_api

from ..errors import DataError, UsageError
from .dataset import ImageInfo
from .segmentation import MalformedAnnotation, check_drawable, checked_run_lengths, usable_polygons
from .transforms import Augmentation, Sample, transform


class PythonData(Protocol):
    """What the user writes; the module's docstring says what `__getitem__` returns."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, Mapping[str, Any]]: ...


class PythonDataset:
    """Wraps a user's data set; has what the loaders, the training loop and the evaluation ask of `AnnotatedImages`.

    Everything is read once here: batches are put together by the images' sizes, the evaluation needs all annotations
    (kept as run lengths), and a mistake in the last image should not end a run after an hour. Pictures are not kept.

    Args:
        data: the user's data set.
        name: what messages call it, "train_set".
        training: leave out images without objects. Evaluation has all.

    Raises:
        UsageError: no class names. DataError: an item that is not as described; says which, what and why.
    """

    has_semantic, num_semantic_classes, voc = False, 0, None

    def __init__(self, data: PythonData, name: str, training: bool = False):
        names = getattr(data, "class_names", None)
        if not names or isinstance(names, str):
            raise UsageError(
                "a data set has to name its classes",
                where=name,
                why=f"{type(data).__name__} has no attribute class_names, a list of texts by label",
                fix='class_names = ["cell", "debris"]   in the class',
            )
        self.root = self.annotation_file = f"{name} ({type(data).__name__})"
        self.class_names = tuple(map(str, names))
        ids = getattr(data, "category_ids", range(1, len(self.class_names) + 1))
        self.category_ids = np.array([int(key) for key in ids], np.int64)
        if len(set(self.category_ids.tolist())) != len(self.class_names) or len(ids) != len(self.class_names):
            why = f"{len(self.class_names)} names, ids {list(ids)}"
            raise UsageError("category_ids must hold one id for each class", where=name, why=why)
        self._data, self.objects_left_out, self.images_left_out = data, {}, {}
        self._kept, sizes, self._objects = [], [], []
        for index in range(len(data)):
            image, boxes, labels, masks = self._item(index)
            if len(labels) or not training:
                self._kept.append(index)
                sizes.append(image.shape[:2])
                self._objects.append((boxes, labels, masks))
            else:
                self.images_left_out["no object"] = self.images_left_out.get("no object", 0) + 1
        if not self._kept:
            why = f"it has {len(data)} images, none with an object" if training else "it has no images"
            raise DataError("there is nothing to use", where=self.root, why=why)
        self.sizes = np.array(sizes, np.int32)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._kept)

    def image_info(self, index: int) -> ImageInfo:
        return ImageInfo(self._kept[index], str(self._kept[index]), *self.sizes[index].tolist())

    def image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB."""
        return _checked_image(self._data[self._kept[index]][0], self._where(self._kept[index]))

    def sample(
        self,
        index: int,
        resize: tuple[int, int] | None,
        augmentation: Augmentation | None = None,
        random: np.random.Generator | None = None,
        resize_image_too: bool = True,
    ) -> Sample:
        """As `AnnotatedImages.sample`. The annotations are those of the first reading."""
        item = self._kept[index]
        image = self.image(index)
        if image.shape[:2] != tuple(self.sizes[index]):
            raise DataError(
                "an image has another size than when it was first read",
                where=self._where(item),
                why=f"(height, width) was {tuple(self.sizes[index].tolist())}, and is {image.shape[:2]}",
                fix="__getitem__ must give the same image each time; training augments by itself (--scale-jitter)",
            )
        boxes, labels, masks = self._objects[index]
        return transform(
            image,
            boxes,
            labels,
            lambda which: mask_api.decode(masks[which]),
            None,
            image_id=item,
            resize=resize,
            augmentation=augmentation,
            random=random,
            resize_image_too=resize_image_too,
        )

    def ground_truth(self) -> dict:
        """The annotations as the content of a COCO file."""
        images, annotations = [], []
        for index, (boxes, labels, masks) in enumerate(self._objects):
            info = self.image_info(index)
            size = {"height": info.height, "width": info.width}
            images.append({"id": info.image_id, "file_name": info.file_name, **size})
            for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": info.image_id,
                        "category_id": int(self.category_ids[label]),
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": int(mask_api.area(mask)),
                        "iscrowd": 0,
                        "segmentation": mask | {"counts": mask["counts"].decode()},
                    }
                )
        named = zip(self.category_ids.tolist(), self.class_names, strict=True)
        categories = [{"id": key, "name": name} for key, name in named]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _where(self, item: int) -> str:
        return f"{self.root}, item {item}"

    def _item(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """(image, boxes float32 [g, 4], labels int64 [g], g COCO RLE) of the user's item, checked."""
        where, value = self._where(item), self._data[item]
        if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[1], Mapping):
            raise DataError("an item must be (image, dict)", where=where, why=f"got {type(value).__name__}")
        image, target = _checked_image(value[0], where), value[1]
        unknown = target.keys() - {"boxes", "labels", "masks"}
        if unknown or not {"labels", "masks"} <= target.keys():
            why = f"its keys are {', '.join(map(repr, target))}; labels and masks are needed, boxes may be there"
            raise DataError("an item has other annotations than expected", where=where, why=why)
        labels = np.asarray(target["labels"]).reshape(-1)
        if labels.size and (labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= self.num_classes):
            why = f"whole numbers from 0 to {self.num_classes - 1} are needed, got {labels.tolist()[:10]}"
            raise DataError("an item has labels that are no classes", where=where, why=why)
        try:
            masks = [_run_lengths(mask, *image.shape[:2]) for mask in target["masks"]]
        except (MalformedAnnotation, TypeError, ValueError) as error:
            raise DataError("an item has a mask that cannot be used", where=where, why=error) from error
        boxes = target.get("boxes")
        boxes = np.asarray(_mask_boxes(masks) if boxes is None else boxes, np.float32).reshape(-1, 4)
        if not len(boxes) == len(labels) == len(masks):
            why = f"{len(boxes)} boxes, {len(labels)} labels, {len(masks)} masks"
            raise DataError("an item has not as many boxes, labels and masks", where=where, why=why)
        limit = np.float32([image.shape[1], image.shape[0]])
        good = np.isfinite(boxes).all(1) & (np.minimum(boxes[:, 2:], limit) > np.maximum(boxes[:, :2], 0)).all(1)
        for index, mask in enumerate(masks):
            if not good[index] or not mask_api.area(mask):
                why = f"object {index}: box {boxes[index].tolist()} (x1, y1, x2, y2), {mask_api.area(mask)} pixels"
                fix = "leave such objects out of the item"
                raise DataError("an item has an object without any pixel", where=where, why=why, fix=fix)
        return image, boxes, labels.astype(np.int64), masks


def _checked_image(image, where: str) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        why = f"uint8 [H, W, 3] is needed, got {image.dtype} {list(image.shape)}"
        raise DataError("an item's image is not RGB", where=where, why=why)
    return np.ascontiguousarray(image)


def _run_lengths(mask, height: int, width: int) -> dict:
    """COCO RLE of a bitmap, of an RLE dict, or of polygons. Raises MalformedAnnotation, TypeError or ValueError."""
    if isinstance(mask, Mapping):
        counts = mask.get("counts")
        mask = dict(mask) | {"counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
        return {"size": [height, width], "counts": checked_run_lengths(mask, height, width)}
    check_drawable(height, width)
    if isinstance(mask, list):
        polygons = usable_polygons([np.asarray(part, np.float64).reshape(-1).tolist() for part in mask])
        if not polygons:
            raise MalformedAnnotation("it has no polygon of 3 points or more")
        return mask_api.merge(mask_api.frPyObjects(polygons, height, width))
    bitmap = np.asarray(mask)
    if bitmap.shape != (height, width) or not np.isin(bitmap, (0, 1)).all():
        why = f"a bitmap must be [{height}, {width}] of 0 and 1, got {list(bitmap.shape)} {bitmap.dtype}"
        raise MalformedAnnotation(why)
    return mask_api.encode(np.asfortranarray(bitmap, dtype=np.uint8))


def _mask_boxes(masks: list[dict]) -> np.ndarray:
    boxes = np.array([mask_api.toBbox(mask) for mask in masks], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
