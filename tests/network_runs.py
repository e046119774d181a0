"""Runs the main programs one after the other in this process; prints a JSON object {program: exit code}.

    LD_PRELOAD=no_network.so NETWORK_LOG=FILE python tests/network_runs.py FOLDER [--ask]

--ask also asks for the network, in Python and in a process that this one starts.
"""

import contextlib
import json
import multiprocessing
import runpy
import socket
import subprocess
import sys
from pathlib import Path


def programs(folder: Path) -> dict[str, list]:
    from program_cases import write_data, write_weights
    from tiny_runs import tiny_config, write_tiny_data

    from models.config_files import as_json
    from models.files import write_json

    data, weights = write_data(folder / "data"), write_weights(folder / "weights.safetensors")
    config = tiny_config(write_tiny_data(folder / "tiny"), folder / "run", workers=1, epochs=1)
    write_json(folder / "config.json", as_json(config))
    found = {
        "train": ["--preset", folder / "config.json"],
        "report": [folder / "run"],
        "evaluate": ["--weights", weights, "--data", data, "--output", folder / "evaluated"],
        "predict": [data / "val", "--weights", weights, "--output", folder / "predicted"],
        "data check": [data, "--page", folder / "check.html"],
        "weights": [],
    }
    return found | {f"{name} --help": ["--help"] for name in ("train", "export", "replay", "classify")}


def exit_code(program: str, arguments: list) -> int:
    name, *words = program.removesuffix(" --help").split()
    sys.argv = [f"models.{name}", *words, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_module(f"models.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def ask() -> None:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    with contextlib.suppress(OSError), socket.socket() as connection:
        connection.connect(("127.0.0.1", 9))
    code = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    if "--ask" in sys.argv:
        ask()
        print("{}")
    else:
        print(json.dumps({name: exit_code(name, arguments) for name, arguments in programs(Path(sys.argv[1])).items()}))
