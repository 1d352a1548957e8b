"""The pace of the first round, which may be another one than the cap on the bandwidth.

A first round moves most of the data and decides nothing. So where links are shared, it may be let go faster or slower
than its migration was promised. The rounds after it and the blackout keep to the cap, and so must what it shows of the
link: a round that sent all that its pace allowed would have sent all that the cap allows.
"""

from __future__ import annotations


class FirstRoundPace:
    """The pace of a first round that runs, or is to begin.

    Attributes:
        bytes_per_s: the pace; 0: the cap on the bandwidth is the pace.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0
        self._since_ns: int | None = None
        self._allowed_bytes = 0.0

    def begin(self, now_ns: int) -> None:
        """The round begins."""
        self._since_ns = now_ns

    def change(self, bytes_per_s: int, cap: int, now_ns: int) -> None:
        """Take another pace.

        Args:
            cap: the cap so far (bytes per second).
        """
        self._count(cap, now_ns)
        self.bytes_per_s = bytes_per_s

    def ns_at_cap(self, sent_bytes: int, cap: int, now_ns: int) -> int:
        """Return how long the round, which is over, would have taken at the cap (ns).

        Args:
            sent_bytes: what it sent.
            cap: above 0 (bytes per second).
        """
        self._count(cap, now_ns)
        return int(max(sent_bytes, self._allowed_bytes) * 1e9 / cap)

    def _count(self, cap: int, now_ns: int) -> None:
        if self._since_ns is not None:
            self._allowed_bytes += (self.bytes_per_s or cap) * (now_ns - self._since_ns) / 1e9
            self._since_ns = now_ns
