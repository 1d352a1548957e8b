"""The guest's heartbeat: page 0 of guest memory, which the vCPU writes every millisecond with its own clock, so that
the gap that the guest itself observed over a migration can be read afterwards.

Page 0 is a closed form of this state, which travels with the vCPU.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from protocol.guest_time import U64_MAX
from vmm_sim.content import PAGE_SIZE
from vmm_sim.memory import GuestMemory

GAP_THRESHOLD_NS: Final = 5_000_000
RING_ENTRIES: Final = 64

_MAGIC: Final = b"HEARTBT1"
_HEADER: Final = struct.Struct("<8s6Q")
_ENTRY: Final = struct.Struct("<3Q")

STATE_FIELDS: Final = ("beats", "tsc", "last_gap_ns", "max_gap_ns", "gap_count", "backwards")


class Heartbeat:
    """Beats so far, the guest TSC at the last one, and the last observed gaps above 5 ms.

    ``backwards`` counts observations of a TSC that ran backwards. It must stay 0: verify says so if not.
    """

    def __init__(self) -> None:
        self.beats = 0
        self.tsc = 0
        self.last_gap_ns = 0
        self.max_gap_ns = 0
        self.gap_count = 0
        self.backwards = 0
        self.ring: list[tuple[int, int, int]] = []

    def beat(self, memory: GuestMemory, tsc: int, guest_freq: int, uptime_ns: int, step: int) -> int:
        """One beat at ``tsc``; writes page 0. Returns the gap since the last beat in guest ns (0 for the first)."""
        gap_ns = 0
        if self.beats:
            ticks = (tsc - self.tsc) & U64_MAX
            if ticks >> 63:
                self.backwards += 1
            else:
                gap_ns = ticks * 1_000_000_000 // guest_freq
        self.beats += 1
        self.tsc = tsc
        if gap_ns > GAP_THRESHOLD_NS:
            entry = (gap_ns, max(uptime_ns, 0), step)
            slot = self.gap_count % RING_ENTRIES
            self.gap_count += 1
            self.ring[slot : slot + 1] = [entry]
            memory.write_bytes(_HEADER.size + slot * _ENTRY.size, _ENTRY.pack(*entry))
        self.last_gap_ns = gap_ns
        self.max_gap_ns = max(self.max_gap_ns, gap_ns)
        memory.write_bytes(0, self._header())
        return gap_ns

    def _header(self) -> bytes:
        return _HEADER.pack(_MAGIC, *(getattr(self, field) for field in STATE_FIELDS))

    def page(self) -> bytes:
        """Page 0 as it must read in this state; all zero before the first beat."""
        if not self.beats:
            return bytes(PAGE_SIZE)
        ring = b"".join(_ENTRY.pack(*entry) for entry in self.ring)
        return (self._header() + ring).ljust(PAGE_SIZE, b"\0")

    def gaps(self) -> list[dict[str, int]]:
        """The remembered gaps, oldest first."""
        oldest = self.gap_count % RING_ENTRIES if self.gap_count > RING_ENTRIES else 0
        ring = list(self.ring)
        return [
            {"gap_ns": gap, "at_guest_uptime_ns": at, "step": step} for gap, at, step in ring[oldest:] + ring[:oldest]
        ]

    def state(self) -> dict[str, Any]:
        """The state as it travels in the vCPU's state."""
        return {**{field: getattr(self, field) for field in STATE_FIELDS}, "ring": [list(entry) for entry in self.ring]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Heartbeat:
        """The inverse of :meth:`state`. Raises ValueError for anything else."""
        heartbeat = cls()
        ring = state.get("ring")
        if set(state) != {*STATE_FIELDS, "ring"} or not isinstance(ring, list) or len(ring) > RING_ENTRIES:
            raise ValueError("heartbeat has the wrong fields")
        for field in STATE_FIELDS:
            setattr(heartbeat, field, _u64(state[field], field))
        if len(ring) != min(heartbeat.gap_count, RING_ENTRIES):
            raise ValueError("heartbeat ring and gap_count disagree")
        for entry in ring:
            if not isinstance(entry, list) or len(entry) != 3:
                raise ValueError("heartbeat ring entry is not a triple")
            heartbeat.ring.append((_u64(entry[0], "gap"), _u64(entry[1], "uptime"), _u64(entry[2], "step")))
        return heartbeat


def _u64(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= U64_MAX:
        raise ValueError(f"heartbeat {name} is not a 64-bit number")
    return value
