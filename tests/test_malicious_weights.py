"""Weights files that want to run code or to exhaust the machine: none does, and each is answered within a second."""

import io
import pickle
import random
import sys
import time

import malicious_weights as zoo
import pytest
import torch

from models.errors import DataError
from models.weights.contents import read_contents

SECONDS = 1.0
QUIET = {"mmap.__new__", "builtins.id", "object.__getattr__", "object.__setattr__"}
"""Audit events of reading a file, besides its opening."""

CALLS, BOMBS = zoo.calls("VICTIM"), zoo.bombs()
FALSE = zoo.false_tensors() | zoo.false_arrays() | zoo.other_files()
CONTAINERS = {
    "zip": zoo.archive,
    "legacy": zoo.legacy,
    "bare": lambda content: content,
}

_watched: dict = {"path": None, "events": []}


def _hook(event: str, arguments: tuple) -> None:
    if _watched["path"] is None or (event == "open" and str(arguments[0]) == _watched["path"]):
        return
    if event not in QUIET:
        _watched["events"].append((event, arguments[:2]))


sys.addaudithook(_hook)


def watch(path, function):
    """(result or error, audit events other than reading the file, seconds)"""
    _watched["path"], _watched["events"] = str(path), []
    start = time.process_time()
    try:
        result = function(path)
    except Exception as error:
        result = error
    finally:
        _watched["path"] = None
    return result, _watched["events"], time.process_time() - start


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What Python imports on first use is imported before anything is watched."""
    folder = tmp_path_factory.mktemp("good")
    for kind, data in zoo.good_files().items():
        (folder / kind).write_bytes(data)
        contents = read_contents(folder / kind)
        assert torch.equal(contents.state["conv.weight"], torch.arange(6.0).view(2, 3).t()), kind
    for data in (b"", zoo.archive(b"")):
        (folder / "bad").write_bytes(data)
        with pytest.raises(DataError):
            read_contents(folder / "bad")
    (folder / "bad").write_bytes(b"\0" * 8 + b"{")
    with pytest.raises(DataError):
        read_contents(folder / "bad")


def answered(path) -> None:
    """Read as data or refused with a DataError; nothing else happened, and not for long."""
    result, events, seconds = watch(path, read_contents)
    assert events == []
    assert isinstance(result, DataError) or not isinstance(result, Exception), repr(result)
    assert seconds < SECONDS
    return result


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", CALLS)
def test_no_call_is_made(tmp_path, kind, container):
    victim = tmp_path / "victim"
    content = zoo.pickle_of(zoo.calls(str(victim))[kind], protocol=4)
    (tmp_path / "weights").write_bytes(CONTAINERS[container](content))
    result = answered(tmp_path / "weights")
    assert not victim.exists()
    assert isinstance(result, DataError) or not result.state


def test_a_call_beside_weights_leaves_the_weights(tmp_path):
    """A checkpoint whose notes hold objects of other packages, as mmcv and mmengine write, is read without them."""
    call = zoo.calls(str(tmp_path / "victim"))["os.system"]
    content = b"\x80\x02}" + zoo.text("state_dict") + b"}" + zoo.text("layer.weight") + zoo.tensor() + b"s"
    content += b"s" + zoo.text("meta") + call + b"s."
    path = tmp_path / "weights"
    for data in (
        zoo.archive(content, {"data/0": zoo.FOUR_FLOATS}),
        zoo.legacy(content, ["0"], (4).to_bytes(8, "little") + zoo.FOUR_FLOATS),
    ):
        path.write_bytes(data)
        result = answered(path)
        assert result.state["layer.weight"].tolist() == [1, 2, 3, 4]
        assert result.left_out == {"meta": "a part of the training state"}
    assert not (tmp_path / "victim").exists()


def test_the_watch_sees_what_pickle_would_have_done(tmp_path):
    """The same bytes, given to Python's own unpickler, run; so the tests above can fail."""
    path = tmp_path / "weights"
    path.write_bytes(zoo.pickle_of(zoo.calls(str(tmp_path / "victim"))["os.system"]))
    _, events, _ = watch(path, lambda file: pickle.loads(file.read_bytes()))
    assert {"pickle.find_class", "os.system"} <= {event for event, _ in events}
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_answered_at_once(tmp_path, kind, container):
    (tmp_path / "weights").write_bytes(CONTAINERS[container](zoo.pickle_of(BOMBS[kind], protocol=4)))
    result = answered(tmp_path / "weights")
    assert isinstance(result, DataError) or not result.state


@pytest.mark.parametrize("kind", FALSE)
def test_what_does_not_fit_is_refused(tmp_path, kind):
    (tmp_path / "weights").write_bytes(FALSE[kind])
    result = answered(tmp_path / "weights")
    assert isinstance(result, DataError), result
    assert str(tmp_path / "weights") in str(result)
    assert result.why and result.fix


@pytest.mark.parametrize("kind", ["zip", "legacy", "paddle"])
def test_no_shortened_file_is_read(tmp_path, kind):
    data = zoo.good_files()[kind]
    for length in sorted({*range(0, len(data), max(1, len(data) // 100)), len(data) - 1}):
        (tmp_path / "weights").write_bytes(data[:length])
        assert isinstance(answered(tmp_path / "weights"), DataError), length


@pytest.mark.parametrize("kind", ["zip", "legacy", "paddle"])
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, kind):
    """The archive's checksums cover what is read, so there its tensors are right or refused."""
    data, choose = zoo.good_files()[kind], random.Random(0)
    (tmp_path / "weights").write_bytes(data)
    expected = read_contents(tmp_path / "weights").state
    for _ in range(300):
        flipped = bytearray(data)
        flipped[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        (tmp_path / "weights").write_bytes(flipped)
        result = answered(tmp_path / "weights")
        if kind == "zip" and not isinstance(result, DataError):
            assert all(torch.equal(value, expected[key]) for key, value in result.state.items())


def test_no_unsafe_reader_is_in_the_package():
    import re
    from pathlib import Path

    import models

    folder = Path(models.__file__).parent
    for path in folder.rglob("*.py"):
        source = path.read_text()
        assert not re.search(r"pickle\.loads?\(|Unpickler|weights_only=False|allow_pickle=True", source), path
        assert "torch.load(" not in source, path


def test_shared_storage_and_views_are_kept(tmp_path):
    base = torch.arange(12.0)
    file = io.BytesIO()
    torch.save({"a": base[2:8].view(2, 3).t(), "b": base, "c": base[::5], "empty": torch.zeros(0, 3)}, file)
    (tmp_path / "weights").write_bytes(file.getvalue())
    state = read_contents(tmp_path / "weights").state
    assert state["a"].tolist() == [[2, 5], [3, 6], [4, 7]]
    assert state["c"].tolist() == [0, 5, 10]
    assert state["empty"].shape == (0, 3)
    assert state["a"].untyped_storage().data_ptr() == state["b"].untyped_storage().data_ptr()
