"""Errors of past predictions, summarised from the records: those of the bases and those of whole predictions.

Corrections are kept three times: for the guest, for its class (the same devices, vCPUs and size) and for all. Rings are
bounded, so a prediction costs microseconds and the whole summary stays small. Completed attempts teach; refused ones
nothing; an aborted one only that the downtime would have been longer than its limit, and nothing when this host itself
stood still (the pause then lasted far longer than the deadline that should have ended it).

The bound is conformal with a local scale. Every component has a spread, learned beside its correction; the root of the
sum of their squares is the scale of a prediction. A quantile of past scores (``conformal``), times the scale, is added
to the prediction. That holds for exchangeable attempts whatever their distribution; and although guests share scores,
the bound is narrow for a guest of which little is uncertain and wide for one of which much is.

One odd event must not decide over what follows: spreads come from the middle of what was seen, scores have limits, and
an abort widens the bounds of its own guest alone, until its next attempt that ends in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from migrated.prediction.conformal import ScorePools
from migrated.prediction.model import Bases, Prediction, was_busy, was_unrehearsed
from migrated.prediction.prior import Prior
from migrated.record.model import Downtime, Record
from migrated.record.parts import Component, PredictedPart
from migrated.settings.parameters import limit_of
from protocol.guest import GuestDescription

_VERSION: Final = 3
_CORRECTIONS_KEPT: Final = 60
_KEYS_KEPT: Final = 512
_ENOUGH_CORRECTIONS: Final = 5
_LARGE_NS: Final = 5_000_000
"""From this base on a component is corrected by a factor; below, by what it costs beside its base. A factor learned
on a base of nothing would make nonsense of a large one."""
_MOST_FACTOR: Final = 10.0
_MOST_OVERHEAD_NS: Final = 200_000_000
"""Limits of a single correction: beyond, something happened that is no property of a switchover."""
_SPREAD_WEIGHT: Final = 16
"""How many samples a spread of the next more general level is worth beside the own ones."""
_MIDDLE: Final = 0.68
"""The share of a normal distribution that lies within one standard deviation."""
_FEW: Final = 10
_MOST_SPREADS: Final = 5.0
"""While there are few samples, none counts as further off than so many spreads of the next more general level."""
_UNTRIED: Final = 2.0
"""How much less sure a component is that was not tried several times in this attempt."""
_UNREHEARSED_SPREAD: Final = 0.08
"""How far memory may take longer than in rounds that waited for a processor, as the blackout does not (share). On busy
hosts it takes a tenth of that; what such rounds show is no middle but an end."""
_SPREAD_FLOOR_NS: Final = 500_000
"""No prediction is surer than a few wake-ups of threads."""
_CENSORED_MOST: Final = 4.0
"""The score of an aborted attempt, at most: how much longer it would have taken nobody knows."""
_STOOD_STILL: Final = 2
"""A pause of so many limits means that this host stood still: the deadline would have ended it before."""
_ABORT_PENALTY: Final = 1.25
"""Each aborted switchover in a row makes the guest's next bound that much wider."""
_MOST_PENALTIES: Final = 3
_ALL: Final = "*"


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
    """Learns from finished records and predicts. One per daemon; ``document`` and ``from_document`` keep it.

    Args:
        prior: what is assumed while nothing was learned.
    """

    def __init__(self, prior: Prior) -> None:
        self._prior = prior
        self._corrections: dict[str, _Ring] = {}
        self._pools = ScorePools(prior.scores)
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
        estimates = {component: self._estimate(component, guest, kind, bases) for component in Component}
        components = {component: estimate.ns for component, estimate in estimates.items()}
        total_ns = sum(components.values())
        regime = bases.regime(first=not any(name.startswith(f"guest:{guest}/") for name in self._corrections))
        penalty = _ABORT_PENALTY ** min(self._aborts.get(guest, 0), _MOST_PENALTIES)
        scale_ns = _scale_ns(estimates)
        upper_ns = total_ns + max(0, int(self._pools.quantile(regime, coverage) * penalty * scale_ns))
        state_base = max(1, bases.of(Component.STATE))
        memory_ns = components[Component.STATE] * min(bases.memory_ns, state_base) // state_base
        basis = self._basis(regime, coverage)
        return Prediction(
            total_ns, upper_ns, components, memory_ns, basis, bandwidth_known, bases, regime, int(scale_ns)
        )

    def _basis(self, regime: str, coverage: float) -> str:
        """Return a phrase that says how many past attempts the bound was learned from."""
        known, needed = self._pools.known, math.ceil(coverage / (1 - coverage))
        attempts = "attempt" if known == 1 else "attempts"
        if known < needed:
            return f"wide: {known} {attempts} known, {needed} needed"
        return f"{known} {attempts} known, {self._pools.known_in(regime)} {regime}"

    def _estimate(self, component: Component, guest: str, kind: str, bases: Bases) -> _Estimate:
        """A component, corrected, with its spread."""
        prior, base_ns = self._prior.components[component], bases.of(component)
        scale = base_ns if base_ns >= _LARGE_NS else 1
        whole, tried_ns = bases.whole(component), bases.spreads_ns.get(component)
        ns = prior.expected_ns(base_ns, bases.devices, bases.device_bytes, bases.load, whole=whole)
        share_ns = base_ns * prior.spread
        if component is Component.STATE and bases.unrehearsed:
            known_ns = base_ns * _UNREHEARSED_SPREAD
        else:
            known_ns = _UNTRIED * share_ns if tried_ns is None else math.hypot(share_ns, tried_ns)
        beside_ns = prior.beside_spread_ns(bases.load, whole=whole and tried_ns is not None)
        spread = (known_ns + beside_ns) / scale
        state = _state_of(memory_bound=bases.memory_bound, unrehearsed=bases.unrehearsed)
        own, *_ = keys = list(_keys(guest, kind))
        for key in reversed(keys):
            ring = self._corrections.get(_correction_key(key, component, base_ns, state, busy=bases.busy))
            if ring is None:
                continue
            count, centre = len(ring.values), median(ring.values)
            seen = _spread(ring.values, centre, most=_MOST_SPREADS * spread)
            spread = (count * seen + _SPREAD_WEIGHT * spread) / (count + _SPREAD_WEIGHT)
            if component is Component.STATE and bases.memory_bound and base_ns >= _LARGE_NS and key != own:
                centre = max(centre, 1.0)  # other guests' memory moved faster because of their link, or their rounds
            if count >= _ENOUGH_CORRECTIONS:
                ns = max(0, int(base_ns * centre if base_ns >= _LARGE_NS else base_ns + centre))
        return _Estimate(ns, spread * scale)

    # Section: learning

    def learn(self, record: Record, kind: str) -> None:
        """Take a finished record into account.

        Args:
            kind: the guest's class (``class_key``).
        """
        if record.outcome != "aborted":
            self._aborts.pop(record.guest, None)  # it widened the bound of this attempt, and that is enough
        downtime = record.downtime
        if downtime is None or downtime.predicted_ns is None or downtime.predicted_scale_ns <= 0:
            return
        limit_ns = limit_of(record.parameters)
        score = (downtime.counted_ns - downtime.predicted_ns) / downtime.predicted_scale_ns
        upper_ns = downtime.predicted_upper_ns or 0
        if record.outcome == "completed":
            self._learn_components(record.guest, downtime, kind)
        elif record.outcome == "aborted" and downtime.counted_ns < _STOOD_STILL * limit_ns:
            if upper_ns < limit_ns:
                # The bound let it pass and was wrong; a forced stop says nothing about the bound.
                self._aborts[record.guest] = self._aborts.get(record.guest, 0) + 1
            score = min(score, _CENSORED_MOST)
            if score <= 0:
                return  # right-censored below the prediction: it tells nothing
        else:
            return
        coverage = record.parameters.prediction_coverage_pct / 100
        self._pools.add(downtime.predicted_regime, score, coverage, held=downtime.counted_ns <= upper_ns)

    def _learn_components(self, guest: str, downtime: Downtime, kind: str) -> None:
        truth, bases_ns = downtime.by_component(), downtime.predicted_bases_ns
        memory_bound = not downtime.predicted_parts_ns.get(PredictedPart.DEVICE_SAVES.label)
        state = _state_of(memory_bound=memory_bound, unrehearsed=was_unrehearsed(downtime.predicted_regime))
        busy = was_busy(downtime.predicted_regime)
        for component in Component:
            base_ns = bases_ns.get(component, 0)
            if base_ns >= _LARGE_NS:
                learned = min(truth[component] / base_ns, _MOST_FACTOR)
            else:
                learned = float(min(truth[component] - base_ns, _MOST_OVERHEAD_NS))
            for key in _keys(guest, kind):
                name = _correction_key(key, component, base_ns, state, busy=busy)
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
            "version": _VERSION,
            "corrections": {key: ring.values for key, ring in self._corrections.items()},
            "aborts": self._aborts,
            **self._pools.document(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], prior: Prior) -> Knowledge:
        """Read a summary back, each value within the limits that learning keeps to.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is no such summary.
        """
        knowledge = cls(prior)
        if document.get("version") != _VERSION:
            raise ValueError(f"a summary of version {document.get('version')} cannot be read")
        for key, values in document["corrections"].items():
            most = _MOST_FACTOR if key.endswith("/factor") else float(_MOST_OVERHEAD_NS)
            corrections = [min(max(float(value), -most), most) for value in values]
            if not corrections or not all(map(math.isfinite, corrections)):
                raise ValueError(f"the corrections {key!r} are no finite figures")
            knowledge._corrections[key] = _Ring(_CORRECTIONS_KEPT, corrections)
        knowledge._pools.read(document)
        knowledge._aborts = {key: int(count) for key, count in document["aborts"].items()}
        return knowledge


