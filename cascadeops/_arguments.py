"""What is asked of arguments before a kernel sees them; the kernels' own checks are csrc/checks.h.

Errors name the operator, the argument, the rule and what came, in the words of the kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensors(operator: str, optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """Dense tensors, or None for an optional one. TypeError: no tensor; RuntimeError: a sparse or nested one."""
    given = {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    for name, value in (tensors | given).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            kind = "nested" if value.is_nested else "quantized" if value.is_quantized else _name_of(value.layout)
            raise RuntimeError(f"{operator}: {name} must be a dense tensor, got a {kind} one")


def as_float32(operator: str, **tensors: Tensor) -> list[Tensor]:
    """The arguments in float32, without gradient. Raises as as_floating."""
    return [as_floating(operator, name, tensor).float() for name, tensor in tensors.items()]


def as_floating(operator: str, name: str, tensor: Tensor) -> Tensor:
    """The argument without gradient. Raises as check_tensors; RuntimeError: no floating dtype."""
    check_tensors(operator, **{name: tensor})
    if not tensor.dtype.is_floating_point:
        raise RuntimeError(f"{operator}: {name} must have a floating dtype, got {_name_of(tensor.dtype)}")
    return tensor.detach()


def as_int64(operator: str, name: str, tensor: Tensor) -> Tensor:
    """An integer argument in int64. Raises as check_tensors; RuntimeError: no integer dtype."""
    check_tensors(operator, **{name: tensor})
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise RuntimeError(f"{operator}: {name} must have an integer dtype, got {_name_of(tensor.dtype)}")
    return tensor.to(torch.int64)


def height_and_width(operator: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), for which one number may stand. TypeError: anything else."""
    numbers = (value, value) if isinstance(value, int | torch.SymInt) else value
    is_pair = isinstance(numbers, tuple | list | torch.Size) and len(numbers) == 2
    if not is_pair or not all(isinstance(number, int | torch.SymInt) for number in numbers):
        raise TypeError(f"{operator}: {name} must be two integers (height, width), got {value!r}")
    return tuple(numbers)


def as_list(operator: str, name: str, values: Sequence[Any], kind: type | tuple[type, ...]) -> list[Any]:
    """A list of one kind of object. TypeError: anything else."""
    is_list = isinstance(values, list | tuple)
    if not is_list or not all(isinstance(value, kind) for value in values):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        found = f"a list of {', '.join(type(value).__name__ for value in values)}" if is_list else type(values).__name__
        raise TypeError(f"{operator}: {name} must be a list of {wanted}, got {found}")
    return list(values)


def check_shapes(operator: str, **arguments: tuple[Tensor | None, str]) -> None:
    """For fake kernels: raises where the real kernel finds a wrong shape, or another device than the first argument's.

    Args:
        operator: its name.
        arguments: name -> (tensor, or None for one that was left out; the sizes it must have, such as "B N 4"). A
            letter stands for the same size wherever it appears, and "*" for any.
    """
    sizes: dict[str, int] = {}
    first = next(iter(arguments))
    device = arguments[first][0].device
    for name, (tensor, pattern) in arguments.items():
        if tensor is None:
            continue
        letters = pattern.split()
        shape = list(tensor.shape)
        rule = f"{operator}: {name} must have shape [{', '.join(letters)}]"
        torch._check(len(shape) == len(letters), lambda rule=rule, shape=shape: f"{rule}, got {shape}")
        for letter, size in zip(letters, shape, strict=True):
            if letter == "*":
                continue
            wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            torch._check(
                size == wanted,
                lambda rule=rule, shape=shape, letter=letter, wanted=wanted: (
                    f"{rule} with {letter} = {wanted}, got {shape}"
                ),
            )
        torch._check(tensor.device == device, lambda name=name: f"{operator}: {name} must be on the device of {first}")


def check_range(operator: str, name: str, value: int, low: int, high: int) -> None:
    """For fake kernels: a size in [low, high]."""
    torch._check(low <= value <= high, lambda: f"{operator}: {name} must be in [{low}, {high}], got {value}")


def _name_of(dtype_or_layout: torch.dtype | torch.layout) -> str:
    return str(dtype_or_layout).removeprefix("torch.")
