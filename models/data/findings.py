"""What may be wrong with a data set: one table of kinds, and one record for each fault that was found."""

from collections import Counter
from dataclasses import asdict, dataclass, field

REFUSED, LEFT_OUT, DOUBTFUL, FOLLOWS = "stops training", "left out of training", "doubtful", "follows"

KINDS = {
    # lists
    "no images or no categories": REFUSED,
    "category that cannot be used": REFUSED,
    # images
    "missing image": REFUSED,
    "unreadable image": REFUSED,
    "image outside its folder": REFUSED,
    "image entry that cannot be used": REFUSED,
    "image id used twice": REFUSED,
    "size other than annotated": REFUSED,
    "same image twice": DOUBTFUL,
    "unusable stuff map": REFUSED,
    "unreadable annotation of an image": REFUSED,
    # annotations
    "annotation lacks a key": REFUSED,
    "annotation id used twice": REFUSED,
    "annotation of an unknown image": REFUSED,
    "annotation of an unknown category": REFUSED,
    "mask of another size": REFUSED,
    "malformed mask": REFUSED,
    "empty polygon": LEFT_OUT,
    "self-crossing polygon": DOUBTFUL,
    "mask without a pixel": DOUBTFUL,
    "no mask": REFUSED,
    "malformed box": REFUSED,
    "box under 1 pixel": LEFT_OUT,
    "box outside its image": LEFT_OUT,
    "box reaches beyond its image": DOUBTFUL,
    "box disagrees with its mask": DOUBTFUL,
    "no area": LEFT_OUT,
    "same annotation twice": DOUBTFUL,
    "annotation of an image taken out": FOLLOWS,
}
"""What each kind means for training as the data set is."""

SHOWN = 6
"""So many of each kind come with a picture in the page."""


@dataclass(frozen=True)
class Finding:
    kind: str
    split: str
    image: str
    """Its file name; empty where there is none."""
    annotation: object
    """The annotation's id; None for a fault of an image."""
    detail: str
    change: str
    """What --fix does about it."""


@dataclass
class Findings:
    """All faults of a data set, and for the first of each kind the annotations as they were."""

    all: list[Finding] = field(default_factory=list)
    examples: dict[str, list[tuple[Finding, dict | None]]] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)

    def add(self, finding: Finding, annotation: dict | None = None) -> None:
        self.all.append(finding)
        self.counts[finding.kind] += 1
        examples = self.examples.setdefault(finding.kind, [])
        if len(examples) < SHOWN:
            examples.append((finding, annotation))

    @property
    def serious(self) -> bool:
        """Whether training stops, or leaves something out."""
        return any(KINDS[kind] in (REFUSED, LEFT_OUT) for kind in self.counts)

    def as_json(self) -> list[dict]:
        return [asdict(finding) for finding in self.all]
