"""The guest's clock: the kernel half of guest time, as bhyve has it.

    guest_tsc = ((host_tsc * multiplier) >> FRACTION_BITS) + offset     modulo 2^64
    uptime    = hrtime - boot_hrtime

Guest time runs on while the vCPUs are stopped. Time import replaces offset and boot_hrtime and must come before any
device, since device timers are rebased on boot_hrtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from protocol.guest_time import U64_MAX, VmTimeData, tsc_ticks
from protocol.wrong_values import first_fault
from vmm_sim.errors import VmmError
from vmm_sim.host_clock import NS_PER_SEC, HostClock

FRACTION_BITS: Final = 32
TSC_TOLERANCE_PPM: Final = 250
"""A guest whose TSC frequency is this close to the host's runs unscaled (KVM's default, also QEMU's)."""
_MIN_SCALED_GUEST_FREQ: Final = 500_000_000
_MAX_SCALED_RATIO: Final = 15
"""TSC scaling covers guests of at least 500 MHz and below 15 times the host's frequency (illumos, AMD)."""


@dataclass(frozen=True, slots=True)
class HostTsc:
    """The host's TSC: its frequency in Hz, and whether the hardware can scale a guest's."""

    freq: int
    can_scale: bool = True

    def multiplier(self, guest_freq: int) -> int:
        """Fixed-point factor from host to guest ticks.

        Raises VmmError: TimeInvalidFrequency, TscScalingUnavailable (the kernel's EPERM), TscRatioOutOfRange.
        """
        if guest_freq == 0:
            raise VmmError("TimeInvalidFrequency", "The guest TSC frequency is 0: the time data is damaged.")
        difference = abs(guest_freq - self.freq)
        if difference == 0:
            return 1 << FRACTION_BITS
        if not self.can_scale:
            if difference * 1_000_000 <= TSC_TOLERANCE_PPM * self.freq:
                return 1 << FRACTION_BITS
            raise VmmError(
                "TscScalingUnavailable",
                f"The guest's TSC runs at {guest_freq} Hz and this host's at {self.freq} Hz, more than"
                f" {TSC_TOLERANCE_PPM} ppm apart, and this host cannot scale: choose a host that can.",
            )
        if guest_freq < _MIN_SCALED_GUEST_FREQ or guest_freq >= _MAX_SCALED_RATIO * self.freq:
            raise VmmError(
                "TscRatioOutOfRange",
                f"This host scales guest TSCs from {_MIN_SCALED_GUEST_FREQ} Hz to below {_MAX_SCALED_RATIO} times its"
                f" own {self.freq} Hz, not to {guest_freq} Hz.",
            )
        return (guest_freq << FRACTION_BITS) // self.freq


@dataclass(frozen=True, slots=True)
class TimeImport:
    """The VMM's own addition on import: the time since the caller's clock reading."""

    vmm_ns: int
    vmm_ticks: int


def parse_time_data(value: object) -> VmTimeData:
    """Time data from the API socket. Raises VmmError InvalidTimeData."""
    try:
        time_data = VmTimeData.model_validate(value)
    except ValidationError as error:
        raise VmmError("InvalidTimeData", f"The time data is not usable: {first_fault(error)}.") from error
    if time_data.hres_ns >= NS_PER_SEC:
        raise VmmError("InvalidTimeData", f"The time data's hres_ns is {time_data.hres_ns}, a second or more.")
    return time_data


class GuestClock:
    """The clock of one guest on one host; booted now, at TSC ``boot_tsc``."""

    def __init__(self, host: HostClock, host_tsc: HostTsc, guest_freq: int, boot_tsc: int = 0) -> None:
        self.host = host
        self._host_tsc = host_tsc
        self.guest_freq = guest_freq
        self.hops = 0
        self.ran_unscaled_before = False
        self._multiplier = host_tsc.multiplier(guest_freq)
        self.boot_hrtime = host.hrtime_ns()
        self._offset = (boot_tsc - self._scaled(self.boot_hrtime)) & U64_MAX

    def _scaled(self, hrtime: int) -> int:
        return (hrtime * self._host_tsc.freq // NS_PER_SEC * self._multiplier) >> FRACTION_BITS

    @property
    def scaled(self) -> bool:
        """True when the guest's TSC is scaled to exactly its frequency here (False: within the tolerance, unscaled)."""
        return self._multiplier != 1 << FRACTION_BITS or self.guest_freq == self._host_tsc.freq

    @property
    def ran_unscaled(self) -> bool:
        """True when the TSC ever ran unscaled, at a host's frequency (within the tolerance), here or elsewhere."""
        return self.ran_unscaled_before or not self.scaled

    def tsc_at(self, hrtime: int) -> int:
        """VM-wide guest TSC at host time ``hrtime``."""
        return (self._scaled(hrtime) + self._offset) & U64_MAX

    def uptime_at(self, hrtime: int) -> int:
        """Guest uptime in ns at host time ``hrtime``."""
        return hrtime - self.boot_hrtime

    def read(self) -> VmTimeData:
        """All clocks at one instant."""
        hrtime = self.host.hrtime_ns()
        seconds, nanoseconds = self.host.wall()
        return VmTimeData(
            guest_freq=self.guest_freq,
            guest_tsc=self.tsc_at(hrtime),
            hrtime=hrtime,
            hres_sec=seconds,
            hres_ns=nanoseconds,
            boot_hrtime=self.boot_hrtime,
        )

    def import_time(self, time_data: VmTimeData) -> TimeImport:
        """Take over ``time_data``, which the caller adjusted to this host's clocks a moment ago.

        The checks and their order are the kernel's. Its own latency is added to the TSC, at the new frequency;
        boot_hrtime is stored as given and the wall clock is ignored. Raises VmmError, with the clock unchanged.
        """
        multiplier = self._host_tsc.multiplier(time_data.guest_freq)
        now = self.host.hrtime_ns()
        if time_data.hrtime > now or time_data.boot_hrtime > now:
            raise VmmError(
                "TimeInFuture",
                f"The time data's hrtime {time_data.hrtime} or boot_hrtime {time_data.boot_hrtime} lies after this"
                f" host's {now}: adjust it to this host's clock first.",
            )
        latency_ns = now - time_data.hrtime
        ticks = tsc_ticks(latency_ns, time_data.guest_freq)
        self._multiplier = multiplier
        self.guest_freq = time_data.guest_freq
        self.boot_hrtime = time_data.boot_hrtime
        self._offset = (time_data.guest_tsc + ticks - self._scaled(now)) & U64_MAX
        return TimeImport(latency_ns, ticks)
