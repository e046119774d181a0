"""A zoo of weights files that want to run code, exhaust memory or time, or are damaged: {kind: bytes of a file}.

Pickles are written opcode by opcode, since Python's own pickler makes well-behaved ones only.
"""

import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import torch

MAGIC = 0x1950A86A20F9469CFC6C
GADGETS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("os", "execv"),
    ("os", "remove"),
    ("os", "mkdir"),
    ("os", "putenv"),
    ("subprocess", "Popen"),
    ("subprocess", "check_output"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "compile"),
    ("builtins", "open"),
    ("builtins", "getattr"),
    ("builtins", "setattr"),
    ("builtins", "__import__"),
    ("builtins", "breakpoint"),
    ("builtins", "map"),
    ("__builtin__", "eval"),
    ("__builtin__", "execfile"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("runpy", "_run_code"),
    ("pty", "spawn"),
    ("pdb", "run"),
    ("bdb", "Bdb.run"),
    ("cProfile", "run"),
    ("profile", "run"),
    ("timeit", "timeit"),
    ("trace", "Trace.run"),
    ("code", "InteractiveInterpreter"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("marshal", "loads"),
    ("pickle", "loads"),
    ("_pickle", "loads"),
    ("dill", "loads"),
    ("cloudpickle", "loads"),
    ("joblib", "load"),
    ("ctypes", "CDLL"),
    ("socket", "create_connection"),
    ("urllib.request", "urlopen"),
    ("http.client", "HTTPSConnection"),
    ("smtplib", "SMTP"),
    ("ftplib", "FTP"),
    ("webbrowser", "open"),
    ("shutil", "rmtree"),
    ("pathlib", "Path.touch"),
    ("tempfile", "mkdtemp"),
    ("logging.config", "dictConfig"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("functools", "partial"),
    ("functools", "reduce"),
    ("asyncio", "run"),
    ("multiprocessing", "Process"),
    ("threading", "Thread"),
    ("signal", "raise_signal"),
    ("sys", "exit"),
    ("copyreg", "_reconstructor"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.jit", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.f2py.crackfortran", "getlincoef"),
    ("mmengine.config", "Config.fromfile"),
    ("pip", "main"),
    ("lib2to3.pgen2.grammar", "Grammar.loads"),
]
PAYLOAD = "touch {victim}"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def pickle_of(value: bytes, protocol: int = 2) -> bytes:
    """A state dict with one entry, of these opcodes."""
    return b"\x80" + bytes([protocol]) + b"}" + text("layer.weight") + value + b"s."


def archive(content: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes, around this data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("archive/data.pkl", content)
        for name, data in (records or {}).items():
            out.writestr(f"archive/{name}", data)
        out.writestr("archive/version", "3\n")
    return file.getvalue()


def legacy(content: bytes, keys: object = (), storages: bytes = b"") -> bytes:
    """What torch.save wrote before 1.6."""
    start = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
    return b"".join(start) + content + pickle.dumps(list(keys), 2) + storages


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 4) -> bytes:
    """A reference to a storage, as opcodes."""
    number = b"\x8a\x08" + struct.pack("<q", numel)
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number + b"tQ"


def tensor(
    size: tuple = (4,), stride: tuple = (1,), offset: int = 0, function: str = "_rebuild_tensor_v2", **kept
) -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    arguments = storage(**kept) + number(offset) + numbers(size) + numbers(stride) + b"\x89" + b"N"
    return named("torch._utils", function) + b"(" + arguments + b"tR"


REBUILD = named("torch._utils", "_rebuild_tensor_v2")
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def calls(victim: str) -> dict[str, bytes]:
    """Opcodes that call, for each gadget and for each way of calling that a pickle has."""
    payload = PAYLOAD.format(victim=victim)
    found = {f"{module}.{name}": named(module, name) + text(payload) + b"\x85R" for module, name in GADGETS}
    command = text(payload)
    found |= {
        "stack_global": b"\x8c\x02os\x8c\x06system\x93" + command + b"\x85R",
        "inst": b"(" + command + b"ios\nsystem\n",
        "obj": b"(" + named("os", "system") + command + b"o",
        "newobj": named("subprocess", "Popen") + command + b"\x85\x81",
        "newobj_ex": named("subprocess", "Popen") + command + b"\x85}\x92",
        "build a setstate": named("torch", "Tensor") + b")\x81}" + text("__setstate__") + named("os", "system") + b"sb",
        "build slots": named("collections", "OrderedDict")
        + b"N}"
        + text("__init__")
        + named("os", "system")
        + b"s\x86b",
        "build then call": named("builtins", "eval") + b"}b" + command + b"\x85R",
        "persistent id that calls": named("os", "system") + command + b"\x85RQ",
        "persistent id of text": b"Pos.system\n",
        "extension code": b"\x82\x01" + command + b"\x85R",
        "dict subclass": named("mmcv.utils.config", "ConfigDict") + b")R" + text("a") + named("os", "system") + b"s",
        "list subclass": named("evil", "List") + b")R" + named("os", "system") + b"a",
        "metaclass call": named("builtins", "type") + text("X") + b")}\x87R)R",
        "nested getattr": named("builtins", "getattr")
        + named("os", "path")
        + text("os")
        + b"\x86R"
        + command
        + b"\x85R",
        "call as key": b"}" + named("os", "system") + command + b"\x85RNs",
        "call as storage type": b"("
        + text("storage")
        + named("os", "system")
        + command
        + b"\x85R"
        + text("0cpu") * 2
        + b"tQ",
        "ordered dict of a call": named("collections", "OrderedDict") + named("os", "system") + command + b"\x85R\x85R",
        "state of numpy": named("numpy.core.multiarray", "_reconstruct") + b")R" + named("os", "system") + b"b",
        "out of band buffer": b"\x97",
        "codecs": named("_codecs", "encode") + command + text("rot13") + b"\x86R",
    }
    return found


def bombs() -> dict[str, bytes]:
    """Pickles that ask for time or memory; values of one entry."""
    doubled = b"N\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60
    return {
        "half a million calls": b"N0" * 400_000 + b"N",
        "a million empty dicts": b"]" + b"}a" * 700_000,
        "deep tuple": b")" + b"\x85" * 200_000,
        "deep list": b"]" * 200_000 + b"a" * 199_999,
        "deep tuple as key": b"}" + b")" + b"\x85" * 200_000 + b"Ns",
        "deep tuple as function": b")" + b"\x85" * 200_000 + b")R",
        "doubled tuple": doubled,
        "doubled tuple as key": b"}" + doubled + b"Ns",
        "doubled tuple as function": doubled + b")R",
        "list of itself": b"]q\x00h\x00a",
        "list as key": b"}]Ns",
        "length of an exabyte": b"\x8d" + struct.pack("<Q", 1 << 60),
        "bytes of 64 gigabytes": b"\x8e" + struct.pack("<Q", 1 << 36),
        "array of bytes of an exabyte": b"\x96" + struct.pack("<Q", 1 << 60),
        "frame of an exabyte": b"\x95" + struct.pack("<Q", 1 << 60) + b"N",
        "number of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
        "long of a million digits": b"L" + b"9" * 1_000_000 + b"L\n",
        "long of a megabyte": b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20),
        "negative long": b"\x8b" + struct.pack("<i", -1),
        "memo far away": b"Nr\xff\xff\xff\xff",
        "memo that is not": b"h\x07",
        "mark that is not": b"t",
        "pop of nothing": b"0000000",
        "append to text": text("a") + text("b") + b"a",
        "item of text": text("a") + text("b") + text("c") + b"s",
        "ordered dict of ordered dicts": named("collections", "OrderedDict") + b"]" + b"}a" * 1000 + b"\x85R",
        "no such opcode": b"\xff",
        "wrong escape": b"S'\\x'\n",
        "text that is none": b"X\x02\x00\x00\x00\xff\xfe",
    }


def false_tensors() -> dict[str, bytes]:
    """Archives whose tensors do not fit what is there."""

    def one(record: bytes = FOUR_FLOATS, **kind) -> bytes:
        return archive(pickle_of(tensor(**kind)), {"data/0": record})

    twice = b"}" + text("a") + tensor() + b"s" + text("b") + tensor(kind="LongStorage", numel=2) + b"s"
    return {
        "terabyte of stride 0": one(size=(1 << 30, 1 << 10), stride=(0, 0)),
        "larger than its storage": one(size=(5,)),
        "offset beyond the end": one(offset=1),
        "stride beyond the end": one(size=(2, 2), stride=(3, 1)),
        "negative size": one(size=(-1,)),
        "negative stride": one(stride=(-1,)),
        "negative offset": one(offset=-4),
        "negative storage": one(numel=-4),
        "size that overflows": one(size=(1 << 62, 4), stride=(1, 1)),
        "stride that overflows": one(size=(2, 2), stride=(1 << 62, 1 << 62)),
        "more strides than sizes": one(stride=(1, 1)),
        "a thousand dimensions": one(size=(1,) * 1000, stride=(1,) * 1000),
        "storage shorter than told": one(FOUR_FLOATS[:8]),
        "storage longer than told": one(FOUR_FLOATS * 2),
        "storage that is not there": archive(pickle_of(tensor())),
        "storage outside of the folder": archive(pickle_of(tensor(key="../../data.pkl")), {"data/0": FOUR_FLOATS}),
        "one storage of two types": archive(b"\x80\x02" + twice + b".", {"data/0": FOUR_FLOATS}),
        "unknown type": one(kind="QInt8Storage"),
        "sparse": one(function="_rebuild_sparse_csr_tensor"),
        "size that is a text": archive(
            pickle_of(
                named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage() + b"K\x00" + text("4") * 2 + b"tR"
            ),
            {"data/0": FOUR_FLOATS},
        ),
        "storage that is no record": archive(pickle_of(REBUILD + b"()K\x00))tR")),
        "storage without arguments": archive(pickle_of(REBUILD + b"()QK\x00))tR")),
        "no arguments": archive(pickle_of(named("torch._utils", "_rebuild_tensor_v2") + b")R")),
        "parameter of itself": archive(pickle_of(named("torch._utils", "_rebuild_parameter") + b")R")),
        "old view of a storage": archive(
            pickle_of(tensor().replace(b"tQ", b"K\x00K\x00K\x04\x87tQ", 1)), {"data/0": FOUR_FLOATS}
        ),
        "compressed record": archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS}, zipfile.ZIP_DEFLATED),
        "compressed bomb": archive(pickle_of(b"N") + bytes(10_000_000), None, zipfile.ZIP_DEFLATED),
        "big-endian": archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS, "byteorder": b"big"}),
        "program": archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS, "constants.pkl": b"N."}),
        "two tables of contents": archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS, "data.pkl": pickle_of(b"N")}),
        "no table of contents": archive(b"").replace(b"data.pkl", b"data.txt"),
        "list of many records": many_records(),
        "false number of records": false_directory(),
        "archive without tensors": archive(b"\x80\x02}."),
        "archive of a list": archive(b"\x80\x02]."),
        "encrypted record": archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS}).replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
        ),
        "wrong checksum": archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS}).replace(FOUR_FLOATS, FOUR_FLOATS[::-1]),
        "legacy storage that is not there": legacy(pickle_of(tensor())),
        "legacy storage cut off": legacy(pickle_of(tensor()), ["0"], struct.pack("<q", 4) + FOUR_FLOATS[:7]),
        "legacy storage of a terabyte": legacy(pickle_of(tensor()), ["0"], struct.pack("<q", 1 << 40)),
        "legacy storage of negative size": legacy(pickle_of(tensor()), ["0"], struct.pack("<q", -1) + FOUR_FLOATS),
        "legacy storage twice": legacy(pickle_of(tensor()), ["0", "0"], 2 * (struct.pack("<q", 4) + FOUR_FLOATS)),
        "legacy keys that are none": legacy(pickle_of(tensor()), [("a",)], struct.pack("<q", 4) + FOUR_FLOATS),
        "legacy storages of nobody": legacy(pickle_of(b"N"), ["7"], struct.pack("<q", 4) + FOUR_FLOATS),
    }


