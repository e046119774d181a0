"""Which device a program runs on."""

import torch

from .errors import MachineError, UsageError


def choose_device(name: str) -> torch.device:
    """ "auto": the first GPU where there is one, else the CPU; or any device name of PyTorch, "cpu", "cuda:1".

    Raises:
        UsageError: not a device name. MachineError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("not a device", where=f"--device {name}", fix="--device auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("the operators run on cpu and cuda", where=f"--device {name}", fix="--device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        build = f"PyTorch {torch.__version__}"
        why = (
            f"{build} is built without CUDA" if torch.version.cuda is None else f"{build} finds no usable driver or GPU"
        )
        raise MachineError("there is no GPU to run on", where=f"--device {name}", why=why, fix="--device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        have = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        raise MachineError("there is no such GPU", where=f"--device {name}", why=f"this machine has {have}")
    return device


def choose_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """None: float32. "auto" asks the hardware, because emulated bfloat16 is slower than float32."""
    if amp == "auto":
        on_gpu = device.type == "cuda"
        native = torch.cuda.is_bf16_supported(False) if on_gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        amp = "bfloat16" if native else "off"
    return {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]


def half_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes with it, else float16 on a GPU and float32 on a CPU, which would emulate."""
    on_gpu = torch.float16 if device.type == "cuda" else torch.float32
    return choose_amp_dtype("auto", device) or on_gpu


def allow_tf32() -> None:
    """Lets NVIDIA GPUs multiply float32 matrices with 10 bits of mantissa, as PyTorch lets them convolve anyway."""
    torch.set_float32_matmul_precision("high")
