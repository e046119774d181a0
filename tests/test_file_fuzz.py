"""Readers of weights, checkpoints, configurations and images: any bytes are read, or refused with one typed error, in
bounded time. Most changes are made inside of what protects a file (a zip archive's checksums, a manifest's hash), since
a stranger can compute them, too.

A few hundred inputs each; CASCADEOPS_EXAMPLES=1000000 asks for more (make fuzz).
"""

import io
import json
import zipfile

import malicious_weights
import numpy as np
import pytest
import torch
from malicious_runs import write_checkpoint
from PIL import Image
from program_cases import write_weights
from test_data_fuzz import EXAMPLES, mutated, outcomes, with_odd_values

from models import recipes
from models.checkpoint import load_detector
from models.checkpoints import read_checkpoint
from models.checkpoints import write_checkpoint as write_good_checkpoint
from models.config_files import as_json, config_from_json, read_config
from models.errors import DataError
from models.images import read_image
from models.weights.contents import read_contents


def reader(path, read):
    def read_bytes(data: bytes):
        path.write_bytes(data)
        return read(path)

    return read_bytes


@pytest.mark.parametrize("kind", ["zip", "legacy", "paddle"])
def test_weights(tmp_path, kind):
    """.pth of both formats and .pdparams; a tensor is never larger than the file."""
    random, whole = np.random.default_rng(0), malicious_weights.good_files()[kind]
    records = {}
    if kind == "zip":
        archive = zipfile.ZipFile(io.BytesIO(whole))
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        del records["version"]

    def inputs():
        for _ in range(EXAMPLES):
            if not records or random.random() < 0.3:
                yield mutated(random, whole)
                continue
            changed = dict(records)
            name = list(changed)[random.integers(len(changed))] if random.random() < 0.2 else "data.pkl"
            changed[name] = mutated(random, changed[name])
            yield malicious_weights.archive(changed.pop("data.pkl"), changed)

    def read(path):
        contents = read_contents(path)
        assert sum(value.numel() for value in contents.state.values()) <= 16 * path.stat().st_size

    counts = outcomes(reader(tmp_path / "weights", read), inputs())
    assert min(counts.values()) > EXAMPLES / 100, counts


def test_safetensors(tmp_path):
    """Of ours: the header says which detector to build."""
    random, whole = np.random.default_rng(1), write_weights(tmp_path / "good.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def inputs():
        for _ in range(EXAMPLES // 10 or 1):
            changed, metadata = dict(header), dict(header["__metadata__"])
            if random.random() < 0.3:
                yield whole[:8] + mutated(random, whole[8 : 8 + length]) + rest
                continue
            if random.random() < 0.7:
                metadata["config"] = json.dumps(with_odd_values(random, json.loads(metadata["config"])))
            else:
                metadata = with_odd_values(random, metadata)
            text = json.dumps(changed | {"__metadata__": metadata}).encode()
            yield len(text).to_bytes(8, "little") + text + rest

    counts = outcomes(reader(tmp_path / "weights", load_detector), inputs())
    assert counts["refused"] > EXAMPLES / 50, counts


def test_checkpoints(tmp_path):
    random, tensors = (
        np.random.default_rng(2),
        {"detector/a": torch.arange(6.0).view(2, 3), "random/0/cpu": torch.ones(4)},
    )
    good = write_good_checkpoint(tmp_path / "good", 1, tensors, {"config": {"arch": "scnet"}, "sampler": {"epoch": 1}})
    manifest, data = json.loads((good / "manifest.json").read_text()), (good / "tensors.safetensors").read_bytes()

    def read(case):
        found = read_checkpoint(write_checkpoint(tmp_path / "step-00000001", *case))
        assert all(torch.equal(value, tensors[name]) for name, value in found.tensors.items())

    def inputs():
        for _ in range(EXAMPLES):
            kind = random.integers(4)
            if kind == 0:
                yield manifest, mutated(random, data)
            elif kind == 1:
                text = mutated(random, json.dumps(manifest).encode())
                yield text.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode(), data
            else:
                yield with_odd_values(random, manifest), data

    counts = outcomes(read, inputs())
    assert min(counts.values()) > EXAMPLES / 100, counts


def test_configurations(tmp_path):
    """What is read is written and read again as the same."""
    random = np.random.default_rng(3)
    configs = [as_json(recipes.small(arch)) for arch in ("faster_rcnn", "htc", "scnet")]

    def inputs():
        for index in range(EXAMPLES):
            config = configs[index % 3]
            if random.random() < 0.3:
                yield mutated(random, json.dumps(config).encode())
            else:
                yield json.dumps(with_odd_values(random, config)).encode()

    def read(path):
        values = as_json(read_config(path))
        assert as_json(config_from_json(values)) == values

    counts = outcomes(reader(tmp_path / "config.json", read), inputs())
    assert min(counts.values()) > EXAMPLES / 100, counts


def test_images(tmp_path):
    random = np.random.default_rng(4)
    picture = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    wholes = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        file = io.BytesIO()
        picture.save(file, kind, **({"exif": exif} if kind != "BMP" else {}))
        wholes.append(file.getvalue())
    counts = outcomes(
        reader(tmp_path / "a.png", read_image), (mutated(random, wholes[index % 4]) for index in range(EXAMPLES))
    )
    assert min(counts.values()) > EXAMPLES / 100, counts


def test_any_bytes(tmp_path):
    """Without any form: every reader refuses."""
    random, path = np.random.default_rng(5), tmp_path / "a"
    for read in (read_contents, load_detector, read_config, read_image):
        for _ in range(EXAMPLES // 10 or 1):
            path.write_bytes(random.integers(0, 256, random.integers(0, 200), np.uint8).tobytes())
            with pytest.raises(DataError):
                read(path)