def _spread(values: list[float], centre: float, *, most: float) -> float:
    """Return the usual distance of values from their centre: the one that two thirds of them stay within, so that
    outliers do not stretch the scale; they are what the scores tell of.

    Args:
        most: no distance counts as more while there are few values, since few have no middle.
    """
    distances = sorted(abs(value - centre) for value in values)
    if len(distances) < _FEW:
        distances = [min(distance, most) for distance in distances]
    return distances[math.ceil(_MIDDLE * len(distances)) - 1]


def _scale_ns(estimates: Mapping[Component, _Estimate]) -> float:
    """Return the usual error of a prediction (ns), from the spreads of its components, which err independently."""
    return math.sqrt(_SPREAD_FLOOR_NS**2 + sum(estimate.spread_ns**2 for estimate in estimates.values()))


def _state_of(*, memory_bound: bool, unrehearsed: bool) -> str:
    """What state waits for: the link, which rounds have rehearsed or not, or a device."""
    if not memory_bound:
        return "device-saves"
    return "unrehearsed-memory" if unrehearsed else "memory"


def _correction_key(key: str, component: Component, base_ns: int, state: str, *, busy: bool) -> str:
    """The key of a correction. State errs differently by what it waits for (``_state_of``), and so does everything on a
    host where it waits for a processor."""
    what = f"{component}:{state}" if component is Component.STATE else component.value
    host = "/busy" if busy else ""
    return f"{key}{host}/{what}/{'factor' if base_ns >= _LARGE_NS else 'overhead'}"


def _keys(guest: str, kind: str) -> Iterator[str]:
    """From the most specific to the most general."""
    yield f"guest:{guest}"
    yield f"class:{kind}"
    yield _ALL
