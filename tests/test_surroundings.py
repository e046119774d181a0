"""What surrounds a run: the clock, file modes, odd paths, a full or forbidden disk, few descriptors, lost images."""

import contextlib
import dataclasses
import errno
import gc
import itertools
import os
import random
import resource
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import black_picture, differences, outcome, stopped_after, tiny_config, write_tiny_data

from models import progress, training
from models.checkpoints import checkpoint_folders, prune, read_checkpoint, write_checkpoint
from models.command_line import _machine_fault
from models.data import open_dataset
from models.errors import DataError, MachineError, UserError
from models.evaluate import evaluate_detector
from models.resume import RunFolder

ROUNDS = int(os.environ.get("CASCADEOPS_ROUNDS", "100"))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No pictures, which take most of the time, and no TensorBoard, whose files are not ours."""
    monkeypatch.setattr(training, "save_comparison", black_picture)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_comparison", black_picture)
        training.train(tiny_config(tiny_data, folder))
    return outcome(folder)


# ---- clock, modes, paths


def test_no_result_depends_on_the_clock(tiny_data, tmp_path, monkeypatch, whole):
    """It jumps by up to ten years, back and forth, with each look at it."""
    now, choose = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: now() + choose.randint(-(10**8), 10**8) * 3)
    training.train(tiny_config(tiny_data, tmp_path))
    assert differences(outcome(tmp_path), whole) == []


def test_files_and_folders_have_the_modes_that_the_user_asked_for(tiny_data, tmp_path):
    mask = 0o027
    before = os.umask(mask)
    try:
        training.train(tiny_config(tiny_data, tmp_path / "run"))
    finally:
        os.umask(before)
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(paths) > 12
    for path in paths:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("name", ["-ü 画 é", "[*]? 100% a=b", "a.b/../$HOME 'q' \"r\""])
def test_odd_paths_are_as_good_as_any(tmp_path, monkeypatch, whole, name):
    data = write_tiny_data(tmp_path / "data" / name)
    config = tiny_config(data, tmp_path / "run" / name)
    stopped_after(3, monkeypatch, config)
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(config.output), whole) == []


def test_the_folder_may_be_a_symbolic_link(tiny_data, tmp_path, monkeypatch, whole):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    config = tiny_config(tiny_data, tmp_path / "run")
    stopped_after(3, monkeypatch, config)
    train_set = open_dataset(tiny_data, "train", semantic="no", training=True, boxes_only=True)
    config = training.fit_to_data(config, train_set)
    with (
        RunFolder(dataclasses.replace(config, resume=True), tmp_path / "disk", train_set),
        pytest.raises(UserError, match="another run is writing"),
    ):
        training.train(dataclasses.replace(config, resume=True))  # it is the same folder
    training.train(dataclasses.replace(config, resume=True))
    assert (tmp_path / "run").is_symlink()
    assert differences(outcome(tmp_path / "disk"), whole) == []


# ---- a disk that is forbidden or full


@contextlib.contextmanager
def as_nobody(*folders: Path):
    """Root may write everywhere: for a while this process is somebody else."""
    if os.geteuid() != 0:
        yield
        return
    for folder in folders:
        for part in (folder, *folder.parents):
            if part.stat().st_uid == 0 and not part.stat().st_mode & 0o001:
                part.chmod(part.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_only_be_read_is_named(tiny_data, tmp_path, monkeypatch):
    output = tmp_path / "run"
    config = tiny_config(tiny_data, output)
    output.mkdir()
    output.chmod(0o555)
    with as_nobody(tmp_path, tiny_data), pytest.raises(MachineError) as error:
        training.train(config)
    assert str(output) in error.value.where and error.value.why == "Permission denied" and error.value.fix
    output.chmod(0o755)
    stopped_after(3, monkeypatch, config)
    for path in (output, output / "checkpoints"):
        path.chmod(0o555)
    with as_nobody(tmp_path, tiny_data), pytest.raises(MachineError) as error:
        training.train(dataclasses.replace(config, resume=True))
    assert str(output) in error.value.where and error.value.why == "Permission denied"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_the_disk_says_is_passed_on(tmp_path, monkeypatch, code):
    write_checkpoint(tmp_path, 1, {}, {})

    def refused(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as inner, pytest.raises(MachineError) as error:
        inner.setattr(os, "fsync", refused)
        write_checkpoint(tmp_path, 2, {}, {})
    assert str(tmp_path) in error.value.where and error.value.why.startswith(os.strerror(code))
    assert ("MiB free in" in error.value.why) == (code != errno.EROFS)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000001"]


def test_a_limit_for_the_size_of_files_is_told(tiny_data, tmp_path, whole, monkeypatch):
    """RLIMIT_FSIZE, as `ulimit -f` sets it: between the size of the weights and that of a checkpoint. The third
    refusal ends the run."""
    config = tiny_config(tiny_data, tmp_path)
    stopped_after(3, monkeypatch, config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(MachineError) as error:
            training.train(dataclasses.replace(config, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.why.startswith("File too large") and str(tmp_path / "checkpoints") in error.value.where
    assert [read_checkpoint(path).step for path in checkpoint_folders(tmp_path / "checkpoints")] == [1, 2, 3]
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(tmp_path), whole) == []


def test_a_device_that_is_always_full(tmp_path, monkeypatch):
    """A checkpoint's files are new ones, so that what is written to them is sent to /dev/full."""
    write_checkpoint(tmp_path, 1, {}, {})
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda _, content: write(Path("/dev/full"), content))
    with pytest.raises(MachineError) as error:
        write_checkpoint(tmp_path, 2, {}, {})
    assert error.value.why.startswith("No space left on device") and str(tmp_path) in error.value.where
    assert os.listdir(tmp_path) == ["step-00000001"]


