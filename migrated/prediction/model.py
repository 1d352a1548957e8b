"""The component model of a downtime.

    predicted = stop + dirty log + max(memory, device saves) + device loads + legs + resume

Each component (``record.parts``) has a base that this attempt measured or tried (dry runs on both sides, the last scan,
remaining bytes over acknowledged bandwidth), corrected by what past records showed of base and truth. The upper bound
covers the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from migrated.record.parts import Component, PredictedPart


@dataclass(frozen=True, slots=True)
class Bases:
    """The bases of the components: measured or tried in this attempt, before any correction (ns).

    Memory and device saves run side by side, so the longer of the two counts.
    """

    stop_ns: int
    dirty_log_ns: int
    memory_ns: int
    save_ns: int
    load_ns: int
    legs_ns: int
    resume_ns: int

    @property
    def memory_bound(self) -> bool:
        """Whether memory takes longer than saving devices."""
        return self.memory_ns >= self.save_ns

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
        total_ns: what it will most likely be.
        upper_ns: what it will not exceed with the coverage asked for.
        components: the corrected components, summing to ``total_ns``.
        memory_ns: the part of ``state`` that is memory.
        basis: why the bound is as wide as it is, a phrase.
        bandwidth_known: False before anything was acknowledged.
        bases: what the components rest on.
    """

    total_ns: int
    upper_ns: int
    components: Mapping[Component, int]
    memory_ns: int
    basis: str
    bandwidth_known: bool
    bases: Bases

    def bases_by_name(self) -> dict[str, int]:
        """The bases of the components."""
        return {component.value: ns for component, ns in self.bases.by_name().items()}

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
