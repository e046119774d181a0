"""Several splits as one data set: VOC's trainval of 2007 and of 2012, COCO's train2014 and valminusminival2014."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ..classes import check_same_classes
from ..errors import DataError
from .dataset import AnnotatedImages, ImageInfo, VocMetric
from .transforms import Augmentation, Sample


class JoinedImages:
    """The images of the parts, one part after the other; it gives what `AnnotatedImages` gives.

    Args:
        parts: with the same classes, and no image id in two of them. All have stuff maps, or none has.

    Raises:
        DataError: classes, ids or stuff maps do not go together.
    """

    def __init__(self, parts: Sequence[AnnotatedImages]) -> None:
        first = parts[0]
        for part in parts[1:]:
            check_same_classes(
                "the parts of the data set have different classes",
                (first.split, first.class_names, first.category_ids),
                (part.split, part.class_names, part.category_ids),
                where=f"{first.annotation_file} and {part.annotation_file}",
                fix="give all the same categories",
            )
        self._parts, self._ends = parts, [*accumulate(map(len, parts))]
        self.root = first.root
        self.split = "+".join(part.split for part in parts)
        self.annotation_file = " + ".join(str(part.annotation_file) for part in parts)
        self.class_names, self.category_ids, self.num_classes = first.class_names, first.category_ids, first.num_classes
        self.has_semantic = first.has_semantic
        if any(part.has_semantic != first.has_semantic for part in parts):
            have = ", ".join(part.split for part in parts if part.has_semantic)
            why = f"only {have} has them"
            raise DataError("some parts have no stuff maps", where=first.root, why=why, fix="--semantic no")
        ids = np.concatenate([part.image_ids for part in parts])
        found, counts = np.unique(ids, return_counts=True)
        if counts.max() > 1:
            why = f"{(counts > 1).sum()} image ids are in more than one part, the first is {found[counts.argmax()]}"
            raise DataError("parts of the data set share images", where=self.annotation_file, why=why)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sizes(self) -> np.ndarray:
        """int32 [len(self), 2] (height, width) of the image files."""
        return np.concatenate([part.sizes for part in self._parts])

    @property
    def num_semantic_classes(self) -> int:
        return max(part.num_semantic_classes for part in self._parts)

    @property
    def objects_left_out(self) -> dict[str, int]:
        return dict(sum((Counter(part.objects_left_out) for part in self._parts), Counter()))

    @property
    def images_left_out(self) -> dict[str, int]:
        return dict(sum((Counter(part.images_left_out) for part in self._parts), Counter()))

    @property
    def voc(self) -> VocMetric | None:
        """VOC's metric, if the parts are scored alike."""
        return self._parts[0].voc if len({part.voc for part in self._parts}) == 1 else None

    def image_info(self, index: int) -> ImageInfo:
        part, inside = self._find(index)
        return part.image_info(inside)

    def image(self, index: int) -> np.ndarray:
        part, inside = self._find(index)
        return part.image(inside)

    def semantic_map(self, index: int) -> np.ndarray | None:
        part, inside = self._find(index)
        return part.semantic_map(inside)

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part, inside = self._find(index)
        return part.objects(inside)

    def mask(self, index: int, which: int) -> np.ndarray:
        part, inside = self._find(index)
        return part.mask(inside, which)

    def sample(
        self,
        index: int,
        resize: tuple[int, int] | None,
        augmentation: Augmentation | None = None,
        random: np.random.Generator | None = None,
        resize_image_too: bool = True,
    ) -> Sample:
        part, inside = self._find(index)
        return part.sample(inside, resize, augmentation, random, resize_image_too)

    def ground_truth(self) -> dict:
        """The parts' annotations as the content of one COCO file; annotations are numbered anew."""
        contents = [part.ground_truth() for part in self._parts]
        annotations = [annotation for content in contents for annotation in content["annotations"]]
        return {
            "images": [image for content in contents for image in content["images"]],
            "annotations": [entry | {"id": number} for number, entry in enumerate(annotations, 1)],
            "categories": contents[0]["categories"],
        }

    def _find(self, index: int) -> tuple[AnnotatedImages, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], int(index) - (self._ends[number] - len(self._parts[number]))
