"""No argument ends the process or is read beyond its memory; every outcome is an error with names, or a value.

tests/bad_input_runner.py runs in a process of its own every fault of bad_input_faults.py (NaN, indices out of range,
wrong shapes, layouts, types, parameters) against every argument and entry of every operator of operator_cases.py. The
memory of every argument ends, and in a second run begins, at a page that may not be touched. docs/bad_input.md is the
table of outcomes; `python tests/test_bad_input.py` writes it anew.
"""

import collections
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from operator_cases import OPERATORS, arguments_of

import cascadeops

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/bad_input.md"
PROCESSES = 2
SLOWEST = 20.0
"""Seconds of CPU time that a case may take."""

# What multiscale_roi_align, which does the work, calls these arguments.
ALIASES = {"roi_align": ("features", "rois", "strides")}
# Errors of PyTorch itself, before or behind our code: what they say is not ours to choose.
MEMORY = re.compile(
    r"^std::bad_alloc$|not enough memory|can't allocate memory|Storage size calculation overflowed"
    r"|torch_call_dispatcher\(\s*\"aten::(contiguous|new_empty|empty)|aoti_torch_empty"  # the reason goes to stderr
)
FOREIGN = {
    "forward": re.compile(r"Could not run 'cascadeops::\w+' with arguments from the '\w+' backend"),
    "meta": re.compile(
        r"Could not run 'aten::\w+' with arguments from the '\w+' backend|dynamic shape operator"
        r"|does not call torch.library.get_ctx"  # how many rows there are depends on values, which meta has not
    ),
    "compiled": re.compile(r"Multiple dispatch failed for 'torch._ops|quantized nyi in meta tensors"),
    "backward": re.compile(r"Inference tensors cannot be saved for backward"),
}


