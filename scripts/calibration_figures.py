"""Figures of the prediction campaign from its attempts: errors, coverage, wrong refusals, cells, goals, and the same of
simpler predictors; and two plots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from scripts.calibration_records import Outcome

MS: Final = 1_000_000
ENOUGH_FOR_A_CELL: Final = 12


BASELINES: Final[dict[str, Callable[[dict[str, Any], float], float]]] = {
    # QEMU: remaining bytes over the bandwidth of the last window, nothing else.
    "qemu": lambda record, _fixed: _remaining(record) / max(1.0, record["rounds"][-1]["bandwidth_bytes_per_s"]) * 1e9,
    # KubeVirt: the same with a smoothed bandwidth.
    "smoothed": lambda record, _fixed: _remaining(record) / max(1.0, _smoothed(record)) * 1e9,
    # Cloud Hypervisor: the last bandwidth, and a fixed part (here the median of the training, which flatters it).
    "cloud-hypervisor-fixed": lambda record, fixed: (
        _remaining(record) / max(1.0, record["rounds"][-1]["bandwidth_bytes_per_s"]) * 1e9 + fixed
    ),
    # Geometric: what the dirty rate leaves of the last round.
    "dirty-rate-ratio": lambda record, _fixed: (
        record["rounds"][-1]["dirty_rate_pages_per_s"]
        * 4096
        / max(1.0, record["rounds"][-1]["bandwidth_bytes_per_s"])
        * record["rounds"][-1]["ns"]
    ),
}


def _remaining(record: dict[str, Any]) -> float:
    return float(record["rounds"][-1]["dirty_pages"] * 4096)


def _smoothed(record: dict[str, Any]) -> float:
    rate = 0.0
    for row in record["rounds"]:
        rate = row["bandwidth_bytes_per_s"] if not rate else 0.6 * rate + 0.4 * row["bandwidth_bytes_per_s"]
    return rate


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share, in percent."""
    if not total:
        return 0.0, 100.0
    z, share = 1.96, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return round(100 * (centre - half), 1), round(100 * (centre + half), 1)


