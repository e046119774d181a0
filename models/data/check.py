"""Looks through a data set on disk for everything that stops training, is left out of it, or is doubtful."""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, UsageError, UserError, printable
from ..files import explained
from ..images import image_size, path_inside, read_image, read_label_map
from ..progress import Progress
from .annotation_json import in_chunks, read_in_chunks
from .annotations import is_inside, name_from_url
from .check_annotations import AnnotationChecker, usable_categories, usable_image
from .coco import existing_folder, find_split
from .findings import Finding, Findings
from .mended_copy import CocoCopy, Split, VocCopy
from .voc import is_voc, voc_splits, year_folder

IMAGE_OUT = "image and its annotations taken out"
MAP_REPLACED = "a map without labels (255) in its place"


class Look(NamedTuple):
    """What is seen of an image file and its stuff map."""

    kind: str | None
    """of fault"""
    detail: str = ""
    digest: str | None = None
    """of the image file"""
    map_fault: str | None = None


def check_dataset(
    root: Path, splits: tuple[str, ...] = (), fix: Path | None = None, quick: bool = False, workers: int = 1
) -> tuple[Findings, dict[str, Path]]:
    """(what is wrong, the image folder of each split) of a folder in COCO's or VOC's layout.

    Args:
        splits: their names; all that are there by default.
        fix: a new folder for a mended copy in the same layout: annotations, hard links to the images (copies where the
            disk has none), maps, and changes.json. Nothing in `root` is changed.
        quick: read only the headers of images, which finds no truncated ones and no duplicates.
        workers: processes that read images.

    Raises:
        DataError: there is nothing that could be checked. UsageError: `fix` is not new.
    """
    root = existing_folder(root)
    findings, folders, seen = Findings(), {}, {}
    with _new_folder(fix) as folder:
        copy = None
        if folder is not None:
            copy = VocCopy(year_folder(root), folder) if is_voc(root) else CocoCopy(root, folder)
        for split in _splits(root, splits, findings):
            folders[split.name] = split.image_folder
            _check_split(split, findings, seen, copy, quick, workers)
        if copy is not None:
            copy.finish()
            (folder / "changes.json").write_text(json.dumps(findings.as_json(), indent=1, default=str))
    return findings, folders


def _splits(root: Path, names: tuple[str, ...], findings: Findings) -> Iterator[Split]:
    """Validation and test before training: where an image is in both, it is training that loses it."""
    if is_voc(root):
        folder = year_folder(root)
        for name, source, content in voc_splits(root, names, lambda *fault: findings.add(_voc_fault(*fault))):
            chunks, boxes_only = in_chunks(content.pop("annotations")), source.parent.name == "Main"
            yield Split(name, source, folder / "JPEGImages", None, content, chunks, boxes_only)
        for file in sorted((folder / "Annotations").glob("pascal_*.json")):
            if not names or file.stem in names:
                yield _coco_split(file.stem, file, folder / "JPEGImages", None)
        return
    if not names:
        files = [path.stem for kind in ("instances", "lvis_v1") for path in root.glob(f"annotations/{kind}_*.json")]
        names = {name.removeprefix("instances_").removeprefix("lvis_v1_") for name in files}
        if not names:
            why = "it holds no annotations/instances_*.json or lvis_v1_*.json, and no JPEGImages and Annotations"
            raise DataError("there is no data set to check", where=root, why=why)
    for name in sorted(names, key=lambda name: (name.startswith("train"), name)):
        file, folder = find_split(root, name)
        maps = root / "stuffthingmaps" / folder.name
        yield _coco_split(name, file, folder, maps if maps.is_dir() else None)


def _coco_split(name: str, file: Path, image_folder: Path, map_folder: Path | None) -> Split:
    content, chunks = read_in_chunks(file)
    lists = content if isinstance(content, dict) else {}
    missing = [key for key in ("images", "categories") if not isinstance(lists.get(key), list)]
    if missing or chunks is None:
        why = f"it has no list {', '.join(missing or ['annotations'])}"
        raise DataError("the annotation file is not COCO", where=file, why=why)
    for entry in content["images"]:
        if isinstance(entry, dict) and entry.get("file_name") is None and (own := name_from_url(entry)) is not None:
            entry["file_name"] = own
    return Split(name, file, image_folder, map_folder, content, chunks)


def _voc_fault(split: str, name: str, error: UserError) -> Finding:
    return Finding("unreadable annotation of an image", split, name, None, f"{error.what}: {error.why}", IMAGE_OUT)


