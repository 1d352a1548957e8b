"""The pictures in the documentation, taken from real migrations: `migratectl watch` in a terminal, and reports in a
browser. Needs the extra `pictures` and Chromium.

    python -m scripts.documents.pictures                         all of them into docs/images/
    python -m scripts.documents.pictures -o DIRECTORY --keep     elsewhere, and the pages and records beside them
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pyte
from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from migrated.report import write_comparison, write_report
from scripts.basics import ROOT
from scripts.rig.browser import Browser
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

COLUMNS: Final = 100
ROWS: Final = 30
ROUNDS: Final = 4
"""The terminal is captured once so many rounds are over: there is something to see, and more to come."""
WATCH_TIMEOUT_S: Final = 90.0
LIMIT_MS: Final = 150
LINE_HEIGHT: Final = 24.4
"""Of rich's pictures."""
THEME: Final = TerminalTheme(
    (22, 27, 34),
    (214, 220, 228),
    [(22, 27, 34), (255, 123, 114), (86, 211, 140), (229, 180, 84), (121, 176, 255), (210, 140, 255), (79, 207, 200),
     (200, 208, 218)],
    [(110, 118, 129), (255, 161, 152), (120, 231, 170), (240, 200, 110), (160, 200, 255), (226, 170, 255),
     (120, 230, 225), (240, 244, 248)],
)  # fmt: skip
SVG: Final = """\
<svg xmlns="http://www.w3.org/2000/svg"
  viewBox="-10 -8 {width} HEIGHT" role="img" aria-label="TITLE">
<style>
text {{ font: {char_height}px "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; }}
{styles}
</style>
<rect x="-10" y="-8" width="{width}" height="HEIGHT" rx="10" fill="#161b22"/>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="100%" height="100%"/></clipPath>{lines}</defs>
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
</svg>
"""


class Terminal:
    """A command in a terminal of its own, and what stands on its screen."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", **environment})
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    def read(self, wait_s: float) -> bool:
        """Take what was written within ``wait_s``. Returns False once the command has ended."""
        if not select.select([self._descriptor], [], [], wait_s)[0]:
            return True
        try:
            written = os.read(self._descriptor, 1 << 16)
        except OSError:  # how Linux tells that nobody holds the other end any more
            return False
        if b"\x1b[?1049l" in written:
            # Back from the second screen, which this renderer does not keep apart.
            self.screen.reset()
            written = written.partition(b"\x1b[?1049l")[2]
        # The renderer knows no faint text; grey is what terminals make of it.
        self._stream.feed(written.replace(b"\x1b[2m", b"\x1b[90m"))
        return bool(written)

    def settle(self) -> None:
        """Read until a look is drawn to its end: the next one is half a second away."""
        while select.select([self._descriptor], [], [], 0.15)[0] and self.read(0):
            pass

    def text(self) -> Text:
        """The screen with its colours, without the empty rows beneath."""
        shown = [line for line in self.screen.display if line.strip()]
        found = Text(no_wrap=True, end="")
        for row in range(len(shown)):
            cells = [self.screen.buffer[row][column] for column in range(COLUMNS)]
            for (color, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
                found.append("".join(cell.data for cell in run), style=Style(color=_color(color), bold=bold))
            found.append("\n")
        return found

    def close(self) -> None:
        """Wait for the command's end."""
        os.close(self._descriptor)
        os.waitpid(self.pid, 0)


def _color(name: str) -> str | None:
    """A colour as rich knows it."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("bright", "bright_").replace("brown", "yellow")


def write_svg(shown: Text, path: Path, title: str) -> None:
    """A screen as SVG, with no font or anything else from elsewhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(shown, end="")
    height = LINE_HEIGHT * len(shown.plain.splitlines()) + 16
    code_format = SVG.replace("TITLE", title).replace("HEIGHT", f"{height:.0f}")
    drawn = console.export_svg(theme=THEME, code_format=code_format, unique_id="t")
    path.write_text(drawn, encoding="utf-8")


async def booted(host: Host, name: str) -> None:
    """Wait until a guest has its memory."""

    async def probe() -> bool:
        return not (await host.guest(name))["booting"]

    await until(f"{name} booted", probe, 120.0)


async def watched(pair: Pair, directory: Path) -> dict[str, Any]:
    """A busy guest of 2 GiB migrates while `migratectl watch` runs. Writes both captures; returns the record."""
    await pair.a.create_guest("web", 2048, profile="busy", workload="random", dirty_rate_bytes_per_s=220 << 20)
    await booted(pair.a, "web")
    command = [sys.executable, "-c", "from migrated.cli.migratectl import main; main()", "watch"]
    terminal = Terminal(command, {"MIGRATED_SOCKET": str(pair.a.socket), "PYTHONPATH": str(ROOT)})
    identity = await pair.a.begin_migration("web", pair.b, downtime_limit=LIMIT_MS, max_bandwidth=300 << 20)
    await asyncio.to_thread(_capture, terminal, directory)
    return await pair.a.wait(identity)


