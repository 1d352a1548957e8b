"""What past records taught, summarised: how far bases were off, and how far whole predictions were off.

Everything is kept three times: for the guest, for its class (the same devices, vCPUs and size) and for all. Rings are
bounded, so a prediction costs microseconds and the whole summary stays small. Completed attempts teach; an aborted one
only that the downtime was at least so long; refused ones nothing.

The bound is split conformal with a local scale. Every component has a spread, learned beside its correction; the root
of the sum of their squares is the scale of a prediction. Of n past attempts the ceil((n+1) * coverage)-th smallest of
(truth - prediction) / scale, times the scale, is added to the prediction. That holds for exchangeable attempts whatever
their distribution; and although all guests share one pool, the bound is narrow for a guest of which little is uncertain
and wide for one of which much is. With fewer attempts than a finite bound needs, a wide prior stands in, and the
prediction says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from migrated.prediction.model import Bases, Prediction
from migrated.record.model import Downtime, Record
from migrated.record.parts import Component, PredictedPart
from migrated.settings.parameters import limit_of
from protocol.guest import GuestDescription

_CORRECTIONS_KEPT: Final = 60
_SCORES_KEPT: Final = 500
_KEYS_KEPT: Final = 512
_ENOUGH_CORRECTIONS: Final = 5
_LARGE_NS: Final = 5_000_000
"""From this base on a component is corrected by a factor; below, by what it costs beside its base. A factor learned
on a base of nothing would make nonsense of a large one."""
_SPREAD_WEIGHT: Final = 16
"""How many samples a spread of the next more general level is worth beside the own ones."""
_SPREAD_FLOOR_NS: Final = 500_000
"""No prediction is surer than a few wake-ups of threads."""
_TRIMMED_TO_DEVIATION: Final = 1.4
_PRIOR_SCORE: Final = 3.0
"""Scales that the bound lies above the prediction while too few attempts are known."""
_ABORT_PENALTY: Final = 1.25
"""Each aborted switchover in a row makes the guest's next bound that much wider."""
_MOST_PENALTIES: Final = 3
_ALL: Final = "*"


@dataclass(frozen=True, slots=True)
class _Prior:
    """The assumption on a component while nothing was learned: its cost beside its base (calls to the VMM, wake-ups),
    and its spread, a share of the base and an amount."""

    overhead_ns: int
    spread: float
    spread_ns: int


