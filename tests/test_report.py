"""benchmarks/report.py on a small file whose numbers are made for mental arithmetic, and on what the README shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import report

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "data/benchmarks.json"
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


def test_tables():
    assert report.tables(report.load(STORED)) == (
        "## Paper Processor 9000, 2 processors, 2 of them used\n\n"
        "torch 2.11.0, torchvision 0.26.0; commit 0123abc; 2026-11; a copy moves 20.0 GB/s. "
        "File: `benchmarks.json`.\n\n"
        "### padded_nms\n\n"
        "| workload | cascadeops | torchvision | reference | GB/s | of a copy's |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 1,000 boxes, 5 groups | 2.00 ms | 24.0 ms (12.0x) | ~2.00 s (1,000x) | 2 | 10% |\n"
        "| 10 boxes, 1 group | 50.0 us | ~40.0 us (**0.80x: a loss**) |  | 0.02 | 0% |\n"
        "| 100 boxes, 5 groups | 1.00 ms | 3.00 ms (3.00x) |  |  |  |\n\n"
        "### paste_masks\n\n"
        "| workload | cascadeops | cascadeops, soft | torchvision |\n"
        "| --- | --- | --- | --- |\n"
        "| 100 masks, 800 x 1333 | 10.1 ms | 20.2 ms | 1.01 s (100x) |"
    )


def test_summary_has_the_least_and_the_largest_gain_of_each_operator():
    lines = report.summary(report.load(STORED)).splitlines()
    assert lines[-3:] == [
        "| `padded_nms` | 10 boxes, 1 group | 50.0 us | torchvision ~40.0 us | **0.80x: a loss** |",
        "| `padded_nms` | 1,000 boxes, 5 groups | 2.00 ms | torchvision 24.0 ms | 12.0x |",
        "| `paste_masks` | 100 masks, 800 x 1333 | 10.1 ms | torchvision 1.01 s | 100x |",
    ]


@pytest.mark.parametrize(
    "seconds, text", [(9.994, "9.99 s"), (9.996, "10.0 s"), (99.96, "100 s"), (1234, "1,234 s"), (2.5e-9, "2.50 ns")]
)
def test_three_digits_across_the_powers_of_ten(seconds, text):
    assert report.duration(report.Timing(seconds, iqr=0.0, rounds=10)) == text


def test_rewrite_changes_the_marked_sections_alone(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- benchmarks: summary -->\n99x, typed by hand\n<!-- /benchmarks -->\nafter\n")
    report.main([str(STORED), "--rewrite", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmarks: summary -->\n\nPaper Processor") and "99x" not in text
    assert text.endswith("100x |\n\n<!-- /benchmarks -->\nafter\n")
    report.main([str(STORED), "--rewrite", str(page)])
    assert page.read_text() == text
    (tmp_path / "other.md").write_text("no marks")
    with pytest.raises(SystemExit, match="has no section between"):
        report.main([str(STORED), "--rewrite", str(tmp_path / "other.md")])


def detector_run(device: str, **times: tuple[float, int | None]) -> report.Run:
    """times: operator -> seconds and bytes of SCNet R-50."""
    row, facts = "scnet_r50_fpn_1x_coco", {"gpu": "Paper GPU", "processor": "Paper Processor", "threads": 2}
    workloads = [
        report.Workload(operator.replace("_", " "), row, {"cascadeops": report.Timing(seconds, 0.0, 10, memory=memory)})
        for operator, (seconds, memory) in times.items()
    ]
    return report.Run(Path(), device, facts, "2026-11", workloads)


def test_detectors_have_the_published_number_beside_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "PREDICTED", tmp_path / "predicted.json")
    sizes = {"float32": {"peak": 3 * 2**30}, "bfloat16": {"peak": 2**31}, "bfloat16, recomputing": {"peak": 2**30}}
    rows = ["scnet_r50_fpn_1x_coco", "scnet_r50_fpn_20e_coco", "htc_r50_fpn_20e_coco"]
    report.PREDICTED.write_text(json.dumps({"torch": "2.13.0", "rows": dict.fromkeys(rows, sizes)}))
    cpu = detector_run("cpu", detect_to_RLE=(4.0, None))
    gpu = detector_run("cuda", detect=(0.01, None), train=(0.1, 7 * 2**29))
    text = report.detectors([cpu])
    assert "GPU: not measured; CPU: Paper Processor, 2 of them used." in text
    assert text.splitlines()[-2:] == [  # the 20e row is the same detector
        "| `scnet_r50_fpn_1x_coco` | 7.0 | 3.0 | 2.0 | 1.0 | not measured | 6.2 | not measured | 4.00 s |",
        "| `htc_r50_fpn_20e_coco` | 8.2 | 3.0 | 2.0 | 1.0 | not measured | - | not measured | - |",
    ]
    assert "| scnet_r50_fpn_1x_coco | 100 ms, 3,584 MiB |" in report._operator_table(gpu.workloads[1:])
    text = report.detectors([cpu, gpu])
    assert "GPU: Paper GPU;" in text
    assert "| `scnet_r50_fpn_1x_coco` | 7.0 | 3.0 | 2.0 | 1.0 | 3.5 | 6.2 | 100.0 | 4.00 s |" in text


def test_output_folder(tmp_path):
    report.main([str(STORED), "--output", str(tmp_path / "new")])
    assert (tmp_path / "new/tables.md").read_text() == report.tables(report.load(STORED)) + "\n"
    picture = Image.open(tmp_path / "new/benchmarks_cpu.png")
    assert picture.format == "PNG"
    pixels = set(picture.convert("RGB").get_flattened_data())
    assert {(0, 114, 178), (230, 159, 0), (213, 94, 0)} <= pixels  # both peers' dots, and the number of the loss


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"machine_info": {}, "benchmarks": []}', "not written by `pytest benchmarks/"),
        ('{"machine_info": {"cascadeops": {}}, "benchmarks": []}', "holds no benchmarks"),
        ("[1, 2", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "other.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "other.json")])
    assert f"other.json: {message}" in capsys.readouterr().err


def test_a_benchmark_is_kept_only_when_its_result_is_right(tmp_path):
    shutil.copy(ROOT / "benchmarks/conftest.py", tmp_path)
    (tmp_path / "bench_sum.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.parametrize('implementation', ['cascadeops', 'broken'])\n"
        "def bench_sum(measure, implementation):\n"
        "    def check(result):\n"
        "        assert result == (1e6 if implementation == 'cascadeops' else 0)\n"
        "    numbers = torch.ones(1_000_000)\n"
        "    measure('sum, a million', implementation, lambda: numbers.sum(), check, bytes_moved=4_000_000)\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command += [str(tmp_path), "--benchmark-only", "--benchmark-json", str(tmp_path / "times.json")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert "1 failed, 1 passed" in output, output
    (run,) = report.load(tmp_path / "times.json")
    (workload,) = run.workloads
    assert (workload.operator, workload.name, list(workload.timings)) == ("sum", "a million", ["cascadeops"])
    assert workload.ours.median > 0 and workload.ours.gb_per_second > 0
    assert run.device == "cpu" and "a copy moves" in run.conditions


@pytest.mark.parametrize("path", ["README.md", "benchmarks/results/README.md"])
def test_published_numbers_are_those_of_the_results(path):
    runs = [run for file in RESULTS for run in report.load(file)]
    text = (ROOT / path).read_text()
    assert report.SECTION.search(text)
    assert report.rewritten(text, runs) == text, (
        f"python -m benchmarks.report benchmarks/results/*.json --rewrite {path}"
    )


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_named_by_machine_and_month_and_come_from_a_commit(path):
    document = json.loads(path.read_text())
    assert re.fullmatch(r"[a-z0-9-]+_\d{6}", path.stem)
    assert path.stem.endswith(document["datetime"][:7].replace("-", ""))
    assert "node" not in document["machine_info"]
    assert re.fullmatch(r"[0-9a-f]{7,}", document["machine_info"]["cascadeops"]["commit"]), "measured on a dirty tree"
