"""From a dataclass to a command line, in one layer over tyro: the fields are the options, their docstrings the help.

Accepted alike: `--batch-size 8`, `--batch-size=8`, `batch_size=8`; nested fields as `--optimizer.lr 0.01`; several
values as `--resize 800 1333` or `resize=800,1333`; switches as `--amp`, `--no-amp`, `amp=false`.

Exit codes: 0 done, 2 usage, 3 data, 4 environment, 130 interrupted (by another signal: 128 + its number).
Nothing here imports torch, so `--help` is quick.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.text import Text

from .errors import MachineError, UsageError, UserError

Config = typing.TypeVar("Config")
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def run(
    config_type: type[Config],
    main: Callable[[Config], None],
    *,
    examples: Sequence[str],
    presets: Mapping[str, Config] | Callable[[Sequence[str]], Mapping[str, Config]] | None = None,
    arguments: Sequence[str] | None = None,
) -> typing.NoReturn:
    """Runs a program: parses the command line, calls `main` with the result, turns faults into a message and exit code.

    Args:
        config_type: dataclass; its docstring is the program's description.
        examples: command lines that `--help` starts with; "{program}" stands for how this program is called.
        presets: named configurations that `--preset NAME` starts from; the first is the default. All of one structure.
            Or a function that gives them for a command line.
        arguments: the command line without the program's name; sys.argv by default.
    """
    # PyTorch reads this at its first allocation. Large tensors in pages of 2 MiB instead of 4 KiB: making one takes a
    # CPU a quarter of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    program = program_name()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        presets = presets(arguments) if callable(presets) else presets
        main(parse(config_type, arguments, program, examples, presets))
    except UserError as error:
        sys.exit(tell(error))
    except KeyboardInterrupt as interrupt:
        Console(stderr=True, highlight=False).print(str(interrupt) or "interrupted", soft_wrap=True)
        sys.exit(getattr(interrupt, "exit_code", 130))
    except BrokenPipeError:  # the reader of our output has gone: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        fault = _machine_fault(error)
        if fault is None:
            raise
        sys.exit(tell(fault))
    sys.exit(0)


def tell(error: UserError) -> int:
    """Prints it, if no other process of the job does. Returns what this one is to exit with."""
    # All processes of a job are given the same command line.
    if error.told_by_another or (isinstance(error, UsageError) and os.environ.get("RANK", "0") != "0"):
        time.sleep(1.0)  # a launcher ends all with the first that ends, and who tells it may not have done so yet
    else:
        print_error(error)
    return error.exit_code


def program_name() -> str:
    """How this program was called: "python -m models.predict", or the console command's own name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and Path(sys.argv[0]).suffix == ".py":
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def given_value(name: str, arguments: Sequence[str]) -> str | None:
    """The value that raw `arguments` give an option, for one that decides which options there are; None: not given.
    Of several the last, as everywhere: `make train ARGS="--arch htc"` adds to a command line that names one."""
    found = None
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key.lstrip("-").replace("-", "_") == name and (equals or key.startswith("--")):
            found = value if equals else next(iter(arguments[i + 1 :]), None)
    return found


def given_switch(name: str, arguments: Sequence[str]) -> bool:
    """Whether raw `arguments` turn an option on that is off by default, in any spelling; the last one decides."""
    on = False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        bare = key.lstrip("-").replace("-", "_")
        if bare in (name, f"no_{name}") and (equals or key.startswith("--")):
            on = SWITCH_WORDS.get(value.lower(), False) if equals else True
            on = on != (bare != name)
    return on


def print_error(error: UserError) -> None:
    """Writes the message to stderr: the fault in red where there are colours; long lines stay whole, to be copied."""
    first, *rest = str(error).split("\n")
    message = Text.assemble(("error: ", "bold red"), (first, "bold"))
    for line in rest:
        message.append("\n" + line)
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)


