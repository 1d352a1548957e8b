"""The result of a benchmark: its rows, their ratios, and both as a document and as a table."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from protocol.guest import PAGE_SIZE
from scripts.basics import MIB

SHMEM_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
"""The host's setting for huge pages of shared memory."""
RATIOS: Final = (
    ("random", "raw"),
    ("random", "iperf3"),
    ("random", "qemu"),
    ("random", "qemu-multifd"),
    ("zero", "qemu-zero"),
    ("sparse", "touched"),
    ("scattered", "random"),
    ("plain-capped", "delta-capped"),
)

CPU_CASES: Final = ("raw", "random", "qemu", "zero", "scattered")
"""Cases whose processor time is shown."""
CPU_SIDES: Final = ("source_s_per_gib", "destination_s_per_gib")


@dataclass(slots=True)
class Case:
    """One row of the result."""

    name: str
    unit: str
    samples: list[float] = field(default_factory=list)
    details: dict[str, list[float]] = field(default_factory=dict)
    """Further figures of the same samples, by name."""

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)

    def note(self, **figures: float) -> None:
        """Keep further figures of a sample."""
        for name, value in figures.items():
            self.details.setdefault(name, []).append(value)

    def document(self) -> dict[str, Any]:
        """As the result shows it."""
        document: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "samples": self.samples,
            "median": self.median,
        }
        if len(self.samples) >= 20:
            document |= {
                "p50": quantile(self.samples, 0.5),
                "p99": quantile(self.samples, 0.99),
                "max": max(self.samples),
            }
        return document | ({"details": self.details} if self.details else {})


def quantile(samples: list[float], q: float) -> float:
    """The smallest sample that at least a share of ``q`` does not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, int(np.ceil(q * len(ordered))) - 1))]


def ratios_of(cases: dict[str, Case]) -> dict[str, float]:
    """Ratios of medians, as far as both cases ran."""
    return {
        f"{mine}/{other}": round(cases[mine].median / cases[other].median, 3)
        for mine, other in RATIOS
        if mine in cases and other in cases
    }


def cpu_of(cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    """Processor time (user and system, s/GiB) of each side, medians, by case."""
    return {
        name: {side: round(statistics.median(cases[name].details[side]), 3) for side in CPU_SIDES}
        for name in CPU_CASES
        if name in cases
    }


def block(cases: dict[str, Case], rss_mib: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Cases, ratios, processor time, tracking and memory as the result shows them."""
    found: dict[str, Any] = {
        "cases": [case.document() for case in cases.values()], "ratios": ratios_of(cases), "cpu": cpu_of(cases)
    }  # fmt: skip
    if "tracking" in cases:
        found["tracking"] = {"reported_per_written": round(cases["tracking"].median, 4)}
    if rss_mib:
        found["rss_mib"] = {
            guest: {side: round(mib, 1) for side, mib in peak.items()} for guest, peak in rss_mib.items()
        }
    return found


def table(cases: dict[str, Case], rss_mib: dict[str, dict[str, float]]) -> str:
    """For people."""
    rows = [f"{'case':15} {'median':>10} {'min':>10} {'max':>10}  unit"]
    for case in cases.values():
        tail = f"   p99 {quantile(case.samples, 0.99):.3g}" if len(case.samples) >= 20 else ""
        low, high = min(case.samples), max(case.samples)
        rows.append(f"{case.name:15} {case.median:10.3g} {low:10.3g} {high:10.3g}  {case.unit}{tail}")
    rows += [f"{name:31} {value:.3g}" for name, value in ratios_of(cases).items()]
    if cpu := cpu_of(cases):
        rows.append(f"{'CPU s/GiB':15} {'source':>10} {'dest.':>10} {'sum':>10}")
        rows += [f"{name:15} {a:10.3f} {b:10.3f} {a + b:10.3f}" for name, (a, b) in _sides(cpu)]
    if rss_mib:
        rows.append(f"{'own MiB, peak':15} {'source':>10} {'dest.':>10}")
        rows += [f"{name:15} {a:10.1f} {b:10.1f}" for name, (a, b) in _sides(rss_mib)]
    return "\n".join(rows)


def _sides(figures: dict[str, dict[str, float]]) -> list[tuple[str, list[float]]]:
    """Both sides' figures, the source's first, by name."""
    return [(name, list(sides.values())) for name, sides in figures.items()]


def machine() -> dict[str, Any]:
    """Return the machine and versions that the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE // MIB,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "shmem_enabled": SHMEM_HUGE.read_text().strip() if SHMEM_HUGE.exists() else None,
        "load_at_start": os.getloadavg()[0],
    }
