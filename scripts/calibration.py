"""The prediction campaign: real migrations over loopback, predicted against actual, and against simpler predictors.

    training attempts (another seed, not counted)  ->  counted attempts  ->  the cells  ->  figures, baselines, plots

Guests, workloads, dirty rates, link caps, device profiles and limits are drawn from the seed. A share of the attempts
is forced and unlimited, which samples what a refusal would have hidden. The cells (``calibration_cells``) are fixed
settings, each with daemons of its own, in which the bound must hold too. The last line on stdout is one JSON object.

With ``--records`` every attempt is kept as soon as it ended, and those that are in the file already are not made again:
so a campaign can be run in slices, for instance

    python -m scripts.calibration --records R --migrations 0 --cells idle-64,demo-guest
    python -m scripts.calibration --records R                  the rest
    python -m scripts.calibration --records R --figures        only the figures of all that is in R
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.basics import MIB, ROOT
from scripts.calibration_cells import CELLS, CHECKS, FORCED_SHARE, run_cells
from scripts.calibration_figures import figures, plot
from scripts.calibration_records import Outcome, Part, RecordsFile, load_now
from scripts.rig.host import Host
from scripts.rig.pair import Pair

_TRAINING_SEED: Final = 1_000_003
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


async def attempt(pair: Pair, subject: Subject, draw: random.Random, part: Part, seed: int) -> Outcome:
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
    load = load_now()
    record = await source.migrate(subject.name, destination, **parameters)
    if record["outcome"] == "completed":
        subject.at = destination
    await subject.at.command("x-migrated-guest-pause", {"guest": subject.name})
    cell, first = f"drawn-{subject.cap_mib}-mib-per-s", subject.moves == 0
    subject.moves += 1
    return Outcome(part, cell, seed, subject.name, first, False, forced, limit_ms, load, record)


async def campaign(
    pair: Pair, count: int, seed: int, part: Part, file: RecordsFile, say: Callable[[str], None]
) -> None:  # fmt: skip
    """``count`` attempts with guests of their own, in waves so that guests come and go."""
    draw = random.Random(seed + _TRAINING_SEED if part == "training" else seed)
    made = created = 0
    while made < count:
        subjects = [await create(pair, draw, created + number, part) for number in range(GUESTS)]
        created += GUESTS
        for _ in range(min(count - made, GUESTS * 6)):
            file.add(await attempt(pair, draw.choice(subjects), draw, part, seed))
            made += 1
            if made % 20 == 0:
                say(f"{part}: {made}/{count} attempts")
        for subject in subjects:
            await subject.at.command("x-migrated-guest-destroy", {"guest": subject.name})


async def must_refuse(pair: Pair) -> bool:
    """A limit of 1 ms is refused, and the guest never stops."""
    await pair.a.create_guest("strict", 32, profile="cloud-hypervisor-small")
    record = await pair.a.migrate("strict", pair.b, downtime_limit=1)
    await pair.a.command("x-migrated-guest-destroy", {"guest": "strict"})
    return record["outcome"] == "refused" and record["downtime"] is None


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The campaign, as far as the file of records does not have it."""

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    began, file, refused = time.monotonic(), RecordsFile(options.records), None
    if not options.figures:
        done = any(o.part == "counted" and o.seed == options.seed for o in file.outcomes)
        if options.migrations and not done:
            refused = await draw_all(options, file, say)
        if options.cell_attempts:
            await run_cells(options.cell_attempts, options.seed, options.cells, file, say)
    if options.plots is not None:
        plot([outcome for outcome in file.outcomes if outcome.part != "training"], options.plots)
    return figures(file.outcomes) | {"one_ms_refused": refused, "seed": options.seed}


async def draw_all(options: argparse.Namespace, file: RecordsFile, say: Callable[[str], None]) -> bool:
    """Training and counted attempts of drawn guests, between the same two daemons. Returns whether a limit of 1 ms was
    refused."""
    with tempfile.TemporaryDirectory() as profiles, Pair(vmm={"profiles": profiles}) as pair:
        for profile in PROFILES:
            if profile != "plain":
                write_profile(Path(profiles), profile)
        refused = await must_refuse(pair)
        await campaign(pair, options.training, options.seed, "training", file, say)
        await campaign(pair, options.migrations, options.seed, "counted", file, say)
    return refused


def cell_names(text: str) -> frozenset[str]:
    """The names in a comma list.

    Raises:
        ArgumentTypeError: there is no such cell.
    """
    names, known = frozenset(filter(None, text.split(","))), {cell.name for cell in CELLS + CHECKS}
    if unknown := names - known:
        raise argparse.ArgumentTypeError(f"no cell {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return names


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    environment = os.environ
    parser.add_argument(
        "--migrations", type=int, default=int(environment.get("CALIBRATE_MIGRATIONS", "300")),
        help="drawn attempts that count, 0 for none",
    )  # fmt: skip
    parser.add_argument("--training", type=int, default=int(environment.get("CALIBRATE_TRAINING", "120")))
    parser.add_argument("--seed", type=int, default=int(environment.get("CALIBRATE_SEED", "1")))
    parser.add_argument(
        "--cell-attempts", type=int, default=int(environment.get("CALIBRATE_CELL_ATTEMPTS", "16")),
        help="attempts in each of the cells, 0 for none",
    )  # fmt: skip
    parser.add_argument(
        "--cells", type=cell_names, default=environment.get("CALIBRATE_CELLS", ""), metavar="NAME[,NAME]",
        help="only these cells, of: " + ", ".join(cell.name for cell in CELLS + CHECKS),
    )  # fmt: skip
    parser.add_argument("--plots", type=Path, help="write plots into this directory")
    parser.add_argument(
        "--records", type=Path, help="keep every attempt in this file, one JSON line each, and go on from what it has"
    )
    parser.add_argument("--figures", action="store_true", help="make no attempt; only the figures of --records")
    # An end from outside must not leave daemons and guests behind: it becomes an exception that undoes everything.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
