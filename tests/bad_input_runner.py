"""Runs every fault of bad_input_faults.py against every entry of every operator, in this process.

    python tests/bad_input_runner.py [--share I/N] [--after CASE] [--only TEXT] [--address-space GiB]

Prints one JSON object a line: {"begin": case} before a case runs and its outcome afterwards, so that whoever reads this
through a pipe knows the case that ended the process. tests/test_bad_input.py does.
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bad_input_faults import FAULTS, Fault
from guarded_memory import guarded
from operator_cases import OPERATORS, arguments_of, call, identical, map_tensors
from torch import Tensor

# torch.compile takes some 50 ms for each new shape, dtype and parameter: these stand for all, unless --compile-all.
COMPILED = (
    r"value (NaN|\+inf|1e30)|every value NaN|box|batch index|integer \d"
    r"|dimension 0 (empty|one more)|dimension 1 of 1|rank one more|transposed"
    r"|all strides 0|requires grad|dtype (float16|int32)|on the meta device|None|number (-1|NaN)"
)
LONGEST = 60  # seconds of CPU time that a case may take
ENTRIES = ("forward", "backward", "meta", "autocast", "compiled")


@dataclass(frozen=True)
class Case:
    operator: str
    argument: str
    """Its name; with the position, as in "features[1]", for an item of a list of tensors."""
    fault: Fault
    entry: str

    @property
    def name(self) -> str:
        return f"{self.operator} | {self.argument} | {self.fault.name} | {self.entry}"

    def arguments(self) -> dict[str, Any]:
        """The everyday arguments with this one spoilt."""
        arguments = arguments_of(self.operator)
        name, _, position = self.argument.rstrip("]").partition("[")
        if position:
            items = list(arguments[name])
            items[int(position)] = self.fault.change(items[int(position)])
            return arguments | {name: items}
        return arguments | {name: self.fault.change(arguments[name])}


def all_cases(compile_all: bool) -> Iterator[Case]:
    for operator, description in OPERATORS.items():
        places = []
        for name, value in arguments_of(operator).items():
            places.append((name, value))
            if isinstance(value, list):
                places += [(f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor)]
        for fault in FAULTS:
            compiled = False
            for place, value in places:
                if not fault.applies(place.partition("[")[0], value):
                    continue
                for entry in ENTRIES:
                    if entry == "backward" and not description.gradients:
                        continue
                    if entry == "compiled":  # slow, and the same code whichever argument is wrong: once for a fault
                        if compiled or not (compile_all or re.match(COMPILED, fault.name)):
                            continue
                        compiled = True
                    yield Case(operator, place, fault, entry)


def forward(case: Case, arguments: dict[str, Any]) -> list[Any]:
    return call(case.operator, arguments)


def autocast(case: Case, arguments: dict[str, Any]) -> list[Any]:
    with torch.autocast("cpu", torch.bfloat16):
        return call(case.operator, arguments)


def meta(case: Case, arguments: dict[str, Any]) -> list[Any]:
    return call(case.operator, map_tensors(lambda tensor: tensor.to("meta"), arguments))


def compiled(case: Case, arguments: dict[str, Any]) -> list[Any]:
    return torch.compile(call, backend="aot_eager")(case.operator, arguments)


def backward(case: Case, arguments: dict[str, Any]) -> list[Any]:
    """The gradients; of the result alone where no spoilt argument can have one."""
    leaves = []

    def require(tensor):
        if tensor.is_floating_point() and not tensor.is_inference():
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1]
        return tensor

    differentiable = {name: map_tensors(require, arguments[name]) for name in OPERATORS[case.operator].gradients}
    outputs = call(case.operator, arguments | differentiable)
    outputs = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
    if not outputs:
        return []
    total = sum((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


RUN: dict[str, Callable[[Case, dict[str, Any]], list[Any]]] = {
    "forward": forward, "backward": backward, "meta": meta, "autocast": autocast, "compiled": compiled,
}  # fmt: skip


def attempt(case: Case, arguments: dict[str, Any]) -> list[Any] | Exception:
    try:
        return RUN[case.entry](case, arguments)
    except Exception as error:
        return error


def kind_of(result: list[Any] | Exception) -> list[Any] | str:
    """What two runs must have in common: shapes and dtypes, or the error's type."""
    if isinstance(result, Exception):
        return type(result).__name__
    return [[str(item.dtype), list(item.shape)] if isinstance(item, Tensor) else type(item).__name__ for item in result]


def outcome_of(case: Case) -> dict[str, Any]:
    """Two runs, whose memory ends and begins at forbidden pages; the second finds fresh memory filled with NaN."""
    begin = time.process_time()
    arguments = case.arguments()
    results = []
    for edge, poison in (("end", False), ("start", True)):
        torch.use_deterministic_algorithms(poison, warn_only=True)  # with it, torch.empty is filled
        results.append(attempt(case, map_tensors(lambda tensor, edge=edge: guarded(tensor, edge), arguments)))
    first, second = results
    outcome = {"case": case.name, "kind": kind_of(first)}
    if isinstance(first, Exception):
        outcome |= {"outcome": "error", "message": str(first), "stable": kind_of(first) == kind_of(second)}
    else:
        comparable = case.entry != "meta" and not any(isinstance(item, Tensor) and item.is_meta for item in first)
        stable = identical(first, second) if comparable else kind_of(first) == kind_of(second)
        outcome |= {"outcome": "value", "stable": stable}
        # (An inference tensor cannot get a gradient, and its copy does.)
        if case.fault.harmless and comparable and (case.fault.name, case.entry) != ("inference tensor", "backward"):
            plain = map_tensors(lambda tensor: tensor.detach().contiguous().clone(), arguments)
            same = close if case.entry == "backward" else identical  # gradients are sums, in the order of the layout
            outcome["as_plain"] = same(first, attempt(case, plain))
    return outcome | {"seconds": time.process_time() - begin}


def close(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    """Up to the rounding of sums in another order."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return len(pairs) == len(first) - first.count(None) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) if b.numel() else 0, equal_nan=True)
        for a, b in pairs
    )


def limit_memory(gibibytes: float) -> None:
    """Sizes beyond this fail as they do on a smaller machine, instead of filling this one."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", default="0/1", help="I/N: every N-th case from case I on")
    parser.add_argument("--after", help="the case to go on behind")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--compile-all", action="store_true", help="every fault under torch.compile")
    parser.add_argument("--address-space", type=float, default=2.0, help="GiB that a case may take; 0: any")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**6
    if options.address_space:
        limit_memory(options.address_space)
    first, step = map(int, options.share.split("/"))
    cases = [case for case in all_cases(options.compile_all) if options.only in case.name][first::step]
    names = [case.name for case in cases]
    for case in cases[names.index(options.after) + 1 if options.after else 0 :]:
        print(json.dumps({"begin": case.name}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, LONGEST)  # ends the process
        signal.alarm(30 * LONGEST)  # one that waits for something, too
        print(json.dumps(outcome_of(case)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
