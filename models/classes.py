"""Class tables: which label is which class. They travel inside weights files; data has to agree with them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from .errors import DataError, UsageError


def check_same_classes(
    what: str,
    left: tuple[str, Sequence[str], Sequence[int]],
    right: tuple[str, Sequence[str], Sequence[int]],
    where: str,
    fix: str,
) -> None:
    """Compares two class tables.

    Args:
        what: the error's sentence, "the weights know other classes than the data".
        left, right: (heading of its column, class names by label, category ids by label).

    Raises:
        DataError: names or ids differ, or their order: both tables side by side, the rows that differ.
    """
    first, second = ([f"{key} {name}" for key, name in zip(ids, names, strict=True)] for _, names, ids in (left, right))
    if first == second:
        return
    size = max(len(first), len(second))
    pairs = zip(*(table + [""] * (size - len(table)) for table in (first, second)), strict=True)
    rows = [(label, a, b) for label, (a, b) in enumerate(pairs) if a != b]
    width = max(len(left[0]), *(len(a) for _, a, _ in rows))
    table = [f"label  {left[0]:<{width}}  {right[0]}"] + [
        f"{i:>5}  {a:<{width}}  {b}".rstrip() for i, a, b in rows[:12]
    ]
    table += [f"... {len(rows) - 12} more"] if len(rows) > 12 else []
    raise DataError(
        what,
        where=where,
        why=f"{len(first)} classes and {len(second)}; they differ in (id and name)\n" + "\n".join(table),
        fix=fix,
    )


def find_classes(wanted: str | Sequence[str], names: Sequence[str]) -> list[int]:
    """The labels of class names; UsageError names the nearest ones for a name that is not there."""
    labels = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or list(names[:10])
            raise UsageError(f"there is no class {name!r}", fix=f"did you mean {' or '.join(near)}?")
        labels.append(list(names).index(name))
    return labels
