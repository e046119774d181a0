"""The processes of one job: each works for itself, or all of them train and evaluate together.

    torchrun --standalone --nproc-per-node=8 -m models.train --preset htc_r50_fpn_1x_coco --data coco

torchrun (or another launcher that sets the same variables) starts them, one for each GPU; without it a program is a
world of one, in which every function here gives back what it was given.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import choose_device
from .errors import DataError, MachineError, UsageError, UserError
from .processes import identity

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each process."""
MEETING = 600.0
"""Seconds that the processes of a job wait for each other at its start."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The place of this process among those of its job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those on this machine."""
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to a person."""
        return self.rank == 0


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """Raises MachineError where the launcher's variables are incomplete or contradict each other: of this process
    alone, perhaps."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return World()
    fix = "torchrun --nproc-per-node=N -m models.train ... sets all of them"
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise MachineError("the environment of a job is incomplete", ", ".join(missing), "not set", fix)
    try:
        rank, size, local_rank, local_size = (int(environment[name]) for name in VARIABLES[:4])
    except ValueError as error:
        raise MachineError("the environment of a job holds no numbers", ", ".join(VARIABLES[:4]), error, fix) from error
    if not (0 <= local_rank < local_size <= size and local_rank <= rank < size):
        why = f"rank {rank} of {size}, on its machine {local_rank} of {local_size}"
        raise MachineError("the environment of a job contradicts itself", ", ".join(VARIABLES[:4]), why, fix)
    return World(rank, size, local_rank, local_size)


def own_device(name: str, world: World) -> torch.device:
    """`choose_device`, where each process of a machine takes a GPU of its own."""
    if world.size == 1:
        return choose_device(name)
    if name.startswith("cuda:"):
        raise UsageError("the processes of a job cannot share a GPU", f"--device {name}", fix="--device cuda")
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if torch.cuda.device_count() < world.local_size:
        why = f"{world.local_size} processes, {torch.cuda.device_count()} GPUs (CUDA_VISIBLE_DEVICES counts)"
        raise MachineError(
            "there are more processes than GPUs on this machine", why=why, fix="a smaller --nproc-per-node"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def meet(world: World) -> tuple[dist.Store, dist.Store] | tuple[None, None]:
    """Returns when all processes of the job have come.

    Returns:
        Two connections to a store of this start of the job, which has the `identity` of each process under
        process/{rank}: for `joined`, and for the watchdog. None in a world of one.

    Raises:
        MachineError: some process has not come.
    """
    if world.size == 1:
        return None, None
    store = _connect(serve=world.main and not _agent_serves())
    start = _agreed_name(store, world)
    return dist.PrefixStore(start, store), dist.PrefixStore(start, _connect(serve=False))


@contextlib.contextmanager
def joined(world: World, device: torch.device, store: dist.Store | None, timeout: float) -> Iterator[None]:
    """While the block runs, the processes can speak to each other: tensors of the CPU over gloo, of GPUs over NCCL.

    Args:
        store: where they have met.
        timeout: seconds after which a process that is waited for is given up.
    """
    if store is None:
        yield
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if on_gpu else None,
    )
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # DistributedDataParallel's reducer must have gone before: where it is the last that knows the group, its end
        # waits, with Python's lock held, for a thread that waits for Python's lock.
        gc.collect()
        dist.destroy_process_group()


def _connect(serve: bool) -> dist.TCPStore:
    address, port, launcher = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.getppid()
    deadline = time.monotonic() + MEETING
    while True:
        try:
            wait = datetime.timedelta(seconds=5)
            store = dist.TCPStore(address, port, None, serve, wait, wait_for_workers=False, multi_tenant=True)
            store.set_timeout(datetime.timedelta(seconds=MEETING))
            return store
        except RuntimeError as error:
            # Whoever serves may come later; not if the launcher has gone.
            if serve or os.getppid() != launcher or time.monotonic() > deadline:
                raise _not_met(str(error).splitlines()[0]) from error


def _not_met(why: str) -> MachineError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return MachineError("the processes of the job do not find each other", where, why)


