"""One migration over time: the snapshots that the daemon sent, and the samples for its curves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

from migrated.observe.progress import Progress, read_progress
from migrated.record.model import Record
from migrated.record.parts import PredictedPart
from migrated.record.reading import read_record
from migrated.record.terms import FINISHED
from protocol.guest import PAGE_SIZE

SAMPLES_KEPT: Final = 2000
RATE_WINDOW_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Look:
    """One migration at one moment: the daemon's snapshot of it, and its record once it has ended."""

    told: dict[str, Any]
    """The document itself, the record in it as ``record``."""
    progress: Progress
    record: Record | None = None

    @classmethod
    def of(cls, progress: dict[str, Any], record: dict[str, Any] | None = None) -> Self:
        """From the documents of a snapshot and of a record.

        Raises:
            DocumentError: this version cannot read one of them.
        """
        if record is None:
            return cls(progress, read_progress(progress))
        return cls(progress | {"record": record}, read_progress(progress), read_record(record))


class Sample(NamedTuple):
    """One snapshot on the time axis of its migration. Rates are bytes per second."""

    elapsed_ns: int
    transferred_bytes: int
    remaining_bytes: int
    bandwidth: float
    dirtied: float


@dataclass(slots=True)
class Trace:
    """The newest snapshot of one migration, its record once it has ended, and samples over time."""

    progress: Progress
    record: Record | None = None
    """Its record, once it has ended."""
    samples: list[Sample] = field(default_factory=list)
    _round: int = -1
    _round_base_bytes: int = 0

    def take(self, look: Look) -> None:
        """Add one snapshot."""
        progress = self.progress = look.progress
        self.record = look.record or self.record
        if not self.samples:
            self.samples = list(_of_rounds(progress))
        if self.record is not None or progress.status == "setup" or progress.status in FINISHED:
            return
        transferred = progress.transferred_bytes
        if progress.round != self._round:
            self._round, self._round_base_bytes = progress.round, transferred
        remaining = progress.remaining_bytes
        if progress.round:
            # The daemon counts what a round has left dirty; what the next one has sent of it comes off here.
            remaining = max(0, remaining - (transferred - self._round_base_bytes))
        dirtied = progress.dirty_rate_pages_per_s * PAGE_SIZE
        elapsed_ns = progress.elapsed_ns
        sample = Sample(elapsed_ns, transferred, remaining, self._bandwidth(elapsed_ns, transferred), dirtied)
        self.samples.append(sample)
        if len(self.samples) > SAMPLES_KEPT:
            del self.samples[1::2]

    def _bandwidth(self, elapsed_ns: int, transferred_bytes: int) -> float:
        """Bytes per second over about the last second; over the rounds, when that is not known yet."""
        for sample in reversed(self.samples):
            if elapsed_ns - sample.elapsed_ns >= RATE_WINDOW_NS:
                return max(0, transferred_bytes - sample.transferred_bytes) / (elapsed_ns - sample.elapsed_ns) * 1e9
        began_ns = self.progress.setup_ns
        return self.progress.bandwidth_bytes_per_s or transferred_bytes / max(1, elapsed_ns - began_ns) * 1e9

    @property
    def last(self) -> Sample:
        """The newest sample; where none was taken, one made of the daemon's snapshot."""
        if self.samples:
            return self.samples[-1]
        progress = self.progress
        return Sample(progress.elapsed_ns, progress.transferred_bytes, progress.remaining_bytes, 0.0, 0.0)

    def to_go_ns(self) -> int | None:
        """Estimate of the time until the guest runs on the destination (ns); None when the rounds do not converge.

        The remaining pages are sent, then the pages dirtied meanwhile, and so on, until the rest fits the limit: a
        geometric series.
        """
        progress, now = self.progress, self.last
        bandwidth = now.bandwidth
        if progress.status not in ("active", "device") or progress.role == "destination" or bandwidth <= 0:
            return None
        ratio = now.dirtied / bandwidth
        passes_ns = now.remaining_bytes / bandwidth * 1e9
        predicted, upper = progress.predicted_downtime_ns, progress.predicted_upper_ns
        if progress.status == "device" or not progress.round or predicted is None:
            return round(passes_ns)
        fixed_ns = (upper or predicted) - progress.predicted_parts_ns.get(PredictedPart.MEMORY.label, 0)
        fits_bytes = max(PAGE_SIZE, (progress.downtime_limit_ns - fixed_ns) / 1e9 * bandwidth)
        left, total_ns = float(now.remaining_bytes), 0.0
        while left > fits_bytes:
            if ratio >= 1:
                return None
            total_ns += left / bandwidth * 1e9
            left *= ratio
        return round(total_ns + left / bandwidth * 1e9)


def _of_rounds(progress: Progress) -> Iterable[Sample]:
    """The rounds that were over before the first snapshot."""
    at_ns = progress.setup_ns
    sent = 0
    for row in progress.rounds:
        bandwidth, dirtied = row.bandwidth_bytes_per_s, row.dirty_rate_pages_per_s * PAGE_SIZE
        yield Sample(at_ns, sent, row.bytes, bandwidth, dirtied)
        at_ns += row.ns
        sent += row.bytes
        yield Sample(at_ns, sent, row.dirty_pages * PAGE_SIZE, bandwidth, dirtied)
