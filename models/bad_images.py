"""Broken images that a run met and left out: each named once, all counted, and not too many."""

from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import DataError

SHARE, AT_LEAST = 1000, 10
"""One image in so many may be broken, and this number in any case."""


class BadImages:
    """Notes them in OUTPUT/bad_images.txt, one a line, which a resumed run goes on with, and all processes of a job.

    Args:
        images: how many there are to train on, in all processes.
        tell: called with a line for a person.
    """

    def __init__(self, output: Path, images: int, tell: Callable[[str], None]) -> None:
        self._path, self._tell = output / "bad_images.txt", tell
        self._most = max(AT_LEAST, images // SHARE)
        self._known = self._noted()

    def note(self, broken: Iterable[str]) -> None:
        """Raises DataError when there are too many."""
        for text in broken:
            line = " ".join(text.splitlines())
            if line in self._known:
                continue
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._known = self._noted()
            self._tell(f"bad image {len(self._known)}, another takes its place: {line}")
        if len(self._known) > self._most:
            raise DataError(
                "too many images cannot be used",
                where=self._path,
                why=f"{len(self._known)} of them, more than {self._most}",
                fix="mend the data set: the file names what is wrong",
            )

    def _noted(self) -> set[str]:
        return set(self._path.read_text(encoding="utf-8").splitlines()) if self._path.exists() else set()
