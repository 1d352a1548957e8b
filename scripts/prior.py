"""Makes the prior table of predictions from the records of a campaign.

    python -m scripts.calibration --records records.jsonl
    python -m scripts.prior records.jsonl --provenance "who, where, when" --output migrated/prediction/prior.json

The records must be of another seed than the campaign that reports: a table that was chosen on what it is judged by
proves nothing. Costs are medians, spreads the distance that two thirds stay within, both for a load of 1; what no
record tells stays as it is in the table that ships now. The cells of the campaign that are checks are left out. With
``--left-out`` every cell is predicted by a table that was made of the other cells alone, as for a fresh daemon: how
the table does where nobody calibrated it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from migrated.prediction.knowledge import Knowledge
from migrated.prediction.model import Bases, Prediction, was_unrehearsed
from migrated.prediction.prior import VERSION, ComponentPrior, Prior
from migrated.record.model import Downtime, Record
from migrated.record.parts import Component
from migrated.record.reading import read_record
from migrated.state.learned import load_prior
from scripts.basics import say
from scripts.calibration_records import Outcome, read_outcomes

_ENOUGH: Final = 20
_LARGE_NS: Final = 5_000_000
_LOADED_ALONE_NS: Final = 300_000
_CALM: Final = 2.0
_MIDDLE: Final = 0.68
_SCORES: Final = 40
_COVERAGE: Final = 0.95

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Switchover:
    """A completed attempt that was predicted, with what its prediction rested on."""

    cell: str
    guest: str
    downtime: Downtime
    bases: Bases


def switchovers(outcomes: Iterable[Outcome]) -> list[Switchover]:
    """What a table may be made of: completed attempts with their bases and the load, of cells that are no checks."""
    found: list[Switchover] = []
    for outcome in outcomes:
        record = read_record(outcome.record)
        downtime = record.downtime
        if record.outcome != "completed" or downtime is None or outcome.part == "check":
            continue
        if downtime.predicted_bases_ns and downtime.predicted_load > 0:
            found.append(Switchover(outcome.cell, record.guest, downtime, _bases(record, downtime)))
    return found


def table(seen: Sequence[Switchover], before: Prior, provenance: dict[str, Any]) -> Prior:
    """The table that the records teach.

    Raises:
        ValueError: there are too few of them.
    """
    if len(seen) < _ENOUGH:
        raise ValueError(f"{len(seen)} switchovers are too few for a table; it needs {_ENOUGH}")
    components = {component: _component(component, seen, before.components[component]) for component in Component}
    taught = Prior(components, before.scores, provenance)
    scores = []
    for one in seen:
        prediction = first_prediction(taught, one)
        scores.append((one.downtime.counted_ns - prediction.total_ns) / prediction.scale_ns)
    quantiles = np.quantile(scores, (np.arange(_SCORES) + 0.5) / _SCORES)
    return replace(taught, scores=tuple(round(float(score), 2) for score in quantiles))


def first_prediction(prior: Prior, one: Switchover) -> Prediction:
    """The prediction that a daemon which had learned nothing would have made."""
    return Knowledge(prior).predict(one.guest, "", one.bases, coverage=_COVERAGE, bandwidth_known=True)


def _component(component: Component, seen: Sequence[Switchover], before: ComponentPrior) -> ComponentPrior:
    # What memory took while it waited for a processor says nothing of what it takes in a blackout.
    telling = [one for one in seen if component is not Component.STATE or not one.bases.unrehearsed]
    rows = np.array([_row(component, one) for one in telling], np.float64)
    base, truth, devices, mib, load = rows.T
    per_device, per_mib = before.per_device_ns, before.per_mib_ns
    if component is Component.DEVICE_LOADS:
        per_device, per_mib = _beside((truth - base) / load, devices, mib)
    # What is beside the base is mostly waiting for a processor: it takes that much longer on a busy host.
    rest = (truth - base) / load - per_device * devices - per_mib * mib
    calm, small = load < _CALM, base < _LARGE_NS
    overhead, factor, spread = before.overhead_ns, before.factor, before.spread
    if small.sum() >= _ENOUGH:
        overhead = max(0, int(median(rest[small])))
    off = load * np.abs(rest - overhead)
    spread_ns = _middle(off[small & calm], before.spread_ns)
    waited = small & ~calm
    waiting_spread_ns = _middle((off[waited] - spread_ns) / (load[waited] - 1.0), before.waiting_spread_ns)
    beside = load * (overhead + per_device * devices + per_mib * mib)
    # A base that was tried on a busy host contains that waiting already: it says nothing of the factor.
    if (tried := calm & ~small).sum() >= _ENOUGH:
        factor = round(max(0.1, float(median((truth - beside)[tried] / base[tried]))), 3)
    if (~small).sum() >= _ENOUGH:
        beside_spread = spread_ns + (load - 1.0) * waiting_spread_ns
        further = (np.abs(truth - beside - factor * base) - beside_spread)[~small]
        spread = round(max(0.01, float(np.quantile(further / base[~small], _MIDDLE))), 3)
    return ComponentPrior(factor, overhead, per_device, per_mib, spread, spread_ns, waiting_spread_ns)


def _middle(off: Floats, before_ns: int) -> int:
    """The distance that two thirds stay within (ns); as it was before where they are few."""
    return max(1, int(np.quantile(off, _MIDDLE))) if len(off) >= _ENOUGH else before_ns


def _row(component: Component, one: Switchover) -> tuple[int, int, int, float, float]:
    """Base, truth, devices that are loaded alone, MiB of device state, and load."""
    bases = one.bases
    truth = one.downtime.by_component()[component]
    return bases.of(component), truth, bases.devices, bases.device_bytes / (1 << 20), bases.load


def _bases(record: Record, downtime: Downtime) -> Bases:
    """The bases of a record's prediction, as far as the record keeps them."""
    by_name, spreads = downtime.predicted_bases_ns, downtime.predicted_spreads_ns
    state_ns = by_name.get(Component.STATE, 0)
    memory_bound = not downtime.predicted_parts_ns.get("device-saves")
    return Bases(
        stop_ns=by_name.get(Component.STOP, 0),
        dirty_log_ns=by_name.get(Component.DIRTY_LOG, 0),
        memory_ns=state_ns if memory_bound else 0,
        save_ns=0 if memory_bound else state_ns,
        load_ns=by_name.get(Component.DEVICE_LOADS, 0),
        legs_ns=by_name.get(Component.LEGS, 0),
        resume_ns=by_name.get(Component.RESUME, 0),
        devices=sum((device.expected_load_ns or 0) >= _LOADED_ALONE_NS for device in record.devices),
        device_bytes=sum(device.bytes for device in record.devices),
        bandwidth_bytes_per_s=max((row.bandwidth_bytes_per_s for row in record.rounds), default=0.0),
        load=downtime.predicted_load,
        memory_waited=was_unrehearsed(downtime.predicted_regime),
        spreads_ns={component: spreads[component] for component in Component if component in spreads},
    )