def percent(part: int, whole: int) -> float:
    """A share in percent, 0 of nothing."""
    return round(100 * part / whole, 2) if whole else 0.0


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that the campaign shows. Training only serves the predictor that needs a fixed part."""
    counted = [o for o in outcomes if o.part != "training"]
    seen = [o for o in counted if o.actual_ns is not None]
    stops = [o for o in counted if o.record["downtime"] is not None]
    gated = [o for o in stops if not o.forced]
    late = [o for o in gated if o.record["outcome"] == "completed" and o.record["downtime"]["limit_violated"]]
    aborted = [o for o in gated if o.record["outcome"] == "aborted"]
    in_a_row = sum(
        a.subject == b.subject and a.record["outcome"] == b.record["outcome"] == "aborted"
        for a, b in _consecutive(gated)
    )
    cells = by_cell(counted)
    return {
        "migrations": len(counted),
        "stops": len(stops),
        **_summary(seen),
        "late_pct": percent(len(late), len(gated)),
        "abort_pct": percent(len(aborted), len(gated)),
        "aborts_in_a_row": in_a_row,
        **_refusals(seen),
        "first_time_coverage_pct": _summary([o for o in seen if o.first])["coverage_pct"],
        "first_ever": _summary([o for o in seen if o.first_ever]) | _refusals([o for o in seen if o.first_ever]),
        "trained": _summary([o for o in seen if o.part == "counted"]),
        "busy_host": _summary([o for o in seen if "busy-host" in o.record["downtime"]["predicted_regime"]]),
        "quiet_host": _summary([o for o in seen if "quiet-host" in o.record["downtime"]["predicted_regime"]]),
        "load": {
            "median": _median([o.load for o in counted]),
            "most": round(max((o.load for o in counted), default=0), 2),
        },
        "cells": cells,
        "thin_cells": [name for name, row in cells.items() if row["switchovers"] < ENOUGH_FOR_A_CELL],
        "goals": goals(gated),
        "outcomes": Counter(o.record["outcome"] for o in counted),
        "late": [_explain(o) for o in late],
        "aborted": [_explain(o) for o in aborted],
        "baselines": _baselines(outcomes, seen),
    }


def _summary(seen: Sequence[Outcome]) -> dict[str, Any]:
    """How predictions and bounds of completed switchovers held; figures of nothing are None."""
    rows = [_row(outcome) for outcome in seen]
    held = sum(actual <= upper for _, upper, actual in rows)
    return {
        "switchovers": len(rows),
        "held": held,
        "coverage_pct": percent(held, len(rows)),
        "coverage_ci": list(wilson(held, len(rows))),
        "median_error_pct": _median([100 * abs(predicted - actual) / actual for predicted, _, actual in rows]),
        "median_error_ms": _median([abs(predicted - actual) / MS for predicted, _, actual in rows], 3),
        "bound_over_truth": _median([upper / actual for _, upper, actual in rows], 3),
    }


def _row(outcome: Outcome) -> tuple[int, int, int]:
    """Predicted, bound and actual downtime of a switchover that was seen through (ns)."""
    downtime = outcome.record["downtime"]
    return downtime["predicted_ns"], downtime["predicted_upper_ns"], downtime["measured_ns"]


def _refusals(seen: Sequence[Outcome]) -> dict[str, Any]:
    """Forced attempts that stayed inside their limit although their bound did not: they would have been refused
    wrongly."""
    forced = [o for o in seen if o.forced]
    refused = [o for o in forced if o.record["downtime"]["predicted_upper_ns"] >= o.limit_ms * MS]
    wrongly = [o for o in refused if o.record["downtime"]["measured_ns"] < o.limit_ms * MS]
    return {
        "forced": len(forced),
        "would_refuse": len(refused),
        "wrong_refusal_pct": percent(len(wrongly), len(forced)),
        "wrong_refusals": [_explain(o) for o in wrongly],
    }


def by_cell(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """How the bound held in every cell that saw a switchover."""
    cells: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.actual_ns is not None:
            cells.setdefault(outcome.cell, []).append(outcome)
    return {name: _summary(seen) | {"load": _median([o.load for o in seen])} for name, seen in cells.items()}


def goals(gated: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Median downtime and total time with each ``downtime_goal``, in the cells that were moved with more than one, and
    the same of ``least`` over ``first-fit``."""
    found: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in gated:
        if outcome.actual_ns is not None:
            found.setdefault(outcome.cell, {}).setdefault(outcome.goal, []).append(outcome)
    return {cell: _compared(of_goal) for cell, of_goal in found.items() if len(of_goal) > 1}


def _compared(of_goal: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        goal: {
            "switchovers": len(seen),
            "downtime_ms": _median([o.record["downtime"]["measured_ns"] / MS for o in seen], 3),
            "total_ms": _median([o.record["total_ns"] / MS for o in seen], 1),
        }
        for goal, seen in of_goal.items()
    }
    ratios = {
        f"{what}_ratio": round(rows["least"][f"{what}_ms"] / rows["first-fit"][f"{what}_ms"], 3)
        for what in ("downtime", "total")
    }
    return rows | ratios


def _baselines(outcomes: Sequence[Outcome], seen: Sequence[Outcome]) -> dict[str, Any]:
    fixed = _fixed_part([o for o in outcomes if o.part == "training"])
    found = {}
    for name, predict in BASELINES.items():
        pairs = [(predict(o.record, fixed), o.record["downtime"]["measured_ns"]) for o in seen if o.record["rounds"]]
        found[name] = {
            "median_error_pct": _median([100 * abs(p - a) / a for p, a in pairs]),
            "median_error_ms": _median([abs(p - a) / MS for p, a in pairs], 3),
        }
    return found


def _median(values: Sequence[float], digits: int = 2) -> float | None:
    return round(median(values), digits) if values else None


