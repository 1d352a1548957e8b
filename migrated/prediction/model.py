"""The component model of a downtime.

    predicted = stop + dirty log + max(memory, device saves) + device loads + legs + resume

Each component (``record.parts``) has a base that this attempt measured or tried (dry runs on both sides, the last scan,
remaining bytes over acknowledged bandwidth), corrected by what past records showed of base and truth. The upper bound
covers the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from migrated.record.parts import Component, PredictedPart

_FAST_BYTES_PER_S: Final = 450 << 20
"""From this bandwidth on a link counts as fast: what counts is what a page costs at both ends, not the wire."""

_BUSY_LOAD: Final = 2.0
"""From this load on a host counts as busy: what is due waits for a processor as long as it runs."""
_BUSY_HOST: Final = "busy-host"
_UNREHEARSED: Final = "unrehearsed"


def was_busy(regime: str) -> bool:
    """Whether the host was busy in an attempt of this regime."""
    return _BUSY_HOST in regime


def was_unrehearsed(regime: str) -> bool:
    """Whether memory decided in an attempt of this regime, and no round had shown what it costs in a blackout."""
    return _UNREHEARSED in regime


@dataclass(frozen=True, slots=True)
class Bases:
    """The bases of the components: measured or tried in this attempt, before any correction (ns).

    Memory and device saves run side by side, so the longer of the two counts.

    Attributes:
        devices, device_bytes: device states that are loaded in a call of their own, and the bytes of all.
        bandwidth_bytes_per_s: of large transfers, 0 while unknown.
        load: how much longer things take here because they wait for a processor, at least 1.
        memory_waited: whether every round waited for a processor behind others, as the blackout will not. Then
            ``memory_ns`` is what memory takes at most.
        whole_steps: whether the figures of stop, saves, loads and resume are of whole steps, with all calls and
            wake-ups, and not of the VMM's part in them.
        spreads_ns: how far single tries lay from the base, for components that were tried more than once.
    """

    stop_ns: int
    dirty_log_ns: int
    memory_ns: int
    save_ns: int
    load_ns: int
    legs_ns: int
    resume_ns: int
    devices: int = 0
    device_bytes: int = 0
    bandwidth_bytes_per_s: float = 0.0
    load: float = 1.0
    memory_waited: bool = False
    whole_steps: bool = False
    spreads_ns: Mapping[Component, int] = field(default_factory=dict)

    @property
    def memory_bound(self) -> bool:
        """Whether memory takes longer than saving devices."""
        return self.memory_ns >= self.save_ns

    @property
    def unrehearsed(self) -> bool:
        """Whether memory decides how long state takes, and no round has shown what it costs in a blackout."""
        return self.memory_bound and self.memory_waited

    @property
    def busy(self) -> bool:
        """Whether what is due waits for others on this host."""
        return self.load >= _BUSY_LOAD

    def whole(self, component: Component) -> bool:
        """Whether the base of a component is that of a whole step (``whole_steps``)."""
        match component:
            case Component.STOP | Component.DEVICE_LOADS | Component.RESUME:
                return self.whole_steps
            case Component.STATE:
                return self.whole_steps and not self.memory_bound
            case Component.DIRTY_LOG | Component.LEGS:
                return False

    def regime(self, *, first: bool) -> str:
        """The kind of attempt that this one is like, by the host, the link, what it waits for, and whether that was
        seen before.

        Args:
            first: whether no migration of this guest is known.
        """
        total_ns = sum(self.by_name().values())
        return "/".join(
            (
                "first" if first else "later",
                _BUSY_HOST if self.busy else "quiet-host",
                "fast-link" if self.bandwidth_bytes_per_s >= _FAST_BYTES_PER_S else "slow-link",
                "memory-bound" if self.memory_bound and 2 * self.memory_ns >= total_ns else "device-bound",
                *((_UNREHEARSED,) if self.unrehearsed else ()),
            )
        )

    def by_name(self) -> dict[Component, int]:
        """All components."""
        return {component: self.of(component) for component in Component}

    def of(self, component: Component) -> int:
        """The base of one component."""
        match component:
            case Component.STOP:
                return self.stop_ns
            case Component.DIRTY_LOG:
                return self.dirty_log_ns
            case Component.STATE:
                return max(self.memory_ns, self.save_ns)
            case Component.DEVICE_LOADS:
                return self.load_ns
            case Component.LEGS:
                return self.legs_ns
            case Component.RESUME:
                return self.resume_ns


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted downtime.

    Attributes:
        total_ns: the most likely downtime.
        upper_ns: a bound that holds with the requested coverage.
        components: the corrected components, summing to ``total_ns``.
        memory_ns: the part of ``state`` that is memory.
        basis: why the bound is as wide as it is, a phrase.
        bandwidth_known: False before anything was acknowledged.
        bases: the measured or rehearsed figures behind the components.
        regime: the kind of attempt, whose bounds are kept apart (``Bases.regime``).
        scale_ns: how far such a prediction is usually off.
    """

    total_ns: int
    upper_ns: int
    components: Mapping[Component, int]
    memory_ns: int
    basis: str
    bandwidth_known: bool
    bases: Bases
    regime: str = ""
    scale_ns: int = 0

    def bases_by_name(self) -> dict[str, int]:
        """The bases of the components."""
        return {component.value: ns for component, ns in self.bases.by_name().items()}

    def spreads_by_name(self) -> dict[str, int]:
        """The spreads of the bases that were tried more than once."""
        return {component.value: ns for component, ns in self.bases.spreads_ns.items()}

    def parts(self) -> dict[str, int]:
        """The components by name, ``state`` cut into memory and what device saves add to it."""
        parts: dict[str, int] = {}
        for component, ns in self.components.items():
            if component is Component.STATE:
                memory_ns = min(self.memory_ns, ns)
                parts[PredictedPart.MEMORY.label] = memory_ns
                parts[PredictedPart.DEVICE_SAVES.label] = ns - memory_ns
            else:
                parts[component.value] = ns
        return parts

    def explain(self, limit_ns: int) -> str:
        """The prediction as a sentence, largest parts first."""
        largest = sorted(self.parts().items(), key=lambda part: -part[1])[:4]
        named = ", ".join(f"{name} {ns / 1e6:.1f}" for name, ns in largest if ns >= 50_000)
        return (
            f"predicted {self.total_ns / 1e6:.1f} ms, bound {self.upper_ns / 1e6:.1f} ms ({self.basis}), "
            f"limit {limit_ns / 1e6:g} ms; {named or 'nothing left'}"
        )
