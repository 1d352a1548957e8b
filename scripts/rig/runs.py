"""Did two copies of a guest ever run? Every process of a guest writes when it began and stopped running, and at which
step; here these run logs are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RunInterval:
    """One stretch of running of one guest process (CLOCK_MONOTONIC, ns); ``end_step`` is None when it was killed."""

    host: str
    pid: int
    begin_ns: int
    begin_step: int
    end_ns: int | None
    end_step: int | None


def run_intervals(host: str, entries: Iterable[dict[str, Any]], deaths: dict[int, int]) -> list[RunInterval]:
    """The stretches of running in one run log.

    Args:
        deaths: when processes that could not write their end were gone.
    """
    found: list[RunInterval] = []
    open_runs: dict[int, dict[str, Any]] = {}
    for entry in entries:
        pid = entry["pid"]
        begun = open_runs.pop(pid, None)
        if begun is not None:
            found.append(
                RunInterval(host, pid, begun["monotonic_ns"], begun["step"], entry["monotonic_ns"], entry["step"])
            )
        if entry["event"] == "run":
            open_runs[pid] = entry
    for pid, begun in open_runs.items():
        found.append(RunInterval(host, pid, begun["monotonic_ns"], begun["step"], deaths.get(pid), None))
    return found


def check_runs(logs: dict[str, list[dict[str, Any]]], deaths: dict[int, int]) -> list[str]:
    """Compare the run logs of all processes of one guest: no two may run at once, and each must go on at the step at
    which the one before it stopped."""
    runs = sorted(
        (run for host, entries in logs.items() for run in run_intervals(host, entries, deaths)),
        key=lambda run: run.begin_ns,
    )
    found: list[str] = []
    longest: RunInterval | None = None  # of those that began before: the one that ended last
    for earlier, later in zip([None, *runs], runs, strict=False):
        if longest is not None and (longest.end_ns is None or longest.end_ns > later.begin_ns):
            found.append(f"two copies ran at once: {longest} and {later}")
        elif earlier is not None and earlier.end_step is not None and earlier.end_step != later.begin_step:
            found.append(f"steps were lost or repeated: {earlier} and then {later}")
        if longest is None or (longest.end_ns is not None and (later.end_ns is None or later.end_ns > longest.end_ns)):
            longest = later
    return found
