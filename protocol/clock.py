"""Clock exchange samples in, intervals with a proven bound out. No wall clock is read or trusted.

One exchange: A asks at T1, B hears it at T2, answers at T3, A hears that at T4. No transit is negative, so B - A lies
between T3 - T4 and T2 - T1, however asymmetric the path (Cristian 1989; RFC 5905 section 8):

    B  ------------T2----T3------------->   T1, T4 on A's clock, T2, T3 on B's
                  /        \\
    A  ---------T1----------T4---------->   delta = (T4 - T1) - (T3 - T2)

The exchange that wraps an export needs no earlier sample: the destination asks, the source exports at S inside, the
destination imports at D after the reply. The interval for D - S in true time is as wide as that round trip, however
long the pause:

    source       ----T2---S---T3------------------>
                    /            \\
    destination  --T1-------------T4----D--------->

All stamps and durations are integer nanoseconds. ``rho_ppb`` bounds the rate error of one clock against true time
(rate within 1 - rho and 1 + rho); ``resolution_ns`` is the step of a stamp (a stamp is a clock reading rounded down).
Take T1 and T3 before the write, T2 and T4 after the read; then every delay only widens the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NS_PER_SEC: Final = 1_000_000_000
DEFAULT_RHO_PPB: Final = 100_000
DEFAULT_RESOLUTION_NS: Final = 1

_PPB: Final = 1_000_000_000


class ClockError(Exception):
    """Stamps that give no interval. The message names them and says what to do."""


class FalsifiedStampsError(ClockError):
    """Stamps that two clocks within the drift bound cannot have produced."""


class InconsistentClocksError(ClockError):
    """Intervals that each hold alone but exclude each other."""


class NoTransitBoundError(ClockError):
    """No bound of the transit is known: neither an offset nor an earlier message of this host."""


def _least_true_ns(measured_ns: int, rho_ppb: int) -> int:
    """The least true time in which a clock can advance by ``measured_ns``, rounded down."""
    return measured_ns * _PPB // (_PPB + rho_ppb)


def _most_true_ns(measured_ns: int, rho_ppb: int) -> int:
    """The most true time in which a clock can advance by ``measured_ns``, rounded up."""
    return -(-measured_ns * _PPB // (_PPB - rho_ppb))


def _check_bounds(rho_ppb: int, resolution_ns: int) -> None:
    if not 0 <= rho_ppb < _PPB or resolution_ns < 0:
        raise ValueError(f"rho_ppb {rho_ppb} must be in [0, {_PPB}) and resolution_ns {resolution_ns} not negative.")


def _check_round_trip(t1: int, t2: int, t3: int, t4: int, rho_ppb: int, resolution_ns: int) -> None:
    """Raise :class:`FalsifiedStampsError` unless the answer can have been made between asking and hearing it.

    Exactly delta >= -2 rho (T4 - T1) - resolution to first order: the round trip in true time, at its longest, must
    hold the peer's processing at its shortest.
    """
    _check_bounds(rho_ppb, resolution_ns)
    if t4 < t1:
        raise FalsifiedStampsError(
            f"The local clock ran backwards by {t1 - t4} ns during a clock exchange: repeat it, and check the clock."
        )
    if t3 < t2:
        raise FalsifiedStampsError(
            f"The peer says that it answered {t2 - t3} ns before it heard the question of a clock exchange: "
            "do not use its stamps."
        )
    if (t4 - t1 + resolution_ns) * (_PPB + rho_ppb) < (t3 - t2 - resolution_ns) * (_PPB - rho_ppb):
        raise FalsifiedStampsError(
            f"The peer says that it needed {t3 - t2} ns inside a clock exchange that took {t4 - t1} ns: a clock was "
            "stepped, a host was suspended or the stamps are false; repeat the exchange."
        )


@dataclass(frozen=True, slots=True)
class ClockExchange:
    """One exchange: ``t1`` and ``t4`` on the asking (local) clock, ``t2`` and ``t3`` on the answering (remote) one."""

    t1: int
    t2: int
    t3: int
    t4: int

    @property
    def delta_ns(self) -> int:
        """Round trip without the peer's processing: the width of the interval."""
        return (self.t4 - self.t1) - (self.t3 - self.t2)

    def check(self, *, rho_ppb: int = DEFAULT_RHO_PPB, resolution_ns: int = DEFAULT_RESOLUTION_NS) -> None:
        """Raise :class:`FalsifiedStampsError` when two clocks within the bounds cannot have produced these stamps."""
        _check_round_trip(self.t1, self.t2, self.t3, self.t4, rho_ppb, resolution_ns)


