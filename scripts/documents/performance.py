"""Puts the result of a benchmark into docs/performance.md and docs/images/throughput.svg.

BENCH_OUT=bench.json make bench && python -m scripts.documents.performance bench.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from scripts.basics import ROOT
from scripts.bench.plot import plot

DOCS: Final = ROOT / "docs"
DOCUMENT: Final = DOCS / "performance.md"
PLOT: Final = DOCS / "images" / "throughput.svg"
BEGIN: Final = "<!-- figures begin -->"
END: Final = "<!-- figures end -->"

RATIO_TARGETS: Final = {
    "random/raw": ("at least", 0.85),
    "random/qemu": ("at least", 1.5),
    "random/qemu-multifd": ("at least", 1.2),
    "zero/qemu-zero": ("at least", 8.0),
    "sparse/touched": ("at most", 1.5),
    "scattered/random": ("at least", 0.5),
    "plain-capped/delta-capped": ("at least", 5.0),
}
HUGE_RATIO_TARGETS: Final = {
    "random/raw": ("at least", 0.85),
    "random/qemu": ("at least", 3.0),
    "random/qemu-multifd": ("at least", 2.5),
}
CASE_TARGETS: Final = {"final-round": ("median", 25.0), "downtime-idle": ("p50", 6.0), "loop-lag": ("p99", 2.0)}
P99_TARGETS: Final = {"downtime-idle": 20.0}


def figure(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def met(bound: str, wanted: float, value: float) -> str:
    """Whether a figure is as wanted, as a word."""
    return "yes" if (value >= wanted if bound == "at least" else value <= wanted) else "**no**"


def case_rows(block: dict[str, Any]) -> list[str]:
    """The table of cases."""
    rows = ["| case | median | lowest | highest | unit |", "|---|---|---|---|---|"]
    for case in block["cases"]:
        samples = case["samples"]
        cells = [figure(case["median"]), figure(min(samples)), figure(max(samples)), case["unit"]]
        rows.append(f"| `{case['name']}` | {' | '.join(cells)} |")
    return rows


def ratio_rows(block: dict[str, Any], targets: dict[str, tuple[str, float]]) -> list[str]:
    """The table of ratios."""
    rows = ["| ratio | figure | wanted | met |", "|---|---|---|---|"]
    for name, value in block["ratios"].items():
        target = targets.get(name)
        judged = f"{target[0]} {target[1]:g} | {met(*target, value)}" if target else " | "
        rows.append(f"| `{name}` | {figure(value)} | {judged} |")
    return rows


def time_rows(block: dict[str, Any]) -> list[str]:
    """The table of what is wanted in milliseconds."""
    cases = {case["name"]: case for case in block["cases"]}
    rows = ["| time | figure (ms) | wanted at most | met |", "|---|---|---|---|"]
    wanted = [(name, which, limit) for name, (which, limit) in CASE_TARGETS.items()]
    wanted += [(name, "p99", limit) for name, limit in P99_TARGETS.items()]
    for name, which, limit in wanted:
        if name in cases and which in cases[name]:
            value = cases[name][which]
            rows.append(f"| `{name}` {which} | {figure(value)} | {limit:g} | {met('at most', limit, value)} |")
    return rows


def figures(result: dict[str, Any]) -> str:
    """The block of the document."""
    machine = result["machine"]
    heading = (
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_mib']} MiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; {result['size_mib']} MiB per bulk case, {result['repeats']} repetitions, load "
        f"{machine['load_at_start']:.1f} at the start."
    )
    lines = [
        heading,
        "",
        *case_rows(result),
        "",
        *ratio_rows(result, RATIO_TARGETS),
        "",
        *time_rows(result),
    ]
    if huge := result.get("with_huge_pages"):
        lines += ["", "With huge pages for shared memory (`shmem_enabled` = `advise`):", "", *case_rows(huge), ""]
        lines += ratio_rows(huge, HUGE_RATIO_TARGETS)
    lines += [f"\nLeft out: `{name}`: {reason}." for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    """Refresh both files."""
    result = json.loads(Path(sys.argv[1]).read_text())
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{figures(result)}\n\n{END}{after}")
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(plot(result))


if __name__ == "__main__":
    main()