@as_root
def test_a_disk_that_is_really_full(tiny_data, tmp_path, whole, capsys):
    """A file system of 2 MiB, filled up so that some checkpoints fit. With space again, the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        config = tiny_config(tiny_data, disk / "run", keep_checkpoints=99)
        training.train(tiny_config(tiny_data, tmp_path / "size", max_iterations=1))
        size = sum(path.stat().st_size for path in (tmp_path / "size/checkpoints").rglob("*"))
        (disk / "ballast").write_bytes(bytes(2 * 2**20 - int(3.5 * size) - 65536))
        with pytest.raises(MachineError) as error:
            training.train(config)
        assert "No space left on device (0 MiB free in" in error.value.why and str(disk) in error.value.where
        left = checkpoint_folders(disk / "run/checkpoints")
        assert len(left) >= 1 and [read_checkpoint(path).step for path in left] == list(range(1, len(left) + 1))
        assert not [path.name for path in (disk / "run/checkpoints").iterdir() if path not in left]
        (disk / "ballast").unlink()
        training.train(dataclasses.replace(config, resume=True))
        assert differences(outcome(disk / "run"), whole) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the log may still be open


# ---- few descriptors


def limit_with(spare: int) -> int:
    """The limit that leaves so many numbers free."""
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    return next(limit for limit in itertools.count() if limit - sum(number < limit for number in used) == spare)


@pytest.mark.parametrize(("workers", "spares"), [(0, (8, 1)), (2, (32, 6, 1))])
def test_few_descriptors_are_enough_or_are_told(tiny_data, tmp_path, whole, workers, spares):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ends = []
    for spare in spares:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        config = tiny_config(tiny_data, tmp_path / str(spare), workers=workers)
        limit = limit_with(spare)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            training.train(config)
            ends.append("done")
            assert differences(outcome(config.output), whole) == []
        except Exception as error:
            fault = error if isinstance(error, UserError) else _machine_fault(error)
            ends.append(str(fault))
            assert "oo many open files" in ends[-1]
            del error, fault
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        gc.collect()
        # Python leaves the first of two pipes behind where there is no number for the second.
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * (workers > 0 and ends[-1] != "done")
    assert ends[0] == "done" and ends[-1] != "done"


# ---- images that go away


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("choice", ["stop", "substitute"])
def test_an_image_that_is_removed_during_the_run(tmp_path, monkeypatch, capsys, workers, choice):
    data = write_tiny_data(tmp_path / "data")
    config = tiny_config(data, tmp_path / "run", workers=workers, on_bad_image=choice)
    save = RunFolder.save

    def saved(self, step, *arguments):
        save(self, step, *arguments)
        (data / "train" / "4.png").unlink(missing_ok=True)

    monkeypatch.setattr(RunFolder, "save", saved)
    if choice == "stop":
        with pytest.raises(DataError) as error:
            training.train(config)
        assert error.value.where == str(data / "train" / "4.png")
    else:
        training.train(config)
        assert "4.png" in (config.output / "bad_images.txt").read_text()
        assert capsys.readouterr().out.count("bad image 1, ") == 1


# ---- leaks


def in_use() -> tuple[int, int, int]:
    """(bytes of memory, descriptors, threads)"""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def test_saving_and_evaluating_leak_nothing(tiny_data, tmp_path):
    """Half of the rounds warm up. CASCADEOPS_ROUNDS=2000 is the long form."""
    from models.build import build_from_config

    config = tiny_config(tiny_data, tmp_path)
    dataset = open_dataset(tiny_data, "val", semantic="no", boxes_only=True)
    config = training.fit_to_data(config, dataset)
    detector = build_from_config(config.arch, config.detector)
    tensors, measured = dict(detector.state_dict()), []
    for step in range(ROUNDS):
        write_checkpoint(tmp_path, step, tensors, {})
        prune(tmp_path, keep=2)
        read_checkpoint(tmp_path / f"step-{step:08}")
        if step % 10 == 0:
            evaluate_detector(detector, dataset, batch_size=2, workers=2 * (step % 20 == 0))
        if step % (ROUNDS // 10) == 0:
            measured.append(in_use())
    memory, descriptors, threads = zip(*measured[len(measured) // 2 :], strict=True)
    print(f"{ROUNDS} rounds, in the second half of them {(memory[-1] - memory[0]) / 2**10:.0f} KiB more")
    assert max(descriptors) == min(descriptors) and max(threads) == min(threads)
    assert memory[-1] - memory[0] < 2**20
