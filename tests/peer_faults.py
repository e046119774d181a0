"""One fault of another library, a row of docs/peer_faults.md: who, what input, what came of it, and what here.

The rows themselves are in peer_faults_*.py, a file for each kind of operator; test_peer_faults.py runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    peer: str
    """Libraries, with their versions where the fault was reproduced, or reports: owner/repository#number."""
    input: str
    theirs: str
    ours: str
    """What comes of it here; where `is_error`, the text of the exception."""
    call: Callable[[], object] | None = None
    """What shows it: raises, or returns whether it is as `ours` says."""
    is_error: bool = False
    tests: tuple[str, ...] = ()
    """Where other tests show it: "tests/file.py::test_function"."""


def raises(peer: str, input: str, theirs: str, error: str, call: Callable[[], object]) -> Fault:
    return Fault(peer, input, theirs, error, call, is_error=True)


def gives(peer: str, input: str, theirs: str, ours: str, check: Callable[[], object]) -> Fault:
    return Fault(peer, input, theirs, ours, check)


def tested(peer: str, input: str, theirs: str, ours: str, *tests: str) -> Fault:
    return Fault(peer, input, theirs, ours, tests=tests)
