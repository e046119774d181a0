"""Atomic writing: whatever goes wrong, the old file or the new one is there, and nothing else."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from models import files
from models.errors import MachineError, UsageError

ROOT = Path(__file__).parent.parent


def test_the_new_file_replaces_the_old_one_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("length", [0, 1, 1000, 1001, 2500])
def test_a_long_list_is_written_in_parts_that_make_one_text(tmp_path, length):
    value = [{"score": 1 / (i + 1), "name": 'a, "b"'} for i in range(length)]
    files.write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == json.dumps(value)


def test_mode_and_symbolic_links_are_kept(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with files.atomic_write(link, "w") as file:
        file.write("new")
    assert link.is_symlink() and real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    mask = os.umask(0o027)
    try:
        files.write_json(tmp_path / "fresh", 1)
    finally:
        os.umask(mask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640


def test_a_defect_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), files.atomic_write(path) as file:
        file.write(b"half of the new")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_is_told(tmp_path, monkeypatch, step):
    path = tmp_path / "weights"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(MachineError) as error, files.atomic_write(path) as file:
        file.write(b"new")
    assert error.value.what == "cannot write the file; the old file is kept as it was"
    assert error.value.where == str(path)
    assert error.value.why.startswith("No space left on device (") and "MiB free in" in error.value.why
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights"]


@pytest.mark.parametrize("writer", ["python", "torch", "torch to a file", "safetensors"])
def test_the_system_refusing_to_write_more_keeps_the_old_file(tmp_path, writer):
    """The real thing: a process that may write 64 KiB writes 256 KiB, by each library that we write with."""
    (tmp_path / "weights").write_text("old")
    code = f"""
        import resource, torch, safetensors.torch
        from models.errors import MachineError
        from models.files import atomic_path
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        state = {{"a": torch.zeros(65536)}}
        writers = {{
            "python": lambda path: path.write_bytes(bytes(262144)),
            "torch": lambda path: torch.save(state, path),
            "torch to a file": lambda path: torch.save(state, open(path, "wb")),
            "safetensors": lambda path: safetensors.torch.save_file(state, path),
        }}
        try:
            with atomic_path({str(tmp_path / "weights")!r}) as temporary:
                writers[{writer!r}](temporary)
        except MachineError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("cannot write the file; the old file is kept as it was\n"), done.stdout + done.stderr
    assert (tmp_path / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["weights"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a", float("nan"))
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(MachineError) as error:
        files.write_json(tmp_path / "no" / "a", 1)
    assert error.value.what == "cannot write the file"
    assert error.value.why == "No such file or directory"


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("precious")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(UsageError) as error:
            files.make_folder(folder)
        assert error.value.where == str(tmp_path / "out")
        assert error.value.fix.startswith(f"name another folder (--output {folder}-2)")
    assert (tmp_path / "out").read_text() == "precious"
    assert files.make_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.skipif(os.getuid() != 0, reason="another user is needed")
def test_a_folder_that_may_not_be_entered_is_told(tmp_path):
    code = f"""
        import os, pathlib
        from models import errors, files
        os.setuid(65534)
        try:
            files.make_folder(pathlib.Path({str(tmp_path)!r}) / "closed" / "run")
        except errors.MachineError as error:
            print(error.why)
    """
    (tmp_path / "closed").mkdir(mode=0o700)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "Permission denied\n", done.stderr


def test_a_file_that_has_become_stale_is_opened_again(tmp_path, monkeypatch):
    """Once: a file system that goes on like that is told."""
    path, calls = tmp_path / "notes.txt", []
    path.write_bytes(b"content")
    look = os.stat

    def stale(*arguments, **options):
        calls.append(1)
        if len(calls) in failing:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return look(*arguments, **options)

    monkeypatch.setattr(os, "stat", stale)
    failing = {1}
    assert files.read_bytes(path, 100) == b"content"
    failing = {3, 4}
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        files.read_bytes(path, 100)
    assert len(calls) == 4
