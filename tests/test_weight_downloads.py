"""Downloads of published weights: resumed, checked, whole or not there. The server is a local one."""

import hashlib
import http.server
import os
import threading
from typing import ClassVar

import pytest
from program_cases import run_program

from models.errors import DataError, MachineError, UsageError
from models.weights.download import cache_folder, cached, fetch
from models.weights.published import PUBLISHED, Published, find

BODY = bytes(range(256)) * 12_000  # 3 MB: more than one chunk
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Sends BODY; the class attributes say how well it behaves."""

    breaks_at: ClassVar[list[int]] = []
    """Bytes after which the next answers end."""
    ranges = True
    status = 200
    seen: ClassVar[list[str | None]] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        type(self).seen.append(wanted)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.ranges else 0
        if self.status != 200:
            return self.send_error(self.status)
        if start >= len(BODY):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        end = start + self.breaks_at.pop(0) if self.breaks_at else len(BODY)
        self.wfile.write(BODY[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    class Handler(Server):
        breaks_at, seen = [], []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        Handler.url = f"http://127.0.0.1:{running.server_port}"
        yield Handler
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CASCADEOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CASCADEOPS_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def published(server, prefix: str = SHA[:8]) -> Published:
    return Published("tiny", f"{server.url}/tiny-{prefix}.pth", "backbone, ImageNet", "none")


def test_a_file_arrives_whole_under_its_name_and_is_not_fetched_twice(server, capsys):
    file = published(server)
    assert cached(file) is None
    path = fetch(file)
    assert path == cache_folder() / f"tiny-{SHA[:8]}.pth" == cached(file)
    assert path.read_bytes() == BODY
    assert os.listdir(path.parent) == [path.name]
    assert "2/2 MiB" in capsys.readouterr().out
    fetch(file)
    assert server.seen == [None]


def test_a_broken_connection_goes_on_where_it_stopped(server):
    server.breaks_at = [1_000_000, 700_000]
    assert fetch(published(server), wait=0.0).read_bytes() == BODY
    assert server.seen == [None, "bytes=1000000-", "bytes=1700000-"]


def test_what_arrived_is_kept_for_the_next_call(server):
    server.breaks_at = [500_000, 500_000, 500_000]
    with pytest.raises(MachineError) as caught:
        fetch(published(server), wait=0.0)
    assert "goes on from byte 1500000" in str(caught.value)
    part = cache_folder() / f"tiny-{SHA[:8]}.pth.part"
    assert part.read_bytes() == BODY[:1_500_000]
    assert fetch(published(server), wait=0.0).read_bytes() == BODY
    assert server.seen[-1] == "bytes=1500000-"
    assert not part.exists()


def test_a_server_without_ranges_sends_it_all_again(server):
    server.ranges, server.breaks_at = False, [1_000_000]
    assert fetch(published(server), wait=0.0).read_bytes() == BODY


def test_a_part_that_is_whole_already_is_only_checked(server):
    part = cache_folder() / f"tiny-{SHA[:8]}.pth.part"
    part.parent.mkdir()
    part.write_bytes(BODY)
    assert fetch(published(server)).read_bytes() == BODY


@pytest.mark.parametrize("left", [b"", b"something else" * 1000])
def test_another_file_is_refused_and_removed(server, left):
    file = published(server, "0badc0de")
    if left:
        cache_folder().mkdir()
        (cache_folder() / f"{file.file_name}.part").write_bytes(left)
    with pytest.raises(DataError) as caught:
        fetch(file)
    assert "the published one's with 0badc0de" in str(caught.value)
    assert os.listdir(cache_folder()) == []


def test_a_damaged_file_in_the_cache_is_refused(server):
    file = published(server)
    path = fetch(file)
    path.write_bytes(BODY[:-1])
    with pytest.raises(DataError, match="not the file that was published"):
        fetch(file)
    assert fetch(file).read_bytes() == BODY


def test_offline_the_error_says_what_to_put_where(server, monkeypatch):
    monkeypatch.setenv("CASCADEOPS_OFFLINE", "1")
    file = published(server)
    with pytest.raises(MachineError) as caught:
        fetch(file)
    assert f"{file.url}\n         -> {cache_folder() / file.file_name}" in str(caught.value)
    assert server.seen == []
    (cache_folder() / file.file_name).write_bytes(BODY)
    assert fetch(file).read_bytes() == BODY


def test_no_server_is_told_like_no_network(server):
    file = Published("tiny", f"http://127.0.0.1:1/tiny-{SHA[:8]}.pth", "", "")
    with pytest.raises(MachineError) as caught:
        fetch(file, wait=0.0)
    assert "refused" in caught.value.why and str(cache_folder() / file.file_name) in caught.value.fix
    assert os.listdir(cache_folder()) == []


def test_a_file_that_is_gone_is_asked_for_once(server):
    server.status = 404
    with pytest.raises(MachineError, match="the server answered 404"):
        fetch(published(server), wait=0.0)
    assert len(server.seen) == 1


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    import fcntl

    cache_folder().mkdir()
    with open(cache_folder() / f"tiny-{SHA[:8]}.pth.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match="another process downloads this file"):
            fetch(published(server))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CASCADEOPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cascadeops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cascadeops"


def test_a_fetched_file_is_loaded_by_its_name(tmp_path):
    import torch

    from models.weights.contents import read_contents

    with pytest.raises(DataError, match=r"python -m models.weights scnet50   fetches it \(licence: MIT\)"):
        read_contents("scnet50")
    cache_folder().mkdir()
    torch.save({"a": torch.ones(2)}, cache_folder() / find("scnet50").file_name)
    assert read_contents("scnet50").state["a"].tolist() == [1, 1]


def test_published_files_are_well_formed():
    assert len({file.name for file in PUBLISHED}) == len({file.url for file in PUBLISHED}) == len(PUBLISHED)
    for file in PUBLISHED:
        assert file.url.startswith("https://")
        assert len(file.sha256_prefix) == 8
        assert file.licence
        assert find(file.name) is find(file.file_name) is file
    dcn = find("htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco")
    assert dcn.sha256_prefix == "946fd751"
    assert dcn.url.count(dcn.name) == 2
    with pytest.raises(UsageError, match="did you mean scnet_r50_fpn_1x_coco"):
        find("scnet_r50_fpn_1x")


def test_the_program_lists_every_file_with_its_licence():
    process = run_program("weights")
    assert process.returncode == 0, process.stderr
    for file in PUBLISHED:
        (line,) = [line for line in process.stdout.splitlines() if line.startswith(f"{file.name} ")]
        assert file.licence in line and "unknown" in line


def test_the_program_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("CASCADEOPS_OFFLINE", "1")
    process = run_program("weights", "resnet50", "--folder", tmp_path / "here")
    assert process.returncode == 4
    assert "error: resnet50-0676ba61.pth cannot be downloaded\n" in process.stderr
    assert f"-> {tmp_path}/here/resnet50-0676ba61.pth" in process.stderr
    assert "Traceback" not in process.stderr


def test_the_program_and_an_unknown_name():
    process = run_program("weights", "resnet51")
    assert (process.returncode, "did you mean resnet50" in process.stderr) == (2, True)
