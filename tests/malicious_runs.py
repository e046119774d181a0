"""The part of the zoo that looks like what a run writes: checkpoints, configurations, weights of ours, metrics, caches.

Hashes are right where a file has some: a stranger can compute them, too.
"""

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path

import malicious_weights
import numpy as np
from malicious_files import ESC, Case, coco_text, members, nested, put
from safetensors.numpy import save

from models import recipes
from models.config_files import as_json

CALL = b"\x80\x04cos\nsystem\n(X\x0c\x00\x00\x00touch ownedtR."
DEEP = nested(200_000)


def weight_files(folder: Path) -> list[Case]:
    """The zoo of malicious_weights.py: each call in each of the formats that hold a pickle, and each bomb in one of
    them; test_malicious_weights.py has the others."""
    containers = {"zip": malicious_weights.archive, "legacy": malicious_weights.legacy, "bare": lambda content: content}
    files = {
        f"{kind}, {container}": pack(malicious_weights.pickle_of(value, protocol=4))
        for kind, value in malicious_weights.calls(str(folder / "victim")).items()
        for container, pack in containers.items()
    }
    for kind, value in malicious_weights.bombs().items():
        files[kind] = malicious_weights.archive(malicious_weights.pickle_of(value, protocol=4))
    files |= malicious_weights.false_tensors() | malicious_weights.false_arrays() | malicious_weights.other_files()
    paths = [put(folder / f"weights {number}", data) for number, data in enumerate(files.values())]
    return [Case(f"weights: {kind}", "weights", str(path)) for kind, path in zip(files, paths, strict=True)]


