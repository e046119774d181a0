"""A scale model of the kernels: their sources with 16 bits where they say int, for `scripts/sanitize.py narrow`.

What would wrap at 2^31 wraps here at 2^15, with tensors of a megabyte, and does not do so silently: `int` and `int32_t`
become the class of tests/native/narrow_index.h, which ends the program. int64_t stays as it is, and so does uint32_t,
which holds the bits of floats and keys of sorts. The limits that the checks of arguments derive from 31 bits shrink, so
that an operator either computes or refuses, as the real one.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLASS = "tests/native/narrow_index.h"

WHOLE_FILES = {
    "csrc/build_info.cpp": "text",
    "csrc/library.cpp": "the schemas, whose int has 64 bits",
    "csrc/cpu/simd.h": "lanes of vectors, and bits of floats; its loops count the vectors of a register",
    "csrc/cpu/transpose.h": "the same; its indices are int64_t",
    "csrc/cpu/cache_line.h": "the same",
    "csrc/cpu/exp.h": "bits of floats",
}
"""Files in which no int is an index."""

LEFT_ALONE = {
    r"template <[^>]*>": "known when compiling, and so is what is computed from these alone: a compiler sees it wrap",
    r"\bconstexpr int(32_t)?\b": "the same",
    r"\bint32_t (highest|bits);": "match_boxes: the bits of an IoU",
    r"<int32_t>::max\(\) / height": "the values of a RoI, an int in the CUDA kernels only",
    r'"(\\.|[^"\\])*"|//[^\n]*': "strings and comments",
}
"""Regular expressions of what stays as it is."""

SCALED = {
    ("csrc/checks.h", "limit = int64_t{1} << 23"): "limit = int64_t{1} << 14",  # pixels along an axis of a pasted mask
    ("csrc/checks_preprocess.h", "limit = int64_t{1} << 23"): "limit = int64_t{1} << 14",  # and of a batch
    ("csrc/checks_polygon.h", "output_size <= 4096"): "output_size <= 128",  # its square and a row, 2^24, are an int
    ("csrc/common/polygon.h", "kFarthestLine = 1 << 28"): "kFarthestLine = 1 << 13",  # the sum of two is an int
}
"""Limits written as numbers that keep an int below 2^31, and what does so below 2^15."""

NARROW = "::cascadeops::Narrow"
TOKEN = re.compile(
    "|".join(f"(?:{pattern})" for pattern in LEFT_ALONE)
    + r"|(?P<tensor>\w+\.const_data_ptr<int32_t>\(\))"
    + r"|(?P<literal>(?<=[?:] )-?\d+(?![\w.]))"  # of c ? 0 : x, where int and the class have no common type
    + r"|(?P<index>\bint(?:32_t)?\b)"
)


def replacement(token: re.Match) -> str:
    if token["tensor"]:
        return f"reinterpret_cast<const {NARROW}*>({token[0]})"
    if token["literal"]:
        return f"{NARROW}({token[0]})"
    return NARROW if token["index"] else token[0]


def narrowed(path: str) -> str:
    """The text of a source, in which every int is narrow."""
    text = (ROOT / path).read_text()
    if path in WHOLE_FILES:
        return text
    for (file, limit), small in SCALED.items():
        if file == path:
            assert text.count(limit) == 1, f"{path} has no {limit}"
            text = text.replace(limit, small)
    return TOKEN.sub(replacement, text)


def write(folder: Path) -> None:
    """The sources and headers of the CPU kernels, under folder/csrc; a file that is as it was keeps its time."""
    for path in [*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc/common").iterdir(), *(ROOT / "csrc/cpu").iterdir()]:
        name = str(path.relative_to(ROOT))
        target, text = folder / name, narrowed(name)
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
