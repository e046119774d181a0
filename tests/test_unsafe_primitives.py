"""No unsafe primitive in what is installed or run by hand: the source is searched as Python sees it, not as text.

Also: the oldest versions that pyproject.toml allows are not ones with known holes, and those installed are as new.
"""

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cascadeops", "models", "scripts", "benchmarks", "examples", "docs")
FILES = [ROOT / "setup.py", ROOT / "bin/cascadeops"]
FILES += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

NAMES = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports what a text names",
    "runpy.run_path": "runs what a file holds",
    "runpy.run_module": "runs what a text names",
    "torch.load": "unpickles",
    "torch.jit.load": "runs what a file holds",
    "numpy.load": "may unpickle",
    "torch.hub.load": "runs what it downloads",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "tempfile.mktemp": "a race for the name",
    "yaml.load": "runs what the file names",
    "shutil.unpack_archive": "follows the archive's names",
    "PIL.Image.open": "decodes any format",
    "cv2.imread": "decodes any format",
}
METHODS = {"extractall": "follows the archive's names"}
IMPORTS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "tarfile"}
IMPORTS |= {"xml.etree", "xml.dom", "xml.sax", "lxml", "telnetlib", "ftplib", "smtplib", "requests"}
IMPORTS |= {"urllib.request"}
KEYWORDS = {("weights_only", False): "unpickles", ("allow_pickle", True): "unpickles", ("shell", True): "a shell"}

ALLOWED = {
    ("models/cli.py", "exec"): "runs a module of this package, as `python -m` does, named in a table of its own",
    ("models/data/mended_copy.py", "xml.etree"): "writes anew a file that read_voc_file has checked",
    ("models/weights/download.py", "urllib.request"): "the one place that downloads, checked by hash",
    ("models/images.py", "PIL.Image.open"): "the one place where images are opened: with an allow-list and a pixel cap",
}


def imported(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, name in this file, full name) of whatever is imported from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.asname or "", alias.name  # without "as" the full name is written out
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_name(node: ast.expr, known: dict[str, str]) -> str | None:
    """ "torch.load" of `t.load` behind `import torch as t`; None of what is no name with or without dots."""
    attributes = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([known.get(node.id, node.id), *attributes]).removeprefix("builtins.")


def findings(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what, why it is unsafe), whether it is called or, but for Python's own functions, given to something else
    that may call it. What is hidden on purpose, behind getattr for one, is not found."""
    tree = ast.parse(source)
    known = {name: full for _, name, full in imported(tree)}
    for line, _, full in imported(tree):
        for module in IMPORTS:
            if full == module or full.startswith(f"{module}."):
                yield line, module, "an unsafe reader, or the network"
        name = full.removeprefix("builtins.")
        if name in NAMES:
            yield line, name, NAMES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, known)
            if name in NAMES and "." in name:  # "compile" alone may be an argument of that name
                yield node.lineno, name, NAMES[name]
        if isinstance(node, ast.Call):
            name = full_name(node.func, known)
            if name in NAMES and "." not in name:
                yield node.lineno, name, NAMES[name]
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield node.lineno, node.func.attr, METHODS[node.func.attr]
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in KEYWORDS and isinstance(value, bool):
                    yield node.lineno, f"{keyword.arg}={value}", KEYWORDS[keyword.arg, value]


def test_no_unsafe_primitive_is_used():
    found, used = [], set()
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for line, what, why in findings(path.read_text(encoding="utf-8")):
            if (name, what) in ALLOWED:
                used.add((name, what))
            else:
                found.append(f"{name}:{line}: {what} ({why})")
    assert found == []
    assert used == ALLOWED.keys(), "an exception that is no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import xml.etree.ElementTree as E",
        "torch.load(path)",
        "f(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "eval(text)",
        "tempfile.mktemp()",
        "yaml.load(text)",
        "from PIL import Image\nImage.open(path)",
        "import PIL.Image\nPIL.Image.open(path)",
        "from PIL.Image import open",
        "from PIL.Image import open as reader\nf = reader",
        "import torch as t\nt.load(path)",
        "import numpy as np\nmap(np.load, paths)",
        "from torch import load",
        "import torch\ntorch.jit.load(path)",
        "from os import system",
        "from xml import sax",
        "from tempfile import mktemp",
        "subprocess.getoutput(command)",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import eval",
        "runpy.run_path(path)",
        "import urllib.request",
        "from urllib import request",
    ],
)
def test_each_would_be_found(source):
    assert len([*findings(source)]) >= 1


def test_what_only_looks_like_it_is_not_found():
    assert [
        *findings("import torch\ndetector.eval()\ntorch.compile(f)\nre.compile(text)\nfrom .images import open")
    ] == []


def requirements() -> dict[str, str]:
    """The least version of each package that pyproject.toml gives one for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(r'^    "([\w-]+)>=([\d.]+)"', text, re.MULTILINE))


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"\d+(\.\d+)*", text)[0].split(".")))


SAFE = {"torch": "2.10", "pillow": "12.3"}
"""The first versions without known holes in what reads files. torch.load runs code even with weights_only before 2.6
(CVE-2025-32434), and writes beside its memory before 2.10 (CVE-2026-24747); it is not used here. Pillow from 10.3 to
12.1.1 unpacks a FITS file of any size (CVE-2026-40192), and 12.3 mends PDF, EPS and McIdas files; no such format is
opened here."""


def test_the_oldest_allowed_versions_are_safe_and_those_installed_as_new():
    least = requirements()
    for name, safe in SAFE.items():
        assert version(least[name]) >= version(safe), name
        assert version(importlib.metadata.version(name)) >= version(safe), name
