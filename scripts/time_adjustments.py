"""The adjustment of guest time in one migration, in the columns and rows of Propolis' ``time-adjustments.d``.

Reads the record of an attempt from a file (``-`` for standard input), or asks the daemon for a MIGRATION_ID. The row
Propolis is our daemon, the row Kernel our VMM. A row holds the values before the stage's adjustment has been made, its
adjustment follows. The adjustment is computed again from the record; what differs is printed as ERROR lines. Exit
status: 0 done, 1 no usable record or an ERROR line, else what ``migratectl`` said.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt

from protocol.guest_time import I64_MIN, U64_MAX, TimeAdjustError, TimeStage, VmTimeData, adjust_time_data
from scripts.live_migration_times import NS_PER_US, RecordError, arguments, load_record


def _wrap_i64(value: int) -> int:
    return ((value - I64_MIN) & U64_MAX) + I64_MIN


class TimeSummary(BaseModel):
    """The members of the record's ``time`` that this table shows."""

    before: VmTimeData
    after: VmTimeData
    guest_uptime_ns: NonNegativeInt
    elapsed_ns: NonNegativeInt | None = None
    stages: list[TimeStage] = Field(default_factory=list)

    def elapsed(self) -> int:
        """The elapsed time in use (ns); a record that does not state it implies it by both uptimes."""
        if self.elapsed_ns is not None:
            return self.elapsed_ns
        return self.after.hrtime - self.after.boot_hrtime - (self.before.hrtime - self.before.boot_hrtime)

    def durations(self) -> tuple[int, int, int]:
        """Nanoseconds of the stages migration, daemon and vmm."""
        spent = {stage.name: stage.ns for stage in self.stages}
        return spent.get("migration", self.elapsed()), spent.get("daemon", 0), spent.get("vmm", 0)

    def clocks(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(guest TSC, boot_hrtime) as exported, as the daemon imported them, and as the VMM left them."""
        tsc, boot = self.after.guest_tsc, self.after.boot_hrtime
        for stage in self.stages:
            if stage.name == "vmm":
                tsc, boot = (tsc + stage.tsc_delta) & U64_MAX, _wrap_i64(boot + stage.boot_hrtime_delta)
        return (
            (self.before.guest_tsc, self.before.boot_hrtime),
            (self.after.guest_tsc, self.after.boot_hrtime),
            (tsc, boot),
        )

    def adjustments(self) -> list[tuple[int, int]]:
        """(guest TSC, boot_hrtime) changes between these three, as 64-bit differences."""
        start, daemon, vmm = self.clocks()
        return [((b[0] - a[0]) & U64_MAX, _wrap_i64(b[1] - a[1])) for a, b in ((start, daemon), (daemon, vmm))]

    def errors(self) -> list[str]:
        """Where the imported time data is not what the record's own figures give."""
        try:
            computed = adjust_time_data(
                self.before,
                destination_hrtime=self.after.hrtime,
                destination_wall=(self.after.hres_sec, self.after.hres_ns),
                elapsed_ns=self.elapsed(),
            ).adjusted
        except TimeAdjustError as error:
            return [f"ERROR: the adjustment cannot be computed again: {error.name}: {error}"]
        return [
            line
            for label, field in (
                ("guest TSC", "guest_tsc"),
                ("guest freq", "guest_freq"),
                ("boot_hrtime", "boot_hrtime"),
            )
            if getattr(computed, field) != getattr(self.after, field)
            for line in (
                f"ERROR: computed and imported {label} differ",
                f"computed_val = {getattr(computed, field)}, imported_val = {getattr(self.after, field)}",
            )
        ]

    def table(self) -> str:
        """The text of the original's output."""
        uptime_us, total_us = self.guest_uptime_ns // NS_PER_US, sum(self.durations()) // NS_PER_US
        lines = [
            *self.errors(),
            f"{'GUEST FREQ (Hz)':>15} {'UPTIME (usec)':>20} {'TOTAL TIME (usec)':>20}",
            f"{self.before.guest_freq:>15} {uptime_us:>20} {total_us:>20}",
            "",
            f"{'EVENT':<10} {'DURATION (usec)':>20} {'GUEST TSC':>20} {'BOOT HRTIME':>20}",
        ]
        events = [
            f"{name:<10} {ns // NS_PER_US:>20} {tsc:>20} {boot:>20}"
            for name, ns, (tsc, boot) in zip(
                ("Migration", "Propolis", "Kernel"), self.durations(), self.clocks(), strict=True
            )
        ]
        changes = [f"{'[adjustment]':<30}  {tsc:>20} {boot:>20}" for tsc, boot in self.adjustments()]
        return "\n".join([*lines, events[0], changes[0], events[1], changes[1], events[2]])

    def document(self) -> dict[str, Any]:
        """The same figures for programs, times in ns."""
        return {
            "guest_freq": self.before.guest_freq,
            "guest_uptime_ns": self.guest_uptime_ns,
            "total_ns": sum(self.durations()),
            "events": [
                {"name": name, "ns": ns, "guest_tsc": tsc, "boot_hrtime": boot}
                for name, ns, (tsc, boot) in zip(
                    ("migration", "daemon", "vmm"), self.durations(), self.clocks(), strict=True
                )
            ],
            "adjustments": [{"guest_tsc": tsc, "boot_hrtime": boot} for tsc, boot in self.adjustments()],
            "errors": self.errors(),
        }


class TimeRecord(BaseModel):
    """The part of a record that is read here; ``time`` is null when the attempt ended before the time data."""

    time: TimeSummary | None


def main() -> int:
    """Print the table; returns the exit status."""
    options = arguments("Adjustment of guest time, as Propolis' time-adjustments.d prints it.").parse_args()
    try:
        summary = load_record(options.record, options.socket, TimeRecord).time
        if summary is None:
            raise RecordError(f"{options.record} holds no time data: the attempt ended before guest time was carried.")
    except RecordError as error:
        print(error, file=sys.stderr)
        return error.status
    print(json.dumps(summary.document()) if options.json else summary.table())
    return 1 if summary.errors() else 0


if __name__ == "__main__":
    sys.exit(main())
