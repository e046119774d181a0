"""The one exception of the data pipeline."""


class DataError(Exception):
    """A data set that cannot be used as it is: what is wrong, where, why, and what mends it.

    Args:
        what: the fault in one sentence, e.g. "the annotation names an image that the file does not list".
        where: file, and annotation or image id where there is one.
        why: what was expected or what came, when `what` alone does not tell it.
        mend: a command to copy, or an action, that puts it right.
    """

    def __init__(self, what: str, where: object, why: str = "", mend: str = "") -> None:
        super().__init__(what, str(where), why, mend)  # plain arguments: the error crosses process borders by pickle
        self.what, self.where, self.why, self.mend = what, str(where), why, mend

    def __str__(self) -> str:
        lines = [self.what, f"  where: {self.where}"]
        if self.why:
            lines.append(f"  why:   {self.why}")
        if self.mend:
            lines.append(f"  mend:  {self.mend}")
        return "\n".join(lines)
