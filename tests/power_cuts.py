"""What a file system may hold after a power cut: records file operations, and builds the states that they may leave.

The rules are POSIX's, which promise less than any journal does. What reached the disk is what was synced: a file's
content by a sync of the file, the names in a folder by a sync of the folder. Of everything else that was done before
the cut any part may be there, in whatever combination: a rename without the content of what was renamed, the second of
two removals without the first, a file of the right length that ends in zeros, a part of a write. Only a single rename
is never half done.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ACTIVE: list["Recorder"] = []
_HOOKED = False


class Entry(NamedTuple):
    """The name in the folder now means the node; None: nothing."""

    folder: int
    name: str
    node: int | None


class Rename(NamedTuple):
    folder: int
    name: str
    new_folder: int
    new_name: str
    node: int


class Write(NamedTuple):
    node: int
    start: int
    data: bytes


class Truncate(NamedTuple):
    node: int
    size: int


class Sync(NamedTuple):
    node: int


class Mark(NamedTuple):
    """The program has come to a point, which promises something from then on."""

    what: object


WHOLE = (1, False)


class Recorder:
    """Inside its block, what this process does to the files below `root` is noted in `operations`.

    What is there before is taken for synced.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.operations: list[Entry | Rename | Write | Truncate | Sync | Mark] = []
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.contents: dict[int, bytes] = {}
        self._next = 1
        self._adopt(self.root, 0)
        self.first_folders = {node: dict(names) for node, names in self.folders.items()}
        self.first_contents = dict(self.contents)

    def __enter__(self) -> "Recorder":
        global _HOOKED
        if not _HOOKED:
            sys.addaudithook(_hook)
            _HOOKED = True
        self._fsync, os.fsync = os.fsync, self._synced
        _ACTIVE.append(self)
        return self

    def __exit__(self, *_) -> None:
        _ACTIVE.remove(self)
        os.fsync = self._fsync
        self._note_writes()

    def mark(self, what: object) -> None:
        self._note_writes()
        self.operations.append(Mark(what))

    def happens(self, event: str, arguments: tuple) -> None:
        """An audit event: of what is about to be done."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & (os.O_CREAT | os.O_TRUNC):
                self._opened(self._place(path, -1), flags)
        elif event == "os.mkdir":
            self._made(self._place(arguments[0], arguments[2]))
        elif event == "os.rename":
            self._renamed(self._place(arguments[0], arguments[2]), self._place(arguments[1], arguments[3]))
        elif event in ("os.remove", "os.rmdir"):
            self._removed(self._place(arguments[0], arguments[1]))

    def _adopt(self, path: Path, node: int) -> None:
        for entry in sorted(path.iterdir()):
            child, self._next = self._next, self._next + 1
            self.folders[node][entry.name] = child
            if entry.is_dir():
                self.folders[child] = {}
                self._adopt(entry, child)
            else:
                self.contents[child] = entry.read_bytes()

    def _place(self, path: str | os.PathLike, folder: int) -> tuple[int, str] | None:
        """(folder, name); None: not below the root."""
        path = os.fspath(path)
        if folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        node = self._node(Path(os.path.realpath(parent)))
        return None if node is None else (node, name)

    def _node(self, path: Path) -> int | None:
        if path != self.root and self.root not in path.parents:
            return None
        node = 0
        for name in path.relative_to(self.root).parts:
            node = self.folders.get(node, {}).get(name)
        return node

    def _note_writes(self) -> None:
        for path, node in self._files(self.root, 0):
            before, now = self.contents[node], path.read_bytes()
            if not now.startswith(before):
                self.operations.append(Truncate(node, 0))
                before = b""
            if now != before:
                self.operations.append(Write(node, len(before), now[len(before) :]))
            self.contents[node] = now

    def _files(self, path: Path, folder: int) -> Iterator[tuple[Path, int]]:
        for name, node in self.folders[folder].items():
            if node in self.folders:
                yield from self._files(path / name, node)
            elif (path / name).is_file():  # one that was announced may not be there yet
                yield path / name, node

    def _enter(self, place: tuple[int, str], node: int | None) -> None:
        self.operations.append(Entry(*place, node))
        folder, name = place
        if node is None:
            del self.folders[folder][name]
        else:
            self.folders[folder][name] = node

    def _opened(self, place: tuple[int, str] | None, flags: int) -> None:
        if place is None:
            return
        self._note_writes()
        folder, name = place
        node = self.folders[folder].get(name)
        if node is None and flags & os.O_CREAT:
            node, self._next = self._next, self._next + 1
            self.contents[node] = b""
            self._enter(place, node)
        elif node is not None and flags & os.O_TRUNC and self.contents[node]:
            self.operations.append(Truncate(node, 0))
            self.contents[node] = b""

    def _made(self, place: tuple[int, str] | None) -> None:
        if place is not None and place[1] not in self.folders[place[0]]:
            node, self._next = self._next, self._next + 1
            self.folders[node] = {}
            self._enter(place, node)

    def _renamed(self, old: tuple[int, str] | None, new: tuple[int, str] | None) -> None:
        if old is None and new is None:
            return
        self._note_writes()
        node = self.folders[old[0]].pop(old[1])
        self.folders[new[0]][new[1]] = node
        self.operations.append(Rename(*old, *new, node))

    def _removed(self, place: tuple[int, str] | None) -> None:
        if place is not None and place[1] in self.folders[place[0]]:
            self._note_writes()
            self._enter(place, None)

    def _synced(self, descriptor: int) -> None:
        self._note_writes()
        node = self._node(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        if node is not None:
            self.operations.append(Sync(node))
        self._fsync(descriptor)


def _hook(event: str, arguments: tuple) -> None:
    if _ACTIVE and (event == "open" or event.startswith("os.")):
        for recorder in _ACTIVE:
            recorder.happens(event, arguments)


class State(NamedTuple):
    cut: int  # so many operations were done
    marks: list  # that the program had come to
    files: dict[str, bytes | None]  # by path; None: a folder


def states(recorder: Recorder, count: int, choose: random.Random) -> Iterator[State]:
    """About `count` different states, spread over all moments at which the power may be cut."""
    operations = recorder.operations
    share = -(-count // (len(operations) + 1))
    seen, more = set(), 0
    for cut in range(len(operations) + 1):
        marks = [operation.what for operation in operations[:cut] if isinstance(operation, Mark)]
        pending = [i for i in range(cut) if _is_lost_by(operations, i, cut)]
        lost = set(pending)
        tries, found, misses = 0, 0, 0
        while found < share + more and misses < 30:
            kept = _kept(operations, pending, tries, choose)
            files = _built(recorder, [i for i in range(cut) if i in kept or i not in lost], kept)
            key = (repr(marks), tuple(sorted(files.items(), key=lambda item: item[0])))
            tries, misses = tries + 1, misses + 1
            if key not in seen:
                seen.add(key)
                found, misses = found + 1, 0
                yield State(cut, marks, files)
        more = share + more - found  # at some moments little can be lost


def _is_lost_by(operations: list, index: int, cut: int) -> bool:
    """Whether a power cut may undo the operation."""
    operation = operations[index]
    if isinstance(operation, Sync | Mark):
        return False
    if isinstance(operation, Rename):
        needed = {operation.folder, operation.new_folder}
    else:
        needed = {operation.folder if isinstance(operation, Entry) else operation.node}
    return not needed <= {later.node for later in operations[index:cut] if isinstance(later, Sync)}


def _kept(operations: list, pending: list[int], number: int, choose: random.Random) -> dict[int, tuple[float, bool]]:
    """Which of the unsynced operations are there: none, all, all but one of each, and then by chance.

    Of a write there may be a part, with zeros behind it or nothing: (share of its bytes, zeros).
    """
    if number == 0:
        return {}
    if number == 1:
        return dict.fromkeys(pending, WHOLE)
    if number - 2 < len(pending):
        return dict.fromkeys([i for i in pending if i != pending[-1 - (number - 2)]], WHOLE)
    share = choose.random()
    chosen = [i for i in pending if choose.random() < share]
    parts = [WHOLE, (choose.choice((0, choose.random())), True), (choose.random(), False)]
    return {i: choose.choice(parts) if isinstance(operations[i], Write) else WHOLE for i in chosen}


def _built(recorder: Recorder, there: list[int], kept: dict[int, tuple[float, bool]]) -> dict[str, bytes | None]:
    """What a disk holds that these operations have reached."""
    folders = {node: dict(names) for node, names in recorder.first_folders.items()}
    contents = {node: bytearray(content) for node, content in recorder.first_contents.items()}
    for index in there:
        operation, way = recorder.operations[index], kept.get(index, WHOLE)
        match operation:
            case Entry(folder, name, None):
                folders.setdefault(folder, {}).pop(name, None)
            case Entry(folder, name, node):
                folders.setdefault(folder, {})[name] = node
            case Rename(folder, name, new_folder, new_name, node):
                if folders.setdefault(folder, {}).get(name) == node:
                    del folders[folder][name]
                folders.setdefault(new_folder, {})[new_name] = node
            case Write(node, start, data):
                content = contents.setdefault(node, bytearray())
                share, zeros = way
                there = data[: int(share * len(data))]
                data = there.ljust(len(data), b"\0") if zeros else there
                content.extend(bytes(max(start - len(content), 0)))
                content[start : start + len(data)] = data
            case Truncate(node, size):
                del contents.setdefault(node, bytearray())[size:]
    made: dict[str, bytes | None] = {}

    def walk(folder: int, path: str) -> None:
        for name, node in folders.get(folder, {}).items():
            if node in recorder.folders:
                made[path + name] = None
                walk(node, path + name + "/")
            else:
                made[path + name] = bytes(contents.get(node, b""))

    walk(0, "")
    return made


def write_state(state: State, folder: Path) -> None:
    folder.mkdir()
    for path, content in state.files.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
