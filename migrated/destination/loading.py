"""Loading: puts all state that arrives into the incoming guest, in the order that correctness needs.

iterable state of the rounds   on arrival
time data                      before any final device state, where the guest's time travels
final iterable state           after the time data
other devices' final state     after STATE_END and the last page, since a device may look into guest memory
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from migrated.base.clock import HostClock
from migrated.base.errors import MigrationError
from migrated.destination.states import ArrivedState, ArrivingStates
from migrated.record.model import TimeSummary
from migrated.vmm.seam import StatePart, TimeImport, VmmGuest
from protocol import messages
from protocol.clock import ElapsedInterval, ExportExchange, OffsetEstimate
from protocol.guest_time import (
    TimeAdjustment,
    VmTimeData,
    adjust_time_data,
    check_limits,
    choose_elapsed,
    provable_skew,
    time_account,
    wall_clock_skew,
)
from protocol.messages import TimeRules

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ArrivedTime:
    """The answer to our time ask: the message, and the stamps of the exchange on this host's raw clock."""

    data: messages.TimeData
    asked_at_ns: int
    read_at_ns: int
    offset: OffsetEstimate | None = None
    """Bounds of the difference of the two hosts' clocks from earlier exchanges, None where there are none."""

    @property
    def time(self) -> VmTimeData:
        """The guest's time at its export."""
        return self.data.time

    @property
    def round_trip_ns(self) -> int:
        """The round trip of the exchange, which decides how well the elapsed time is known."""
        return self._exchange(self.read_at_ns).delta_ns

    def elapsed(self, imported_at_ns: int, _wall: tuple[int, int]) -> ElapsedInterval:
        """Bounds of the time from the export to an instant of this host's raw clock."""
        return self._exchange(imported_at_ns).elapsed(offset=self.offset)

    def _exchange(self, imported_at_ns: int) -> ExportExchange:
        data = self.data
        return ExportExchange(
            self.asked_at_ns, data.t2_ns, data.time.hrtime, data.t3_ns, self.read_at_ns, imported_at_ns
        )


class ExportedTime(Protocol):
    """A guest's time that has come from somewhere, and what is known of how long ago it was read."""

    @property
    def time(self) -> VmTimeData:
        """The guest's time at its export."""

    @property
    def round_trip_ns(self) -> int:
        """The round trip of the exchange that brought it, 0 where there was none."""

    def elapsed(self, imported_at_ns: int, wall: tuple[int, int]) -> ElapsedInterval:
        """Bounds of the time from the export to an instant of this host's clocks, raw (ns) and wall (seconds,
        nanoseconds).

        Raises:
            ClockError, TimeAdjustError: the clocks give none.
        """


@dataclass(frozen=True, slots=True)
class _ImportedTime:
    """One import of a guest's time: what came, how long that took, what it became, and what the daemon and the VMM
    spent on it."""

    exported: ExportedTime
    interval: ElapsedInterval
    elapsed_ns: int
    adjustment: TimeAdjustment
    daemon_ns: int
    imported: TimeImport


@dataclass(slots=True)
class Loaded:
    """The results of loading so far."""

    load_ns: dict[str, int] = field(default_factory=dict)
    states: int = 0
    final_devices: set[tuple[str, str]] = field(default_factory=set)
    time: TimeSummary | None = None


