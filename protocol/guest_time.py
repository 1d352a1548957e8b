"""Guest time across a migration: the time data of a guest, and its adjustment to the destination's clocks.

The names, widths and error variants are Propolis' (``VmTimeData``, ``adjust_time_data``); the elapsed time comes from
:mod:`protocol.clock` and not from two wall clocks. For every input that is not refused:

    destination hrtime - boot_hrtime'  =  (source hrtime - boot_hrtime) + elapsed      guest uptime grows by elapsed
    guest_tsc'  =  guest_tsc + floor(elapsed * guest_freq / 10^9)   modulo 2^64        and so does the TSC
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from protocol.clock import NS_PER_SEC, ElapsedInterval
from protocol.guest import NonNegativeNs, WireModel

U64_MAX: Final = (1 << 64) - 1
I64_MIN: Final = -(1 << 63)
I64_MAX: Final = (1 << 63) - 1

U64 = Annotated[int, Field(ge=0, le=U64_MAX)]
I64 = Annotated[int, Field(ge=I64_MIN, le=I64_MAX)]

Policy = Literal["midpoint", "never-ahead", "never-behind", "freeze"]

TimeErrorName = Literal[
    # Propolis' variants
    "Hrtime",
    "InvalidMigrateDelta",
    "GuestUptimeOverflow",
    "TimeDeltaOverflow",
    "BootHrtimeOverflow",
    "TscAdjustOverflow",
    # what Propolis lets panic or pass
    "InvalidTimeData",
    "InvalidFrequency",
    "InvalidWallClock",
    "TimeJumpTooLarge",
    "TimeErrorTooLarge",
]


class TimeAdjustError(Exception):
    """Guest time that cannot be carried over. ``name`` is the variant, the message a sentence."""

    def __init__(self, name: TimeErrorName, message: str) -> None:
        super().__init__(message)
        self.name: TimeErrorName = name


def _require(holds: bool, name: TimeErrorName, message: str) -> None:
    if not holds:
        raise TimeAdjustError(name, message)


class VmTimeData(WireModel):
    """The guest's clocks and the host's, read at one instant."""

    guest_freq: U64
    """Guest TSC frequency in Hz; a migration never changes it."""
    guest_tsc: U64
    """VM-wide guest TSC in ticks, without per-vCPU offsets."""
    hrtime: I64
    """Host monotonic clock in ns."""
    hres_sec: U64
    """Host wall clock, seconds."""
    hres_ns: U64
    """Host wall clock, nanosecond part."""
    boot_hrtime: I64
    """Host hrtime in ns at which the guest (virtually) booted; negative when the guest is older than its host."""

    @property
    def wall_ns(self) -> int:
        """Host wall clock in ns."""
        return self.hres_sec * NS_PER_SEC + self.hres_ns


@dataclass(frozen=True, slots=True)
class TimeAdjustment:
    """The adjusted time data, and what was added (Propolis' log record)."""

    adjusted: VmTimeData
    guest_uptime_ns: int
    """Guest uptime at the export."""
    tsc_delta: int
    """Ticks added to the guest TSC."""
    boot_hrtime_delta: int
    """Guest uptime at the import: how far the new boot_hrtime lies before the destination's hrtime."""


def tsc_ticks(elapsed_ns: int, guest_freq: int) -> int:
    """Whole ticks of a TSC of ``guest_freq`` Hz in ``elapsed_ns`` (not negative)."""
    return elapsed_ns * guest_freq // NS_PER_SEC


def adjust_time_data(
    source: VmTimeData, *, destination_hrtime: int, destination_wall: tuple[int, int], elapsed_ns: int
) -> TimeAdjustment:
    """Carry ``source``'s time data to the destination, ``elapsed_ns`` after it was exported.

    ``destination_hrtime`` (ns) and ``destination_wall`` (seconds, nanoseconds) are the destination's clocks at the
    instant to which ``elapsed_ns`` counts. Raises :class:`TimeAdjustError`. Propolis' checks come first and in its
    order, so its variant is reported wherever it would report one.
    """
    _require(
        0 <= destination_hrtime <= I64_MAX,
        "Hrtime",
        "The destination's monotonic clock is negative or does not fit in 64 bits: check the clock of that host.",
    )
    _require(
        0 <= elapsed_ns <= I64_MAX,
        "InvalidMigrateDelta",
        "The elapsed time is negative or does not fit in 64 bits: measure it again between export and import.",
    )
    uptime = source.hrtime - source.boot_hrtime
    where = f"(hrtime {source.hrtime}, boot_hrtime {source.boot_hrtime})"
    _require(uptime <= I64_MAX, "GuestUptimeOverflow", f"The guest's uptime {where} does not fit in 64 bits.")
    _require(uptime >= 0, "GuestUptimeOverflow", f"The guest's boot time lies in the source's future {where}.")
    total = uptime + elapsed_ns
    _require(
        total <= I64_MAX,
        "TimeDeltaOverflow",
        f"The guest's uptime of {uptime} ns and the elapsed {elapsed_ns} ns together do not fit in 64 bits.",
    )
    boot_hrtime = destination_hrtime - total
    _require(
        boot_hrtime >= I64_MIN,
        "BootHrtimeOverflow",
        f"The boot time {total} ns before the destination's hrtime {destination_hrtime} does not fit in 64 bits.",
    )
    _require(
        source.guest_freq > 0,
        "InvalidFrequency",
        "The guest's TSC frequency is 0 Hz: the source's time data cannot be used.",
    )
    ticks = tsc_ticks(elapsed_ns, source.guest_freq)
    _require(
        ticks <= U64_MAX,
        "TscAdjustOverflow",
        f"The ticks of {elapsed_ns} ns at {source.guest_freq} Hz do not fit in 64 bits.",
    )
    seconds, nanoseconds = destination_wall
    for host, sec, ns in (("source", source.hres_sec, source.hres_ns), ("destination", seconds, nanoseconds)):
        _require(
            0 <= sec <= U64_MAX and 0 <= ns < NS_PER_SEC,
            "InvalidWallClock",
            f"The {host}'s wall clock is out of range: seconds must be 64 bits and nanoseconds below {NS_PER_SEC}.",
        )
    adjusted = VmTimeData(
        guest_freq=source.guest_freq,
        # A guest may write its TSC to any value, so wrapping is intended.
        guest_tsc=(source.guest_tsc + ticks) & U64_MAX,
        hrtime=destination_hrtime,
        hres_sec=seconds,
        hres_ns=nanoseconds,
        boot_hrtime=boot_hrtime,
    )
    return TimeAdjustment(adjusted, guest_uptime_ns=uptime, tsc_delta=ticks, boot_hrtime_delta=total)


def read_later(earlier: VmTimeData, hrtime: int, wall: tuple[int, int]) -> VmTimeData:
    """The guest's time as its VMM would read it now, from what it read ``earlier`` on the same host.

    ``hrtime`` (ns) and ``wall`` (seconds, nanoseconds) are that host's clocks now. Guest time runs on while a guest
    stands still, so this is exact up to the rounding of one TSC tick, and, for a guest whose TSC is not scaled, to what
    the host's frequency differs from the guest's in between. Raises :class:`TimeAdjustError`.
    """
    elapsed_ns = hrtime - earlier.hrtime
    return adjust_time_data(earlier, destination_hrtime=hrtime, destination_wall=wall, elapsed_ns=elapsed_ns).adjusted


def choose_elapsed(interval: ElapsedInterval, policy: Policy) -> int:
    """The elapsed time (ns) that ``policy`` takes out of ``interval``.

    ``midpoint`` errs least, ``never-ahead`` and ``never-behind`` keep the guest on one side of true time, ``freeze``
    stops guest time during the move as QEMU does; the interval is then the time lost.
    """
    match policy:
        case "midpoint":
            return interval.midpoint_ns
        case "never-ahead":
            return interval.lower_ns
        case "never-behind":
            return interval.upper_ns
        case "freeze":
            return 0


def check_limits(interval: ElapsedInterval, *, max_time_jump_ns: int = 0, max_time_error_ns: int = 0) -> None:
    """Refuse an interval whose upper end exceeds ``max_time_jump_ns`` or whose width exceeds ``max_time_error_ns``.

    0 is no limit. Both are checked whatever the policy, before the hand-over, so that the source can resume.
    Raises :class:`TimeAdjustError`.
    """
    _require(
        not max_time_jump_ns or interval.upper_ns <= max_time_jump_ns,
        "TimeJumpTooLarge",
        f"Up to {interval.upper_ns} ns passed between export and import, more than the allowed jump of "
        f"{max_time_jump_ns} ns: shorten the switchover or raise max-time-jump.",
    )
    _require(
        not max_time_error_ns or interval.width_ns <= max_time_error_ns,
        "TimeErrorTooLarge",
        f"The time between export and import is known only to {interval.width_ns} ns, worse than the allowed "
        f"{max_time_error_ns} ns: ask for the time data again or raise max-time-error.",
    )


def wall_clock_skew(source: VmTimeData, destination: VmTimeData, interval: ElapsedInterval) -> tuple[int, int]:
    """Bounds (lower, upper) in ns of destination - source wall clock, when ``interval`` passed between the two."""
    difference = destination.wall_ns - source.wall_ns
    return difference - interval.upper_ns, difference - interval.lower_ns


def provable_skew(skew: tuple[int, int]) -> int:
    """The least wall-clock disagreement (ns, signed as the bounds) that ``skew`` proves; 0 when it proves none."""
    lower, upper = skew
    return max(lower, 0) or min(upper, 0)


StageName = Literal["migration", "daemon", "vmm"]


class TimeStage(WireModel):
    """One stage of the adjustment: the time that it covered and the changes that it made."""

    name: StageName
    ns: NonNegativeNs
    """The time that passed in this stage; stages follow each other without overlap."""
    tsc_delta: U64
    """Ticks that this stage added to the guest TSC."""
    boot_hrtime_delta: I64
    """Change of boot_hrtime in ns, wrapped to 64 bits as Propolis' script does."""


def time_account(
    source: VmTimeData, adjustment: TimeAdjustment, *, elapsed_ns: int, daemon_ns: int, vmm_ns: int, vmm_ticks: int
) -> tuple[TimeStage, TimeStage, TimeStage]:
    """The account of an import, stage by stage: migration (export to the destination's clock snapshot), daemon
    (snapshot to the write to the VMM), vmm (the rest until the VMM's own clock took over).

    ``daemon_ns`` was measured by the daemon. ``vmm_ns`` is the latency since the snapshot as the VMM found it, the
    daemon's part included, and ``vmm_ticks`` what the VMM added for all of it: the daemon itself adds nothing, as in
    Propolis.
    """
    daemon_ns = min(daemon_ns, vmm_ns)
    boot_change = adjustment.adjusted.boot_hrtime - source.boot_hrtime
    boot_change = ((boot_change - I64_MIN) & U64_MAX) + I64_MIN
    return (
        TimeStage(name="migration", ns=elapsed_ns, tsc_delta=adjustment.tsc_delta, boot_hrtime_delta=boot_change),
        TimeStage(name="daemon", ns=daemon_ns, tsc_delta=0, boot_hrtime_delta=0),
        TimeStage(name="vmm", ns=vmm_ns - daemon_ns, tsc_delta=vmm_ticks, boot_hrtime_delta=0),
    )


class _DestinationClocks(WireModel):
    hrtime: I64
    hres_sec: U64
    hres_ns: U64


class _AdjustDocument(WireModel):
    source: VmTimeData
    destination: _DestinationClocks
    elapsed_ns: int


def parse_time_data(value: object) -> VmTimeData:
    """Time data from a decoded message or document; raises :class:`TimeAdjustError` (``InvalidTimeData``)."""
    try:
        return VmTimeData.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> TimeAdjustError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A key may be anything that the peer likes: show it escaped and short.
    place = ".".join(repr(part)[1:-1][:40] for part in first["loc"] if isinstance(part, str)) or "the top"
    fault = "an object is expected" if first["type"] == "model_type" else first["msg"][:1].lower() + first["msg"][1:]
    return TimeAdjustError("InvalidTimeData", f"The time data cannot be read at {place}: {fault}.")


def adjust_time_document(document: object) -> dict[str, Any]:
    """``migratectl adjust-time`` for a decoded JSON document. Never raises for any input.

    In: ``{"source": VmTimeData, "destination": {"hrtime", "hres_sec", "hres_ns"}, "elapsed_ns": N}``. Out:
    ``{"adjusted": VmTimeData, "guest_uptime_ns", "tsc_delta", "boot_hrtime_delta"}``, or
    ``{"error": NAME, "message": SENTENCE}``.
    """
    try:
        try:
            request = _AdjustDocument.model_validate(document)
        except ValidationError as error:
            raise _invalid(error) from None
        adjustment = adjust_time_data(
            request.source,
            destination_hrtime=request.destination.hrtime,
            destination_wall=(request.destination.hres_sec, request.destination.hres_ns),
            elapsed_ns=request.elapsed_ns,
        )
    except TimeAdjustError as error:
        return {"error": error.name, "message": str(error)}
    return {
        "adjusted": adjustment.adjusted.model_dump(),
        "guest_uptime_ns": adjustment.guest_uptime_ns,
        "tsc_delta": adjustment.tsc_delta,
        "boot_hrtime_delta": adjustment.boot_hrtime_delta,
    }
