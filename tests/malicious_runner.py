"""Reads every file of the zoo, in this process, which is watched; prints a JSON line a case.

    python tests/malicious_runner.py FOLDER [--unsafe]

An audit hook notes what Python is asked to do while a file is read: whatever is not on the list of harmless events, and
files opened outside of FOLDER or for writing. --unsafe reads one of the files as an unsafe program would, so that a
test can see that the watch sees it.
"""

import contextlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from unittest import mock

import malicious_files
import malicious_runs
import malicious_weights
from program_cases import write_weights

from models import recipes
from models.checkpoint import class_table, load_detector
from models.checkpoints import read_checkpoint
from models.config import DETECTOR_CONFIGS
from models.config_files import as_json, read_config
from models.data import annotation_cache
from models.data.annotations import read_annotations
from models.data.check import check_dataset
from models.data.coco import CocoDataset
from models.data.image_folders import read_class_names
from models.data.voc import VocDataset
from models.data.voc_xml import read_voc_file
from models.errors import UserError, printable
from models.images import image_size, read_image, read_label_map
from models.partial_results import PartialResults
from models.progress import evaluations
from models.replay import Replay
from models.replay import main as replay
from models.results import Result
from models.weights.contents import read_contents

QUIET = {"mmap.__new__", "builtins.id", "object.__getattr__", "object.__setattr__", "os.listdir", "os.scandir"}
QUIET |= {"array.__new__", "fcntl.flock", "sys._getframe"}
"""Audit events of reading files, besides opening them."""

WRITING = {"os.mkdir", "os.rename", "os.remove", "os.chmod", "os.truncate", "os.utime", "tempfile.mkstemp"}
"""That a program which keeps a cache may do in the folder of the cache."""

WRITERS = {"cache", "partial"}
"""Readers that put what is damaged right."""


def read_data(folder: str) -> None:
    data = CocoDataset(folder, "val")
    for index in range(len(data)):
        data.image(index)
        data.objects(index)
        data.mask(index, 0)


def read_picture(path: str) -> None:
    image_size(path)
    read_image(path)


def read_detector(path: str) -> None:
    class_table(path)
    load_detector(path)


def read_cache(path: str) -> None:
    """What is cached is damaged, and is not believed."""
    folder = Path(path).parent
    names = {"SMALLEST": 0, "_key": lambda *_: "key", "cache_root": lambda: folder}
    with mock.patch.multiple(annotation_cache, **names):
        assert len(annotation_cache.cached_annotations(Path(path), False, read_annotations).labels) == 1


def read_partial(path: str) -> None:
    assert PartialResults(Path(path), 1).batches == []


def read_metrics(path: str) -> None:
    assert evaluations(Path(path)) == {1: 0.0}


READERS = {
    "weights": read_contents,
    "detector": read_detector,
    "checkpoint": lambda path: read_checkpoint(Path(path)),
    "replay": lambda path: replay(Replay(Path(path), "cpu")),
    "config": lambda path: read_config(Path(path)),
    "annotations": lambda path: read_annotations(Path(path)),
    "data": read_data,
    "voc": lambda path: VocDataset(path, "val", boxes_only=True),
    "check": lambda path: check_dataset(Path(path)),
    "voc xml": lambda path: read_voc_file(Path(path)),
    "image": read_picture,
    "label map": read_label_map,
    "class names": read_class_names,
    "result": lambda path: Result.from_json(Path(path).read_text()),
    "metrics": read_metrics,
    "partial": read_partial,
    "cache": read_cache,
}

REPEATED = 0.3
"""Seconds from which a case is read again, and the shortest time counts: other processes use the machine, too."""

watched: dict = {"folder": None, "events": [], "reader": None}


def hook(event: str, arguments: tuple) -> None:
    folder = watched["folder"]
    if folder is None or event in QUIET:
        return
    if event in ("open", "pathlib.Path.glob") or event in WRITING:
        path = arguments[0]
        reads = event == "pathlib.Path.glob"
        if event == "open":
            _, mode, flags = arguments
            reads = mode in ("r", "rb") or not (mode or flags & os.O_ACCMODE)
        inside = isinstance(path, int) or os.path.realpath(path).startswith(folder)
        if inside and (reads or watched["reader"] in WRITERS):
            return
    watched["events"].append(f"{event} {arguments[:2]!r}"[:200])


def kilobytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def outcome(case: malicious_files.Case, folder: str, read) -> dict:
    """What became of a case: its error, what was asked for meanwhile, seconds of CPU, and mebibytes at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far begins anew
    before, start = kilobytes("VmRSS"), time.process_time()
    watched.update(folder=folder, events=[], reader=case.reader)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            read(case.path)
        error = None
    except Exception as caught:
        error = caught
    watched["folder"] = None
    return {
        "name": case.name,
        "reader": case.reader,
        "expected": case.outcome,
        "error": None if error is None else type(error).__name__,
        "typed": isinstance(error, UserError),
        "text": str(error)[:20_000],
        "path": case.path,
        "events": watched["events"],
        "seconds": round(time.process_time() - start, 3),
        "mebibytes": (kilobytes("VmHWM") - before) / 1024,
    }


def good_cases(folder: Path) -> list[malicious_files.Case]:
    """One for each reader that can be read: what Python imports on first use is imported before anything is watched."""
    put, case = malicious_files.put, malicious_files.Case
    root = folder / "data"
    put(root / "annotations/instances_val.json", malicious_files.coco_text())
    put(root / "val/1.png", malicious_files.png(40, 60))
    cases = [case("", "data", str(root)), case("", "image", str(root / "val/1.png"))]
    for name, data in malicious_weights.good_files().items():
        cases.append(case("", "weights", str(put(folder / name, data))))
    cases.append(case("", "voc xml", str(put(folder / "a.xml", malicious_files.voc_text()))))
    cases.append(case("", "detector", str(write_weights(folder / "weights.safetensors"))))
    for arch in DETECTOR_CONFIGS:
        cases.append(case("", "config", str(put(folder / arch, json.dumps(as_json(recipes.small(arch)))))))
    return cases


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    for case in good_cases(folder / "good"):
        READERS[case.reader](case.path)
    printable(malicious_files.ESC)  # imports an encoding, and so does the next line
    json.loads("1".encode("utf-32-be"))
    zoo, unsafe = [], "--unsafe" in sys.argv
    for make in [malicious_runs.weight_files] if unsafe else [*malicious_files.PARTS, *malicious_runs.PARTS]:
        (folder / make.__name__).mkdir()
        zoo += make(folder / make.__name__)
    seen = set()
    for case in zoo:  # what errors need, and a check to show its findings, is imported before anything is watched
        if (case.reader not in seen or case.reader == "check") and not unsafe:
            seen.add(case.reader)
            outcome(case, str(folder), READERS[case.reader])
    sys.addaudithook(hook)
    if unsafe:
        case = next(case for case in zoo if case.name == "weights: os.system, bare")
        print(json.dumps(outcome(case, str(folder), lambda path: pickle.loads(Path(path).read_bytes()))))
        return
    for case in zoo:
        found = outcome(case, str(folder), READERS[case.reader])
        for _ in range(2):
            if found["seconds"] > REPEATED:
                found["seconds"] = min(found["seconds"], outcome(case, str(folder), READERS[case.reader])["seconds"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
