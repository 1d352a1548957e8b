"""The prediction campaign: real migrations over loopback, predicted against actual, and against simpler predictors.

    training attempts (another seed, not counted)  ->  counted attempts  ->  the cells  ->  figures, baselines, plots

Guests, workloads, dirty rates, link caps, device profiles and limits are drawn from the seed. A share of the attempts
is forced and unlimited, which samples what a refusal would have hidden. The cells (``calibration_cells``) are fixed
settings, each with daemons of its own, in which the bound must hold too. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from scripts import calibration_cells as cells
from scripts.basics import MIB, ROOT
from scripts.calibration_cells import FORCED_SHARE, Outcome
from scripts.rig.host import Host
from scripts.rig.pair import Pair

MS: Final = 1_000_000
LIMITS_MS: Final = (50.0, 100.0, 300.0, 900.0)
CAPS_MIB: Final = (100, 200, 400)
DIRTY_SHARES: Final = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
WORKLOADS: Final = ("idle", "sequential", "random", "hot-cold", "phased")
PROFILES: Final = ("plain", "cloud-hypervisor-small", "propolis-lab", "qemu-33g-one-vf", "busy")
MEMORY_MIB: Final = 48
GUESTS: Final = 4
"""Guests that exist at once."""
WARM_UP_S: Final = 0.2


@dataclass(slots=True)
class Subject:
    """One guest of the campaign, and where it is."""

    name: str
    workload: str
    share: float
    profile: str
    cap_mib: int
    at: Host
    moves: int = 0


def write_profile(directory: Path, profile: str) -> None:
    """Write a profile of this name with jitter and 10 % outliers on every device."""
    document = tomllib.loads((ROOT / "configs" / "guests" / f"{profile}.toml").read_text(encoding="utf-8"))
    # Every tenth switchover has an outlier somewhere: the share is spread over the devices.
    devices = document.get("device", [])
    lines = ["[guest]"]
    guest = {**document.get("guest", {}), "jitter": 0.05}
    for key in ("memory", "workload", "dirty_rate"):
        guest.pop(key, None)
    lines += [f"{key} = {json.dumps(value)}" for key, value in guest.items()]
    for device in devices:
        drawn = {**device, "jitter": 0.1, "outlier_probability": 0.1 / max(1, len(devices)), "outlier_factor": 3.0}
        lines += ["[[device]]", *(f"{key} = {json.dumps(value)}" for key, value in drawn.items())]
    (directory / f"{profile}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


async def create(pair: Pair, draw: random.Random, number: int, prefix: str) -> Subject:
    """A new guest on host a. Its dirty rate is a share of its link's capacity."""
    workload, profile = WORKLOADS[number % len(WORKLOADS)], PROFILES[(number // 2) % len(PROFILES)]
    share, cap = draw.choice(DIRTY_SHARES), draw.choice(CAPS_MIB)
    subject = Subject(f"{prefix}{number}", workload, share, profile, cap, pair.a)
    arguments: dict[str, Any] = {"workload": workload, "seed": draw.randrange(1 << 30)}
    if workload != "idle":
        arguments["dirty_rate_bytes_per_s"] = int(share * cap * MIB)
    if profile != "plain":
        arguments["profile"] = profile
    await pair.a.create_guest(subject.name, MEMORY_MIB, **arguments)
    await pair.a.command("x-migrated-guest-pause", {"guest": subject.name})
    return subject


async def attempt(pair: Pair, subject: Subject, draw: random.Random) -> Outcome:
    """One migration of a guest to the other host, with drawn limit. It runs for a moment before, and rests after: on a
    machine of two cores, guests that are not migrated would take the time of the one that is."""
    forced = draw.random() < FORCED_SHARE
    limit_ms = draw.choice(LIMITS_MS)
    parameters: dict[str, Any] = {
        "downtime_limit": limit_ms,
        "max_bandwidth": subject.cap_mib * MIB,
        "timeout_s": 1.5 if forced else 4.0,
        "multifd_channels": 2,
    }
    if forced:
        parameters |= {"on_timeout": "force", "switchover_abort": False}
    source, destination = subject.at, pair.other(subject.at)
    await source.command("x-migrated-guest-resume", {"guest": subject.name})
    await asyncio.sleep(WARM_UP_S)
    record = await source.migrate(subject.name, destination, **parameters)
    if record["outcome"] == "completed":
        subject.at = destination
    await subject.at.command("x-migrated-guest-pause", {"guest": subject.name})
    outcome = Outcome(f"drawn, {subject.cap_mib} MiB/s", subject.name, subject.moves == 0, forced, limit_ms, record)
    subject.moves += 1
    return outcome


async def campaign(pair: Pair, count: int, seed: int, prefix: str, say: Callable[[str], None]) -> list[Outcome]:
    """``count`` attempts with guests of their own, in waves so that guests come and go."""
    draw = random.Random(seed)
    outcomes: list[Outcome] = []
    created = 0
    while len(outcomes) < count:
        subjects = [await create(pair, draw, created + number, prefix) for number in range(GUESTS)]
        created += GUESTS
        for _ in range(min(count - len(outcomes), GUESTS * 6)):
            subject = draw.choice(subjects)
            outcome = await attempt(pair, subject, draw)
            outcomes.append(outcome)
            if len(outcomes) % 20 == 0:
                say(f"{prefix}: {len(outcomes)}/{count} attempts")
        for subject in subjects:
            await subject.at.command("x-migrated-guest-destroy", {"guest": subject.name})
    return outcomes


async def must_refuse(pair: Pair) -> bool:
    """A limit of 1 ms is refused, and the guest never stops."""
    await pair.a.create_guest("strict", 32, profile="cloud-hypervisor-small")
    record = await pair.a.migrate("strict", pair.b, downtime_limit=1)
    await pair.a.command("x-migrated-guest-destroy", {"guest": "strict"})
    return record["outcome"] == "refused" and record["downtime"] is None


# Section: figures


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


def figures(training: list[Outcome], counted: list[Outcome]) -> dict[str, Any]:
    """Everything that the campaign shows."""
    seen = [(o, actual) for o in counted if (actual := o.actual_ns) is not None]
    errors_ns = [abs(o.record["downtime"]["predicted_ns"] - actual) for o, actual in seen]
    errors_pct = [100 * error / actual for error, (_, actual) in zip(errors_ns, seen, strict=True)]
    held = [actual <= o.record["downtime"]["predicted_upper_ns"] for o, actual in seen]
    firsts = [h for h, (o, _) in zip(held, seen, strict=True) if o.first]
    stops = [o for o in counted if o.record["downtime"] is not None]
    gated = [o for o in stops if not o.forced]
    late = [o for o in gated if o.record["outcome"] == "completed" and o.record["downtime"]["limit_violated"]]
    aborted = [o for o in gated if o.record["outcome"] == "aborted"]
    in_a_row = sum(
        a.subject == b.subject and a.record["outcome"] == b.record["outcome"] == "aborted"
        for a, b in _consecutive(gated)
    )
    # A forced attempt that stayed inside its limit although its bound did not would have been refused wrongly.
    would_refuse = [
        (o, actual) for o, actual in seen if o.forced and o.record["downtime"]["predicted_upper_ns"] >= o.limit_ms * MS
    ]
    wrongly = [o for o, actual in would_refuse if actual < o.limit_ms * MS]
    forced = [o for o, _ in seen if o.forced]
    fixed = _fixed_part(training)
    baselines = {}
    for name, predict in BASELINES.items():
        pairs = [(predict(o.record, fixed), actual) for o, actual in seen if o.record["rounds"]]
        baselines[name] = {
            "median_error_pct": round(median(100 * abs(p - a) / a for p, a in pairs), 2),
            "median_error_ms": round(median(abs(p - a) / MS for p, a in pairs), 3),
        }
    return {
        "migrations": len(counted),
        "stops": len(stops),
        "median_error_pct": round(median(errors_pct), 2),
        "median_error_ms": round(median(errors_ns) / MS, 3),
        "coverage_pct": percent(sum(held), len(held)),
        "coverage_ci": list(wilson(sum(held), len(held))),
        "late_pct": percent(len(late), len(gated)),
        "abort_pct": percent(len(aborted), len(gated)),
        "aborts_in_a_row": in_a_row,
        "wrong_refusal_pct": percent(len(wrongly), len(forced)),
        "would_refuse": len(would_refuse),
        "first_time_coverage_pct": percent(sum(firsts), len(firsts)),
        "first_times": len(firsts),
        "outcomes": Counter(o.record["outcome"] for o in counted),
        "late": [_explain(o) for o in late],
        "aborted": [_explain(o) for o in aborted],
        "baselines": baselines,
    }


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


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole campaign."""

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as profiles, Pair(vmm={"profiles": profiles}) as pair:
        for profile in PROFILES:
            if profile != "plain":
                write_profile(Path(profiles), profile)
        refused = await must_refuse(pair)
        training = await campaign(pair, options.training, options.seed + 1_000_003, "train", say)
        counted = await campaign(pair, options.migrations, options.seed, "count", say)
    by_cell = await cells.all_attempts(options.cell_attempts, options.seed, options.cell, say)
    result = figures(training, counted) | {"cells": cells.figures(counted + by_cell)}
    result["one_ms_refused"] = refused
    result["seed"] = options.seed
    if options.plots is not None:
        plot(counted, options.plots)
    if options.records is not None:
        with options.records.open("w", encoding="utf-8") as file:
            for outcome in training + counted + by_cell:
                drawn = {
                    "cell": outcome.cell,
                    "forced": outcome.forced,
                    "limit_ms": outcome.limit_ms,
                    "first": outcome.first,
                }
                file.write(json.dumps({**drawn, **outcome.record}) + "\n")
    return result


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    environment = os.environ
    parser.add_argument("--migrations", type=int, default=int(environment.get("CALIBRATE_MIGRATIONS", "300")))
    parser.add_argument("--training", type=int, default=int(environment.get("CALIBRATE_TRAINING", "120")))
    parser.add_argument("--seed", type=int, default=int(environment.get("CALIBRATE_SEED", "1")))
    parser.add_argument(
        "--cell-attempts", type=int, default=int(environment.get("CALIBRATE_CELL_ATTEMPTS", "40")),
        help="attempts in each of the cells, 0 for none",
    )  # fmt: skip
    parser.add_argument("--cell", default="", help="only cells whose name holds this")
    parser.add_argument("--plots", type=Path, help="write plots into this directory")
    parser.add_argument(
        "--records", type=Path, help="write every record into this file, one JSON line each; training first"
    )
    # An end from outside must not leave daemons and guests behind: it becomes an exception that undoes everything.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