def parse(
    config_type: type[Config],
    arguments: Sequence[str],
    program: str,
    examples: Sequence[str],
    presets: Mapping[str, Config] | None = None,
) -> Config:
    """The configuration that `arguments` ask for. Raises UsageError; prints and exits with 0 for --help."""
    options = _options(config_type, next(iter(presets.values())) if presets else None)
    arguments = list(arguments)
    default = None
    if presets is not None:
        options["preset"] = typing.Literal[tuple(presets)]
    arguments = _normalise(arguments, options, program)
    if presets is not None:
        name, arguments = _take_preset(arguments, presets)
        default = presets[name]
    if "--help" in arguments or "-h" in arguments:
        print("Examples:")
        print("\n".join("  " + line.format(program=program) for line in examples) + "\n")
        if presets is not None:
            print(f"--preset {{{','.join(presets)}}} chooses the values to start from (those shown below: {name}).\n")
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            # Where a field may be one of several dataclasses, the default's decides, and there are no subcommands.
            return tyro.cli(
                config_type, prog=program, args=arguments, default=default, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _usage_error(shown.getvalue(), arguments, options, program) from None


def _options(config_type: type, default: object | None = None, prefix: str = "") -> dict[str, object]:
    """Every option's dotted name and type, nested dataclasses unfolded: {"amp": bool, "data.workers": int}.

    Of a field that may be one of several dataclasses, the default's is unfolded.
    """
    found = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        value = getattr(default, field.name, None)
        kind = type(value) if dataclasses.is_dataclass(value) else hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= _options(kind, value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = kind
    return found


def _normalise(arguments: Sequence[str], options: Mapping[str, object], program: str) -> list[str]:
    """Rewrites every accepted spelling to tyro's, and refuses an unknown name."""
    result = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[position:]]
        match = re.fullmatch(r"(--?)?([A-Za-z_][\w.-]*)(?:=(.*))?", argument, re.DOTALL)
        if argument in ("-h", "--help") or match is None:
            result.append(argument)
            continue
        dashes, name, value = match.groups()
        if dashes is None and (value is None or Path(argument).exists()):
            result.append(argument)  # a value, or a file whose name has an equals sign
            continue
        key, negated = _find(name, options)
        if key is None:
            raise _unknown_option(argument, name, options, program)
        flag = "--" + key.replace("_", "-")
        if value is None:
            result.append(_switch(key, False) if negated else flag)
        elif options[key] is bool:
            if value.lower() not in SWITCH_WORDS:
                raise _wrong_value(key, options[key], repr(value), program)
            result.append(_switch(key, SWITCH_WORDS[value.lower()] != negated))
        else:
            values = value.split(",") if _is_tuple(options[key]) else [value]
            result += [flag, *("None" if part.lower() in ("none", "null") else part for part in values)]
    return result


def _find(name: str, options: Mapping[str, object]) -> tuple[str | None, bool]:
    """(the option called `name`, whether it is the --no- form); (None, False) where there is none."""
    key = name.replace("-", "_")
    if key in options:
        return key, False
    head, _, last = key.rpartition(".")
    positive = f"{head}.{last[3:]}" if head else last[3:]
    if last.startswith("no_") and options.get(positive) is bool:
        return positive, True
    return None, False


def _switch(key: str, on: bool) -> str:
    head, dot, last = key.replace("_", "-").rpartition(".")
    return f"--{head}{dot}{'' if on else 'no-'}{last}"


def _take_preset(arguments: list[str], presets: Mapping[str, object]) -> tuple[str, list[str]]:
    """(name of the preset, the other arguments)."""
    if "--preset" not in arguments:
        return next(iter(presets)), arguments
    at = arguments.index("--preset")
    name = arguments[at + 1] if at + 1 < len(arguments) else None
    if name not in presets:
        raise UsageError(
            "no such preset", where="--preset", why=f"expected one of {', '.join(presets)}, got {name or 'nothing'}"
        )
    return name, arguments[:at] + arguments[at + 2 :]


def _unknown_option(argument: str, name: str, options: Mapping[str, object], program: str) -> UsageError:
    key = name.replace("-", "_")
    same_end = [option for option in options if option.rpartition(".")[2] == key.rpartition(".")[2]]
    last_parts = {option.rpartition(".")[2]: option for option in options}
    close = difflib.get_close_matches(key, options, n=3, cutoff=0.6)
    close += [
        last_parts[part] for part in difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=2, cutoff=0.7)
    ]
    names = ["--" + option.replace("_", "-") for option in dict.fromkeys(same_end + close)]
    return UsageError(
        "unknown option",
        where=argument,
        why=f"the nearest names are {', '.join(names)}" if names else "no option has a name like it",
        fix=f"{program} --help   lists all of them",
    )


