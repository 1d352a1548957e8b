"""Assumed costs of a switchover while this host has learned nothing: a measured table that ships with the package.

``prior.json`` lies beside this module. ``scripts.prior`` makes it of a campaign's records, and it says of itself how
(``provenance``). Reading the file is its caller's affair (``state.learned``): nothing here does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from migrated.record.parts import Component

VERSION: Final = 2
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ComponentPrior:
    """The assumption on one component: its cost as a factor on its base, and what it costs beside it.

    Attributes:
        factor: what the base is multiplied with.
        overhead_ns: calls to the VMM and wake-ups of threads.
        per_device_ns: the same for every device of the guest.
        per_mib_ns: for every MiB of device state, which is copied to and from the VMM.
        spread: how far truths lie from that, as a share of the base.
        spread_ns: and the amount that comes on top, on a calm host.
        waiting_spread_ns: and the amount for each task that is ahead of what waits for a processor.
    """

    factor: float
    overhead_ns: int
    per_device_ns: int
    per_mib_ns: int
    spread: float
    spread_ns: int
    waiting_spread_ns: int

    def expected_ns(self, base_ns: int, devices: int, device_bytes: int, load: float, *, whole: bool = False) -> int:
        """The component's cost without anything learned.

        Args:
            load: of the host; what is beside the base is mostly waiting for a processor, and takes that much longer.
            whole: the base is of a whole step, and has what is beside it on a calm host.
        """
        beside_ns = self.overhead_ns + devices * self.per_device_ns + self.per_mib_ns * device_bytes // _MIB
        return int(base_ns * self.factor + (load - whole) * beside_ns)

    def beside_spread_ns(self, load: float, *, whole: bool = False) -> float:
        """How far what is beside the base lies from what is expected of it; arguments as above."""
        return (0 if whole else self.spread_ns) + (load - 1.0) * self.waiting_spread_ns


@dataclass(frozen=True, slots=True)
class Prior:
    """The table.

    Attributes:
        components: an assumption for each.
        scores: a sample of scores, ascending: how many scales truths lay above their predictions.
        provenance: how the table was made, for people.
    """

    components: Mapping[Component, ComponentPrior]
    scores: tuple[float, ...]
    provenance: Mapping[str, Any]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Prior:
        """Read the table.

        Raises:
            ValueError, KeyError, TypeError: it is no such table.
        """
        if document.get("version") != VERSION:
            raise ValueError(f"a prior table of version {document.get('version')} cannot be read")
        components = {component: ComponentPrior(**document["components"][component.value]) for component in Component}
        scores = tuple(sorted(float(score) for score in document["scores"]))
        if not scores or not all(map(math.isfinite, scores)):
            raise ValueError("a prior table needs finite scores")
        return cls(components, scores, document["provenance"])