def _beside(beside_ns: Any, devices: Any, mib: Any) -> tuple[int, int]:
    """Fit the cost of each device and of each MiB beside the tried loads by least squares (ns, at least 0), a second
    time without the tenth that lies farthest off."""
    features = np.column_stack((np.ones(len(devices)), devices, mib))
    costs = np.linalg.lstsq(features, beside_ns, rcond=None)[0]
    off = np.abs(beside_ns - features @ costs)
    near = off <= np.quantile(off, 0.9)
    _, per_device, per_mib = np.linalg.lstsq(features[near], beside_ns[near], rcond=None)[0]
    return max(0, int(per_device)), max(0, int(per_mib))


def left_out(seen: Sequence[Switchover], before: Prior) -> Iterable[str]:
    """A line for each cell, predicted by a table made without it."""
    for cell in dict.fromkeys(one.cell for one in seen):
        others = [one for one in seen if one.cell != cell]
        mine = [one for one in seen if one.cell == cell]
        yield f"{cell}: {judged(mine, table(others, before, {}))}"


def judged(seen: Sequence[Switchover], prior: Prior) -> str:
    """How first predictions from a table hold, for people."""
    rows = [(first_prediction(prior, one), one.downtime.counted_ns) for one in seen]
    held = sum(actual <= prediction.upper_ns for prediction, actual in rows)
    return (
        f"{held} of {len(rows)} held, bound over truth {median(p.upper_ns / a for p, a in rows):.2f}, error "
        f"{median(100 * abs(p.total_ns - a) / a for p, a in rows):.1f} % or "
        f"{median(abs(p.total_ns - a) / 1e6 for p, a in rows):.1f} ms"
    )


def text(prior: Prior) -> str:
    """The table as it ships: one component a line, scores in lines of ten."""
    components = [f"  {json.dumps(name.value)}: {json.dumps(asdict(one))}" for name, one in prior.components.items()]
    rows = [", ".join(map(str, prior.scores[at : at + 10])) for at in range(0, len(prior.scores), 10)]
    provenance = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in prior.provenance.items()]
    listed, scores, said = ",\n".join(components), ",\n  ".join(rows), ",\n".join(provenance)
    return (
        f'{{\n "version": {VERSION},\n "provenance": {{\n{said}\n }},\n "components": {{\n{listed}\n }},\n'
        f' "scores": [\n  {scores}\n ]\n}}\n'
    )


def write(prior: Prior, path: Path) -> None:
    """Write a table, whole or not at all: the file may be the one that the daemons read."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".new", delete=False) as file:
        file.write(text(prior))
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)


def main() -> None:
    """Parse the command line, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="files of calibration --records")
    parser.add_argument("--provenance", required=True, help="a sentence: machine, settings, seed, date")
    parser.add_argument("--output", type=Path, help="write the table to this file, atomically [standard output]")
    parser.add_argument("--left-out", action="store_true", help="also tell how each cell does without itself")
    options = parser.parse_args()
    seen, before = switchovers(read_outcomes(options.records)), load_prior()
    loads = [one.bases.load for one in seen]
    provenance = {
        "made_by": "scripts.prior",
        "settings": options.provenance,
        "attempts": len(seen),
        "cells": len({one.cell for one in seen}),
        "load_for_each_processor": {
            "least": min(loads, default=0),
            "median": median(loads or [0]),
            "most": max(loads, default=0),
        },
    }
    made = table(seen, before, provenance)
    if options.left_out:
        for line in left_out(seen, before):
            say(line)
    say(f"all, by the table of all: {judged(seen, made)}")
    if options.output is None:
        print(text(made), end="")
    else:
        write(made, options.output)


if __name__ == "__main__":
    main()
