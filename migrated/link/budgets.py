"""Bounds on what a peer may use: an amount per time, and a number of places per address."""

from __future__ import annotations

from collections import Counter
from typing import Final


class Allowance:
    """An amount that is used up and grows back: ``burst`` at once, ``per_s`` from then on. Time is an argument (s)."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst: Final = burst
        self._per_s: Final = per_s
        self._left = burst
        self._at_s = 0.0

    def take(self, amount: float, now_s: float) -> bool:
        """Use some up; False, and nothing used, when there is not so much."""
        self._left = min(self._burst, self._left + max(0.0, now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if amount > self._left:
            return False
        self._left -= amount
        return True


class Places:
    """A limited number of places, in all and for one address."""

    def __init__(self, total: int, per_address: int) -> None:
        self._total = total
        self._per_address = per_address
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Places that are taken."""
        return self._held.total()

    def why_full(self, address: str) -> str | None:
        """Return a phrase that says why an address gets no further place; None when it gets one."""
        if self._held[address] >= self._per_address:
            return f"{address} holds {self._held[address]}, the most that one address may"
        if self.held >= self._total:
            return f"there are {self.held}, the most that this host takes"
        return None

    def take(self, address: str) -> None:
        """Count one more place of an address as taken."""
        self._held[address] += 1

    def give_back(self, address: str) -> None:
        """Count one place of an address as free again."""
        self._held[address] -= 1
        if not self._held[address]:
            del self._held[address]
