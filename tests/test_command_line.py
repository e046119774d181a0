"""The command line: spellings of an option, what a mistake is answered with, exit codes, help without torch."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

import models
from models.command_line import given_value, parse, run
from models.errors import DataError, MachineError, UsageError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Optimizer:
    rate: float = 0.02
    steps: tuple[int, ...] = (8, 11)
    fast_mode: bool = False

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}")


@dataclass(frozen=True)
class Options:
    """Does something."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    score_threshold: float = 0.3
    kind: Literal["slow", "quick"] = "slow"
    resize: tuple[int, int] | None = None
    amp: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True, kw_only=True)
class NeedsWeights:
    weights: Path
    """The weights."""


def parsed(*arguments: str, **more) -> Options:
    return parse(more.pop("config", Options), arguments, "program", ["{program} a.jpg"], **more)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--score-threshold", "0.5"],
        ["--score_threshold", "0.5"],
        ["--score-threshold=0.5"],
        ["score_threshold=0.5"],
        ["score-threshold=0.5"],
    ],
)
def test_every_spelling_of_an_option_means_the_same(arguments):
    assert parsed(*arguments) == Options(score_threshold=0.5)


@pytest.mark.parametrize(
    ("arguments", "amp"),
    [(["--amp"], True), (["--no-amp"], False), (["amp=true"], True), (["--amp=no"], False), (["amp=1"], True)],
)
def test_switches(arguments, amp):
    assert parsed(*arguments, presets={"on": Options(amp=not amp)}).amp is amp


def test_several_values_and_nested_fields():
    expected = Options(resize=(800, 1333), optimizer=Optimizer(rate=0.1, steps=(1, 2, 3), fast_mode=True))
    assert parsed("resize=800,1333", "optimizer.rate=0.1", "optimizer.steps=1,2,3", "--optimizer.fast-mode") == expected
    spelled = ["--resize", "800", "1333", "--optimizer.rate", "0.1", "--optimizer.steps", "1", "2", "3"]
    assert parsed(*spelled, "optimizer.fast_mode=on") == expected


def test_none_is_a_value():
    assert parsed("resize=none", presets={"a": Options(resize=(1, 2))}).resize is None


def test_a_file_name_with_an_equals_sign_stays_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("score_threshold=1.jpg").touch()
    assert parsed("a.jpg", "score_threshold=1.jpg").images == (Path("a.jpg"), Path("score_threshold=1.jpg"))


def test_a_preset_is_where_the_other_options_start_from():
    presets = {"small": Options(kind="quick"), "large": Options(score_threshold=0.9, amp=True)}
    assert parsed(presets=presets).kind == "quick"
    assert parsed("--no-amp", "--preset", "large", presets=presets) == Options(score_threshold=0.9)
    assert parsed("preset=large", presets=presets).amp
    with pytest.raises(UsageError, match="expected one of small, large, got huge"):
        parsed("--preset", "huge", presets=presets)


@dataclass(frozen=True)
class Adam:
    rate: float = 0.001
    epsilon: float = 1e-8


@dataclass(frozen=True)
class EitherOptimizer:
    optimizer: Optimizer | Adam = field(default_factory=Optimizer)


def test_the_preset_decides_which_dataclass_a_field_holds():
    presets = {"small": EitherOptimizer(Adam()), "large": EitherOptimizer(Adam(epsilon=1.0))}
    found = parsed("optimizer.rate=0.5", "--preset=large", config=EitherOptimizer, presets=presets)
    assert found == EitherOptimizer(Adam(rate=0.5, epsilon=1.0))
    with pytest.raises(UsageError, match="unknown option"):
        parsed("--optimizer.fast-mode", config=EitherOptimizer, presets=presets)
    presets = {"small": EitherOptimizer()}
    assert parsed("--optimizer.fast-mode", config=EitherOptimizer, presets=presets).optimizer.fast_mode


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--arch", "htc", "-v"], "htc"),
        (["-v", "--arch=htc"], "htc"),
        (["arch=htc"], "htc"),
        (["arch", "htc"], None),
        (["--architect", "htc"], None),
        (["--arch"], None),
    ],
)
def test_a_value_is_found_before_the_command_line_is_parsed(arguments, value):
    assert given_value("arch", arguments) == value


