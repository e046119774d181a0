"""The pages of docs/ run as they are printed, name what exists, and show figures that their script draws."""

import ast
import re
from pathlib import Path

import pytest

import cascadeops
from docs import figures

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPERATORS = sorted((ROOT / "docs/operators").glob("*.md"))


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", OPERATORS, ids=page_id)
def test_examples_give_what_their_comments_say(path):
    """`expression  # -> text`: the text is what Python shows for the expression."""
    (example,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    names: dict = {}
    claims = 0
    for node in ast.parse(example).body:
        code = "\n".join(example.splitlines()[node.lineno - 1 : node.end_lineno])
        code, arrow, claim = code.partition("  # -> ")
        if arrow:
            assert repr(eval(code, names)) == claim, code
            claims += 1
        else:
            exec(code, names)
    assert claims


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_and_names_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for name in re.findall(r"\bcascadeops\.(\w+)\(", text):
        assert hasattr(cascadeops, name), name


@pytest.mark.parametrize("path", OPERATORS, ids=page_id)
def test_a_page_is_of_an_operator_and_in_the_index(path):
    assert path.stem in cascadeops.__all__
    assert path.read_text().startswith(f"# {path.stem}\n")
    assert f"](operators/{path.name})" in (ROOT / "docs/README.md").read_text()


@pytest.mark.parametrize("figure", figures.FIGURES, ids=lambda figure: figure.__name__)
def test_figures_are_what_the_script_draws(figure):
    assert (figures.FOLDER / f"{figure.__name__}.svg").read_text() == figure().svg(), "python -m docs.figures"
