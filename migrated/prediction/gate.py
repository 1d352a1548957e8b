"""The gate of the stop: what the switchover would cost now, part by part, against the limit.

    predicted = stop + scan + remaining / bandwidth + device saves + device loads + legs + resume

Memory is only one part; every other part was measured or tried in this attempt before the guest is stopped.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SwitchoverCosts:
    """What does not depend on how much memory is left (ns)."""

    stop_ns: int
    scan_ns: int
    save_ns: int
    load_ns: int
    legs_ns: int
    resume_ns: int

    @property
    def fixed_ns(self) -> int:
        """All of them."""
        return self.stop_ns + self.scan_ns + self.save_ns + self.load_ns + self.legs_ns + self.resume_ns


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted downtime and its parts (ns). ``bandwidth_known`` is False before anything was acknowledged."""

    total_ns: int
    memory_ns: int
    costs: SwitchoverCosts
    bandwidth_known: bool

    def parts(self) -> dict[str, int]:
        """The parts by name, summing to the total."""
        return {
            "stop": self.costs.stop_ns,
            "dirty-log": self.costs.scan_ns,
            "memory": self.memory_ns,
            "device-saves": self.costs.save_ns,
            "device-loads": self.costs.load_ns,
            "legs": self.costs.legs_ns,
            "resume": self.costs.resume_ns,
        }

    def explain(self, limit_ns: int) -> str:
        """The prediction as a sentence with its largest parts first."""
        largest = sorted(self.parts().items(), key=lambda part: -part[1])[:3]
        named = ", ".join(f"{name} {ns / 1e6:.1f}" for name, ns in largest if ns)
        return f"predicted {self.total_ns / 1e6:.1f} ms, limit {limit_ns / 1e6:.1f} ms; {named or 'nothing left'}"


def predict(remaining_bytes: int, bandwidth_bytes_per_s: float, costs: SwitchoverCosts) -> Prediction:
    """Predict the downtime of a stop now.

    Args:
        remaining_bytes: dirty memory that would travel after the stop.
        bandwidth_bytes_per_s: from acknowledged bytes under load; 0 when nothing was measured yet.
    """
    known = bandwidth_bytes_per_s > 0
    memory_ns = int(remaining_bytes / bandwidth_bytes_per_s * 1e9) if known else 0
    return Prediction(costs.fixed_ns + memory_ns, memory_ns, costs, known or remaining_bytes == 0)


class Bandwidth:
    """Acknowledged bandwidth of the rounds so far (bytes per second).

    Only rounds that kept the link busy tell something: a round of a few pages measures the round trip. While no round
    was large enough, all bytes over all time are the best there is, and it is low, never high.
    """

    LARGE_ROUND_BYTES = 4 << 20

    def __init__(self) -> None:
        self._last = 0.0
        self._bytes = 0
        self._ns = 0

    def add(self, acknowledged_bytes: int, ns: int) -> None:
        """A round of ``acknowledged_bytes`` took ``ns`` from its first byte to its acknowledgement."""
        self._bytes += acknowledged_bytes
        self._ns += ns
        if acknowledged_bytes >= self.LARGE_ROUND_BYTES and ns:
            rate = acknowledged_bytes * 1e9 / ns
            # The newest round counts most; one odd round does not decide.
            self._last = rate if not self._last else 0.5 * self._last + 0.5 * rate

    def forget(self) -> None:
        """The cap changed: what was measured before does not hold any more."""
        self._last = 0.0
        self._bytes = self._ns = 0

    @property
    def bytes_per_s(self) -> float:
        """The estimate, 0 before anything was acknowledged."""
        if self._last:
            return self._last
        return self._bytes * 1e9 / self._ns if self._ns else 0.0
