"""Makes the prior table of predictions from the records of a campaign.

    python -m scripts.calibration --records records.jsonl
    python -m scripts.prior records.jsonl --provenance "who, where, when" > migrated/prediction/prior.json

The records must be of another seed than the campaign that reports: a table that was chosen on what it is judged by
proves nothing. Costs are medians, spreads the distance that two thirds stay within; what no record tells stays as it is
in the table that ships now.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from migrated.prediction.knowledge import Knowledge
from migrated.prediction.model import Bases, was_busy
from migrated.prediction.prior import VERSION, ComponentPrior, Prior
from migrated.record.model import Downtime, Record
from migrated.record.parts import Component
from migrated.record.reading import read_record
from migrated.state.learned import load_prior

_ENOUGH: Final = 20
_LARGE_NS: Final = 5_000_000
_LOADED_ALONE_NS: Final = 300_000
_MIDDLE: Final = 0.68
_SCORES: Final = 40
_DRAWN: Final = ("cell", "first", "forced", "limit_ms")


Switchover = tuple[Record, Downtime]


def quiet_switchovers(lines: Iterable[str]) -> list[Switchover]:
    """The completed attempts of a file of records on hosts that were not busy: the table holds for a load of 1."""
    found: list[Switchover] = []
    for line in lines:
        record = read_record({key: value for key, value in json.loads(line).items() if key not in _DRAWN})
        downtime = record.downtime
        if record.outcome != "completed" or downtime is None or was_busy(downtime.predicted_regime):
            continue
        if downtime.predicted_bases_ns:
            found.append((record, downtime))
    return found


def table(seen: Sequence[Switchover], before: Prior, provenance: dict[str, Any]) -> Prior:
    """The table that the records teach.

    Raises:
        ValueError: there are too few of them.
    """
    if len(seen) < _ENOUGH:
        raise ValueError(f"{len(seen)} switchovers on a quiet host are too few for a table; it needs {_ENOUGH}")
    components = {component: _component(component, seen, before.components[component]) for component in Component}
    taught = Prior(components, before.scores, provenance)
    knowledge = Knowledge(taught)
    scores: list[float] = []
    for record, downtime in seen:
        bases = _bases(record, downtime)
        prediction = knowledge.predict(record.guest, "", bases, coverage=0.95, bandwidth_known=True)
        scores.append((downtime.counted_ns - prediction.total_ns) / prediction.scale_ns)
    quantiles = np.quantile(scores, (np.arange(_SCORES) + 0.5) / _SCORES)
    return replace(taught, scores=tuple(round(float(score), 2) for score in quantiles))


def _component(component: Component, seen: Sequence[Switchover], before: ComponentPrior) -> ComponentPrior:
    rows = np.array([_row(component, *one) for one in seen], np.float64)
    base, truth, devices, mib = rows.T
    per_device, per_mib = before.per_device_ns, before.per_mib_ns
    if component is Component.DEVICE_LOADS:
        per_device, per_mib = _beside(truth - base, devices, mib)
    rest = truth - per_device * devices - per_mib * mib
    small, large = base < _LARGE_NS, base >= _LARGE_NS
    overhead, factor, spread, spread_ns = before.overhead_ns, before.factor, before.spread, before.spread_ns
    if small.sum() >= _ENOUGH:
        overhead = max(0, int(median(rest[small] - base[small])))
        spread_ns = max(1, int(np.quantile(np.abs(rest - base - overhead)[small], _MIDDLE)))
    if large.sum() >= _ENOUGH:
        factor = round(max(0.1, float(median((rest[large] - overhead) / base[large]))), 3)
        off = np.abs(rest - factor * base - overhead)[large] / base[large]
        spread = round(float(np.quantile(off, _MIDDLE)), 3)
    return ComponentPrior(factor, overhead, per_device, per_mib, spread, spread_ns)


def _row(component: Component, record: Record, downtime: Downtime) -> tuple[int, int, int, float]:
    """Base, truth, devices that are loaded alone, and MiB of device state."""
    bases = _bases(record, downtime)
    return bases.of(component), downtime.by_component()[component], bases.devices, bases.device_bytes / (1 << 20)


def _bases(record: Record, downtime: Downtime) -> Bases:
    """The bases of a record's prediction, as far as the record keeps them."""
    by_name = downtime.predicted_bases_ns
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
    )


def _beside(beside_ns: Any, devices: Any, mib: Any) -> tuple[int, int]:
    """Fit the cost of each device and of each MiB beside the tried loads by least squares (ns, at least 0)."""
    features = np.column_stack((np.ones(len(devices)), devices, mib))
    _, per_device, per_mib = np.linalg.lstsq(features, beside_ns, rcond=None)[0]
    return max(0, int(per_device)), max(0, int(per_mib))


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


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+", help="files of records, one JSON document a line")
    parser.add_argument("--provenance", required=True, help="a sentence: machine, settings, seed, date")
    options = parser.parse_args()
    seen = [one for path in options.records for one in quiet_switchovers(path.read_text("utf-8").splitlines())]
    provenance = {"made_by": "scripts.prior", "settings": options.provenance, "attempts": len(seen)}
    print(text(table(seen, load_prior(), provenance)), end="")


if __name__ == "__main__":
    main()
