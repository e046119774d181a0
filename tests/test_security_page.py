"""SECURITY.md: every promise names its tests, and they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROMISES = PAGE.split("\n## ")[1]


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/\w+\.py)::(\w+)`", text)


def test_every_test_that_is_named_exists():
    assert len(named_tests(PAGE)) > 30
    for path, name in named_tests(PAGE):
        functions = {
            node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path}::{name}"


def test_every_promise_names_one():
    """Every list item and every paragraph without a list."""
    assert PROMISES.startswith("Promises")
    parts = [part for part in re.split(r"\n\n|\n(?=- )", PROMISES.partition("\n")[2].strip()) if part]
    without = [part for part in parts if not named_tests(part)]
    headings = [part for part in without if part.startswith("**") and part.endswith("**")]
    assert without == headings, "a promise without a test"
    assert len(parts) - len(headings) > 15


def test_what_is_not_defended_and_how_to_report_is_said():
    assert [part.partition("\n")[0] for part in PAGE.split("\n## ")[1:]] == ["Promises", "Not defended", "Reporting"]