def _wrong_value(key: str, kind: object, got: str, program: str) -> UsageError:
    return UsageError(
        "an option has a value of the wrong type",
        where="--" + key.replace("_", "-"),
        why=f"expected {_describe(kind)}, got {got}",
        fix=f"{program} --help   shows the values that it takes",
    )


def _usage_error(shown: str, arguments: Sequence[str], options: Mapping[str, object], program: str) -> UsageError:
    """What tyro found, in our words: the first option that its message names is the one at fault."""
    plain = re.sub(r"[\u2500-\u257f]", " ", re.sub(r"\x1b\[[0-9;]*m", "", shown))
    named = [
        found for found in (_find(word, options)[0] for word in re.findall(r"--([A-Za-z][\w.-]*)", plain)) if found
    ]
    help_line = f"{program} --help   explains every option"
    rule = re.search(r"Error parsing ([\w.]+): (.*?) For full helptext", " ".join(plain.split()))
    if rule:  # the dataclass itself refused (__post_init__)
        return UsageError("the options have a value that is not allowed", where=rule[1], why=rule[2], fix=help_line)
    if "Missing from" in plain:
        missing = ", ".join("--" + key.replace("_", "-") for key in dict.fromkeys(named))
        return UsageError("a required option is missing", where=missing, fix=help_line)
    flag = "--" + named[0].replace("_", "-") if named else None
    if flag not in arguments:
        return UsageError("the command line cannot be understood", why=" ".join(plain.split()), fix=help_line)
    given = []
    for argument in arguments[arguments.index(flag) + 1 :]:
        if argument.startswith("--"):
            break
        given.append(argument)
    return _wrong_value(named[0], options[named[0]], " ".join(map(repr, given)) or "nothing", program)


def _is_tuple(kind: object) -> bool:
    return typing.get_origin(kind) is tuple or any(_is_tuple(part) for part in typing.get_args(kind))


def _describe(kind: object) -> str:
    """A type in words: tuple[int, int] | None -> "2 values (an integer, an integer) or None"."""
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a word",
        Path: "a path",
        type(None): "None",
    }
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is typing.Annotated:
        return _describe(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"values, each {_describe(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} values ({', '.join(map(_describe, parts))})"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _machine_fault(error: Exception) -> MachineError | None:
    """Faults of the machine that may come from anywhere; None for a defect of ours, which keeps its traceback."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MachineError(
            "out of memory", why=str(error) or None, fix="a smaller --batch-size or --resize needs less"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        fix = "ulimit -n 4096 allows more; fewer --workers need less"
        return MachineError("too many open files", where=error.filename, why=error.strerror, fix=fix)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return MachineError("the system refused", where=error.filename, why=error.strerror)
    if type(error).__name__ == "DistBackendError" or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
        return MachineError(
            "another process of the job has ended, or cannot be reached",
            why=str(error).splitlines()[0],
            fix="its own message says why. --resume goes on from the last checkpoint",
        )
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and error.name.split(".")[0] not in ("models", "cascadeops")
    ):
        return MachineError("a package is missing", where=error.name, fix='pip install "cascadeops[detect]"')
    return None
