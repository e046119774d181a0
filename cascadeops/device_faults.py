"""Faults in the data that CUDA kernels met: raised when somebody waits for the GPU anyway."""

import ctypes

import torch

from cascadeops import _binary


def raise_device_faults(device: torch.device | str | int | None = None) -> None:
    """Waits for the current stream of a GPU and raises what kernels of this library found wrong in their data.

    A box that is not finite or an index out of range is an exception on the CPU. A CUDA kernel cannot raise, and asking
    it would stall the GPU after every call: it leaves the row out, as the operator's docstring says, and notes the
    fault, which waits here until the program synchronises by itself. `nms`, `batched_nms` and `paste_masks_rle`, which
    have to wait for the GPU, raise it too. Does nothing for a CPU, and before CUDA was used.

    Args:
        device: CUDA device, ``"cuda"`` or None for the current one.

    Raises:
        RuntimeError: operator, rule and a row that broke it. Of several faults since the last look one is named; they
            are forgotten with it.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda" or _binary.cuda.path is None or not torch.cuda.is_initialized():
        return
    torch.cuda.current_stream(device).synchronize()
    index = torch.cuda.current_device() if device.index is None else device.index
    take = ctypes.CDLL(str(_binary.cuda.path)).cascadeops_take_device_fault
    take.argtypes, take.restype = [ctypes.c_int], ctypes.c_char_p
    if fault := take(index).decode():
        raise RuntimeError(fault)
