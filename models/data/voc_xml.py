"""One XML file of PASCAL VOC: the image's size and its objects.

Such files come from strangers. A file that declares a document type or an entity is refused, so nothing can grow from
its bytes or name another file; size and depth are bounded.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from ..errors import DataError
from ..files import read_bytes

MAX_BYTES, MAX_DEPTH = 2**20, 16
"""VOC's largest file has 12 kB, and its deepest element is 5 deep."""

ENCODINGS = r"utf-?(8|16|16le|16be)|(us-)?ascii|iso-8859-\d+|windows-125\d|gbk|gb2312|gb18030|shift_jis|euc-(jp|kr)"
"""Python would look for a module of any other name."""

PARTS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocObject:
    name: str
    difficult: bool
    box: tuple[float, float, float, float]
    """(xmin, ymin, xmax, ymax) as in the file: the first and the last pixel, counted from 1."""


@dataclass(frozen=True)
class VocFile:
    height: int
    width: int
    objects: list[VocObject] = field(default_factory=list)


def read_voc_file(path: Path) -> VocFile:
    """Read Annotations/*.xml.

    Raises:
        DataError: no such file, no XML, a document type or an entity, too large, numbers that are missing or none.
    """
    try:
        data = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise DataError("the annotation of an image cannot be read", where=path, why=error.strerror) from error
    try:
        objects = _elements(data)
        top = objects.pop()
        size = tuple(_number(top, key) for key in ("size/height", "size/width"))
        return VocFile(*map(int, size), [_object(entry) for entry in objects])
    except expat.ExpatError as error:
        where, why = f"{path}, line {error.lineno}", expat.errors.messages[error.code]
        raise DataError("the annotation of an image is not XML", where=where, why=why) from error
    except (ValueError, LookupError) as error:  # LookupError: an encoding that Python does not know
        raise DataError("the annotation of an image is not VOC's", where=path, why=error) from error


def _elements(data: bytes) -> list[dict[str, str]]:
    """Texts by path: of each <object>, {"name": "dog", "bndbox/xmin": "5", ...}, and last, of all else.

    Raises ExpatError, or ValueError for what is refused.
    """
    stack: list[str] = []
    texts: list[str] = []
    rest: dict[str, str] = {}
    objects: list[dict[str, str]] = []

    def refuse(*_) -> None:
        raise ValueError("it declares a document type or an entity, which VOC's files never do")

    def declaration(_version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and not re.fullmatch(ENCODINGS, encoding, re.IGNORECASE):
            raise ValueError(f"its encoding is {encoding!r:.40}; write it in UTF-8")

    def start(tag: str, _) -> None:
        stack.append(tag)
        texts.clear()
        if len(stack) > MAX_DEPTH:
            raise ValueError(f"elements are nested more than {MAX_DEPTH} deep")
        if stack[0] != "annotation":
            raise ValueError(f"its outermost element is <{stack[0][:40]}>, not <annotation>")
        if stack[1:] == ["object"]:
            objects.append({})

    def end(_) -> None:
        inside_object = stack[1:2] == ["object"]
        entry = objects[-1] if inside_object else rest
        # the first counts: where a tool repeats an element, nothing is overwritten unseen
        entry.setdefault("/".join(stack[2:] if inside_object else stack[1:]), "".join(texts).strip())
        texts.clear()
        stack.pop()

    parser = expat.ParserCreate()
    parser.XmlDeclHandler = declaration
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = texts.append
    parser.Parse(data, True)
    return [*objects, rest]


def _object(entry: dict[str, str]) -> VocObject:
    if not entry.get("name"):
        raise ValueError("an object has no <name>")
    box = tuple(_number(entry, f"bndbox/{part}") for part in PARTS)
    if box[2] < box[0] or box[3] < box[1]:
        raise ValueError(f"the box of a {entry['name']!r} has its corners the wrong way round: {box}")
    return VocObject(entry["name"], entry.get("difficult", "0").strip() not in ("", "0"), box)


def _number(entry: dict[str, str], key: str) -> float:
    text = entry.get(key, "")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e6:  # also NaN
        raise ValueError(f"<{key}> must be a number, got {text[:40]!r}" if text else f"it has no <{key}>")
    return value