def _check_split(
    split: Split, findings: Findings, seen: dict, copy: CocoCopy | VocCopy | None, quick: bool, workers: int
) -> None:
    images, categories = split.content["images"], split.content["categories"]
    if not images or not categories:
        detail = f"{len(images)} images, {len(categories)} categories"
        findings.add(Finding("no images or no categories", split.name, "", None, detail, "left as it is"))
    categories = usable_categories(categories, split.name, split.source, findings)
    split = split._replace(content=split.content | {"categories": categories})
    images, dropped, unlabelled = _check_images(split, findings, seen, quick, workers)
    kept = {id(entry) for entry in images.values()}
    entries = [entry for entry in split.content["images"] if id(entry) in kept]
    category_ids = {category["id"] for category in categories}
    checker = AnnotationChecker(findings, split.name, images, dropped, category_ids, split.boxes_only)
    with nullcontext() if copy is None else copy.annotations(split, entries, unlabelled) as take:
        for annotation in itertools.chain.from_iterable(split.chunks):
            mended = checker.mended(annotation)
            if take is not None:
                take(annotation, mended)


def _check_images(
    split: Split, findings: Findings, seen: dict[str, str], quick: bool, workers: int
) -> tuple[dict[int, dict], dict[int, str], set[str]]:
    """(usable images by id, names of the images taken out by id, names of those whose stuff map cannot be used).
    `seen`: digest of a file -> file, over all splits."""
    images: dict[int, dict] = {}
    unlabelled: set[str] = set()
    dropped: dict[int, str] = {}
    names: set[str] = set()

    def found(kind: str, entry: object, detail: str) -> None:
        name = entry.get("file_name", "") if isinstance(entry, dict) else ""
        findings.add(Finding(kind, split.name, str(name), None, detail, IMAGE_OUT))

    for entry in split.content["images"]:
        fault = usable_image(entry, split.source)
        if fault is not None:
            found("image entry that cannot be used", entry, fault)
            if isinstance(entry, dict) and type(entry.get("id")) is int:
                dropped[entry["id"]] = str(entry.get("file_name"))
        elif entry["id"] in images:
            found("image id used twice", entry, f"id {entry['id']}, also of {images[entry['id']]['file_name']}")
        elif entry["file_name"] in names:
            found("same image twice", entry, "the split lists this file twice")
            dropped[entry["id"]] = entry["file_name"]
        else:
            images[entry["id"]] = entry
            names.add(entry["file_name"])
    folders = split.image_folder, split.map_folder
    tasks = [(folders, e["file_name"], (e["height"], e["width"]), quick) for e in images.values()]
    with Progress(printable(f"images of {split.name}"), total=max(len(tasks), 1), unit="images") as progress:
        for identity, look in zip(list(images), _in_processes(tasks, workers), strict=True):
            progress.advance(1)
            kind, detail, digest = look[:3]
            here = str(split.image_folder / images[identity]["file_name"])
            if kind is None and digest is not None and seen.setdefault(digest, here) != here:
                kind, detail = "same image twice", f"the same bytes as {seen[digest]}"
            if kind is not None:
                entry = images.pop(identity)
                dropped[identity] = entry["file_name"]
                found(kind, entry, detail)
            elif look.map_fault is not None:
                name = images[identity]["file_name"]
                unlabelled.add(name)
                findings.add(Finding("unusable stuff map", split.name, name, None, look.map_fault, MAP_REPLACED))
    return images, dropped, unlabelled


def _in_processes(tasks: list[tuple], workers: int) -> Iterator[Look]:
    if workers < 2 or len(tasks) < 100:
        yield from map(_look, tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_look, tasks, chunksize=16)


def _look(task: tuple[tuple[Path, Path | None], str, tuple[int, int], bool]) -> Look:
    (folder, map_folder), name, size, quick = task
    try:
        if not is_inside(name):
            return Look("image outside its folder", "the name is absolute, or goes up")
        path = path_inside(folder, name)
    except DataError as error:
        return Look("image outside its folder", str(error.why))
    try:
        if not path.exists():
            return Look("missing image", f"no file {path}")
        found = image_size(path) if quick else read_image(path, upright=False).shape[:2]
        if not quick and found != size == found[::-1]:
            found = read_image(path).shape[:2]  # as the reader does: the annotations may mean the upright picture
        digest = None if quick else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except (UserError, OSError) as error:
        return Look("unreadable image", " ".join(str(error).split()))
    if found != size and not (quick and found[::-1] == size):
        return Look("size other than annotated", f"(height, width) is {tuple(found)}, annotated is {size}")
    return Look(None, "", digest, None if map_folder is None else _map_fault(map_folder, name, size, quick))


def _map_fault(folder: Path, name: str, size: tuple[int, int], quick: bool) -> str | None:
    try:
        path = path_inside(folder, Path(name).with_suffix(".png"))
        found = image_size(path) if quick else read_label_map(path).shape
    except UserError as error:
        return " ".join(str(error).split())
    return None if found == size else f"(height, width) is {tuple(found)}, of the image {size}"


@contextmanager
def _new_folder(target: Path | None) -> Iterator[Path | None]:
    """A folder that becomes `target` when the block ends well, and goes away otherwise."""
    if target is None:
        yield None
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("the folder for the mended copy is not new", where=target, fix=f"--fix {target}-2")
    unread: UserError | None = None
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            copy = Path(temporary) / "copy"
            try:
                yield copy
                os.replace(copy, target)
            except UserError as error:
                unread = error  # it says what could not be read, and is none of writing, whatever the system said
    if unread is not None:
        raise unread
