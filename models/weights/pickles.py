"""Reads a pickle as data. No class is looked up, nothing is called: what the pickle asks for comes back as a record.

A pickle is a program for a small stack machine. Python's own machine imports and calls whatever the program names;
this one, over the standard library's disassembler (`pickletools.genops`), has no instruction that does either. A global
name becomes a `Global`, a call becomes a `Call` with its arguments. Whoever reads the result decides by name what a
record means: torch_files.py knows the few that make a tensor, paddle.py those that make a NumPy array.
"""

from __future__ import annotations

import pickletools
from typing import BinaryIO, NamedTuple

MAX_OPERATIONS = 400_000
"""A training state of 1,500 tensors and its optimizer take 150,000; this many take about half a second."""
MAX_DEPTH = 1000
"""Of tuples in tuples; those of weights files are 4 deep."""
MAX_HEIGHT = 100_000
"""Of what waits to be put together; pickle itself puts dicts and lists together in thousands."""
SCALARS = (str, bytes, int, float, bool, type(None))
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
IGNORED = {"PROTO", "FRAME"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUSH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
DICTIONARIES = {("collections", "OrderedDict"), ("builtins", "dict"), ("__builtin__", "dict")}


class PickleFault(ValueError):
    """The bytes are no pickle, or one that asks for more than data; the text says what."""


class Global(NamedTuple):
    """A name that the pickle wanted to be imported; it is not."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """A call that the pickle wanted: `function(*arguments)`, and what it wanted to be set on the result."""

    __slots__ = ("arguments", "function", "state")

    def __init__(self, function: object, arguments: object):
        self.function, self.arguments, self.state = function, arguments, None

    def __repr__(self) -> str:
        name = self.function if isinstance(self.function, Global) else "something"
        return f"<{name}(...), not called>"


PERSISTENT = Global("", "persistent_load")
"""The function of a `Call` for an object kept outside of the pickle; its one argument is the object's id."""


def read_pickle(file: BinaryIO) -> object:
    """The data of the pickle at the file's position, which is left behind its last byte.

    Returns:
        Dicts (ordered ones too), lists, tuples, strings, bytes, numbers, None; `Global` and `Call` for all else.

    Raises:
        PickleFault: damaged, longer than `MAX_OPERATIONS`, or with a key that is no plain value.
    """
    try:
        return _run(file)
    except PickleFault:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise PickleFault(f"it is no intact pickle: {str(error)[:200] or type(error).__name__}") from None


def _run(file: BinaryIO) -> object:
    stack: list[object] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, object] = {}
    depths: dict[int, int] = {}  # of a tuple by its id, which a later one may have again, and then writes anew

    def items() -> list[object]:
        """What was pushed since the last mark."""
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    def checked_tuple(found: list[object]) -> tuple:
        made = tuple(found)
        depths[id(made)] = 1 + max((depths.get(id(part), 0) for part in found if type(part) is tuple), default=0)
        if depths[id(made)] > MAX_DEPTH:
            raise PickleFault(f"tuples in tuples, more than {MAX_DEPTH:,} deep")
        return made

    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count == MAX_OPERATIONS:
            raise PickleFault(f"it has more than {MAX_OPERATIONS:,} operations")
        if len(stack) > MAX_HEIGHT:
            raise PickleFault(f"it puts more than {MAX_HEIGHT:,} values together at once")
        name = operation.name
        if name in PUSH_ARGUMENT:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(checked_tuple(items()))
        elif name in TUPLES:
            size = TUPLES[name]
            found = stack[len(stack) - size :]
            if len(found) != size:
                raise PickleFault("a tuple of more than there is")
            del stack[len(stack) - size :]
            stack.append(checked_tuple(found))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name in ("LIST", "FROZENSET"):
            stack.append(items())
        elif name == "DICT":
            found = items()
            stack.append({})
            _set_items(stack[-1], found)
        elif name == "APPEND":
            value = stack.pop()
            _append(stack[-1], [value])
        elif name in ("APPENDS", "ADDITEMS"):
            found = items()
            _append(stack[-1], found)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            found = items()
            _set_items(stack[-1], found)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_global(argument, stack))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "NEWOBJ_EX":
            stack.pop()  # keyword arguments
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "OBJ":
            function, *arguments = items()
            stack.append(_call(function, tuple(arguments)))
        elif name == "INST":
            arguments = tuple(items())
            stack.append(_call(Global(*argument.split(" ", 1)), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Call):  # the attributes of a dict (a state dict's `_metadata`) hold no weights
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(Call(PERSISTENT, (stack.pop(),)))
        elif name == "PERSID":
            stack.append(Call(PERSISTENT, (argument,)))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            items()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name not in IGNORED:
            raise PickleFault(f"the operation {name} is not one that weights need")
    raise PickleFault("it ends before its end")


def _global(argument: str | None, stack: list[object]) -> Global:
    if argument is not None:
        return Global(*argument.split(" ", 1))
    name, module = stack.pop(), stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleFault("a global name that is no text")
    return Global(module, name)


def _call(function: object, arguments: object) -> object:
    """The record of a call; an ordered dict is plain data and becomes a dict."""
    if not isinstance(function, Global) or function not in DICTIONARIES or not isinstance(arguments, tuple):
        return Call(function, arguments)
    made: dict = {}
    for pair in arguments[0] if arguments else ():  # Python 2 wrote [[key, value], ...]
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise PickleFault("an ordered dict of something else than pairs")
        _set_items(made, list(pair))
    return made


def _append(target: object, values: list[object]) -> None:
    if isinstance(target, list):
        target += values
    elif not isinstance(target, Call):
        raise PickleFault(f"values are appended to a {type(target).__name__}")


def _set_items(target: object, values: list[object]) -> None:
    if isinstance(target, Call):
        return
    if not isinstance(target, dict) or len(values) % 2:
        raise PickleFault(f"items are set on a {type(target).__name__}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        # The hash of a tuple is recursive: a deep one ends the process, one of shared parts takes for ever.
        if isinstance(key, SCALARS):
            target[key] = value
        elif isinstance(key, Global | Call):
            target[str(key)] = value
        elif isinstance(key, tuple):
            target[f"tuple {len(target)}"] = value
        else:
            raise PickleFault(f"a dict has a {type(key).__name__} as a key")
