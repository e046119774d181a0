"""Makes ranks of small jobs hang, and reports whom their watchdogs name, after how long.

    python tests/hung_ranks.py --trials 5        as test_watchdog.py starts it

A fork server: this process imports torch once, and each rank of a job is a child of it. A job sums up a number between
its ranks (gloo), again and again, until at a random moment or step one of them is stopped, loops for ever, holds the
interpreter's lock for ever, or leaves a sum out. Or it sums up a tensor of another shape, which gloo does not wait for:
it aborts a process, and the others lose their connections; no watchdog has anything to do. Prints one JSON object.
"""

import argparse
import collections
import ctypes
import datetime
import gc
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.distributed import PrefixStore, TCPStore

from models.processes import identity
from models.watchdog import EXIT_CODE, Watchdog

SHAPES = "another shape: gloo aborts"
KINDS = ("stopped", "endless loop", "interpreter's lock held", "sum left out", SHAPES)
STEPS = 40
STEP_TIME = 0.02


def rank_of_job(rank: int, size: int, port: int, kind: str, culprit: int, step: int, timeout: float, begun: Path):
    """What a rank does. The culprit writes into `begun` when the others begin to wait for it."""

    def connection(name: str) -> PrefixStore:
        store = TCPStore("127.0.0.1", port, None, False, datetime.timedelta(seconds=60), wait_for_workers=False)
        return PrefixStore(f"{begun.name}/{name}", store)

    notes = connection("watchdog")
    notes.set(f"process/{rank}", json.dumps(identity()))
    torch.distributed.init_process_group("gloo", store=connection("group"), rank=rank, world_size=size)
    with Watchdog(rank, size, notes, timeout) as dog:
        for now in range(STEPS):
            fault = kind if (rank, now) == (culprit, step) else ""
            dog.note(now, "forward")
            time.sleep(STEP_TIME)
            if fault:
                begun.write_text(str(time.monotonic()))
            if fault == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while fault == "endless loop":
                time.sleep(0.001)  # a loop all the same, which leaves the processor to others
            if fault == "interpreter's lock held":
                mutex = ctypes.create_string_buffer(64)
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
            dog.note(now, "all-reduce")
            if fault != "sum left out":
                torch.distributed.all_reduce(torch.ones(1000 if fault == SHAPES else 1))
        if (rank, kind) == (culprit, "sum left out"):
            begun.write_text(str(time.monotonic()))


def fork_rank(log: Path, *arguments) -> int:
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        rank_of_job(*arguments)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    finally:
        os._exit(0)


def serve_store() -> tuple[int, int]:
    """(process, port) of a store. Not in this process: a child of one with threads may find a lock held for ever."""
    # Of IPv4: for each connection to one of both kinds, PyTorch asks the name service whose address it is, and a store
    # that waits for an answer keeps all others waiting.
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    child = os.fork()
    if not child:
        store = TCPStore(  # noqa: F841 (as long as the process)
            "127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        time.sleep(100_000)
    listening.close()
    return child, port


def begin(kind: str, seed: int, timeout: float, room: Path, port: int) -> dict:
    """Starts one job."""
    choose = random.Random(seed)
    size = choose.choice((2, 3, 4))
    culprit, step = choose.randrange(size), choose.randrange(1, STEPS - 1)
    begun, logs = room / f"begun{seed}", [room / f"log{seed}-{rank}" for rank in range(size)]
    arguments = [(rank, size, port, kind, culprit, step, timeout, begun) for rank in range(size)]
    ranks = [fork_rank(log, *each) for log, each in zip(logs, arguments, strict=True)]
    return {"kind": kind, "size": size, "culprit": culprit, "step": step, "ranks": ranks} | {
        "begun": begun,
        "logs": logs,
    }


def ends_of(jobs: list[dict]) -> dict[int, tuple[int, float]]:
    """(exit code, time) by process."""
    ends = {}
    while any(process not in ends for job in jobs for process in job["ranks"]):
        process, status = os.waitpid(-1, 0)
        ends[process] = (os.waitstatus_to_exitcode(status), time.monotonic())
    return ends


def judge(job: dict, ends: dict[int, tuple[int, float]], timeout: float) -> dict:
    """What is wrong with the job's end ("" for nothing), and seconds beyond the timeout."""
    kind, culprit, step, left_out = job["kind"], job["culprit"], job["step"], job["kind"] == "sum left out"
    codes = {rank: ends[process][0] for rank, process in enumerate(job["ranks"])}
    last = max(ends[process][1] for process in job["ranks"])
    delay = last - float(job["begun"].read_text()) - timeout
    text = "".join(log.read_text(errors="replace") for log in job["logs"])
    if kind == SHAPES:
        told = "Received data size doesn't match expected size" in text and re.search("by peer|Broken pipe", text)
        right = set(codes.values()) == {-signal.SIGABRT, 1} and delay < 0 and "culprit" not in text and told
        return {"kind": kind, "delay": delay, "wrong": "" if right else f"{kind}: {codes}, {delay:.1f} s\n{text}"}
    named = re.findall(r"culprit: rank (\d+) \(process (\d+) on \S+\), step (\d+), ([\w -]+),(.*)", text)
    killed = kind in ("stopped", "interpreter's lock held")
    expected = {r: -signal.SIGKILL if killed and r == culprit else EXIT_CODE for r in codes}
    wrong = []
    # A process that cannot speak was last heard of up to a beat ago, and the others tell where it is missed.
    at = re.findall(r"  at:      step (\d+), where the others wait", text)
    if [n[:2] for n in named] != [(str(culprit), str(job["ranks"][culprit]))]:
        wrong.append(f"named {named}, it was rank {culprit}")
    elif named[0][2:4] != (str(STEPS - 1), "ended") if left_out else at != [str(step)]:
        wrong.append(f"named {named} at {at}, it was step {step}")
    if kind == "stopped" and not any("stopped (SIGSTOP)" in n[4] for n in named):
        wrong.append(f"state {named}")
    if codes != expected:
        wrong.append(f"codes {codes}, expected {expected}")
    # The stacks of all that can answer: the endless loop's, and even of one whose interpreter's lock is held.
    if text.count("in rank_of_job") < job["size"] - (kind == "stopped"):
        wrong.append("stacks are missing")
    return {"kind": kind, "delay": delay, "wrong": f"{kind}: {'; '.join(wrong)}\n{text}" if wrong else ""}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=len(KINDS))
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    server, port = serve_store()
    results = []
    with tempfile.TemporaryDirectory() as room:
        for first in range(0, options.trials, options.at_once):
            numbers = range(first, min(first + options.at_once, options.trials))
            jobs = [
                begin(KINDS[number % len(KINDS)], options.seed + number, options.timeout, Path(room), port)
                for number in numbers
            ]
            ends = ends_of(jobs)
            results += [judge(job, ends, options.timeout) for job in jobs]
    os.kill(server, signal.SIGKILL)
    wrong = [result["wrong"] for result in results if result["wrong"]]
    counts = collections.Counter(result["kind"] for result in results)
    delays = {kind: round(max(r["delay"] for r in results if r["kind"] == kind), 2) for kind in counts}
    json.dump({"trials": counts, "wrong": wrong, "largest delay beyond the timeout": delays}, sys.stdout)


if __name__ == "__main__":
    main()
