"""The report in a real browser: every width and colour scheme, with and without its script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.record.model import Record
from migrated.report import write_comparison, write_report
from scripts.rig.browser import EXECUTABLE, Browser

RECORDS = Path(__file__).parents[1] / "data" / "records"

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def record_of(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return record


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report on every record, and a comparison of two."""
    directory = tmp_path_factory.mktemp("pages")
    written = {path.stem: directory / f"{path.stem}.html" for path in RECORDS.glob("*.json")}
    for name, path in written.items():
        write_report(record_of(name), path)
    written["comparison"] = directory / "comparison.html"
    write_comparison(record_of("completed"), record_of("late"), written["comparison"])
    return written


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1025, 1200])
@pytest.mark.parametrize("name", ["completed", "aborted", "refused", "comparison"])
def test_it_fits_and_stays_at_home(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    """No sideways scrolling of the page, no complaint in the console, no request but for the file."""
    browser.open(pages[name], width=width, scheme=scheme)
    assert browser.value("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll("main *")].filter((e) => {
        const box = e.getBoundingClientRect();
        return box.width && box.right > innerWidth + 1 && !e.closest(".scroll, .log, pre, .track");
    }).map((e) => e.outerHTML.slice(0, 200))"""
    assert browser.value(outside) == []
    complaints = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    assert [event for event in browser.events if event["method"] in complaints] == []
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [pages[name].as_uri()]
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    dark = sum(int(channel) for channel in ground[4:-1].split(",")) < 3 * 128
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("name", ["completed", "aborted"])
def test_every_number_on_the_screen_equals_the_record(
    browser: Browser, pages: dict[str, Path], name: str, script: bool
) -> None:
    browser.open(pages[name], script=script)
    shown = browser.value("""Object.fromEntries([...document.querySelectorAll("data")].filter(
        (e) => e.getClientRects().length).map((e) => [e.dataset.field, JSON.parse(e.value)]))""")
    document = Record.model_validate(record_of(name)).document()

    def compare(value: Any, path: str) -> int:
        if isinstance(value, dict | list):
            members = value.items() if isinstance(value, dict) else enumerate(value)
            return sum(compare(member, f"{path}.{key}".lstrip(".")) for key, member in members)
        if value is not None:
            assert shown[path] == value, path
        return 1

    assert compare(document, "") > 150


def bars(browser: Browser) -> dict[str, tuple[float, float]]:
    """Bars of the parts: name to begin and width, as shares of the track."""
    rows = browser.value("""[...document.querySelectorAll("#downtime .tracks tr")].map((row) => {
        const bar = row.querySelector("td.track .bar:not(.instant)"), name = row.querySelector("th data");
        if (!bar || !name) return null;
        const track = row.querySelector("td.track").getBoundingClientRect(), box = bar.getBoundingClientRect();
        return [name.textContent, (box.left - track.left) / track.width, box.width / track.width];
    }).filter(Boolean)""")
    return {name: (begin, width) for name, begin, width in rows}


def test_parts_are_drawn_to_scale(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["completed"], script=False)
    drawn = bars(browser)
    record = record_of("completed")
    axis = browser.value("Number(document.querySelector('#downtime .tracks').dataset.span)")
    begin = 0
    for part in record["downtime"]["parts"]:
        left, width = drawn[part["name"]]
        assert left == pytest.approx(begin / axis, abs=0.005)
        assert width == pytest.approx(part["ns"] / axis, abs=0.006)  # a bar is never thinner than 2 pixels
        begin += part["ns"]


def test_a_short_part_can_be_enlarged_and_back(browser: Browser, pages: dict[str, Path]) -> None:
    """journal is far below a pixel's worth of the downtime; chosen, it fills most of the track."""
    browser.open(pages["completed"])
    before = bars(browser)
    ticks = browser.value("document.querySelector('#downtime .axis').textContent")
    choose = """(() => { const name = [...document.querySelectorAll("#downtime th data")].find(
        (e) => e.textContent === "journal"); const track = name.closest("tr").querySelector("td.track"); %s })()"""
    browser.value(choose % "track.click()")
    settle = "document.getAnimations().forEach((animation) => animation.finish())"
    browser.value(settle)
    begin, width = bars(browser)["journal"]
    assert before["journal"][1] < 0.01
    assert width == pytest.approx(2 / 3, abs=0.02)
    assert begin == pytest.approx(1 / 6, abs=0.02)
    assert browser.value("document.querySelector('#downtime .axis').textContent") != ticks
    assert browser.value("document.querySelector('#downtime .reset').hidden") is False
    browser.value(choose % "track.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    browser.value(settle)
    assert bars(browser) == before
    assert browser.value("document.querySelector('#downtime .reset').hidden") is True


def test_it_is_readable_without_its_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["aborted"], script=False)
    hidden = browser.value(
        """[...document.querySelectorAll("section")].filter((e) => !e.getClientRects().length).length"""
    )
    assert hidden == 0
    assert browser.value("document.querySelectorAll('.axis .tick').length") > 10
    controls = "[...document.querySelectorAll('.reset, .scripted')].every((e) => !e.getClientRects().length)"
    assert browser.value(controls) is True
