"""The classes of bad and of odd input, as functions that spoil one argument of a good call.

A fault is a row of the tables in docs/bad_input.md. `harmless` ones change how the values are stored, not the values:
the result has to be that of a plain copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAN, INFINITY = float("nan"), float("inf")
LARGE = 2**31
"""Elements along a dimension that 32 bits cannot count."""


@dataclass(frozen=True)
class Fault:
    name: str
    applies: Callable[[str, Any], bool]
    """(argument's name, its value) -> whether the fault means anything there."""
    change: Callable[[Any], Any]
    harmless: bool = False


class Subclass(torch.Tensor):
    """A tensor subclass without behaviour of its own."""


def is_tensor(_, value) -> bool:
    return isinstance(value, Tensor)


def is_floating(_, value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_boxes(name, value) -> bool:
    return is_floating(name, value) and (name in ("rois", "anchors") or name.endswith("boxes"))


def is_rois(name, value) -> bool:
    return is_floating(name, value) and name in ("rois", "boxes") and value.shape[-1] == 5


def is_index(_, value) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.uint8


def is_kind(*kinds: type) -> Callable[[str, Any], bool]:
    return lambda _, value: type(value) in kinds


def is_list_of(kind: type) -> Callable[[str, Any], bool]:
    return lambda _, value: isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def one_element(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor):
        tensor = tensor.clone()
        tensor[tuple(size // 2 for size in tensor.shape)] = value
        return tensor

    return change


def one_box(*corners: float) -> Callable[[Tensor], Tensor]:
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1, tensor.shape[-1])[1, -4:] = torch.tensor(corners, dtype=tensor.dtype)
        return tensor

    return change


def one_batch_index(value: float) -> Callable[[Tensor], Tensor]:
    def change(rois):
        rois = rois.clone()
        rois[1, 0] = value
        return rois

    return change


def first_row_everywhere(tensor: Tensor) -> Tensor:
    return tensor.narrow(max(tensor.dim() - 2, 0), 0, 1).expand_as(tensor).clone()


def misaligned(tensor: Tensor) -> Tensor:
    """The values one byte away from where their type may lie."""
    memory = bytearray(1) + bytearray(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def values() -> Iterator[Fault]:
    one = {
        "NaN": NAN, "+inf": INFINITY, "-inf": -INFINITY, "denormal": 1e-42, "-0.0": -0.0, "largest float32": 3.4028e38,
        "1e30": 1e30, "3e9 (past int32)": 3e9,
    }  # fmt: skip
    for name, value in one.items():
        yield Fault(f"value {name}", is_floating, one_element(value))
    for name, value in {"NaN": NAN, "+inf": INFINITY, "0": 0.0, "1e30": 1e30}.items():
        yield Fault(f"every value {name}", is_floating, lambda t, value=value: torch.full_like(t, value))
    yield Fault("values sorted", is_floating, lambda t: t.flatten().sort().values.view(t.shape))
    yield Fault("values reversed", is_floating, lambda t: t.flatten().flip(0).view(t.shape))
    yield Fault("all rows equal (ties)", is_floating, first_row_everywhere)
    boxes = {
        "inverted": (9, 9, 2, 2), "without area": (5, 5, 5, 5), "one pixel": (5, 5, 6, 6),
        "outside": (900, 900, 950, 950), "huge": (-1e6, -1e6, 1e6, 1e6), "past int32": (-3e9, -3e9, 3e9, 3e9),
        "absurd": (-1e30, -1e30, 1e30, 1e30), "width overflows": (-3e38, -3e38, 3e38, 3e38),
        "NaN in every coordinate": (NAN,) * 4, "inf in every coordinate": (INFINITY,) * 4,
    }  # fmt: skip
    for name, corners in boxes.items():
        yield Fault(f"box {name}", is_boxes, one_box(*corners))
    numbers = {
        "N - 1": 1, "N": 2, "-1": -1, "-2": -2, "0.5": 0.5, "1000": 1000, "1e9": 1e9, "2^24 + 2": 2**24 + 2,
        "NaN": NAN, "inf": INFINITY, "1e30": 1e30,
    }  # fmt: skip
    for name, value in numbers.items():
        yield Fault(f"batch index {name}", is_rois, one_batch_index(value))
    integers = {"N - 1": 1, "N": 2, "-1": -1, "-2": -2, "1e6": 10**6, "2^31 - 1": 2**31 - 1, "-2^31": -(2**31)}
    for name, value in integers.items():
        yield Fault(f"integer {name}", is_index, one_element(value))
    for name, value in {"2^63 - 1": 2**63 - 1, "-2^63": -(2**63)}.items():
        yield Fault(f"integer {name}", lambda n, v: is_index(n, v) and v.dtype == torch.int64, one_element(value))


def shapes() -> Iterator[Fault]:
    for axis in range(4):

        def has(name, value, axis=axis):
            return isinstance(value, Tensor) and value.dim() > axis

        yield Fault(f"dimension {axis} empty", has, lambda t, axis=axis: t.narrow(axis, 0, 0))
        yield Fault(f"dimension {axis} of 1", has, lambda t, axis=axis: t.narrow(axis, 0, 1))
        yield Fault(
            f"dimension {axis} one less", has, lambda t, axis=axis: t.narrow(axis, 0, t.shape[axis] - 1).clone()
        )
        yield Fault(f"dimension {axis} one more", has, lambda t, axis=axis: torch.cat([t, t.narrow(axis, 0, 1)], axis))
        yield Fault(
            f"dimension {axis} of 2^31",
            has,
            lambda t, axis=axis: t.narrow(axis, 0, 1).expand(*t.shape[:axis], LARGE, *t.shape[axis + 1 :]),
        )
    yield Fault("rank one less", is_tensor, lambda t: t[0])
    yield Fault("rank one more", is_tensor, lambda t: t[None])
    yield Fault("rank 0", is_tensor, lambda t: t.flatten()[0])


def layouts() -> Iterator[Fault]:
    def yields(name, applies, change):
        return Fault(name, applies, change, harmless=True)

    yield yields("transposed in memory", is_tensor, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1))
    yield yields("strided", is_tensor, lambda t: t.repeat_interleave(3, -1)[..., ::3])
    yield yields("expanded (stride 0)", is_tensor, lambda t: t[:1].expand_as(t))
    yield yields("all strides 0", is_tensor, lambda t: t.flatten()[0].expand_as(t))
    yield yields(
        "channels-last",
        lambda _, v: isinstance(v, Tensor) and v.dim() == 4,
        lambda t: t.contiguous(memory_format=torch.channels_last),
    )
    yield yields("contiguous", is_tensor, lambda t: t.contiguous())
    yield yields("storage offset", is_tensor, lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape))
    yield yields("not aligned", lambda _, v: isinstance(v, Tensor) and v.element_size() > 1, misaligned)
    yield yields("requires grad", is_floating, lambda t: t.clone().requires_grad_())
    yield yields("view that requires grad", is_floating, lambda t: t.clone().requires_grad_()[:])
    yield yields("inference tensor", is_tensor, inference)
    yield yields("nn.Parameter", is_floating, lambda t: torch.nn.Parameter(t.clone()))
    yield yields("subclass", is_tensor, lambda t: t.clone().as_subclass(Subclass))
    yield yields("lazily negated", is_floating, lambda t: torch._neg_view(-t))
    yield yields("zeros without storage", is_floating, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype))


def types() -> Iterator[Fault]:
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool,
        torch.complex64, torch.float8_e4m3fn,
    ):  # fmt: skip
        name = str(dtype).removeprefix("torch.")
        yield Fault(
            f"dtype {name}",
            lambda _, v, dtype=dtype: isinstance(v, Tensor) and v.dtype != dtype,
            lambda t, dtype=dtype: t.to(dtype),
        )
    yield Fault("quantised", is_floating, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8))
    yield Fault("sparse", is_tensor, lambda t: t.to_sparse())
    yield Fault("nested", is_floating, lambda t: torch.nested.nested_tensor(list(t)))
    yield Fault("on the meta device", is_tensor, lambda t: t.to("meta"))
    yield Fault("numpy array", is_tensor, lambda t: t.numpy())
    yield Fault("list of numbers", is_tensor, lambda t: t.tolist())
    yield Fault("None", lambda *_: True, lambda _: None)
    yield Fault("a string", lambda *_: True, lambda _: "unknown")
    yield Fault("a number", lambda _, v: not isinstance(v, int | float), lambda _: 3)


