"""What past records taught, summarised: how far bases were off, and how far whole predictions were off.

Everything is kept three times: for the guest, for its class (the same devices, vCPUs and size) and for all; the most
specific one with enough samples speaks. Rings are bounded, so a prediction costs microseconds and the whole summary
stays small. Completed attempts teach; an aborted one only that the downtime was at least so long; refused ones nothing.

The bound is split conformal: the ceil((n+1) * coverage)-th smallest of the past n ratios of truth to prediction,
which holds for exchangeable attempts whatever their distribution. With fewer samples than a finite bound needs, a wide
prior stands in, and the prediction says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, Final

from migrated.parameters import limit_of
from migrated.prediction.model import Bases, Prediction
from migrated.record import COMPONENT_OF, COMPONENTS, Component, Record
from protocol.guest import GuestDescription

_CORRECTIONS_KEPT: Final = 24
_SCORES_KEPT: Final = 200
_KEYS_KEPT: Final = 512
_ENOUGH_CORRECTIONS: Final = 3
_LARGE_NS: Final = 5_000_000
"""From this base on a component is corrected by a factor; below, by what it costs beside its base. A factor learned
on a base of nothing would make nonsense of a large one."""
_TOTAL_FLOOR_NS: Final = 2_000_000
_PRIOR_RATIO: Final[Mapping[Component, float]] = {
    "stop": 1.3,
    "dirty-log": 2.0,
    "state": 1.8,
    "device-loads": 1.2,
    "legs": 2.5,
    "resume": 1.5,
}
"""How far each component may be off while too few attempts are known: devices were tried, memory is an estimate."""
_PRIOR_FLOOR_NS: Final = 5_000_000
_ABORT_PENALTY: Final = 1.25
"""Each aborted switchover in a row makes the guest's next bound that much wider."""
_MOST_PENALTIES: Final = 3
_ALL: Final = "*"

_PRIOR_OVERHEAD_NS: Final[Mapping[Component, int]] = {
    "stop": 400_000,
    "dirty-log": 300_000,
    "state": 1_500_000,
    "device-loads": 800_000,
    "legs": 1_500_000,
    "resume": 800_000,
}
"""What a component costs beside its base when nothing was learned yet: calls to the VMM and wake-ups."""


def class_key(guest: GuestDescription) -> str:
    """The class of a guest: its devices, vCPUs and memory size (to a power of two)."""
    devices = ",".join(sorted(f"{device.name}/{device.kind}" for device in guest.devices))
    return f"{guest.machine}|{guest.vcpus}|{guest.memory_bytes.bit_length()}|{devices}"


class _Ring:
    """The last values of one key."""

    __slots__ = ("limit", "values")

    def __init__(self, limit: int, values: list[float] | None = None) -> None:
        self.limit = limit
        self.values = (values or [])[-limit:]

    def add(self, value: float) -> None:
        self.values.append(value)
        del self.values[: -self.limit]


