"""What a run finds in its folder: another run that owns it, or what other versions have written."""

import dataclasses
import os
import time

import pytest
from tiny_runs import differences, outcome, stopped_after, tiny_config

from models import resume, training
from models.data import open_dataset
from models.errors import UsageError
from models.resume import RunFolder
from models.run_folder import owned_folder

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_second_of_two_runs_is_refused_within_a_second(tiny_data, tmp_path):
    """The first is another process. Measured without the second's start, which imports torch."""
    dataset = open_dataset(tiny_data, "train", semantic="no", training=True, boxes_only=True)
    config = training.fit_to_data(tiny_config(tiny_data, tmp_path), dataset)
    (ready, tell), (ending, end) = os.pipe(), os.pipe()
    first = os.fork()
    if not first:
        os.close(end)
        with owned_folder(tmp_path):
            os.write(tell, b"1")
            os.read(ending, 1)  # until the other end is closed
        os._exit(0)
    os.read(ready, 1)
    start = time.monotonic()
    with pytest.raises(UsageError, match=f"its owner: process {first} on "), RunFolder(config, tmp_path, dataset):
        pytest.fail("it was let in")
    assert time.monotonic() - start < 1
    os.close(end)
    assert os.waitpid(first, 0)[1] == 0
    with RunFolder(config, tmp_path, dataset):  # the lock has gone with its process
        pass
    for descriptor in (ready, tell, ending):
        os.close(descriptor)


def test_other_versions_are_told_and_the_run_goes_on(tiny_data, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny_data, tmp_path)
    now = resume.versions()
    with monkeypatch.context() as inner:
        inner.setattr(resume, "versions", lambda: now | {"torch": "2.9.1", "cascadeops": "0.1"})
        stopped_after(3, monkeypatch, config)
    capsys.readouterr()
    training.train(dataclasses.replace(config, resume=True))
    told = [line for line in capsys.readouterr().out.splitlines() if "the last digits of results may differ" in line]
    assert [line.partition(":")[0] for line in told] == [
        f"cascadeops was 0.1 and is {now['cascadeops']} now",
        f"torch was 2.9.1 and is {now['torch']} now",
    ]
    training.train(tiny_config(tiny_data, tmp_path / "whole"))
    assert differences(outcome(tmp_path), outcome(tmp_path / "whole")) == []