def parameters() -> Iterator[Fault]:
    sizes = {"0": 0, "-1": -1, "1e5": 10**5, "2^31": 2**31, "2^63": 2**63, "1.5": 1.5, "NaN": NAN}
    for name, value in sizes.items():
        yield Fault(f"number {name}", is_kind(int), lambda _, value=value: value)
        yield Fault(f"first number {name}", is_list_of(int), lambda v, value=value: type(v)([value, *v[1:]]))
    numbers = {
        "0": 0.0, "-1": -1.0, "2": 2.0, "NaN": NAN, "+inf": INFINITY, "-inf": -INFINITY, "1e300": 1e300,
        "-1e-300": -1e-300, "5e-324": 5e-324,
    }  # fmt: skip
    for name, value in numbers.items():
        yield Fault(f"number {name}", is_kind(float), lambda _, value=value: value)
        yield Fault(f"first number {name}", is_list_of(float), lambda v, value=value: type(v)([value, *v[1:]]))
    for applies in (is_list_of(int), is_list_of(float), is_list_of(Tensor)):
        yield Fault("empty list", applies, lambda v: type(v)())
        yield Fault("list one longer", applies, lambda v: type(v)([*v, v[0]]))
        yield Fault("list of 100", applies, lambda v: type(v)([v[0]] * 100))
    yield Fault("list with None", is_list_of(Tensor), lambda v: [v[0], None])


FAULTS = [*values(), *shapes(), *layouts(), *types(), *parameters()]
