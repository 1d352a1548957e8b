"""Phase times and memory traffic of one migration, in the columns of Propolis' ``live-migration-times.d``.

Reads the record of an attempt from a file (``-`` for standard input), or asks the daemon for a MIGRATION_ID. Times are
microseconds, truncated; TOTAL adds the nanoseconds and divides then, so it can exceed the sum of the rows. Phases that
took no time are left out. Exit status: 0 done, 1 no usable record, else what ``migratectl`` said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

NS_PER_US: Final = 1_000
NS_PER_SEC: Final = 1_000_000_000
PHASES: Final = (
    "Sync",
    "RamPushPrePause",
    "Pause",
    "RamPushPostPause",
    "TimeData",
    "DeviceState",
    "RamPull",
    "ServerState",
    "Finish",
)

Model = TypeVar("Model", bound=BaseModel)


class RecordError(Exception):
    """A record that cannot be had or read; ``status`` is the exit status to leave with."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line that both reading aids share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("record", metavar="RECORD|MIGRATION_ID", help="record as a JSON file, - for standard input")
    parser.add_argument("--socket", help="control socket of the daemon to ask for a MIGRATION_ID")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def load_record(record: str, socket: str | None, kind: type[Model]) -> Model:
    """Read the members that ``kind`` names from the record in file ``record``, or of the attempt with this id.

    Raises :class:`RecordError`.
    """
    try:
        if record == "-":
            text = sys.stdin.read()
        elif Path(record).is_file():
            text = Path(record).read_text(encoding="utf-8")
        else:
            text = _ask_daemon(record, socket)
        return kind.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top"
        raise RecordError(f"{record} is not the record of a migration: at {place}: {first['msg']}.") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{record} is not a JSON document: {error}.") from None
    except OSError as error:
        raise RecordError(f"{record} cannot be read: {error.strerror}.") from None


def _ask_daemon(migration_id: str, socket: str | None) -> str:
    beside_us = os.path.dirname(sys.executable)
    migratectl = shutil.which("migratectl", path=os.pathsep.join([beside_us, os.environ.get("PATH", os.defpath)]))
    if migratectl is None:
        raise RecordError(f"There is no file {migration_id}, and no migratectl on the PATH to ask for an attempt.")
    where = ["--socket", socket] if socket else []
    done = subprocess.run(
        [migratectl, *where, "--json", "show", "--", migration_id], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RecordError(done.stderr.strip() or f"migratectl cannot show {migration_id}.", done.returncode)
    return done.stdout


class Phase(BaseModel):
    """One phase of the record; a time is null when that end of it was never reached."""

    name: str
    begin_ns: int | None
    end_ns: int | None


class Ram(BaseModel):
    """The memory traffic of the record, before the stop (precopy) and during it (downtime)."""

    page_size: PositiveInt
    normal_pages: NonNegativeInt
    precopy_bytes: NonNegativeInt
    downtime_bytes: NonNegativeInt
    precopy_pages: NonNegativeInt | None = None
    downtime_pages: NonNegativeInt | None = None

    def pages(self) -> tuple[int, int]:
        """Pages moved before and during the stop; a record without these counts is split by its bytes."""
        if self.precopy_pages is not None and self.downtime_pages is not None:
            return self.precopy_pages, self.downtime_pages
        paused = min(self.normal_pages, self.downtime_bytes // self.page_size)
        return self.normal_pages - paused, paused


class MigrationTimes(BaseModel):
    """The members of a record that this table shows."""

    phases: list[Phase]
    ram: Ram | None = None

    def unmeasured(self) -> list[str]:
        """Names of the phases that ended without a begin."""
        return [phase.name for phase in self.phases if phase.begin_ns is None and phase.end_ns is not None]

    def durations(self) -> dict[str, int]:
        """Nanoseconds of each of Propolis' phases that took any, in Propolis' order."""
        spent = dict.fromkeys(PHASES, 0)
        for phase in self.phases:
            if phase.begin_ns is not None and phase.end_ns is not None and phase.name in spent:
                spent[phase.name] += phase.end_ns - phase.begin_ns
        return {name: ns for name, ns in spent.items() if ns}

    def marks(self) -> list[tuple[int, str, str]]:
        """(ns, phase, BEGIN or END) in the order of time, and of the record at one instant."""
        marks = [
            (phase, ns, mark)
            for phase in self.phases
            for ns, mark in ((phase.begin_ns, "BEGIN"), (phase.end_ns, "END"))
        ]
        return sorted(((ns, phase.name, mark) for phase, ns, mark in marks if ns is not None), key=lambda mark: mark[0])

    def traffic(self) -> list[tuple[str, int]]:
        """The rows on memory: label and figure, none when no page moved."""
        if self.ram is None or not sum(self.ram.pages()):
            return []
        spent = self.durations()
        sizes = (self.ram.precopy_bytes, self.ram.downtime_bytes)
        rows = [("NPAGES XFERED (total)", sum(self.ram.pages())), ("NBYTES XFERED (total)", sum(sizes))]
        for state, phase, pages, size in zip(
            ("unpaused", "paused"), ("RamPushPrePause", "RamPushPostPause"), self.ram.pages(), sizes, strict=True
        ):
            rows += [(f"NPAGES XFERED ({state})", pages), (f"NBYTES XFERED ({state})", size)]
            if size and phase in spent:
                rows.append((f"KiB/SEC ({state})", size * NS_PER_SEC // spent[phase] // 1024))
        return rows

    def table(self, verbose: bool) -> str:
        """The text of the original's output."""
        lines = []
        if verbose:
            lines.append(f"{'PHASE':<12} {'':<10} {'TIMESTAMP':>30}")
            lines += [f"{name:<12} {mark:<10} {ns:>30}" for ns, name, mark in self.marks()]
        lines += [f'WARNING: phase "{name}" could not be measured' for name in self.unmeasured()]
        if lines:
            lines += ["", ""]
        lines.append(f"{'PHASE':<15} {'TIME ELAPSED (usec)':>30}")
        lines += [f"{name:<16} {ns // NS_PER_US:>29}" for name, ns in self.durations().items()]
        lines += [f"{'TOTAL':<15} {sum(self.durations().values()) // NS_PER_US:>30}", ""]
        lines += [f"{label:<25} {figure:>20}" for label, figure in self.traffic()]
        return "\n".join(lines).rstrip("\n")

    def document(self) -> dict[str, Any]:
        """The same figures for programs, times in ns."""
        return {
            "phases": [{"name": name, "ns": ns} for name, ns in self.durations().items()],
            "total_ns": sum(self.durations().values()),
            "ram": dict(self.traffic()),
            "unmeasured": self.unmeasured(),
        }


def main() -> int:
    """Print the table; returns the exit status."""
    parser = arguments("Phase times of one migration, as Propolis' live-migration-times.d prints them.")
    parser.add_argument("-v", "--verbose", action="store_true", help="begin and end of every phase as well")
    options = parser.parse_args()
    try:
        times = load_record(options.record, options.socket, MigrationTimes)
    except RecordError as error:
        print(error, file=sys.stderr)
        return error.status
    print(json.dumps(times.document()) if options.json else times.table(options.verbose))
    return 0


if __name__ == "__main__":
    sys.exit(main())