def many_records() -> bytes:
    """A directory of many entries, each of which takes Python's zipfile ten microseconds."""
    name = b"archive/data.pkl"
    entry = b"PK\x01\x02" + struct.pack("<6H3I5H2I", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    directory = entry * 200_000
    return b"PK\x03\x04" + directory + b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 9, 9, len(directory), 4, 0)


def false_directory() -> bytes:
    data = bytearray(archive(pickle_of(tensor()), {"data/0": FOUR_FLOATS}))
    at = data.rindex(b"PK\x05\x06")
    data[at + 8 : at + 12] = b"\xff\xff\xff\xff"
    return bytes(data)


def false_arrays() -> dict[str, bytes]:
    """Paddle files whose arrays do not fit what is there."""

    def array(shape: bytes, code: str, data: bytes, order: str = "<") -> bytes:
        dtype = (
            named("numpy", "dtype") + text(code) + b"K\x00K\x01\x87R(K\x03" + text(order) + b"NNNJ\xff\xff\xff\xff" * 1
        )
        dtype += b"J\xff\xff\xff\xffK\x00tb"
        start = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
        return start + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"

    four = b"C\x10" + FOUR_FLOATS
    huge = b"J" + struct.pack("<i", 1 << 30)
    shared = b"}" + text("k") + b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\x05s"
    megabyte = b"J" + struct.pack("<i", 1 << 18) + b"\x85"
    found = {
        "array larger than its bytes": array(b"K\x05\x85", "f4", four),
        "array smaller than its bytes": array(b"K\x03\x85", "f4", four),
        "array of an exabyte": array(huge + huge + b"\x86", "f4", four),
        "array of negative size": array(b"J\xff\xff\xff\xff\x85", "f4", four),
        "array of objects": array(b"K\x01\x85", "O8", b"]Na", "|"),
        "array of records": array(b"K\x01\x85", "V8", b"C\x08" + bytes(8), "|"),
        "array of text": array(b"K\x04\x85", "f4", text("\u0416" * 16)),
        "big-endian array": array(b"K\x04\x85", "f4", four, ">"),
        "array without a state": named("numpy.core.multiarray", "_reconstruct") + b")R",
    }
    found = {kind: b"\x80\x04}" + text("layer.weight") + value + b"s." for kind, value in found.items()}
    many = b"".join(text(f"a{i}") + array(megabyte, "f4", b"h\x05") + b"s" for i in range(2000))
    found["thousands of arrays of one string"] = b"\x80\x04" + shared + many + b"."
    found["parts that are missing"] = pickle.dumps(
        {"UnpackBigParamInfor@@": {"a": {"OriginShape": (2, 2), "slices": ["b"]}}, "c": np.zeros(3)}, 2
    )
    found["parts that do not fit"] = pickle.dumps(
        {"UnpackBigParamInfor@@": {"a": {"OriginShape": (2, 2), "slices": ["b"]}}, "b": np.zeros(3)}, 2
    )
    found["parts that are no table"] = pickle.dumps({"UnpackBigParamInfor@@": [1]}, 2)
    return found