_PRIORS: Final[Mapping[Component, _Prior]] = {
    Component.STOP: _Prior(400_000, 0.10, 400_000),
    Component.DIRTY_LOG: _Prior(300_000, 0.30, 300_000),
    Component.STATE: _Prior(1_500_000, 0.25, 1_500_000),
    Component.DEVICE_LOADS: _Prior(800_000, 0.10, 800_000),
    Component.LEGS: _Prior(1_500_000, 0.50, 500_000),
    Component.RESUME: _Prior(800_000, 0.15, 500_000),
}
"""Devices were tried; memory is an estimate."""


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


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A corrected component and how far it is usually off (ns)."""

    ns: int
    spread_ns: float


class Knowledge:
    """Learns from finished records and predicts. One per daemon; ``document`` and ``from_document`` keep it."""

    def __init__(self) -> None:
        self._corrections: dict[str, _Ring] = {}
        self._scores = _Ring(_SCORES_KEPT)
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
        estimates = self._estimates(guest, kind, bases.by_name(), memory_bound=bases.memory_bound)
        components = {component: estimate.ns for component, estimate in estimates.items()}
        total_ns = sum(components.values())
        score, basis = self._score(guest, coverage)
        upper_ns = total_ns + max(0, int(score * _scale_ns(estimates)))
        state_base = max(1, bases.of(Component.STATE))
        memory_ns = components[Component.STATE] * min(bases.memory_ns, state_base) // state_base
        return Prediction(total_ns, upper_ns, components, memory_ns, basis, bandwidth_known, bases)

    def _estimates(
        self, guest: str, kind: str, bases_ns: Mapping[Component, int], *, memory_bound: bool
    ) -> dict[Component, _Estimate]:
        """Every component, corrected, with its spread."""
        return {
            component: self._estimate(component, guest, kind, base_ns, memory_bound=memory_bound)
            for component, base_ns in bases_ns.items()
        }

    def _estimate(self, component: Component, guest: str, kind: str, base_ns: int, *, memory_bound: bool) -> _Estimate:
        prior = _PRIORS[component]
        scale = base_ns if base_ns >= _LARGE_NS else 1
        ns, spread = base_ns + prior.overhead_ns, (base_ns * prior.spread + prior.spread_ns) / scale
        own, *_ = keys = list(_keys(guest, kind))
        for key in reversed(keys):
            ring = self._corrections.get(_correction_key(key, component, base_ns, memory_bound=memory_bound))
            if ring is None:
                continue
            count, centre = len(ring.values), median(ring.values)
            spread = (count * _spread(ring.values, centre) + _SPREAD_WEIGHT * spread) / (count + _SPREAD_WEIGHT)
            if component is Component.STATE and memory_bound and base_ns >= _LARGE_NS and key != own:
                centre = max(centre, 1.0)  # other guests' memory moved faster because of their link, or their rounds
            if count >= _ENOUGH_CORRECTIONS:
                ns = max(0, int(base_ns * centre if base_ns >= _LARGE_NS else base_ns + centre))
        return _Estimate(ns, spread * scale)

    def _score(self, guest: str, coverage: float) -> tuple[float, str]:
        """The conformal score and a phrase that says what it rests on."""
        penalty = _ABORT_PENALTY ** min(self._aborts.get(guest, 0), _MOST_PENALTIES)
        needed = math.ceil(coverage / (1 - coverage))
        scores = self._scores.values
        count = len(scores)
        if count >= needed:
            return sorted(scores)[math.ceil((count + 1) * coverage) - 1] * penalty, f"{count} attempts known"
        attempts = "attempt" if count == 1 else "attempts"
        return max(_PRIOR_SCORE, *scores, 0.0) * penalty, f"wide: {count} {attempts} known, {needed} needed"

    # Section: learning

    def learn(self, record: Record, kind: str) -> None:
        """Take a finished record into account.

        Args:
            kind: the guest's class (``class_key``).
        """
        downtime = record.downtime
        if downtime is None or downtime.predicted_ns is None:
            return
        if record.outcome not in ("completed", "aborted"):
            return
        bases_ns = {component: downtime.predicted_bases_ns.get(component, 0) for component in Component}
        memory_bound = not downtime.predicted_parts_ns.get(PredictedPart.DEVICE_SAVES.label)
        scale_ns = _scale_ns(self._estimates(record.guest, kind, bases_ns, memory_bound=memory_bound))
        score = (downtime.counted_ns - downtime.predicted_ns) / scale_ns
        if record.outcome == "completed":
            self._aborts.pop(record.guest, None)
            self._learn_components(record.guest, downtime, kind, bases_ns, memory_bound=memory_bound)
        else:
            if downtime.predicted_upper_ns is not None and downtime.predicted_upper_ns < limit_of(record.parameters):
                # The bound let it pass and was wrong; a forced stop says nothing about the bound.
                self._aborts[record.guest] = self._aborts.get(record.guest, 0) + 1
            if score <= 0:
                return  # right-censored below the prediction: it tells nothing
        self._scores.add(score)

    def _learn_components(
        self, guest: str, downtime: Downtime, kind: str, bases_ns: Mapping[Component, int], *, memory_bound: bool
    ) -> None:
        truth = downtime.by_component()
        for component, base_ns in bases_ns.items():
            learned = truth[component] / base_ns if base_ns >= _LARGE_NS else truth[component] - base_ns
            for key in _keys(guest, kind):
                name = _correction_key(key, component, base_ns, memory_bound=memory_bound)
                self._ring(self._corrections, name, _CORRECTIONS_KEPT).add(learned)

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
            "version": 2,
            "corrections": {key: ring.values for key, ring in self._corrections.items()},
            "scores": self._scores.values,
            "aborts": self._aborts,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Knowledge:
        """Read a summary back.

        Raises:
            ValueError: it is no such summary.
        """
        knowledge = cls()
        if document.get("version") != 2:
            raise ValueError(f"a summary of version {document.get('version')} cannot be read")
        for key, values in document["corrections"].items():
            knowledge._corrections[key] = _Ring(_CORRECTIONS_KEPT, [float(value) for value in values])
        knowledge._scores = _Ring(_SCORES_KEPT, [float(value) for value in document["scores"]])
        knowledge._aborts = {key: int(count) for key, count in document["aborts"].items()}
        return knowledge


def _spread(values: list[float], centre: float) -> float:
    """How far values usually lie from their centre: the mean distance without the largest tenth, brought to the length
    of a standard deviation. Outliers do not stretch the scale: they are what the scores tell of."""
    distances = sorted(abs(value - centre) for value in values)[: math.ceil(0.9 * len(values))]
    return _TRIMMED_TO_DEVIATION * sum(distances) / len(distances)


def _scale_ns(estimates: Mapping[Component, _Estimate]) -> float:
    """How far a prediction is usually off (ns): the components err independently."""
    return math.sqrt(_SPREAD_FLOOR_NS**2 + sum(estimate.spread_ns**2 for estimate in estimates.values()))


def _correction_key(key: str, component: Component, base_ns: int, *, memory_bound: bool) -> str:
    """The key of a correction. State that waits for the link and state that waits for a device err differently."""
    what = (
        f"{component}:{'memory' if memory_bound else 'device-saves'}"
        if component is Component.STATE
        else component.value
    )
    return f"{key}/{what}/{'factor' if base_ns >= _LARGE_NS else 'overhead'}"


def _keys(guest: str, kind: str) -> Iterator[str]:
    """From the most specific to the most general."""
    yield f"guest:{guest}"
    yield f"class:{kind}"
    yield _ALL
