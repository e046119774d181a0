"""Finds wrong numbers that no hardware reports: a bit of memory that has flipped, a processor that errs now and then.

Dixit et al. 2021, "Silent Data Corruptions at Scale" (arXiv 2102.11245), tell how often; a bit that flips in one
process of a job makes its weights, and with them every gradient from then on, a little wrong, and no loss shows it.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .distributed import gather, max_over_ranks, on_main, rank_of_this_process
from .errors import MachineError

Bits = dict[str, str]
"""A hash of each tensor."""


def bits_of(tensors: Mapping[str, Tensor]) -> Bits:
    return {name: _hash(value) for name, value in tensors.items()}


def check_same_weights(step: int, bits: Bits) -> None:
    """That all processes of the job have the same. Together, once they have made `step`; before anything is saved.

    Raises:
        MachineError: some have others; which ones, where more than half agree.
    """
    # Of hashes that are equal the largest is also the smallest: one small message, whatever the number of processes.
    whole = int.from_bytes(hashlib.sha256("".join(bits.values()).encode()).digest()[:6], "big")
    if max_over_ranks(whole) == -max_over_ranks(-whole):
        return
    shares = gather({"host": socket.gethostname(), "bits": bits})

    def tell() -> None:
        usual, count = Counter(tuple(share["bits"].values()) for share in shares).most_common(1)[0]
        known = 2 * count > len(shares)
        odd = [rank for rank, share in enumerate(shares) if not known or tuple(share["bits"].values()) != usual]
        first = usual if known else tuple(shares[0]["bits"].values())
        lines = []
        for rank in odd:
            own = shares[rank]["bits"]
            other = [name for name, bits, right in zip(own, own.values(), first, strict=True) if bits != right]
            what = f": {other[0]}" + (f" and {len(other) - 1} more" if len(other) > 1 else "") if other else ""
            lines.append(f"rank {rank} on {shares[rank]['host']}{what}")
        raise MachineError(
            "the processes of the job do not have the same weights any more",
            where=f"step {step}, " + "; ".join(lines[:20]),
            why="all of them make the same steps, so a memory or a processor errs, or they are of different kinds",
            fix="--resume goes on from the last checkpoint; this step was not saved. "
            + ("Have that machine's memory tested" if known else "Who is right, two cannot tell"),
        )

    on_main(tell)


def check_repeated(step: int, once: Bits, again: Bits) -> None:
    """That what was computed twice from the same is the same. Together.

    Raises:
        MachineError: it is not, in whichever process.
    """
    differ = [name for name in once if once[name] != again[name]]
    if not max_over_ranks(float(len(differ))):
        return
    found = gather([rank_of_this_process(), socket.gethostname(), differ])

    def tell() -> None:
        places = [f"rank {rank} on {host}: {names[0]}" for rank, host, names in found if names]
        raise MachineError(
            f"step {step} was computed twice, with two results",
            where="; ".join(places[:20]),
            why="a memory or a processor errs; or a kernel adds in any order, as some do on a GPU",
            fix="the weights were not touched, and --resume goes on from the last checkpoint",
        )

    on_main(tell)


def _hash(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()[:16]
