"""Checkpoints: what is written is read, nothing else is, and the newest that is intact takes a damaged one's place."""

import hashlib
import json
import os
import random
import subprocess

import pytest
import torch

from models.checkpoints import checkpoint_folders, newest_checkpoint, prune, read_checkpoint, write_checkpoint
from models.errors import DataError, MachineError, UsageError

FLIPS = int(os.environ.get("CASCADEOPS_FLIPS", "2000"))
TENSORS = {
    "detector/a": torch.arange(12.0).view(3, 4),
    "detector/half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "detector/scalar": torch.tensor(7),
    "detector/bulk": torch.arange(64 if FLIPS <= 2000 else 4096, dtype=torch.int32),
    "detector/empty": torch.zeros(0, 3),
    "random/0/cpu": torch.arange(9, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
}
FACTS = {"lr": 0.1 + 0.2, "list": [1, None, "ü"]}


@pytest.fixture
def written(tmp_path):
    return write_checkpoint(tmp_path, 12, TENSORS, FACTS)


def same_bits(ours: dict, theirs: dict) -> bool:
    def bits(state):
        return {
            key: (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).tolist())
            for key, value in state.items()
        }

    return bits(ours) == bits(theirs)


def test_a_checkpoint_comes_back_bit_by_bit(written):
    found = read_checkpoint(written)
    assert found.step == 12 and found.facts == FACTS
    assert same_bits(found.tensors, TENSORS)
    assert os.listdir(written.parent) == ["step-00000012"]
    assert {path.name for path in written.iterdir()} == {"tensors.safetensors", "manifest.json", "manifest.sha256"}


def test_channels_last_and_views_are_stored_as_their_values(tmp_path):
    layers = {"w": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "v": torch.randn(5, 5).t()[1:3]}
    assert same_bits(read_checkpoint(write_checkpoint(tmp_path, 1, layers, {})).tensors, layers)


def test_a_person_can_check_it_with_sha256sum(written):
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=written, check=True, capture_output=True)
    manifest = json.loads((written / "manifest.json").read_text())
    content = (written / "tensors.safetensors").read_bytes()
    assert content.count(TENSORS["detector/a"].numpy().tobytes()) == 1
    assert (
        manifest["tensors"]["detector/a"]["sha256"]
        == hashlib.sha256(TENSORS["detector/a"].numpy().tobytes()).hexdigest()
    )


def test_files_have_the_mode_that_open_gives(tmp_path):
    mask = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path, 1, TENSORS, {})
    finally:
        os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_every_flipped_bit_is_damage(written):
    """2,000 of them; CASCADEOPS_FLIPS=100000 is the long form."""
    files = {path: path.read_bytes() for path in sorted(written.iterdir())}
    bits = [(path, bit) for path, content in files.items() for bit in range(8 * len(content))]
    choose = random.Random(0)
    chosen = choose.sample(bits, FLIPS)
    for path, bit in chosen:
        damaged = bytearray(files[path])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="the checkpoint is damaged"):
            read_checkpoint(written)
        path.write_bytes(files[path])
    read_checkpoint(written)


def test_every_length_of_a_cut_off_file_is_damage(written):
    for path in written.iterdir():
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(DataError, match="the checkpoint is damaged"):
                read_checkpoint(written)
        path.write_bytes(content + b"\n")
        with pytest.raises(DataError):
            read_checkpoint(written)
        path.unlink()
        with pytest.raises(DataError):
            read_checkpoint(written)
        path.write_bytes(content)
    read_checkpoint(written)


def test_the_damaged_tensor_is_named(written):
    path = written / "tensors.safetensors"
    at = path.read_bytes().index(TENSORS["detector/a"].numpy().tobytes())
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="1 of 7 tensors are not as written, first detector/a"):
        read_checkpoint(written)


def test_the_newest_intact_one_is_taken_and_the_damaged_are_set_aside(tmp_path):
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, {"a": torch.full((3,), float(step))}, {})
    for step in (10, 15):
        with open(tmp_path / f"step-{step:08}" / "manifest.json", "ab") as file:
            file.write(b" ")
    told = []
    found = newest_checkpoint(tmp_path, told.append)
    assert found.step == 5 and found.tensors["a"].tolist() == [5.0] * 3
    assert told[0].startswith("step-00000015 is damaged and was set aside as damaged-step-00000015: manifest.json and")
    assert told[1].startswith("step-00000010 is damaged")
    assert told[2] == "continuing from step 5, the newest checkpoint that is intact"
    write_checkpoint(tmp_path, 15, {"a": torch.zeros(3)}, {})  # its place is free again
    assert newest_checkpoint(tmp_path, pytest.fail).step == 15


def test_nothing_intact_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "absent", pytest.fail) is None
    (write_checkpoint(tmp_path, 1, TENSORS, {}) / "manifest.json").unlink()
    with pytest.raises(DataError, match="no checkpoint is intact"):
        newest_checkpoint(tmp_path, lambda line: None)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        write_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {})
    (tmp_path / ".step-00000009.part").mkdir()  # a kill left it
    prune(tmp_path, keep=2, best=3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000006", "step-00000007"]
    assert [path.name for path in checkpoint_folders(tmp_path)] == sorted(os.listdir(tmp_path))


def test_another_format_is_not_damage(written):
    text = (written / "manifest.json").read_text().replace("cascadeops-checkpoint-1", "cascadeops-checkpoint-9")
    (written / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (written / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    with pytest.raises(UsageError, match="of another version"):
        newest_checkpoint(written.parent, pytest.fail)
    assert written.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="the earlier ones are kept"):
        write_checkpoint(tmp_path, 1, TENSORS, {})
