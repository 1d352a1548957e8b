"""The report in a real browser: every width and colour scheme, with and without its script.

test -- NUL-separated JSON over two pipes (DevTools protocol) -- headless Chromium -- file:// report
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.record import Record
from migrated.report import write_comparison, write_report

RECORDS = Path(__file__).parents[1] / "data" / "records"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
EXECUTABLE = next((found for name in NAMES if (found := shutil.which(name))), None)
ANSWER_S = 60.0
# The browser expects its pipes as descriptors 3 and 4.
LAUNCH = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")


class Browser:
    """One page of a headless Chromium. ``events`` are the protocol's events since the last ``open``."""

    def __init__(self, directory: Path) -> None:
        assert EXECUTABLE is not None
        commands_r, self._out = os.pipe()
        self._in, answers_w = os.pipe()
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        arguments += [f"--user-data-dir={directory}", "--remote-debugging-pipe", "about:blank"]
        # Above 4, so that no descriptor is overwritten before it is passed on.
        passed = [os.dup2(fd, 50 + index) for index, fd in enumerate((commands_r, answers_w))]
        os.close(commands_r)
        os.close(answers_w)
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, passed), EXECUTABLE, *arguments],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in passed:
            os.close(fd)
        self._buffer = b""
        self._sent = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._session = None
        with contextlib.suppress(BrokenPipeError, EOFError):
            self.call("Browser.close")
        try:
            self._process.wait(ANSWER_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._in)
            os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise EOFError
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, path: Path, *, width: int = 1200, scheme: str = "light", script: bool = True) -> None:
        """Load a page and wait until it has loaded."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What an expression gives, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


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
