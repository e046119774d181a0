"""benchmarks/compare.py on runs whose medians and spreads are made for mental arithmetic."""

import json
from pathlib import Path

import pytest

from benchmarks import compare

FACTS = {
    "commit": "0123abc",
    "torch": "2.11.0",
    "peers": {},
    "threads": 2,
    "processor": "Paper Processor 9000, 2 processors",
    "cpu_copy_gb_per_second": 20.0,
}


def run_file(path: Path, times: dict, **facts) -> str:
    """times: (operator, implementation) -> median, interquartile range in ms, and rounds (10)."""
    benchmarks = [
        {
            "extra_info": {"operator": operator, "workload": "", "implementation": implementation, "device": "cpu"},
            "stats": {"median": median / 1e3, "iqr": iqr / 1e3, "rounds": rounds[0] if rounds else 10},
        }
        for (operator, implementation), (median, iqr, *rounds) in times.items()
    ]
    document = {"machine_info": {"cascadeops": FACTS | facts}, "datetime": "2026-11-21", "benchmarks": benchmarks}
    path.write_text(json.dumps(document))
    return str(path)


def compared(tmp_path, capsys, old: dict, new: dict, *options: str) -> tuple[int, str]:
    """Exit status and output."""
    files = run_file(tmp_path / "old.json", old), run_file(tmp_path / "new.json", new)
    with pytest.raises(SystemExit) as end:
        compare.main([*files, *options])
    return end.value.code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("median", "verdict", "status"),
    [(108.0, "noise", 0), (112.0, "SLOWER", 1), (92.0, "noise", 0), (85.0, "faster", 0)],
)
def test_a_change_counts_beyond_half_the_spread_of_both_runs(tmp_path, capsys, median, verdict, status):
    """100 ms with rounds from 95 to 105 in both: 5 % and 5 % are the noise, whatever the change."""
    old = {("nms", "cascadeops"): (100.0, 10.0)}
    new = {("nms", "cascadeops"): (median, median / 10)}
    code, text = compared(tmp_path, capsys, old, new, "--all")
    assert code == status and f"1 {verdict}" in text
    (line,) = [line for line in text.splitlines() if line.startswith("cpu ")]
    assert line.split()[1:4] == ["nms", "cascadeops", "100"]
    assert line.split()[-3:] == [f"{median - 100:+.1f}%", "10.0%", verdict]


def test_what_others_say_of_the_machine_is_noise_for_us(tmp_path, capsys):
    """Without a spread in the rounds, and all of torchvision's 30 % slower: the machine is, not the code."""
    old = {(f"op{i}", name): (10.0, 0.0) for i in range(8) for name in ("cascadeops", "torchvision")}
    new = {key: (13.0, 0.0) for key in old}
    assert compared(tmp_path, capsys, old, new)[0] == 0
    code, text = compared(tmp_path, capsys, old, new | {("op3", "cascadeops"): (14.0, 0.0)})
    assert code == 1 and "did not change: 30.0%" in text and "7 noise" in text
    assert [line.split()[1] for line in text.splitlines() if line.endswith("SLOWER")] == ["op3"]
    code, text = compared(tmp_path, capsys, old, old | {("op3", "cascadeops"): (14.0, 0.0)})
    assert code == 1 and "+40.0%" in text  # the machine is as it was


def test_slower_peers_are_not_ours_to_mend(tmp_path, capsys):
    old = {("nms", "torchvision"): (10.0, 0.1), ("nms", "cascadeops bfloat16"): (10.0, 0.1)}
    assert compared(tmp_path, capsys, old, old | {("nms", "torchvision"): (20.0, 0.1)})[0] == 0
    assert compared(tmp_path, capsys, old, old | {("nms", "cascadeops bfloat16"): (20.0, 0.1)})[0] == 1


def test_a_single_round_gets_no_verdict(tmp_path, capsys):
    old, new = {("nms", "cascadeops"): (10.0, 0.0, 1)}, {("nms", "cascadeops"): (30.0, 0.0, 5)}
    code, text = compared(tmp_path, capsys, old, new)
    assert code == 0 and "1 one round" in text


def test_missing_and_new_benchmarks_are_listed(tmp_path, capsys):
    both = {("nms", "cascadeops"): (10.0, 0.1)}
    old, new = both | {("gone", "cascadeops"): (1.0, 0.1)}, both | {("added", "torchvision"): (1.0, 0.1)}
    code, text = compared(tmp_path, capsys, old, new)
    assert code == 0
    assert "missing:\n  cpu, gone, , cascadeops\n" in text and "new:\n  cpu, added, , torchvision\n" in text


@pytest.mark.parametrize("facts", [{"processor": "Other"}, {"threads": 4}, {"gpu": "A GPU"}])
def test_other_machines_are_refused(tmp_path, capsys, facts):
    times = {("nms", "cascadeops"): (10.0, 0.1)}
    files = run_file(tmp_path / "old.json", times), run_file(tmp_path / "new.json", times, **facts)
    with pytest.raises(SystemExit, match="2"):
        compare.main([*files])
    ((name, value),) = facts.items()
    assert f"not the same machine: {name} is" in (error := capsys.readouterr().err) and str(value) in error


def test_bad_files_are_named(tmp_path, capsys):
    good = run_file(tmp_path / "good.json", {("nms", "cascadeops"): (10.0, 0.1)})
    (tmp_path / "bad.json").write_text("{")
    for bad in (str(tmp_path / "bad.json"), str(tmp_path / "none.json")):
        for files in ([good, bad], [bad, good]):
            with pytest.raises(SystemExit, match="2"):
                compare.main(files)
            assert f"{bad}: cannot be read" in capsys.readouterr().err
