"""HTML pages that are one file: no script, nothing loaded from anywhere, every text escaped, light and dark.

A page forbids itself the network and scripts by its content security policy, so that what a data set or a run folder
smuggled past the escaping would still do nothing.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --panel: #f6f8fa;
  --bar: #0072b233; --heat: 0 114 178; --warn: #9a6700; --better: #1a7f37; --worse: #c0392b;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5558f; --c4: #8a6d00; --c5: #3a9bd9; --c6: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --paper: #0d1117;
  --panel: #161b22; --bar: #56b4e933; --heat: 86 180 233; --warn: #d29922; --better: #3fb950; --worse: #ff7b72;
  --c0: #56b4e9; --c1: #ff9d4d; --c2: #2fc79b; --c3: #e39bc4; --c4: #e3c84a; --c5: #8fd0ff; --c6: #9ca3af } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; margin: 0 auto;
  max-width: 76rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p { max-width: 48rem; margin: .4rem 0 .8rem } .soft { color: var(--soft) } a { color: var(--c0) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .22rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; color: var(--soft) } td.number, th.number { text-align: right; white-space: nowrap }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem } .pictures > * { min-width: 0; max-width: 100% }
figure { margin: 0 } figure img { max-width: 100%; display: block; border-radius: 4px }
figcaption { font-size: 13px; color: var(--soft); overflow-wrap: anywhere }
"""


class Html(str):
    """Text that is markup already; every other text is escaped where it enters a page."""


def escape(value: object) -> Html:
    """What is no Unicode (half a pair: of a file name in another encoding, or from JSON) shows as its number."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value)).encode(errors="backslashreplace").decode())


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, `data_size` is data-size; None leaves an attribute out."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    text = "".join(f' {key}="{escape(str(value))}"' for key, value in pairs)
    return Html(f"<{name}{text}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    return Html("".join(map(escape, parts)))


def table(
    headings: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = (), **attributes: object
) -> Html:
    """A table; a cell that is a `td` already is taken as it is.

    Args:
        numbers: columns that are set right.
    """
    right = set(numbers)

    def cell(kind: str, column: int, value: object) -> Html:
        if isinstance(value, Html) and value.startswith("<td"):
            return value
        return tag(kind, value, class_="number" if column in right else None)

    head = tag("tr", *(cell("th", i, heading) for i, heading in enumerate(headings)))
    body = (tag("tr", *(cell("td", i, value) for i, value in enumerate(row))) for row in rows)
    inside = tag("table", tag("thead", head) if any(headings) else "", tag("tbody", *body), **attributes)
    return tag("div", inside, class_="wide")


def picture(pixels: np.ndarray, alt: str, quality: int = 82) -> Html:
    """uint8 RGB [H, W, 3] as an <img> that holds its own JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[:2]
    return Html(f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/jpeg;base64,{data}">')


def page(title: str, *body: object, style: str = "") -> str:
    """The whole file."""
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n<body>\n{join(body)}\n</body>\n</html>\n"
    )
