"""Timers and clocks of the guest's platform: HPET, PM timer, LAPIC, TSC deadline, RTC, Hyper-V reference counter and
VMClock page, each after the part of its model that a migration can get wrong.

Deadlines are absolute host hrtimes while the guest is here. Export subtracts boot_hrtime, import adds the new host's:
a timer due in 1 s of guest time stays due in 1 s of guest time. Hence time data comes before any of these devices. The
module is longer than others because the devices are alike and best read side by side.
"""

from __future__ import annotations

import struct
import threading
from typing import Any, Final, Protocol

from protocol.guest_time import I64_MAX, I64_MIN, U64_MAX
from vmm_sim.clock import GuestClock
from vmm_sim.errors import VmmError
from vmm_sim.host_clock import NS_PER_SEC

HPET_PERIOD_NS: Final = 10_000_000
LAPIC_PERIOD_NS: Final = 1_000_000_000
TSC_TICK_NS: Final = 4_000_000
"""The guest's kernel re-arms vCPU 0's TSC deadline at 250 Hz."""
PM_TIMER_HZ: Final = 3_579_545
PM_TIMER_MASK: Final = (1 << 24) - 1
MAX_TIMERS: Final = 64

State = dict[str, Any]


class PlatformDevice(Protocol):
    """A built-in device: a few numbers of state."""

    name: str

    def save(self) -> State:
        """State with host times normalised against boot_hrtime."""
        ...

    def load(self, state: State) -> None:
        """Take over a state, host times rebased on this host's boot_hrtime. Raises VmmError DeviceStateInvalid."""
        ...


