"""Errors that a person can mend. Each says what is wrong, where, why, and what to do; a program shows no traceback."""

import unicodedata


class UserError(Exception):
    """A fault in what the program was given, rather than in the program.

    Args:
        what: one sentence, "weights file not found".
        where: file, file and line, annotation id or option that it is about.
        why: the rule that was broken, or what the system said.
        fix: what mends it, best a command to copy. Several lines are fine.

    `exit_code` is what a command-line program ends with: 2 usage, 3 data, 4 environment.
    """

    exit_code = 2
    told_by_another = False
    """Whether another process of the job tells it, so that a person reads it once."""

    def __init__(self, what: str, where: object = None, why: object = None, fix: str | None = None):
        self.what, self.fix = printable(what), None if fix is None else printable(fix)
        self.where = None if where is None else printable(str(where))
        self.why = None if why is None else printable(str(why))
        # plain arguments, so that the error can be pickled: it may come from a worker process
        super().__init__(self.what, self.where, self.why, self.fix)

    def __str__(self) -> str:
        parts = [("where", self.where), ("why", self.why), ("fix", self.fix)]
        lines = [f"  {name + ':':<6} " + text.replace("\n", "\n" + " " * 9) for name, text in parts if text]
        return "\n".join([self.what, *lines])


def printable(text: str) -> str:
    """`text` without what could steer a terminal, and not longer than a person reads: file names, class names and other
    words of a data set or a checkpoint get into messages."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 50]} ... ({len(text):,} characters)"
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character == "\n" or unicodedata.category(character) == "Zs"


LONGEST = 10_000


class UsageError(UserError):
    """The command line or the arguments of a call: an unknown option, a wrong type, an output folder that is a file."""

    exit_code = 2


class DataError(UserError):
    """What was read: images, annotations, weights."""

    exit_code = 3


class MachineError(UserError):
    """What it runs on: a full disk, a missing package, no GPU."""

    exit_code = 4
