"""The work of the guest on its memory, as arguments of its program (guest_init.c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

_LINUX_MIB: Final = 112
"""What is left to Linux: code and data, the unpacked modules, page tables, and what it needs free to boot at all."""


def usable_mib(memory_mib: int) -> int:
    """Return how much of a guest's memory its program may fill (MiB): three quarters, or less where Linux needs more
    than the rest.

    Raises:
        ValueError: Linux would not boot in so little.
    """
    usable = min(memory_mib * 3 // 4, memory_mib - _LINUX_MIB)
    if usable < 1:
        raise ValueError(f"a Linux guest needs more than {_LINUX_MIB} MiB of memory, not {memory_mib} MiB")
    return usable


@dataclass(frozen=True, slots=True)
class Workload:
    """How much memory the guest fills and checks, and how fast it writes into it.

    Attributes:
        memory_mib: filled at the start; every page of it is checked again and again.
        hot_mib: the part that ``hot_percent`` of all writes go to; the others go anywhere.
        rate_mib_per_s: how much it writes, in whole pages.
        check_mib_per_s: how much it checks when nobody asks.
        beat_us: the period of its beats.
    """

    memory_mib: int = 64
    hot_mib: int = 0
    hot_percent: int = 0
    rate_mib_per_s: int = 0
    check_mib_per_s: int = 32
    beat_us: int = 1000

    @classmethod
    def idle(cls, memory_mib: int = 64) -> Self:
        """Nothing is written but what Linux itself writes."""
        return cls(memory_mib)

    @classmethod
    def hot_cold(cls, memory_mib: int = 128, rate_mib_per_s: int = 50) -> Self:
        """Nine of ten writes go to a tenth of the memory."""
        return cls(memory_mib, max(1, memory_mib // 10), 90, rate_mib_per_s)

    @classmethod
    def heavy(cls, memory_mib: int = 128, rate_mib_per_s: int = 150, working_set_mib: int = 64) -> Self:
        """All writes go to one working set, everywhere in it alike."""
        return cls(memory_mib, working_set_mib, 100, rate_mib_per_s)

    def arguments(self) -> list[str]:
        """For the kernel's command line, behind ``--``."""
        return [
            f"memory={self.memory_mib}",
            f"hot={self.hot_mib}",
            f"hot_percent={self.hot_percent}",
            f"rate={self.rate_mib_per_s}",
            f"check={self.check_mib_per_s}",
            f"period_us={self.beat_us}",
        ]


WORKLOADS: Final = {"idle": Workload.idle(), "hot-cold": Workload.hot_cold(), "heavy": Workload.heavy()}
"""The kinds that comparisons are made with, by name."""
