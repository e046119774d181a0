"""Tensors whose memory ends, or begins, at a page that may not be touched: one byte read beyond it is a SIGSEGV."""

import ctypes
import mmap
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NORESERVE = 0x4000  # of Linux; Python 3.12 has no name for it
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


def guarded_empty(count: int, dtype: torch.dtype, edge: str = "end") -> Tensor:
    """A tensor [count] of zeros, untouched and so without memory of its own, between two forbidden pages.

    edge: "end" puts its last byte, "start" its first byte beside the forbidden page. (Elements are aligned, so that
    an end of a page is an end of an element.)
    """
    size = count * dtype.itemsize
    if size == 0:
        return torch.empty(0, dtype=dtype)
    inner = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    whole = inner + 2 * mmap.PAGESIZE
    base = _libc.mmap(None, whole, _NONE, _PRIVATE, -1, 0)
    if base == ctypes.c_void_p(-1).value:
        raise MemoryError(f"mmap of {whole} bytes: error {ctypes.get_errno()}")
    first = base + mmap.PAGESIZE
    _libc.mprotect(first, inner, _READ_WRITE)
    buffer = (ctypes.c_char * size).from_address(first + inner - size if edge == "end" else first)
    weakref.finalize(buffer, _libc.munmap, base, whole)  # the tensor holds the buffer
    return torch.frombuffer(buffer, dtype=dtype)


def guarded(tensor: Tensor, edge: str = "end") -> Tensor:
    """The same values at the same strides, in guarded memory that reaches from its first to its last element.

    What is not plain memory (sparse, quantised, on another device, a subclass, not aligned) is returned as it is.
    """
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_nested or tensor.is_inference() or tensor.is_neg():
        return tensor
    if tensor.requires_grad or tensor.numel() == 0 or tensor.data_ptr() % tensor.dtype.itemsize:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = guarded_empty(extent, tensor.dtype, edge)
    memory.copy_(tensor.as_strided((extent,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride())


class GuardedArguments(TorchDispatchMode):
    """Inside of it every call of an operator of ours gets its arguments in guarded memory."""

    def __init__(self, edge: str):
        super().__init__()
        self.edge = edge

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cascadeops":
            args, kwargs = tree_map_only(Tensor, lambda tensor: guarded(tensor, self.edge), (args, kwargs))
        return function(*args, **(kwargs or {}))