class Knowledge:
    """Learns from finished records and predicts. One per daemon; ``document`` and ``from_document`` keep it."""

    def __init__(self) -> None:
        self._corrections: dict[str, _Ring] = {}
        self._scores: dict[str, _Ring] = {}
        self._aborts: dict[str, int] = {}

    # Section: predicting

    def predict(self, guest: str, kind: str, bases: Bases, *, coverage: float, bandwidth_known: bool) -> Prediction:
        """Predict a downtime.

        Args:
            guest: the guest's name.
            kind: its class (``class_key``).
            bases: what this attempt measured.
            coverage: probability that the bound holds, 0.5 to 0.999.
        """
        components = {
            component: self._corrected(component, guest, kind, bases.of(component)) for component in COMPONENTS
        }
        total_ns = sum(components.values())
        ratio, basis = self._ratio(guest, kind, coverage, components)
        upper_ns = max(total_ns, int((total_ns + _TOTAL_FLOOR_NS) * ratio) - _TOTAL_FLOOR_NS)
        state_base = max(1, bases.of("state"))
        memory_ns = components["state"] * min(bases.memory_ns, state_base) // state_base
        return Prediction(total_ns, upper_ns, components, memory_ns, basis, bandwidth_known, bases)

    def _corrected(self, component: Component, guest: str, kind: str, base_ns: int) -> int:
        for key in _keys(guest, kind):
            ring = self._corrections.get(_correction_key(key, component, base_ns))
            if ring is not None and len(ring.values) >= _ENOUGH_CORRECTIONS:
                learned = median(ring.values)
                return max(0, int(base_ns * learned if base_ns >= _LARGE_NS else base_ns + learned))
        return base_ns + _PRIOR_OVERHEAD_NS[component]

    def _ratio(self, guest: str, kind: str, coverage: float, components: Mapping[Component, int]) -> tuple[float, str]:
        """The conformal ratio and a phrase that says what it rests on."""
        penalty = _ABORT_PENALTY ** min(self._aborts.get(guest, 0), _MOST_PENALTIES)
        needed = math.ceil(coverage / (1 - coverage))
        largest = 0.0
        for key, whose in zip(_keys(guest, kind), ("this guest", "guests like it", "all guests"), strict=True):
            ring = self._scores.get(key)
            if ring is None:
                continue
            count = len(ring.values)
            if count >= needed:
                rank = math.ceil((count + 1) * coverage)
                return sorted(ring.values)[rank - 1] * penalty, f"{count} attempts of {whose}"
            largest = max(largest, *ring.values)
        seen = len(self._scores[_ALL].values) if _ALL in self._scores else 0
        prior_ns = _PRIOR_FLOOR_NS + sum(ns * _PRIOR_RATIO[component] for component, ns in components.items())
        prior = (prior_ns + _TOTAL_FLOOR_NS) / (sum(components.values()) + _TOTAL_FLOOR_NS)
        return max(prior, largest) * penalty, f"wide: only {seen} attempts known, {needed} needed"

    # Section: learning

    def learn(self, record: Record, kind: str) -> None:
        """Take a finished record into account.

        Args:
            kind: the guest's class (``class_key``).
        """
        downtime = record.downtime
        if downtime is None or downtime.predicted_ns is None:
            return
        counted_ns = downtime.measured_ns - downtime.hold_ns
        score = (counted_ns + _TOTAL_FLOOR_NS) / (downtime.predicted_ns + _TOTAL_FLOOR_NS)
        if record.outcome == "completed":
            self._aborts.pop(record.guest, None)
            self._learn_components(record, kind)
        elif record.outcome == "aborted":
            if downtime.predicted_upper_ns is not None and downtime.predicted_upper_ns < limit_of(record.parameters):
                # The bound let it pass and was wrong; a forced stop says nothing about the bound.
                self._aborts[record.guest] = self._aborts.get(record.guest, 0) + 1
            if score <= 1:
                return  # right-censored below the prediction: it tells nothing
        else:
            return
        for key in _keys(record.guest, kind):
            self._ring(self._scores, key, _SCORES_KEPT).add(score)

    def _learn_components(self, record: Record, kind: str) -> None:
        downtime = record.downtime
        assert downtime is not None
        truth = dict.fromkeys(COMPONENTS, 0)
        for part in downtime.parts:
            if part.name != "hold":
                truth[COMPONENT_OF.get(part.name, "legs")] += part.ns
        truth["legs"] += downtime.unattributed_ns
        for component in COMPONENTS:
            base_ns = downtime.predicted_bases_ns.get(component)
            if base_ns is None:
                continue
            learned = truth[component] / base_ns if base_ns >= _LARGE_NS else truth[component] - base_ns
            for key in _keys(record.guest, kind):
                self._ring(self._corrections, _correction_key(key, component, base_ns), _CORRECTIONS_KEPT).add(learned)

    def _ring(self, rings: dict[str, _Ring], key: str, limit: int) -> _Ring:
        ring = rings.pop(key, None) or _Ring(limit)
        rings[key] = ring  # the most recently used comes last
        while len(rings) > _KEYS_KEPT:
            oldest = next(name for name in rings if not name.startswith(_ALL))
            del rings[oldest]
        return ring

    # Section: keeping

    def document(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {
            "version": 1,
            "corrections": {key: ring.values for key, ring in self._corrections.items()},
            "scores": {key: ring.values for key, ring in self._scores.items()},
            "aborts": self._aborts,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Knowledge:
        """Read a summary back.

        Raises:
            ValueError: it is no such summary.
        """
        knowledge = cls()
        if document.get("version") != 1:
            raise ValueError(f"a summary of version {document.get('version')} cannot be read")
        for name, rings, limit in (
            ("corrections", knowledge._corrections, _CORRECTIONS_KEPT),
            ("scores", knowledge._scores, _SCORES_KEPT),
        ):
            for key, values in document[name].items():
                rings[key] = _Ring(limit, [float(value) for value in values])
        knowledge._aborts = {key: int(count) for key, count in document["aborts"].items()}
        return knowledge


def _correction_key(key: str, component: Component, base_ns: int) -> str:
    return f"{key}/{component}/{'factor' if base_ns >= _LARGE_NS else 'overhead'}"


def _keys(guest: str, kind: str) -> Iterator[str]:
    """From the most specific to the most general."""
    yield f"guest:{guest}"
    yield f"class:{kind}"
    yield _ALL