@dataclass(frozen=True, slots=True)
class OffsetInterval:
    """Bounds of remote - local clock at one instant (ns)."""

    lower_ns: int
    upper_ns: int

    @property
    def width_ns(self) -> int:
        """Upper minus lower bound."""
        return self.upper_ns - self.lower_ns


@dataclass(frozen=True, slots=True)
class OffsetEstimate:
    """The bounds of remote - local that follow from a set of exchanges with one peer. The order of the exchanges does
    not matter, and one more exchange never widens the interval.

    Raises :class:`FalsifiedStampsError` when one of the exchanges is impossible by itself.
    """

    exchanges: tuple[ClockExchange, ...]
    rho_ppb: int = DEFAULT_RHO_PPB
    resolution_ns: int = DEFAULT_RESOLUTION_NS

    def __post_init__(self) -> None:
        if not self.exchanges:
            raise ValueError("An offset estimate needs at least one clock exchange.")
        for exchange in self.exchanges:
            exchange.check(rho_ppb=self.rho_ppb, resolution_ns=self.resolution_ns)

    def at(self, local_ns: int) -> OffsetInterval:
        """Bounds of remote - local when the local clock shows ``local_ns``.

        An exchange of age a is widened by 2 rho a / (1 - rho) on each side: the bounds hold when the peer heard and
        when it answered, and both lie between the two local stamps. Raises :class:`InconsistentClocksError` when no
        offset fits every exchange.
        """
        lower, upper = [], []
        for exchange in self.exchanges:
            age = max(abs(local_ns - exchange.t1), abs(local_ns - exchange.t4)) + self.resolution_ns
            widening = -(-2 * self.rho_ppb * age // (_PPB - self.rho_ppb)) + self.resolution_ns
            lower.append(exchange.t3 - exchange.t4 - widening)
            upper.append(exchange.t2 - exchange.t1 + widening)
        interval = OffsetInterval(max(lower), min(upper))
        if interval.lower_ns > interval.upper_ns:
            raise InconsistentClocksError(
                f"{len(self.exchanges)} clock exchanges exclude each other by {-interval.width_ns} ns: a clock was "
                f"stepped, drifts by more than {self.rho_ppb} ppb or the peer's stamps are false; start over with "
                "fresh exchanges."
            )
        return interval


@dataclass(frozen=True, slots=True)
class ElapsedInterval:
    """Bounds of a true elapsed time (ns), never negative. Raises :class:`InconsistentClocksError` when empty."""

    lower_ns: int
    upper_ns: int

    def __post_init__(self) -> None:
        if not 0 <= self.lower_ns <= self.upper_ns:
            raise InconsistentClocksError(
                f"No elapsed time lies between {self.lower_ns} and {self.upper_ns} ns: the clocks contradict each "
                "other; abort, and check both hosts' clocks."
            )

    @property
    def width_ns(self) -> int:
        """Upper minus lower bound."""
        return self.upper_ns - self.lower_ns

    @property
    def midpoint_ns(self) -> int:
        """The middle, rounded down: the value with the least possible error."""
        return (self.lower_ns + self.upper_ns) // 2

    def error_ns(self, elapsed_ns: int) -> int:
        """Return the largest possible error of ``elapsed_ns`` (ns)."""
        return max(self.upper_ns - elapsed_ns, elapsed_ns - self.lower_ns)


@dataclass(frozen=True, slots=True)
class ExportExchange:
    """The exchange that wraps an export: ``t1``, ``t4`` and ``imported_at`` on the asking destination's clock,
    ``t2``, ``exported_at`` and ``t3`` on the source's."""

    t1: int
    t2: int
    exported_at: int
    t3: int
    t4: int
    imported_at: int

    @property
    def delta_ns(self) -> int:
        """Round trip without the source's processing: the width of the interval without drift."""
        return (self.t4 - self.t1) - (self.t3 - self.t2)

    def elapsed(
        self,
        *,
        rho_ppb: int = DEFAULT_RHO_PPB,
        resolution_ns: int = DEFAULT_RESOLUTION_NS,
        min_forward_ns: int = 0,
        min_back_ns: int = 0,
        offset: OffsetEstimate | None = None,
    ) -> ElapsedInterval:
        """Bounds of the true time from export to import.

        ``min_forward_ns`` and ``min_back_ns`` are transits below which the ask and the reply are known not to fall.
        ``offset`` (source - destination, from exchanges that the destination asked) narrows the interval where it
        can. The bounds are rounded outwards; whatever the source's stamps say, they stay within what the destination
        measured alone: reply to import, and ask to import.

        Raises :class:`FalsifiedStampsError` for stamps out of order or an impossible round trip,
        :class:`InconsistentClocksError` when ``offset`` or the minimum transits exclude what the exchange says.
        """
        _check_round_trip(self.t1, self.t2, self.t3, self.t4, rho_ppb, resolution_ns)
        if not self.t2 <= self.exported_at <= self.t3:
            raise FalsifiedStampsError(
                f"The source says that it exported {self.exported_at - self.t2} ns after it was asked and answered "
                f"{self.t3 - self.exported_at} ns after the export: do not use its time data."
            )
        if self.imported_at < self.t4:
            raise FalsifiedStampsError(
                f"The import is stamped {self.t4 - self.imported_at} ns before the reply that it uses: stamp the "
                "import after the reply was read."
            )

        def measured(later: int, earlier: int) -> int:
            """Return the least time between two stamps of one clock (ns, on that clock)."""
            return max(0, later - earlier - resolution_ns)

        replied_to_import = measured(self.t3, self.exported_at) + measured(self.imported_at, self.t4)
        asked_to_import = self.imported_at - self.t1 + resolution_ns
        lower = _least_true_ns(replied_to_import, rho_ppb) + min_back_ns
        upper = (
            _most_true_ns(asked_to_import, rho_ppb)
            - _least_true_ns(measured(self.exported_at, self.t2), rho_ppb)
            - min_forward_ns
        )
        if offset is not None:
            # The source's clock at the import is imported_at + offset: the export is that long ago on its own clock.
            now = offset.at(self.imported_at)
            on_source = self.imported_at - self.exported_at
            lower = max(lower, _least_true_ns(on_source + now.lower_ns - resolution_ns, rho_ppb))
            upper = min(upper, _most_true_ns(on_source + now.upper_ns + resolution_ns, rho_ppb))
        return ElapsedInterval(lower, upper)


def one_way_transit(
    offset: OffsetInterval | None,
    sent_at_remote: int,
    received_at_local: int,
    *,
    followed_local: int | None = None,
    rho_ppb: int = DEFAULT_RHO_PPB,
    resolution_ns: int = DEFAULT_RESOLUTION_NS,
) -> tuple[int, int]:
    """Bounds (lower, upper) in ns, never negative, for the transit of a message that the sender stamped before its
    write and we stamp after the read.

    ``offset`` is remote - local at ``received_at_local``. ``followed_local`` is when we, by our clock, wrote the last
    message that the sender must have read before it stamped this one: the transit cannot be longer than the time
    since then. It is the fallback when no offset is known, and caps the bound when one is.

    Raises :class:`NoTransitBoundError` when both are None, :class:`FalsifiedStampsError` when the message would have
    arrived before it was sent.
    """
    _check_bounds(rho_ppb, resolution_ns)
    lower, uppers = 0, []
    if followed_local is not None:
        uppers.append(_most_true_ns(received_at_local - followed_local + resolution_ns, rho_ppb))
    if offset is not None:
        on_remote = received_at_local - sent_at_remote
        lower = max(0, _least_true_ns(on_remote + offset.lower_ns - resolution_ns, rho_ppb))
        uppers.append(_most_true_ns(on_remote + offset.upper_ns + resolution_ns, rho_ppb))
    if not uppers:
        raise NoTransitBoundError(
            "The transit of a message cannot be bounded: exchange clocks with the peer first, or name a message of "
            "ours that it followed."
        )
    upper = min(uppers)
    if upper < lower:
        raise FalsifiedStampsError(
            f"A message needed at least {lower} and at most {upper} ns by its stamps: the sender's clock was stepped "
            "or its stamp is false; do not use it."
        )
    return lower, upper