def write_checkpoint(folder: Path, manifest: dict | str, tensors: bytes) -> Path:
    text = put(folder / "manifest.json", manifest if isinstance(manifest, str) else json.dumps(manifest)).read_bytes()
    put(folder / "manifest.sha256", f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    put(folder / "tensors.safetensors", tensors)
    return folder


def checkpoint_folders(folder: Path) -> list[Case]:
    value = np.arange(4, dtype=np.float32)
    data, digest = save({"a": value}), hashlib.sha256(value.tobytes()).hexdigest()
    tensors = {"a": {"dtype": "float32", "shape": [4], "sha256": digest}}
    good = {"format": "cascadeops-checkpoint-1", "step": 1, "tensors": tensors, "facts": {}}
    manifests = {
        "manifest that is a list": "[]",
        "manifest that is nested": DEEP,
        "manifest of a number": "1",
        "manifest without tensors": good | {"tensors": None},
        "manifest of other tensors": good | {"tensors": {}},
        "step that is a text": good | {"step": "x"},
        "step of 5,000 digits": json.dumps(good).replace('"step": 1', '"step": ' + "9" * 5_000),
        "infinite step": json.dumps(good).replace('"step": 1', '"step": 1e999'),
        "facts that are a text": good | {"facts": "x"},
        "another format": good | {"format": "pickle"},
        "format that steers a terminal": good | {"format": ESC},
        "tensor of an exabyte": good | {"tensors": {"a": tensors["a"] | {"shape": [2**60]}}},
        "tensor of 2^80 numbers": good | {"tensors": {"a": tensors["a"] | {"shape": [2**40, 2**40]}}},
        "tensor of a negative shape": good | {"tensors": {"a": tensors["a"] | {"shape": [-4]}}},
        "tensor of a shape of texts": good | {"tensors": {"a": tensors["a"] | {"shape": ["4"]}}},
        "tensor without a description": good | {"tensors": {"a": None}},
        "not JSON": "{",
        "not UTF-8": "{\udcff",
    }
    cases = []

    def case(name: str, manifest: dict | str = good, content: bytes = data) -> Path:
        path = write_checkpoint(folder / name / "step-00000001", manifest, content)
        cases.append(Case(name, "checkpoint", str(path)))
        return path

    for name, manifest in manifests.items():
        case(name, manifest)
    for name in ("tensors.safetensors", "manifest.json", "manifest.sha256"):
        path = case(f"link out of the folder: {name}") / name
        outside = put(folder / "outside" / name, path.read_bytes())
        path.unlink()
        path.symlink_to(outside)
        path = case(f"pipe: {name}") / name
        path.unlink()
        os.mkfifo(path)
        path = case(f"folder: {name}") / name
        path.unlink()
        path.mkdir()
        os.truncate(case(f"a terabyte of nothing: {name}") / name, 2**40)
        (case(f"missing: {name}") / name).unlink()
    case("tensors that are a pickle", content=CALL)
    case("tensors of a huge header", content=struct.pack("<Q", 2**62) + b"{}")
    case("tensors with a hole", content=struct.pack("<Q", 8) + b"{}      " + bytes(16))
    return cases


def config_text(changes: dict[str, object], base: dict | None = None) -> str:
    """A configuration with fields by dotted name set."""
    values = as_json(recipes.small("faster_rcnn")) if base is None else base
    for name, value in changes.items():
        place = values
        *path, last = name.split(".")
        for part in path:
            place = place[part]
        place[last] = value
    return json.dumps(values)


BAD_FIELDS: dict[str, object] = {
    "detector.channels": 10**9,
    "detector.num_classes": 10**18,
    "detector.box_channels": -1,
    "detector.backbone.width": 10**12,
    "detector.backbone.layers": [10**9, 1, 1, 1],
    "detector.backbone.scale": 10**6,
    "detector.backbone.block": "os.system",
    "detector.backbone.norm": ["batch"],
    "detector.rpn.anchor_ratios": [1.0] * 100_000,
    "detector.rpn.top_k": 10**15,
    "detector.rpn": None,
    "detector": [],
}


def config_files(folder: Path) -> list[Case]:
    texts = {f"configuration: {name}": config_text({name: value}) for name, value in BAD_FIELDS.items()}
    texts |= {
        "deep configuration": DEEP,
        "deep field": config_text({"epochs": 0}).replace('"epochs": 0', f'"epochs": {DEEP}'),
        "number of 100,000 digits": config_text({"epochs": 0}).replace('"epochs": 0', '"epochs": ' + "9" * 100_000),
        "rate of 4,000 digits": config_text({"optimizer.lr": 123.5}).replace("123.5", "1" + "0" * 4_000),
        "rate of NaN": config_text({"optimizer.lr": float("nan")}),
        "infinite rate": config_text({"optimizer.lr": 123.5}).replace("123.5", "1e999"),
        "architecture that is a list": config_text({"arch": ["scnet"]}),
        "architecture that is a module": config_text({"arch": "os.system"}),
        "unknown field": config_text({"__class__": "os.system"}),
        "path with a zero byte": config_text({"data": "a\0b"}),
        "configuration of 2 megabytes": config_text({"data": "x" * 2**21}),
        "YAML": "!!python/object/apply:os.system ['touch owned']",
        "Python": "__import__('os').system('touch owned')",
        "pickle": CALL.decode("latin-1"),
        "zero bytes": "\0" * 100,
        "nothing": "",
    }
    cases = [Case(name, "config", str(put(folder / f"{i}.json", text))) for i, (name, text) in enumerate(texts.items())]
    os.mkfifo(folder / "pipe.json")
    cases.append(Case("pipe in the place of a configuration", "config", str(folder / "pipe.json")))
    os.truncate(put(folder / "terabyte.json", ""), 2**40)
    cases.append(Case("a terabyte in the place of a configuration", "config", str(folder / "terabyte.json")))
    return cases


def detector_files(folder: Path) -> list[Case]:
    """Weights files of ours whose header lies."""
    detector = as_json(recipes.small("faster_rcnn"))["detector"]
    good = {
        "format": "cascadeops-weights-1",
        "arch": "faster_rcnn",
        "config": json.dumps(detector),
        "class_names": json.dumps([str(label) for label in range(80)]),
        "category_ids": json.dumps(list(range(80))),
        "extra": "{}",
    }
    headers = {
        f"header: {name}": {"config": config_text({name: value}, {"detector": json.loads(good["config"])})}
        for name, value in BAD_FIELDS.items()
    }
    headers = {  # of each the part about the detector
        name: {"config": json.dumps(json.loads(header["config"])["detector"])} for name, header in headers.items()
    }
    headers |= {
        "header of a larger detector than the file": {},
        "header of a nested configuration": {"config": DEEP},
        "header without a configuration": {"config": "null"},
        "header of an unknown architecture": {"arch": "os.system"},
        "header that is no JSON": {"config": "{"},
        "header of NaN": {"config": good["config"].replace("56.0", "NaN").replace("28.0", "NaN")},
        "class names that are nested": {"class_names": DEEP},
        "class names that are numbers": {"class_names": json.dumps(list(range(80)))},
        "too few class names": {"class_names": "[]"},
        "ids of 5,000 digits": {"category_ids": "[" + ", ".join(["9" * 5_000] * 80) + "]"},
        "extra that is a list": {"extra": "[]"},
    }
    tensors = {"backbone.conv1.weight": np.zeros((8, 3, 7, 7), np.float32)}
    cases = []
    for number, (name, header) in enumerate(headers.items()):
        path = put(folder / f"{number}.safetensors", save(tensors, metadata=good | header))
        cases.append(Case(name, "detector", str(path)))
    for key in ("arch", "config", "class_names", "category_ids", "extra"):
        header = {name: text for name, text in good.items() if name != key}
        path = put(folder / f"without {key}.safetensors", save(tensors, metadata=header))
        cases.append(Case(f"header without {key}", "detector", str(path)))

    def entry(offsets: str) -> str:
        return '"a": ' + members('"dtype": "F32", "shape": [2]', f'"data_offsets": [{offsets}]')

    raw = {
        "offsets that overlap": members(entry("0, 8"), entry("4, 12").replace('"a"', '"b"')),
        "offsets that go back": members(entry("8, 0")),
        "negative offsets": members(entry("-8, 0")),
        "offsets of 2^63": members(entry(f"0, {2**63}")),
        "offsets of NaN": members(entry("NaN, 8")),
        "shape that overflows": members(entry("0, 8").replace("[2]", f"[{2**40}, {2**40}]")),
        "negative shape": members(entry("0, 8").replace("[2]", "[-2]")),
        "unknown type": members(entry("0, 8").replace("F32", "OBJECT")),
        "same name twice": members(entry("0, 8"), entry("0, 8")),
        "nested header": '{"a": ' + DEEP + "}",
        "metadata of numbers": members('"__metadata__": {"format": 1}', entry("0, 8")),
        "name that steers a terminal": members(f'{json.dumps(ESC)}: {{"dtype": "F32"}}'),
    }
    for name, header in raw.items():
        data = struct.pack("<Q", len(header)) + header.encode() + bytes(8)
        cases.append(Case(f"safetensors: {name}", "detector", str(put(folder / f"raw {name}.safetensors", data))))
    return cases


def run_files(folder: Path) -> list[Case]:
    """Replays, class names, metrics, partial results and cached annotations."""
    config = as_json(recipes.small("faster_rcnn"))
    value = np.zeros(4, np.float32)
    described = {"dtype": "float32", "shape": [4], "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    facts = {"config": config, "image_ids": [1], "found": ["loss is nan"]}
    replays = {
        "replay without facts": {},
        "replay of a number": {"config": 1, "image_ids": 1, "found": 1},
        "replay of a larger detector than the file": facts,
        "replay of a huge detector": facts | {"config": json.loads(config_text({"detector.channels": 10**6}))},
    }
    cases = []
    for name, content in replays.items():
        for tensor in ("detector/a", "elsewhere/a"):
            manifest = {
                "format": "cascadeops-checkpoint-1",
                "step": 1,
                "tensors": {tensor: described},
                "facts": content,
            }
            path = write_checkpoint(folder / f"{name} {tensor.replace('/', ' ')}", manifest, save({tensor: value}))
            cases.append(Case(f"{name}, {tensor}", "replay", str(path)))
    names = {
        "deep": DEEP,
        "number": "1",
        "gaps": '{"0": "a", "2": "b"}',
        "too many words": '[["a", "b", "c"]]',
        "not UTF-8": "[\udcff]",
        "huge": " " * (17 << 20),
    }
    for name, text in names.items():
        cases.append(Case(f"class names: {name}", "class names", str(put(folder / f"names {name}.json", text))))
    metrics = f'{DEEP}\n{{"step": "x"}}\n[]\n{{"step": 1, "images": 1, "mask_ap": ["x"]}}\n'
    cases.append(Case("metrics", "metrics", str(put(folder / "metrics.jsonl", metrics)), "left alone"))
    lines = ["1\n", *(f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n" for text in (DEEP, "[]", "1"))]
    cases.append(Case("partial results", "partial", str(put(folder / "partial", "".join(lines))), "left alone"))
    headers = {
        "nested": DEEP,
        "list": "[]",
        "without metadata": "{}",
        "rest that is nested": json.dumps({"__metadata__": {"rest": DEEP}}),
        "rest that is a number": '{"__metadata__": {"rest": "1"}}',
        "array of an exabyte": json.dumps(
            {"__metadata__": {"rest": "{}"}, "boxes": {"dtype": "F64", "shape": [2**57], "data_offsets": [0, 8]}}
        ),
        "array of objects": json.dumps(
            {"__metadata__": {"rest": "{}"}, "boxes": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}
        ),
        "array before the file": json.dumps(
            {"__metadata__": {"rest": "{}"}, "boxes": {"dtype": "F64", "shape": [1], "data_offsets": [-800, 8]}}
        ),
    }
    for name, header in headers.items():
        data = struct.pack("<Q", len(header)) + header.encode() + bytes(8)
        data += zlib.crc32(data).to_bytes(4, "little")
        path = put(folder / f"cache {name}" / "a.json", coco_text())
        put(folder / f"cache {name}" / "annotations/key.safetensors", data)
        cases.append(Case(f"cached annotations: {name}", "cache", str(path), "left alone"))
    results = {
        "nested": DEEP,
        "number": "1",
        "mask of a terapixel": result_text({"size": [2**20, 2**20], "counts": [2**40]}),
        "mask of 4 numbers": result_text({"size": [1, 2, 3, 4], "counts": [24]}),
        "mask that is a list": result_text([]),
        "mask whose lengths wrap around": result_text({"size": [40, 60], "counts": [2**62] * 4 + [2400]}),
        "mask of texts": result_text({"size": ["4", "6"], "counts": "0"}),
        "box of a text": result_text({"size": [40, 60], "counts": [2400]}).replace("[0, 0, 1, 1]", '["a"]'),
        "label beyond 64 bits": result_text({"size": [40, 60], "counts": [2400]}).replace(
            '"labels": [0]', f'"labels": [{2**70}]'
        ),
    }
    for name, text in results.items():
        cases.append(Case(f"result: {name}", "result", str(put(folder / f"result {name}.json", text))))
    return cases


def result_text(mask: object) -> str:
    values = {"format": "cascadeops-result-1", "source": None, "image_size": [40, 60], "class_names": ["a"]}
    values |= {"category_ids": [1], "boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [0], "masks": [mask]}
    return json.dumps(values)


PARTS = (weight_files, checkpoint_folders, config_files, detector_files, run_files)