def _fixed_part(training: list[Outcome]) -> float:
    """Return the part of a training downtime that is not memory (median, ns)."""
    rests = [
        actual - BASELINES["qemu"](outcome.record, 0.0)
        for outcome in training
        if (actual := outcome.actual_ns) is not None and outcome.record["rounds"]
    ]
    return max(0.0, median(rests)) if rests else 0.0


def _consecutive(outcomes: list[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Attempts of the same guest that followed each other."""
    last: dict[str, Outcome] = {}
    pairs = []
    for outcome in outcomes:
        if outcome.subject in last:
            pairs.append((last[outcome.subject], outcome))
        last[outcome.subject] = outcome
    return pairs


def _explain(outcome: Outcome) -> str:
    downtime = outcome.record["downtime"]
    largest = max(downtime["parts"], key=lambda part: part["ns"] - downtime["predicted_parts_ns"].get(part["name"], 0))
    return (
        f"{outcome.subject} limit {outcome.limit_ms:g} ms, predicted {downtime['predicted_ns'] / MS:.1f}, bound "
        f"{downtime['predicted_upper_ns'] / MS:.1f}, was {downtime['measured_ns'] / MS:.1f}; largest surprise "
        f"{largest['name']} {largest['ns'] / MS:.1f} ms"
    )


def plot(outcomes: list[Outcome], directory: Path) -> None:
    """Predicted against actual, and how the bound held over time, as two SVG files."""
    points = [
        (o.record["downtime"]["predicted_ns"] / MS, actual / MS, o.record["downtime"]["predicted_upper_ns"] / MS)
        for o in outcomes
        if (actual := o.actual_ns) is not None
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "prediction-scatter.svg").write_text(_scatter(points), encoding="utf-8")
    (directory / "prediction-bound.svg").write_text(_bound(points), encoding="utf-8")


def _svg(width: int, height: int, body: list[str], title: str) -> str:
    style = (
        "<style>text{font:12px sans-serif;fill:#555}line{stroke:#999}.hit{fill:#2a7de1}.miss{fill:#d33}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}}</style>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
        f"{style}{''.join(body)}</svg>\n"
    )


def _scatter(points: list[tuple[float, float, float]]) -> str:
    low, high = 1.0, max(max(p, a) for p, a, _ in points) * 1.2

    def at(value: float) -> float:
        return 420 * math.log(max(value, low) / low) / math.log(high / low)

    body = ['<line x1="50" y1="440" x2="470" y2="20"/>']
    body += [
        f'<circle class="{"hit" if a <= u else "miss"}" cx="{50 + at(p):.1f}" cy="{440 - at(a):.1f}" r="3"/>'
        for p, a, u in points
    ]
    for tick in (1, 3, 10, 30, 100, 300, 1000):
        if tick < high:
            body.append(f'<text x="{50 + at(tick):.0f}" y="458" text-anchor="middle">{tick}</text>')
            body.append(f'<text x="44" y="{444 - at(tick):.0f}" text-anchor="end">{tick}</text>')
    body.append('<text x="260" y="476" text-anchor="middle">predicted downtime, ms</text>')
    body.append('<text x="16" y="16">actual downtime, ms (red: beyond the bound)</text>')
    return _svg(500, 484, body, "Predicted against actual downtime")


def _bound(points: list[tuple[float, float, float]]) -> str:
    ratios = [a / u for _, a, u in points]
    top = max(1.5, *ratios)
    step = 880 / max(1, len(ratios))
    body = [f'<line x1="40" y1="{240 - 200 / top:.1f}" x2="920" y2="{240 - 200 / top:.1f}"/>']
    body += [
        f'<circle class="{"hit" if ratio <= 1 else "miss"}" cx="{40 + number * step:.1f}" '
        f'cy="{240 - 200 * ratio / top:.1f}" r="2.5"/>'
        for number, ratio in enumerate(ratios)
    ]
    body.append('<text x="40" y="260">attempts in order</text>')
    body.append('<text x="40" y="20">actual downtime over its bound (line: 1)</text>')
    return _svg(940, 270, body, "Actual downtime over its upper bound, attempt by attempt")