def run_matrix(*options: str) -> tuple[list[dict], list[str]]:
    """(outcomes in the order of the table, cases that ended their process), from two processes that share the cases."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = list(pool.map(lambda i: run_share(f"--share={i}/{PROCESSES}", *options), range(PROCESSES)))
    in_order = itertools.chain(*itertools.zip_longest(*(outcomes for outcomes, _ in shares)))
    return [outcome for outcome in in_order if outcome], [death for _, deaths in shares for death in deaths]


def run_share(*options: str) -> tuple[list[dict], list[str]]:
    """The runner starts again behind a case that ended it."""
    outcomes, deaths, after = [], [], []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    while True:
        command = [sys.executable, str(ROOT / "tests/bad_input_runner.py"), *options, *after]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=environment, text=True, **quiet) as process:
            running = None
            for line in process.stdout:
                record = json.loads(line)
                running = record.get("begin")
                if running is None:
                    outcomes.append(record)
        status = process.returncode
        if status == 0:
            return outcomes, deaths
        deaths.append(f"{running}: exit status {status}")
        if running is None or len(deaths) > 20:
            return outcomes, deaths
        after = ["--after", running]


@pytest.fixture(scope="module")
def matrix():
    return run_matrix()


@pytest.fixture(scope="module")
def outcomes(matrix):
    return {outcome["case"]: outcome for outcome in matrix[0]}


def entry_of(case: str) -> str:
    return case.rpartition(" | ")[2]


def test_every_operator_is_in_the_table():
    others = {"self_calibrated_conv2d", "raise_device_faults"}  # the first is PyTorch's convolutions and the gate
    assert {*OPERATORS, *others} == {name for name in cascadeops.__all__ if name == name.lower()}


def test_no_case_ends_the_process(matrix):
    assert matrix[1] == []
    assert len(matrix[0]) > 300 * len(OPERATORS)


def test_no_case_takes_long(outcomes):
    assert [case for case, outcome in outcomes.items() if outcome["seconds"] > SLOWEST] == []


def test_outcomes_do_not_depend_on_the_memory_around_the_arguments(outcomes):
    """Else something that belongs to no argument was read: beyond an end, or fresh memory before it was written."""
    assert [case for case, outcome in outcomes.items() if not outcome["stable"]] == []


def test_how_values_are_stored_does_not_matter(outcomes):
    assert [case for case, outcome in outcomes.items() if outcome.get("as_plain") is False] == []


def test_errors_name_operator_and_argument(outcomes):
    def is_clear(case, outcome):
        operator, message = case.split(" | ")[0], outcome["message"]
        names = [*arguments_of(operator), *ALIASES.get(operator, ())]
        names = [name for name in names if re.search(rf"\b{name}\b", message)]
        foreign = FOREIGN.get(entry_of(case), FOREIGN["forward"])
        return (operator in message and names) or MEMORY.search(message) or foreign.search(message)

    errors = {case: outcome for case, outcome in outcomes.items() if outcome["outcome"] == "error"}
    unclear = [f"{case}: {outcome['message']}" for case, outcome in errors.items() if not is_clear(case, outcome)]
    assert unclear == []
    kinds = {"RuntimeError", "TypeError", "ValueError", "NotImplementedError", "MemoryError"}
    kinds |= {"TorchRuntimeError", "DynamicOutputShapeException"}  # torch.compile's and meta's own
    assert {outcome["kind"] for outcome in errors.values()} <= kinds


@pytest.mark.parametrize("entry", ["meta", "autocast", "compiled"])
def test_other_entries_agree_with_the_kernel(outcomes, entry):
    """Where the kernel gives a value, they give one of the same shape and dtype; compiled code and autocast raise where
    the kernel does. (Fake kernels see no values, so they raise for shapes only. Autocast unites dtypes in fresh memory
    and chooses that of the result.)"""
    odd = []
    for case, outcome in outcomes.items():
        if entry_of(case) != entry:
            continue
        kernel = outcomes[case.removesuffix(entry) + "forward"]
        foreign = outcome["outcome"] == "error" and FOREIGN.get(entry, FOREIGN["forward"]).search(outcome["message"])
        same = outcome["kind"] == kernel["kind"] or (entry == "autocast" and outcome["outcome"] == "value")
        if kernel["outcome"] == "value" and not same and not foreign:
            odd.append(f"{case}: {outcome['kind']}, the kernel {kernel['kind']}")
        lenient = entry == "meta" or (entry == "autocast" and re.search(r"\| (dtype \w*float|not aligned)", case))
        if kernel["outcome"] == "error" and outcome["outcome"] == "value" and not lenient:
            odd.append(f"{case}: a value, where the kernel raises")
    assert odd == []


def document(outcomes: dict[str, dict]) -> str:
    """docs/bad_input.md: one table an operator, faults by arguments, with what the call itself does."""
    tables: dict[str, dict[str, dict[str, str]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for case, outcome in outcomes.items():
        operator, argument, fault, entry = case.split(" | ")
        if entry == "forward":
            word = "as plain" if outcome.get("as_plain") else outcome["outcome"]
            if word == "error" and MEMORY.search(outcome["message"]):
                word = "no memory"
            tables[operator][fault][argument] = word
    text = [INTRODUCTION]
    for operator, rows in tables.items():
        columns = list(dict.fromkeys(argument for row in rows.values() for argument in row))
        text += [f"\n## {operator}\n", f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for fault, row in rows.items():
            text.append(f"| {fault} | {' | '.join(row.get(column, '') for column in columns)} |")
    return "\n".join(text) + "\n"


INTRODUCTION = """# What bad input does

Nothing that is passed to an operator ends the process or makes it read or write outside of the arguments' memory. This
page says what happens instead, on the CPU ([SECURITY.md](../SECURITY.md): what bad files do). `tests/test_bad_input.py`
runs all of it, also under autocast, compiled, on the meta device and through the gradient, and fails where this page is
out of date (`python tests/test_bad_input.py` writes it).

- **error**: an exception that names the operator and the argument.
- **value**: a result that depends on the arguments alone. What it is, the operator's docstring says.
- **as plain**: the bits that a plain, contiguous copy of the argument gives.
- **no memory**: the result would need more than the 2 GiB that the test grants; `MemoryError` or PyTorch's own error.

On CUDA, where a look at the values would stall the device, an error that depends on values becomes a skipped row: what
takes its place is in each docstring."""


def test_the_document_says_what_happens(outcomes):
    assert DOCUMENT.read_text() == document(outcomes), "write it anew: python tests/test_bad_input.py"


if __name__ == "__main__":
    results, killed = run_matrix(*sys.argv[1:])
    DOCUMENT.write_text(document({result["case"]: result for result in results}))
    print(f"{len(results)} cases, {len(killed)} ended their process: {killed}; {DOCUMENT} is written")