def integers(device: str, state: State, **bounds: tuple[int, int]) -> list[int]:
    """The values of exactly the keys of ``bounds``, in order, each in its range. Raises VmmError DeviceStateInvalid."""
    if set(state) != set(bounds):
        raise VmmError("DeviceStateInvalid", f"The state of device {device} has the wrong fields.")
    values = []
    for key, (low, high) in bounds.items():
        value = state[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise VmmError("DeviceStateInvalid", f"{key} in the state of device {device} is out of range.")
        values.append(value)
    return values


I64: Final = (I64_MIN, I64_MAX)
U64: Final = (0, U64_MAX)


class Hpet:
    """A periodic comparator, and one-shot timers that the API arms for tests."""

    name = "hpet"

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.deadline = clock.host.hrtime_ns() + HPET_PERIOD_NS
        self.ticks = 0
        self.missed = 0
        self._lock = threading.Lock()  # the API arms while the vCPU fires
        self.pending: list[tuple[int, int]] = []  # (due hrtime, armed hrtime), soonest first
        self.fired: list[dict[str, int]] = []

    def arm(self, in_ns: int) -> int:
        """Arm a one-shot timer; returns the guest uptime at which it is due."""
        with self._lock:
            if len(self.pending) >= MAX_TIMERS:
                raise VmmError("TooManyTimers", f"{MAX_TIMERS} timers are pending: wait until one has fired.")
            now = self._clock.host.hrtime_ns()
            self.pending = sorted([*self.pending, (now + in_ns, now)])
        return self._clock.uptime_at(now + in_ns)

    def next_due(self) -> int:
        """Host time of the next event."""
        pending = self.pending
        return min(self.deadline, pending[0][0]) if pending else self.deadline

    def fire(self, now: int) -> None:
        """Deliver what is due at host time ``now``; a periodic tick that was missed is not delivered late."""
        if now >= self.deadline:
            overdue = (now - self.deadline) // HPET_PERIOD_NS
            self.ticks += 1
            self.missed += overdue
            self.deadline += (overdue + 1) * HPET_PERIOD_NS
        if self.pending and now >= self.pending[0][0]:
            self._fire_pending(now)

    def _fire_pending(self, now: int) -> None:
        uptime_at = self._clock.uptime_at
        with self._lock:
            due = [timer for timer in self.pending if timer[0] <= now]
            self.pending = self.pending[len(due) :]
            fired = [
                {
                    "armed_at_uptime_ns": uptime_at(armed),
                    "due_uptime_ns": uptime_at(deadline),
                    "fired_uptime_ns": uptime_at(now),
                }
                for deadline, armed in due
            ]
            self.fired = [*self.fired, *fired][-MAX_TIMERS:]

    def pending_uptimes(self) -> list[dict[str, int]]:
        """Pending one-shot timers in guest uptime."""
        uptime_at = self._clock.uptime_at
        return [
            {"armed_at_uptime_ns": uptime_at(armed), "due_uptime_ns": uptime_at(due)} for due, armed in self.pending
        ]

    def save(self) -> State:
        boot = self._clock.boot_hrtime
        return {
            "deadline": self.deadline - boot,
            "ticks": self.ticks,
            "missed": self.missed,
            "pending": [[due - boot, armed - boot] for due, armed in self.pending],
            "fired": [list(entry.values()) for entry in self.fired],
        }

    def load(self, state: State) -> None:
        state = dict(state)
        pending, fired = state.pop("pending", None), state.pop("fired", None)
        deadline, ticks, missed = integers(self.name, state, deadline=I64, ticks=U64, missed=U64)
        boot = self._clock.boot_hrtime
        self.deadline, self.ticks, self.missed = deadline + boot, ticks, missed
        self.pending = sorted((due + boot, armed + boot) for due, armed in _tuples(self.name, pending, 2))
        self.fired = [
            {"armed_at_uptime_ns": armed, "due_uptime_ns": due, "fired_uptime_ns": fired_at}
            for armed, due, fired_at in _tuples(self.name, fired, 3)
        ]


def _tuples(device: str, rows: object, width: int) -> list[list[int]]:
    if not isinstance(rows, list) or len(rows) > MAX_TIMERS:
        raise VmmError("DeviceStateInvalid", f"The timers of device {device} are not a list of at most {MAX_TIMERS}.")
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            raise VmmError("DeviceStateInvalid", f"A timer of device {device} is not a list of {width} numbers.")
        integers(device, {str(i): value for i, value in enumerate(row)}, **{str(i): I64 for i in range(width)})
    return rows


class PmTimer:
    """A free-running 24-bit counter at 3.579545 MHz; its state is the host time of its zero."""

    name = "pm-timer"

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.start = clock.boot_hrtime

    def value_at(self, hrtime: int) -> int:
        """The counter at host time ``hrtime``."""
        return ((hrtime - self.start) * PM_TIMER_HZ // NS_PER_SEC) & PM_TIMER_MASK

    def save(self) -> State:
        return {"start": self.start - self._clock.boot_hrtime}

    def load(self, state: State) -> None:
        (start,) = integers(self.name, state, start=I64)
        self.start = start + self._clock.boot_hrtime


class Lapic:
    """The LAPIC timer of vCPU 0 in periodic mode."""

    name = "lapic"

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.target = clock.host.hrtime_ns() + LAPIC_PERIOD_NS
        self.ticks = 0

    def fire(self, now: int) -> None:
        """Deliver what is due at host time ``now``."""
        if now >= self.target:
            self.ticks += 1
            self.target += ((now - self.target) // LAPIC_PERIOD_NS + 1) * LAPIC_PERIOD_NS

    def save(self) -> State:
        return {"target": self.target - self._clock.boot_hrtime, "ticks": self.ticks}

    def load(self, state: State) -> None:
        target, self.ticks = integers(self.name, state, target=I64, ticks=U64)
        self.target = target + self._clock.boot_hrtime


class Rtc:
    """A real-time clock: wall seconds at a base host time."""

    name = "rtc"

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.base_hrtime = clock.boot_hrtime
        self.base_seconds = clock.host.wall()[0]

    def seconds_at(self, hrtime: int) -> int:
        """Return the clock that the guest reads at host time ``hrtime`` (seconds)."""
        return self.base_seconds + (hrtime - self.base_hrtime) // NS_PER_SEC

    def save(self) -> State:
        return {"base": self.base_hrtime - self._clock.boot_hrtime, "seconds": self.base_seconds}

    def load(self, state: State) -> None:
        base, self.base_seconds = integers(self.name, state, base=I64, seconds=U64)
        self.base_hrtime = base + self._clock.boot_hrtime


class HyperV:
    """The reference counter: guest uptime in units of 100 ns. It has no state but the last value that was read."""

    name = "hyperv"

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.last = 0

    def read(self, hrtime: int) -> int:
        """The counter at host time ``hrtime``."""
        self.last = max(self._clock.uptime_at(hrtime) // 100, 0)
        return self.last

    def save(self) -> State:
        return {"last": self.last}

    def load(self, state: State) -> None:
        (self.last,) = integers(self.name, state, last=U64)


class VmClock:
    """The VMClock page: tells the guest that its clock was disrupted, and by how much it may be off."""

    name = "vmclock"
    _PAGE: Final = struct.Struct("<IIHBBIQQ2xBBhBBQQQQQQQQQ")
    _MAGIC: Final = 0x4B4C4356
    _FLAGS: Final = (1 << 4) | (1 << 6) | (1 << 7)  # period and time maximum error valid, monotonic
    _FREERUNNING: Final = 3
    RATE_ERROR_PPM: Final = 50

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.sequence = 0
        self.marker = 1
        self.max_error_ns = 0
        self.imported_error_ns = 0
        self._update()

    def _update(self) -> None:
        reading = self._clock.read()
        self.counter = reading.guest_tsc
        self.seconds, self.nanoseconds = reading.hres_sec, reading.hres_ns
        self.sequence = (self.sequence + 2) & 0xFFFFFFFF  # odd only while a reader could see it half done

    def page(self) -> bytes:
        """The page, little-endian, 112 bytes."""
        period = (1 << 64) // self._clock.guest_freq
        return self._PAGE.pack(
            self._MAGIC,
            self._PAGE.size,
            1,
            1,  # the counter is the x86 TSC
            0,
            self.sequence,
            self.marker,
            self._FLAGS,
            self._FREERUNNING,
            0,
            0,
            0,
            0,
            self.counter,
            period,
            0,
            period * self.RATE_ERROR_PPM // 1_000_000,
            self.seconds,
            (self.nanoseconds << 64) // NS_PER_SEC,
            0,
            self.max_error_ns,
            0,
        )

    def save(self) -> State:
        return {"sequence": self.sequence, "marker": self.marker, "max_error": self.max_error_ns}

    def load(self, state: State) -> None:
        """A load is a disruption: the marker moves on, and the error of this move adds to those before."""
        sequence, marker, max_error = integers(
            self.name, state, sequence=(0, (1 << 32) - 1), marker=(0, U64_MAX - 1), max_error=(0, I64_MAX)
        )
        self.sequence, self.marker = sequence, marker + 1
        self.max_error_ns = min(max_error + self.imported_error_ns, I64_MAX)
        self._update()


class TscDeadlines:
    """TSC offset and TSC deadline of every vCPU: model-specific registers, part of the vCPU state.

    A deadline is armed against the TSC as it stands, so the offset must be loaded first.
    """

    name = "cpu"

    def __init__(self, clock: GuestClock, vcpus: int, skew: int) -> None:
        self._clock = clock
        self.offsets = [(i * skew) & U64_MAX for i in range(vcpus)]
        self.deadlines = [0] * vcpus  # 0: disarmed
        self.ticks = 0

    def arm_first(self, tsc: int) -> None:
        """The guest's kernel starts its tick on vCPU 0."""
        self.deadlines[0] = self._next(tsc)

    def _next(self, tsc: int) -> int:
        return (tsc + self.offsets[0] + TSC_TICK_NS * self._clock.guest_freq // NS_PER_SEC) & U64_MAX or 1

    def fire(self, tsc: int) -> None:
        """Deliver vCPU 0's tick if its deadline has passed at VM-wide ``tsc``; the guest's kernel arms the next."""
        deadline = self.deadlines[0]
        if deadline and not ((tsc + self.offsets[0] - deadline) & U64_MAX) >> 63:
            self.ticks += 1
            self.deadlines[0] = self._next(tsc)

    def save(self) -> list[list[Any]]:
        """The registers in the order in which they must be loaded."""
        return [["TSC", self.offsets], ["TSC_DEADLINE", self.deadlines], ["TICKS", [self.ticks]]]

    def load(self, registers: object) -> None:
        """Load registers in their order. Raises VmmError TscDeadlineBeforeTsc, DeviceStateInvalid."""
        if not isinstance(registers, list) or len(registers) != 3:
            raise VmmError("DeviceStateInvalid", "The registers in the state of device cpu are not a list of three.")
        loaded: dict[str, list[int]] = {}
        for entry in registers:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
                raise VmmError("DeviceStateInvalid", "A register in the state of device cpu is not a name and a list.")
            name, values = entry
            if name == "TSC_DEADLINE" and "TSC" not in loaded:
                raise VmmError(
                    "TscDeadlineBeforeTsc",
                    "The vCPU state loads TSC_DEADLINE before TSC: a deadline needs the TSC that it refers to.",
                )
            width = 1 if name == "TICKS" else len(self.offsets)
            if name not in ("TSC", "TSC_DEADLINE", "TICKS") or name in loaded or len(values) != width:
                raise VmmError("DeviceStateInvalid", f"Register {name!r} in the state of device cpu does not fit.")
            keys = {str(i): value for i, value in enumerate(values)}
            loaded[name] = integers("cpu", keys, **dict.fromkeys(keys, U64))
        self.offsets, self.deadlines, (self.ticks,) = loaded["TSC"], loaded["TSC_DEADLINE"], loaded["TICKS"]


class Platform:
    """All of them, and the check that the vCPU makes every millisecond."""

    def __init__(self, clock: GuestClock, vcpus: int, tsc_skew: int) -> None:
        self.clock = clock
        self.hpet = Hpet(clock)
        self.pm_timer = PmTimer(clock)
        self.lapic = Lapic(clock)
        self.rtc = Rtc(clock)
        self.hyperv = HyperV(clock)
        self.vmclock = VmClock(clock)
        self.tsc = TscDeadlines(clock, vcpus, tsc_skew)

    def devices(self) -> tuple[PlatformDevice, ...]:
        """The devices with a state of their own, in load order; TSC deadlines travel with the vCPU."""
        return (self.hpet, self.pm_timer, self.lapic, self.rtc, self.hyperv, self.vmclock)

    def fire(self, hrtime: int, tsc: int) -> None:
        """Deliver what is due."""
        if hrtime >= self.hpet.next_due():
            self.hpet.fire(hrtime)
        if hrtime >= self.lapic.target:
            self.lapic.fire(hrtime)
        self.tsc.fire(tsc)

    def report(self) -> dict[str, Any]:
        """Return the platform's counters and clocks as the guest would read them now, for status."""
        hrtime = self.clock.host.hrtime_ns()
        return {
            "hpet_ticks": self.hpet.ticks,
            "hpet_missed": self.hpet.missed,
            "lapic_ticks": self.lapic.ticks,
            "tsc_deadline_ticks": self.tsc.ticks,
            "tsc_offsets": self.tsc.offsets[:8],
            "pm_timer": self.pm_timer.value_at(hrtime),
            "rtc_seconds": self.rtc.seconds_at(hrtime),
            "hyperv_reference": self.hyperv.read(hrtime),
            "vmclock": {
                "disruption_marker": self.vmclock.marker,
                "time_maxerror_ns": self.vmclock.max_error_ns,
                "page": self.vmclock.page(),
            },
        }
