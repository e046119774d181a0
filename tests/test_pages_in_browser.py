"""The HTML pages in a real browser: what is drawn, at what width, in light and dark; no error, no request.

`CASCADEOPS_SCREENSHOTS=folder` keeps what the browser shows. Skipped where there is no Chromium or Chrome.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from browser import find_browser, opened_browser
from PIL import Image
from written_runs import write_data, write_run

from models import report
from models.data.check import check_dataset
from models.data.check_page import check_page

pytestmark = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium or Chrome on the path (apt-get install chromium), nor CASCADEOPS_BROWSER",
)

WIDE, DARK, PHONE = (1280, "light"), (1280, "dark"), (390, "light")
VIEWS = {"one": (WIDE, DARK, PHONE), "two": (WIDE, DARK, PHONE), "check": (DARK, PHONE), "none": (PHONE,)}
SCRIPT = "<script>document.title='taken'</script><img src=http://evil.invalid/x.png onerror=\"document.title='taken'\">"

LAID_OUT = """[...document.querySelectorAll('%s')].map(e => {
  const box = e.getBoundingClientRect(); return [box.left, box.right, box.width, box.height] })"""


@pytest.fixture(scope="module")
def browser():
    with opened_browser(find_browser()) as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    data = write_data(folder / "data", (SCRIPT, "a class with a long name"), "<b>.png")
    first = write_run(folder / "first", data)
    second = write_run(folder / "second-with-a-name-that-is-quite-long", data, rate=0.5, quality=3, system=SCRIPT)
    empty = folder / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((first / "config.json").read_bytes())
    report.main(report.Report(folder=first, output=folder / "one.html"))
    report.main(report.Report(folder=first, versus=second, output=folder / "two.html"))
    report.main(report.Report(folder=empty, output=folder / "none.html"))
    path = data / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [-5, 3, 20, 12]
    content["annotations"][1]["category_id"] = SCRIPT
    path.write_text(json.dumps(content))
    (folder / "check.html").write_text(check_page(*_checked(data)))
    return {name: folder / f"{name}.html" for name in VIEWS}


def _checked(data: Path):
    findings, folders = check_dataset(data)
    return findings, data, folders


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [(name, *view) for name, views in VIEWS.items() for view in views], ids=str
)
def test_a_page_is_drawn_whole(browser, pages, tmp_path, name, width, scheme):
    browser.open(pages[name], width, 900, scheme)
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.complaints() == []
    assert browser.ask("document.title") != "taken"
    assert browser.ask("document.documentElement.scrollWidth") <= width, "it has to be scrolled sideways"

    wanted = {"one": (12, 4), "two": (10, 6), "none": (0, 0), "check": (0, 2)}[name]
    charts, pictures = (
        browser.ask(LAID_OUT % selector) for selector in ("section > .charts .chart > svg", "figure img")
    )
    assert (len(charts), len(pictures)) == wanted
    for left, right, wide, high in charts + pictures:
        assert 0 <= left < right <= width and wide > 90 and high > 60
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    for _, right, wide, high in browser.ask(LAID_OUT % "h1, h2, p, nav a, .card"):
        assert wide > 0 and high > 0 and right <= width
    for _, _, wide, _ in browser.ask(LAID_OUT % "section > .charts polyline"):
        assert wide > 50  # a line that has been drawn, if only a flat one
    words = browser.ask("document.body.innerText")
    assert "undefined" not in words and "NaN" not in words and "nan" not in words.split()

    light, dark = browser.ask(
        "['background-color', 'color'].map(k => getComputedStyle(document.body).getPropertyValue(k)"
        ".match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0))"
    )
    assert abs(light - dark) > 450 and (light > dark) == (scheme == "light")
    path = Path(os.environ.get("CASCADEOPS_SCREENSHOTS", tmp_path)) / f"{name}-{width}-{scheme}.png"
    browser.screenshot(path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] == width and pixels.shape[0] >= 300
    ink = (np.abs(pixels.astype(int) - pixels[0, 0]).sum(2) > 60).mean()
    assert 0.005 < ink < 0.6  # neither blank nor a blot


def test_settings_fold_and_links_lead_to_sections(browser, pages):
    browser.open(pages["one"], 1280, 900)
    folded = "[...document.querySelectorAll('details')].map(d => d.getBoundingClientRect().height)"
    before = browser.ask(folded)
    browser.ask("document.querySelectorAll('details:not([open]) > summary')[0].click()")
    after = browser.ask(folded)
    assert sum(b > a for a, b in zip(before, after, strict=True)) == 1  # without a script of the page
    assert browser.ask("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_a_page_could_not_reach_the_network_if_it_tried(browser, pages, tmp_path):
    """What the escaping keeps out, the policy of the page would stop, too."""
    page = tmp_path / "page.html"
    page.write_text(pages["none"].read_text().replace("<h1>", f"{SCRIPT}<h1>"))
    browser.open(page, 1280, 900)
    assert browser.ask("document.title") != "taken"
    assert browser.refused() == ["csp"]  # the image; the script was not even looked at
    assert any("Content Security Policy" in text for text in browser.complaints())
