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
    "random/qemu": ("at least", 2.0),
    "random/qemu-multifd": ("at least", 1.6),
    "zero/qemu-zero": ("at least", 8.0),
    "sparse/touched": ("at most", 1.5),
    "scattered/random": ("at least", 0.6),
    "plain-capped/delta-capped": ("at least", 5.0),
}
HUGE_RATIO_TARGETS: Final = {
    "random/qemu": ("at least", 3.0),
    "random/qemu-multifd": ("at least", 2.5),
}
CPU_TARGET: Final = 1.25
HUGE_CPU_TARGET: Final = 1.5
"""Most processor time for random memory, both sides, as a multiple of what the bare pair takes."""
TRACKING_TARGET: Final = 1.2
LINK_TARGET_PERCENT: Final = 95.0
LINKS: Final = ("link-1gbit", "link-5gbit")
CASE_TARGETS: Final = {"final-round": ("median", 12.0), "downtime-idle": ("p50", 4.0)}
P99_TARGETS: Final = {"downtime-idle": 10.0}
LOOP_LAG_MS: Final = 2.0
LOOP_LAG_RATIO: Final = 1.3
"""The control socket may answer this much later than a bare process wakes up, p99, where that is more."""


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
    if all(name in cases and "p99" in cases[name] for name in ("loop-lag", "bare-wake")):
        value = cases["loop-lag"]["p99"]
        limit = max(LOOP_LAG_MS, LOOP_LAG_RATIO * cases["bare-wake"]["p99"])
        rows.append(f"| `loop-lag` p99 | {figure(value)} | {figure(limit)} | {met('at most', limit, value)} |")
    return rows


def cpu_rows(block: dict[str, Any], most: float, size_gib: float) -> list[str]:
    """The table of processor time, with what random memory takes beside the bare pair."""
    sums = {name: sum(sides.values()) for name, sides in block["cpu"].items()}
    rows = ["| CPU s/GiB | source | destination | sum |", "|---|---|---|---|"]
    for name, sides in block["cpu"].items():
        cells = [figure(seconds) for seconds in (*sides.values(), sums[name])]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    if "raw" in sums and "random" in sums:
        ratio = sums["random"] / sums["raw"]
        rows += [
            "",
            f"random/raw in processor time: {figure(ratio)}, wanted at most {most:g}: {met('at most', most, ratio)}.",
        ]
        small = [case["median"] for case in block["cases"] if case["name"] == "small-move"]
        rows += [
            f"Of it {figure(fixed_s)} s are what any move takes (`small-move`); without them "
            f"{figure((sums['random'] - fixed_s / size_gib) / sums['raw'])}."
            for fixed_s in small
        ]
    return rows


def further_rows(block: dict[str, Any]) -> list[str]:
    """Exactness of tracking, use of shaped links, and memory of the daemons."""
    cases = {case["name"]: case for case in block["cases"]}
    lines: list[str] = []
    if tracking := block.get("tracking"):
        value = tracking["reported_per_written"]
        verdict = met("at most", TRACKING_TARGET, value)
        lines.append(
            f"- Pages reported for each page written: {value:.3f}, wanted at most {TRACKING_TARGET:g}: {verdict}."
        )
    for name in LINKS:
        if name in cases:
            value = cases[name]["median"]
            verdict = met("at least", LINK_TARGET_PERCENT, value)
            lines.append(f"- `{name}`: {value:.1f} % of the link, wanted at least {LINK_TARGET_PERCENT:g}: {verdict}.")
    for guest, peak in block.get("rss_mib", {}).items():
        lines.append(
            f"- Memory of the daemons' own, guest {guest}: source {peak['source']:.0f} MiB, destination "
            f"{peak['destination']:.0f} MiB at most."
        )
    return lines


def figures(result: dict[str, Any]) -> str:
    """The block of the document."""
    machine, size_gib = result["machine"], result["size_mib"] / 1024
    heading = (
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_mib']} MiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; {result['size_mib']} MiB per bulk case, {result['repeats']} repetitions, load "
        f"{machine['load_at_start']:.1f} at the start."
    )
    lines = [
        heading,
        "",
        *cpu_rows(result, CPU_TARGET, size_gib),
        "",
        *case_rows(result),
        "",
        *ratio_rows(result, RATIO_TARGETS),
        "",
        *time_rows(result),
        "",
        *further_rows(result),
    ]
    if huge := result.get("with_huge_pages"):
        lines += ["", "With huge pages for shared memory (`shmem_enabled` = `advise`):", ""]
        lines += [*cpu_rows(huge, HUGE_CPU_TARGET, size_gib), "", *case_rows(huge), ""]
        lines += [*ratio_rows(huge, HUGE_RATIO_TARGETS), ""]
        lines += further_rows(huge)
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