def _agreed_name(store: dist.Store, world: World) -> str:
    """A name of this start of the job, the same in all its processes.

    torchrun keeps its store when it starts a job again, with the addresses of processes that have ended, and the number
    of restarts that it tells them differs between machines. So each process asks under a name of its own, which only
    a main process that lives now answers. Under the name that is agreed on, process/{rank} says which process each is,
    by which the watchdog finds one that is stopped before it has joined the others.
    """
    name = secrets.token_hex(8)
    if world.main:
        store.set(f"{name}/process/0", json.dumps(identity()))
    else:
        store.set(f"hello/{world.rank}", name)
        try:
            agreed = store.get(f"welcome/{name}").decode()
        except RuntimeError as error:
            raise _not_met(f"rank 0 has not come within {MEETING:.0f} s") from error
        store.set(f"{agreed}/process/{world.rank}", json.dumps(identity()))
        return agreed
    deadline = time.monotonic() + MEETING
    missing = set(range(1, world.size))
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set("welcome/" + store.get(f"hello/{rank}").decode(), name)
        missing = {rank for rank in missing if not store.check([f"{name}/process/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise _not_met(f"ranks {sorted(missing)[:20]} have not come within {MEETING:.0f} s")
        time.sleep(0.01 if missing else 0)
    return name


def together() -> bool:
    """Whether there are other processes to speak to."""
    return dist.is_available() and dist.is_initialized()


def number_of_ranks() -> int:
    return dist.get_world_size() if together() else 1


def rank_of_this_process() -> int:
    return dist.get_rank() if together() else 0


def note_for_restarts(what: str) -> None:
    """Remembered by torchrun's store, as long as torchrun lives, for when it starts the job again."""
    if _agent_serves():
        _connect(serve=False).set(f"noted/{what}", "")


def noted_before_restart(what: str) -> bool:
    return _agent_serves() and _connect(serve=False).check([f"noted/{what}"])


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def share_buffers(module: torch.nn.Module) -> None:
    """The main process's statistics of batch norms, in all of them."""
    if together():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of what each process gives, on its device; the same bits in each of them. No gradient."""
    if not together():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(number: float) -> float:
    if not together():
        return number
    largest = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    sum_over_ranks(torch.zeros(1))


@contextlib.contextmanager
def first_on_its_machine(world: World) -> Iterator[None]:
    """The block runs in one process of each machine, then in the others, which find what it left in a cache."""
    if world.local_rank > 0:
        wait_for_all()
    yield
    if world.local_rank == 0:
        wait_for_all()


def on_main(function: Callable[[], Result]) -> Result:
    """What `function` gives in the main process, in all of them; as JSON holds it. An error for the user, too."""
    if not together():
        return function()
    answer: object = None
    if dist.get_rank() == 0:
        try:
            answer = {"result": function()}
        except UserError as error:
            answer = {"error": type(error).__name__, "arguments": error.args}
    answer = share(answer)
    if "error" in answer:
        kinds = {kind.__name__: kind for kind in (UsageError, DataError, MachineError)}
        error = kinds[answer["error"]](*answer["arguments"])
        error.told_by_another = dist.get_rank() > 0
        raise error
    return answer["result"]


def share(value: Result) -> Result:
    """The main process's value, in all of them; as JSON holds it."""
    if not together():
        return value
    text = json.dumps(value, default=str).encode() if dist.get_rank() == 0 else b""
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0)
    content = torch.empty(length.item(), dtype=torch.uint8)
    if text:
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return json.loads(content.numpy().tobytes())


def share_tensors(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The main process's tensors, which the others give as None, on the CPU of all of them."""
    if not together():
        return tensors
    names = share(None if tensors is None else {name: [str(v.dtype), *v.shape] for name, v in tensors.items()})
    shared = {}
    for name, (dtype, *shape) in names.items():
        empty = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        value = empty if tensors is None else tensors[name].cpu().contiguous()
        if value.numel():
            dist.broadcast(value.view(-1).view(torch.uint8), 0)  # bytes, because gloo does not know every type
        shared[name] = value
    return shared


def gather(value: object) -> list | None:
    """What each process gives, by rank, in the main one; None in the others. As JSON holds it.

    One process after the other, so that the main one holds a single message beside what it has unpacked.
    """
    if not together():
        return [value]
    size, rank = dist.get_world_size(), dist.get_rank()
    text = b"" if rank == 0 else json.dumps(value).encode()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(text)]))
    if rank > 0:
        dist.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0)
        return None
    values = [value]
    for source in range(1, size):
        content = torch.empty(lengths[source].item(), dtype=torch.uint8)
        dist.recv(content, source)
        values.append(json.loads(content.numpy().tobytes()))
    return values