def _capture(terminal: Terminal, directory: Path) -> None:
    deadline = time.monotonic() + WATCH_TIMEOUT_S
    taken = False
    while terminal.read(0.2) and time.monotonic() < deadline:
        rounds = re.search(r"active, round (\d+)", "\n".join(terminal.screen.display))
        if not taken and rounds and int(rounds[1]) > ROUNDS:
            terminal.settle()
            write_svg(terminal.text(), directory / "watch.svg", "migratectl watch during a migration")
            taken = True
    write_svg(terminal.text(), directory / "watch-end.svg", "what migratectl watch leaves behind")
    terminal.close()
    if not taken:
        print("the migration was over before there was anything to see; watch.svg is as it was", file=sys.stderr)


async def records(directory: Path) -> dict[str, dict[str, Any]]:
    """The migrations to show: completed over many rounds, one more with a wider limit, and one that was aborted."""
    with Pair() as pair:
        found = {"completed": await watched(pair, directory)}
        await pair.b.command("x-migrated-guest-destroy", {"guest": "web"})
        await pair.a.create_guest("web", 512, profile="busy", dirty_rate_bytes_per_s=50 << 20)
        await booted(pair.a, "web")
        found["quiet"] = await pair.a.migrate("web", pair.b, downtime_limit=300)
        await pair.b.command("x-migrated-guest-destroy", {"guest": "web"})
        await pair.a.create_guest("slow", 64, profile="slow-load")
        await booted(pair.a, "slow")
        found["aborted"] = await pair.a.migrate("slow", pair.b, downtime_limit=100, timeout_s=1, on_timeout="force")
    return found


def section(name: str, *, rows: int | None = None) -> str:
    """Script for the box of a section; with ``rows``, down to so many of its rows."""
    end = f"e.querySelectorAll('tr')[{rows}].getBoundingClientRect().bottom" if rows else "b.bottom"
    return f"""(() => {{ const e = document.querySelector("{name}"), b = e.getBoundingClientRect(), y = b.top + scrollY;
        return {{x: Math.max(0, b.left - 12), y: Math.max(0, y - 12), width: b.width + 24,
                 height: {end} - b.top + {12 if rows else 24}}} }})()"""


HEAD: Final = """(() => { const b = document.querySelector("#prediction").getBoundingClientRect();
    return {x: Math.max(0, b.left - 12), y: 0, width: b.width + 24, height: b.bottom + scrollY + 12} })()"""
NARROW: Final = "(() => ({x: 0, y: 0, width: innerWidth, height: 1150}))()"
SHOTS: Final = (
    ("report-head", "completed", 1100, "light", HEAD),
    ("report-downtime", "completed", 1100, "dark", section("#downtime")),
    ("report-rounds", "completed", 1100, "light", section("#rounds", rows=6)),
    ("report-narrow", "completed", 390, "dark", NARROW),
    ("report-aborted", "aborted", 1100, "light", HEAD),
    ("report-comparison", "comparison", 1100, "light", section("#downtime")),
)
"""Name of the picture, page, width of the window, colour scheme, and what of the page."""
COLORS: Final = 256


def shoot(found: dict[str, dict[str, Any]], pages: Path, directory: Path) -> None:
    """Write the reports and their pictures."""
    for name, record in found.items():
        (pages / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
        write_report(record, pages / f"{name}.html")
    write_comparison(found["completed"], found["quiet"], pages / "comparison.html")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            browser.call("Emulation.setScrollbarsHidden", hidden=True)
            for name, page, width, scheme, box in SHOTS:
                browser.open(pages / f"{page}.html", width=width, scheme=scheme)
                path = directory / f"{name}.png"
                browser.picture(path, browser.value(box))
                with Image.open(path) as taken:
                    few = taken.convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                few.save(path, optimize=True)
        finally:
            browser.close()


def main(arguments: list[str] | None = None) -> int:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description="The pictures in the documentation, from real migrations.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images", help="directory [docs/images]")
    parser.add_argument("--keep", action="store_true", help="leave the pages and the records there too")
    parser.add_argument("--records", type=Path, help="directory of a former --keep: only the reports, from its records")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.records:
        found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in options.records.glob("*.json")}
    else:
        found = asyncio.run(records(options.output))
    with tempfile.TemporaryDirectory() as temporary:
        shoot(found, options.output if options.keep else Path(temporary), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
