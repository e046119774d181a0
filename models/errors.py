"""Errors that a person can mend. Each says what is wrong, where, why, and what to do; a program shows no traceback."""


class UserError(Exception):
    """A fault in what the program was given, rather than in the program.

    Args:
        what: one sentence, "weights file not found".
        where: file, file:line, annotation id or option that it is about.
        why: the rule that was broken, or what the system said.
        fix: what mends it, best a command to copy. Several lines are fine.

    `exit_code` is what a command-line program ends with: 2 usage, 3 data, 4 environment.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, why: object = None, fix: str | None = None):
        self.what = what
        self.where = None if where is None else str(where)
        self.why = None if why is None else str(why)
        self.fix = fix
        parts = [("where", self.where), ("why", self.why), ("fix", self.fix)]
        lines = [f"  {name + ':':<6} " + text.replace("\n", "\n" + " " * 9) for name, text in parts if text]
        super().__init__("\n".join([what, *lines]))


class UsageError(UserError):
    """The command line or the arguments of a call: an unknown option, a wrong type, an output folder that is a file."""

    exit_code = 2


class DataError(UserError):
    """What was read: images, annotations, weights."""

    exit_code = 3


class MachineError(UserError):
    """What it runs on: a full disk, a missing package, no GPU."""

    exit_code = 4