def test_every_detector_has_its_own_options_in_training():
    from models.recipes import TrainConfig, presets

    arguments = ["arch=htc", "--detector.no-interleaved", "--detector.rpn.num-samples", "7"]
    found = parsed(*arguments, config=TrainConfig, presets=presets("htc"))
    assert (found.arch, found.detector.interleaved, found.detector.rpn.num_samples) == ("htc", False, 7)
    with pytest.raises(UsageError, match="unknown option"):
        parsed("--detector.no-interleaved", config=TrainConfig, presets=presets("mask_rcnn"))
    with pytest.raises(UsageError, match="arch scnet needs a detector of SCNetConfig"):
        parsed("arch=scnet", config=TrainConfig, presets=presets("htc"))


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--score-treshold", "--score-threshold"),
        ("treshold=1", "--score-threshold"),
        ("rate=0.1", "--optimizer.rate"),
        ("--optimizer.step=3", "--optimizer.steps"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_names(argument, near):
    with pytest.raises(UsageError) as error:
        parsed(argument)
    assert error.value.what == "unknown option"
    assert error.value.where == argument
    assert near in error.value.why


def test_a_key_like_no_other_is_refused_too():
    with pytest.raises(UsageError, match="no option has a name like it"):
        parsed("--zzz")
    with pytest.raises(UsageError, match="unknown option"):
        parsed("-x")


@pytest.mark.parametrize(
    ("arguments", "option", "why"),
    [
        (["score_threshold=abc"], "--score-threshold", "expected a number, got 'abc'"),
        (["--resize", "800", "x"], "--resize", "expected 2 values (an integer, an integer) or None, got '800' 'x'"),
        (["--kind", "fast"], "--kind", "expected one of slow, quick, got 'fast'"),
        (["amp=maybe"], "--amp", "expected true or false, got 'maybe'"),
        (["--optimizer.steps", "1", "two"], "--optimizer.steps", "expected values, each an integer, got '1' 'two'"),
        (["--score-threshold"], "--score-threshold", "expected a number, got nothing"),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_what_came(arguments, option, why):
    with pytest.raises(UsageError) as error:
        parsed(*arguments)
    assert (error.value.where, error.value.why) == (option, why)


def test_a_rule_of_the_dataclass_is_told():
    with pytest.raises(UsageError) as error:
        parsed("optimizer.rate=-1")
    assert (error.value.where, error.value.why) == ("optimizer", "rate must be positive, got -1.0")


def test_a_missing_option_is_named():
    with pytest.raises(UsageError) as error:
        parsed(config=NeedsWeights)
    assert (error.value.what, error.value.where) == ("a required option is missing", "--weights")


def test_help_starts_with_the_examples(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith("Examples:\n  program a.jpg\n")
    assert "--score-threshold FLOAT" in text


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        (UsageError("a", where="b", why="c", fix="d"), 2, "error: a\n  where: b\n  why:   c\n  fix:   d\n"),
        (
            DataError("no such [K, 5] file", fix="one\ntwo"),
            3,
            "error: no such [K, 5] file\n  fix:   one\n         two\n",
        ),
        (MachineError("full"), 4, "error: full\n"),
        (MemoryError(), 4, "error: out of memory\n  fix:   a smaller --batch-size or --resize needs less\n"),
        (OSError(28, "No space left on device", "/x"), 4, "where: /x\n  why:   No space left on device\n"),
        (ModuleNotFoundError("no tyro", name="tyro"), 4, 'where: tyro\n  fix:   pip install "cascadeops[detect]"\n'),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes_and_messages(fault, code, text, capsys):
    def main(_):
        raise fault

    with pytest.raises(SystemExit) as end:
        run(Options, main, examples=[], arguments=[])
    assert end.value.code == code
    assert capsys.readouterr().err.endswith(text)


def test_a_defect_of_ours_keeps_its_traceback():
    def main(_):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run(Options, main, examples=[], arguments=[])


@pytest.mark.parametrize("program", ["models.train", "models.evaluate", "models.predict"])
def test_help_does_not_import_torch(program):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['program', '--help']\n"
        "try:\n"
        f"    runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print('code', end.code, 'torch', 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"Examples:\n  python -m {program} "), done.stdout + done.stderr
    assert done.stdout.endswith("code 0 torch False\n")


@pytest.mark.parametrize("program", ["models.train", "models.evaluate", "models.predict"])
def test_a_mistyped_option_ends_with_code_2_and_no_traceback(program):
    command = [sys.executable, "-m", program, "--wieghts", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: unknown option\n  where: --wieghts\n"
        + "  why:   the nearest names are "
        + done.stderr.split("the nearest names are ")[1].split("\n")[0]
        + f"\n  fix:   python -m {program} --help   lists all of them\n"
    )
    assert "--weights" in done.stderr


@pytest.mark.parametrize(("name", "home"), [("train", "models.training"), ("predict", "models.inference")])
def test_an_imported_program_leaves_the_function_of_its_name(name, home):
    program = importlib.import_module(f"models.{name}")
    function = getattr(models, name)
    assert function is getattr(importlib.import_module(home), name)
    assert program.main.__module__ == f"models.{name}" and program.main is not function


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m models.predict --help | head -1"
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True, timeout=60, env=os.environ)
    assert (done.stdout, done.stderr) == ("Examples:\n", "")


@pytest.mark.parametrize(("before", "during"), [(None, "1"), ("0", "0")])
def test_programs_ask_for_large_pages_unless_told_otherwise(monkeypatch, before, during):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", before or "")
    if before is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    seen = []
    with pytest.raises(SystemExit):
        run(Options, lambda _: seen.append(os.environ["THP_MEM_ALLOC_ENABLE"]), examples=[], arguments=[])
    assert seen == [during]


@pytest.mark.parametrize(
    ("rank", "kind", "told"), [("0", UsageError, True), ("1", UsageError, False), ("1", DataError, True)]
)
def test_a_job_says_once_what_all_its_processes_were_given(monkeypatch, capsys, rank, kind, told):
    """A fault of the command line is everybody's, one of the data may be of one process alone."""
    monkeypatch.setenv("RANK", rank)

    def main(_):
        raise kind("something is wrong")

    with pytest.raises(SystemExit) as end:
        run(Options, main, examples=(), arguments=[])
    assert end.value.code == kind.exit_code
    assert ("something is wrong" in capsys.readouterr().err) == told


def test_of_two_values_of_an_option_the_last_counts():
    assert given_value("arch", ["--arch", "scnet", "--epochs", "3", "--arch=htc"]) == "htc"
    assert given_value("arch", ["arch=scnet", "--arch", "htc"]) == "htc"
    assert given_value("arch", ["--epochs", "3"]) is None


def test_what_one_process_of_a_job_lacks_it_tells_itself(tmp_path):
    """Its environment may be that of one machine alone; the others wait for it."""
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "models.train", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "the environment of a job is incomplete" in done.stderr and "MASTER_PORT" in done.stderr