def other_files() -> dict[str, bytes]:
    header = struct.pack("<Q", 1 << 62)
    return {
        "nothing": b"",
        "one byte": b"\x80",
        "web page": b"<!DOCTYPE html><html>404</html>",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "gzip": zlib.compress(bytes(1000)),
        "zip of another kind": zipped({"word/document.xml": b"<xml/>"}),
        "archive's first bytes": b"PK\x03\x04",
        "safetensors of an exabyte": header + b"{}",
        "safetensors that overlap": struct.pack("<Q", 120)
        + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        + b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'.ljust(66)
        + bytes(12),
        "safetensors that end early": struct.pack("<Q", 64)
        + b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'.ljust(64),
        "array of the wrong kind": pickle.dumps([np.zeros(3)], 2),
        "pickle before an archive": pickle_of(named("os", "system") + text("id") + b"\x85R")
        + archive(pickle_of(tensor())),
        "text numbers": b"\x80\x02cos\nsystem\n(S'id'\ntR.",
    }


def zipped(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, data in records.items():
            out.writestr(name, data)
    return file.getvalue()


def good_files() -> dict[str, bytes]:
    """One of each readable kind."""
    state = {"conv.weight": torch.arange(6.0).view(2, 3).t(), "bn.num_batches_tracked": torch.tensor(3)}
    found = {}
    for kind, zipped_format in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save(
            {"state_dict": state, "meta": {"CLASSES": ("a", "b")}}, file, _use_new_zipfile_serialization=zipped_format
        )
        found[kind] = file.getvalue()
    found["paddle"] = pickle.dumps({key: value.numpy() for key, value in state.items()}, 4)
    return found