class Loading:
    """Loads one incoming guest. ``run`` is a task of its own; the other methods feed it from the event loop.

    Args:
        vmm: the incoming guest.
        devices: (name, kind) of every device that must have its final state loaded.
        rules: how guest time is carried over.
        clock: this host's clocks.
        arriving: where states come from; is told when one is loaded.
    """

    def __init__(
        self,
        vmm: VmmGuest,
        devices: set[tuple[str, str]],
        rules: TimeRules,
        clock: HostClock,
        arriving: ArrivingStates,
    ) -> None:
        self.done = Loaded()
        self._vmm = vmm
        self._devices = devices
        self._rules = rules
        self._clock = clock
        self._arriving = arriving
        self._states: dict[int, ArrivedState] = {}
        self._arrived = asyncio.Event()
        self._time: asyncio.Future[ExportedTime] = asyncio.get_running_loop().create_future()
        self._imported: _ImportedTime | None = None
        self._complete: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def add_state(self, state: ArrivedState) -> None:
        """A whole device state arrived."""
        self._states[state.meta.order] = state
        self._arrived.set()

    def add_time(self, exported: ExportedTime) -> None:
        """The guest's time arrived."""
        if not self._time.done():
            self._time.set_result(exported)
            self._arrived.set()

    def all_arrived(self, states: int) -> None:
        """Every page of the final state is in place and ``states`` device states were sent in all."""
        if not self._complete.done():
            self._complete.set_result(states)
            self._arrived.set()

    async def run(self) -> None:
        """Load until all state is in place.

        Raises:
            MigrationError, TimeAdjustError, ClockError: a state or the time cannot be loaded.
        """
        expected: int | None = None
        while expected is None or self.done.states < expected:
            state = self._states.pop(self.done.states, None)
            if state is None and self._time.done() and self._vmm.time is not None and self._imported is None:
                await self._import_time()  # while states are on their way
                continue
            if state is None:
                if self._complete.done():
                    expected = self._complete.result()
                    if self.done.states >= expected:
                        break
                self._arrived.clear()
                await self._arrived.wait()
                continue
            if state.meta.final:
                await self._load_final(state)
            else:
                await self._load_iteration(state)
        await self._import_time()  # also when the guest has no devices at all
        self._account_for_time()
        missing = self._devices - self.done.final_devices
        if missing:
            names = ", ".join(f"{name} ({kind})" for name, kind in sorted(missing))
            raise MigrationError(f"the final state of {names} never arrived")

    async def _load_iteration(self, state: ArrivedState) -> None:
        """Load the state that an iterable device sent in a round."""
        iterations = self._vmm.iterations
        if iterations is None:
            raise MigrationError(
                f"device {state.meta.name} sent state in a round, which the driver {self._vmm.driver!r} cannot load"
            )
        await iterations.load_iteration(_part(state))
        self._arriving.loaded(state)
        self.done.states += 1

    async def _load_final(self, first: ArrivedState) -> None:
        """Load a final state together with those behind it that have arrived and may be loaded now."""
        await self._import_time()
        if first.meta.kind == "non-iterable":
            await asyncio.shield(self._complete)
        ready = [first]
        while (state := self._states.get(first.meta.order + len(ready))) is not None and self._may_be_loaded(state):
            ready.append(self._states.pop(state.meta.order))
        loading = asyncio.ensure_future(self._vmm.state_in([_part(state) for state in ready]))
        try:
            await asyncio.sleep(0)
            self._account_for_time()  # while the VMM is at work
        finally:
            costs_ns = await loading
        for state, ns in zip(ready, costs_ns, strict=True):
            self.done.load_ns[f"{state.meta.name}/{state.meta.kind}"] = ns
            self.done.final_devices.add((state.meta.name, state.meta.kind))
            self._arriving.loaded(state)
        self.done.states += len(ready)

    def _may_be_loaded(self, state: ArrivedState) -> bool:
        """Return whether a state behind final ones can be loaded in the same call."""
        return state.meta.final and (state.meta.kind == "iterable" or self._complete.done())

    async def _import_time(self) -> None:
        """Adjust the guest's time to this host and import it, once, if it travels."""
        guest_time = self._vmm.time
        if guest_time is None or self._imported is not None:
            return
        exported, rules = await asyncio.shield(self._time), self._rules
        imported_at_ns, wall = self._clock.hrtime_ns(), self._clock.wall()
        interval = exported.elapsed(imported_at_ns, wall)
        check_limits(interval, max_time_jump_ns=rules.max_time_jump_ns, max_time_error_ns=rules.max_time_error_ns)
        elapsed_ns = choose_elapsed(interval, rules.policy)
        adjustment = adjust_time_data(
            exported.time, destination_hrtime=imported_at_ns, destination_wall=wall, elapsed_ns=elapsed_ns
        )
        daemon_ns = self._clock.hrtime_ns() - imported_at_ns
        error_ns = interval.error_ns(elapsed_ns) if rules.policy != "freeze" else interval.upper_ns
        imported = await guest_time.import_time(adjustment.adjusted, error_ns)
        self._imported = _ImportedTime(exported, interval, elapsed_ns, adjustment, daemon_ns, imported)

    def _account_for_time(self) -> None:
        """Work out what the record says of the import, once it has been made."""
        if (done := self._imported) is None or self.done.time is not None:
            return
        before, interval, adjustment = done.exported.time, done.interval, done.adjustment
        skew = wall_clock_skew(before, adjustment.adjusted, interval)
        if certain_ns := provable_skew(skew):
            log.warning("the hosts' wall clocks disagree", at_least_ms=round(abs(certain_ns) / 1e6, 3))
        self.done.time = TimeSummary(
            policy=self._rules.policy,
            elapsed_lower_ns=interval.lower_ns,
            elapsed_upper_ns=interval.upper_ns,
            elapsed_ns=done.elapsed_ns,
            before=before,
            after=adjustment.adjusted,
            guest_uptime_ns=adjustment.guest_uptime_ns,
            tsc_delta=adjustment.tsc_delta,
            boot_hrtime_delta=adjustment.boot_hrtime_delta,
            wall_clock_skew_ns=skew,
            round_trip_ns=done.exported.round_trip_ns,
            stages=time_account(
                before,
                adjustment,
                elapsed_ns=done.elapsed_ns,
                daemon_ns=done.daemon_ns,
                vmm_ns=done.imported.vmm_ns,
                vmm_ticks=done.imported.vmm_ticks,
            ),
        )


def _part(state: ArrivedState) -> StatePart:
    return StatePart(state.meta.name, state.meta.kind, state.data)
