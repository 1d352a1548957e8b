"""The seam: the interface through which ``source`` and ``destination`` use a VMM of any kind.

    Driver      finds, attaches, creates guests of one kind of VMM, and says what ran
    VmmGuest    one guest: a small core that every VMM can give
    facets      abilities that only some VMMs have: GuestTime, Iterations, Throttle, OwnershipLock; ``None`` where one
                is missing. A parameter that needs a missing facet is refused with a sentence before anything moves

State outside memory leaves and enters as a stream of named parts; how many calls that takes is the driver's affair.
Memory is one or more regions (``migrated.vmm.memory``), and the dirty log covers all of them
(``migrated.vmm.dirty_log``). Nothing above this module imports a driver.

The module is longer than others because whoever writes a driver reads it in one piece.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias

from migrated.base.errors import VmmError
from migrated.settings.config import Config
from migrated.vmm.dirty_log import DirtyLog
from migrated.vmm.memory import GuestMemory
from protocol.guest import DeviceKind, GuestDescription
from protocol.guest_time import VmTimeData
from protocol.messages import DeviceCost

GuestState: TypeAlias = Literal["running", "paused", "incoming"]
DirtyTracking: TypeAlias = Literal["auto", "pagemap-scan", "logged"]
Side: TypeAlias = Literal["save", "load"]
StateBytes: TypeAlias = bytes | bytearray | memoryview
_SPARE_STATE_BYTES: Final = 16 << 20
_SPARE_FINAL_BYTES: Final = 64 << 20
KVM: Final = "kvm"
"""The word of ``Driver.offers`` for KVM: a guest under it may use each feature of its host's processors."""


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """The state of a guest as its VMM reports it now. ``detail`` holds all other figures, for people.

    ``observed_gap`` is the guest's last blackout as the guest itself observed it, where the VMM can tell.
    """

    state: GuestState
    pid: int
    epoch: int
    detail: Mapping[str, Any] = field(default_factory=dict)
    observed_gap: ObservedGap | None = None


@dataclass(frozen=True, slots=True)
class ObservedGap:
    """A blackout as the guest saw it: on its own clock, and on the host's monotonic clock (ns)."""

    guest_ns: int
    host_ns: int | None


@dataclass(frozen=True, slots=True)
class StatePart:
    """One named part of a guest's state outside memory. ``save_ns`` is the duration of saving it in the VMM."""

    name: str
    kind: DeviceKind
    data: StateBytes
    save_ns: int = 0


@dataclass(frozen=True, slots=True)
class ExpectedCosts:
    """The durations that a switchover is expected to take in this VMM now (ns).

    ``basis`` says whether this was tried (the VMM timed a rehearsal in this attempt), learned (from earlier moves of
    this guest or its class on this host) or guessed (a prior): a reserve that was not tried must use a learned quantile
    or a configured floor.
    ``call_ns`` is the longest round trip of a call to the VMM that was seen while finding out. Each device's cost has
    the spread of its tries beside it, ``pause_spread_ns`` is that of the stop; a prior has spreads too.
    ``whole_steps`` says that the figures are of whole steps as earlier moves made them, with all calls and wake-ups; a
    rehearsal knows the VMM's part alone, and the rest comes on top of it.
    """

    devices: tuple[DeviceCost, ...]
    pause_ns: int
    resume_ns: int
    call_ns: int
    basis: Literal["tried", "learned", "guessed"]
    pause_spread_ns: int = 0
    whole_steps: bool = False


def total_cost(costs: Iterable[DeviceCost]) -> tuple[int, int]:
    """Return the time that the devices take one after the other, and its usual error, for independent errors (ns)."""
    listed = list(costs)
    return sum(cost.ns for cost in listed), int(math.hypot(*(cost.spread_ns for cost in listed)))


@dataclass(frozen=True, slots=True)
class PauseTime:
    """The time that stopping a guest took (ns). ``drain_ns``, of ``total_ns``, came when its vCPUs stood already: block
    I/O that was in flight was drained and flushed; 0 where the VMM does not tell that apart.

    ``guest_time`` is the guest's time as it was read once the guest stood, where the VMM tells it with the stop: then
    ``GuestTime.export_time`` need not be asked, a call less in the blackout.
    """

    total_ns: int
    drain_ns: int = 0
    guest_time: VmTimeData | None = None


@dataclass(frozen=True, slots=True)
class TimeImport:
    """The VMM's part in an import of time data: time since the snapshot as the VMM measured it (ns), and the ticks that
    it added."""

    vmm_ns: int
    vmm_ticks: int


@dataclass(frozen=True, slots=True)
class StateBounds:
    """The most bytes of device state that an incoming guest is sent; a peer that sends more is refused.

    Attributes:
        states: of one state, in a round or at last, by name and kind of its device.
        final_bytes: of all final states together.
    """

    states: Mapping[tuple[str, DeviceKind], int]
    final_bytes: int


class GuestTime(ABC):
    """Facet: the guest's time apart from its devices (docs/guest-time.md)."""

    @abstractmethod
    async def export_time(self) -> VmTimeData:
        """The guest's time now. The guest is paused."""

    @abstractmethod
    async def import_time(self, time: VmTimeData, error_ns: int) -> TimeImport:
        """Give an incoming guest its time, known to within ``error_ns``. Before any final state."""


class Iterations(ABC):
    """Facet: devices that send state in rounds while the guest runs."""

    @abstractmethod
    async def save_iteration(self, name: str, number: int) -> StatePart:
        """Save the new state of an iterable device in a round, counted from 0."""

    @abstractmethod
    async def load_iteration(self, part: StatePart) -> int:
        """Load the result of ``save_iteration`` into an incoming guest. Returns the duration (ns)."""


class Throttle(ABC):
    """Facet: vCPUs that can be made to run less."""

    @abstractmethod
    async def set_throttle(self, percent: int) -> None:
        """Run that much less (0 to 99); 0 ends it."""


class OwnershipLock(ABC):
    """Facet: a lock of the guest's identity, held by the VMM's process exactly while the guest may run.

    Attributes:
        token: the fencing token (``protocol.fencing``) that the lock carries when this host holds it; None where the
            guest has no owner in a fleet's store, or the store has not shown it. Without one the lock keeps what it
            carries.
    """

    token: int | None = None

    @abstractmethod
    async def take(self) -> None:
        """Take the lock, which resuming needs, with the token; one that is held stays so. Refused (``VmmError``) when
        another VMM holds it, or when it carries a newer token."""

    @abstractmethod
    async def carry(self) -> None:
        """Let a lock that is held carry the token; without effect when it is not held. Refused as ``take``."""

    @abstractmethod
    async def release(self) -> None:
        """Let go of the lock of a stopped guest."""


class VmmGuest(ABC):
    """One guest. Every call has a bound in time and raises ``VmmError``, or ``VmmGoneError`` when nothing answers.

    Attributes:
        driver: name of its driver.
        name, pid: of the guest, of its VMM's process.
        api_socket: how the VMM is reached.
        time, iterations, throttle, lock: the facets, None where the VMM lacks one.
        dirty_tracking: ways of tracking writes that can be asked for by name, beside ``auto``.
    """

    driver: ClassVar[str]
    dirty_tracking: ClassVar[frozenset[str]] = frozenset()
    name: str
    pid: int
    api_socket: Path
    time: GuestTime | None = None
    iterations: Iterations | None = None
    throttle: Throttle | None = None
    lock: OwnershipLock | None = None

    @abstractmethod
    async def describe(self) -> GuestDescription:
        """The guest as it would be described to a destination."""

    def state_bounds(self, description: GuestDescription) -> StateBounds:
        """Return what the states of this incoming guest, which was just described so, may take at most. Where a driver
        does not know better, usual sizes may be guesses: twice such a size is allowed, and 16 MiB, of final states
        together 64 MiB."""
        usual = {(device.name, device.kind): device.state_bytes for device in description.devices}
        return StateBounds(
            {device: 2 * size + _SPARE_STATE_BYTES for device, size in usual.items()},
            2 * sum(usual.values()) + min(len(usual) * _SPARE_STATE_BYTES, _SPARE_FINAL_BYTES),
        )

    @abstractmethod
    async def status(self) -> GuestStatus:
        """State and figures of the guest; answers also while state is saved or loaded."""

    async def why_not_migrate(self) -> str | None:
        """Return a sentence on everything in this guest that would break the promise of a migration, None when nothing
        does."""
        return None

    async def needs(self) -> frozenset[str]:
        """Return what this guest needs of a host that not every host with its driver has, in the words of
        ``Driver.offers``."""
        return frozenset()

    @abstractmethod
    async def memory(self) -> GuestMemory:
        """Access to the guest's memory, owned by the caller."""

    async def memory_files(self) -> Sequence[int]:
        """Return descriptors of files, owned by the caller, that a new VMM on this host can build an equal guest around
        without a copy: all of the guest's memory, in the order of its pages. Empty where some of it is in no file."""
        return ()

    @abstractmethod
    async def start_dirty_log(self, mode: DirtyTracking) -> DirtyLog:
        """Begin to track writes: from the return on none is missed. The first collect may report every page."""

    async def fence(self) -> int:
        """Wait until every write that bypasses the page tables and was in flight at the last collect of the dirty log
        is in memory: what is read after this is covered by that collect or by the next. Bounded; returns what it took
        (ns), 0 where no such write can be.

        While ``needs_fence`` is true pages must be read only between a fence and the next collect or clear.
        """
        return 0

    @property
    def needs_fence(self) -> bool:
        """True when writes can bypass the page tables (a drive with O_DIRECT). Asked once, when tracking begins."""
        return False

    @abstractmethod
    async def stop_dirty_log(self) -> None:
        """End tracking; without effect when it is off."""

    async def prepare_stop(self) -> None:  # noqa: B027 - most VMMs have nothing to prepare
        """Prepare, while the guest still runs, for a stop and saves that take less time. A resume or an
        ``interrupt`` undoes it."""

    @abstractmethod
    async def pause(self) -> PauseTime:
        """Stop the vCPUs; when this returns nothing writes guest memory any more. Returns what that took."""

    @abstractmethod
    async def resume(self, epoch: int) -> int:
        """Run the vCPUs; ends a running save. Returns when they ran (CLOCK_MONOTONIC, ns), as near to the VMM's own
        stamp as can be had. The caller has written the mark "ran in epoch" before."""

    async def settle(self) -> str | None:
        """Do the rest once a guest that moved here runs and its source knows it. Bounded by two seconds. Returns
        a sentence on it for the record, None where there was nothing."""
        return None

    @abstractmethod
    async def interrupt(self) -> None:
        """End running saves and loads within milliseconds: their calls raise ``VmmError``."""

    @abstractmethod
    def state_out(self, kind: DeviceKind) -> AsyncIterator[Sequence[StatePart]]:
        """Save the final state of all devices of a kind, in the order in which it must be loaded. Each item is the
        result of one call to the VMM; the next call is made when the next item is asked for. The guest is paused and
        saving changes nothing that a resume here would notice."""

    @abstractmethod
    async def state_in(self, parts: Sequence[StatePart]) -> Sequence[int]:
        """Load final state, in order, into an incoming guest that does not run. Returns the duration of each part
        (ns)."""

    @abstractmethod
    async def expected_costs(self, side: Side) -> ExpectedCosts:
        """Return the expected costs of a switchover here, found out without disturbing the guest."""

    async def awaits(self, description: GuestDescription) -> bool:
        """Whether this is an empty guest that somebody started to take that very guest.

        Raises:
            RefusedError: it is, and another machine; the sentence names every difference.
        """
        return False

    async def own_operation(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """An operation that only this kind of VMM has (a simulated guest's ``verify``).

        Raises:
            VmmError: there is no such operation for a guest of this driver; the sentence says so.
        """
        raise VmmError(f"guest {self.name!r} has no operation {name!r}: its driver, {self.driver!r}, does not offer it")

    @abstractmethod
    async def destroy(self) -> None:
        """End the guest; when this returns its process is gone."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the VMM without touching the guest."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """An operator's wishes for the VMM that takes a guest's place on this host; None: as for any guest that comes in.

    Attributes:
        command: the VMM's program and fixed arguments.
        definition: name of the definition that it is built from (QEMU).
    """

    command: tuple[str, ...] | None = None
    definition: str | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """The way in which an incoming guest is to be started.

    Attributes:
        place: the name of its socket and files; the guest's own, unless that is in use.
        memory: descriptors of memory files that another VMM of the guest hands over (its ``memory_files``), the
            caller's own; empty for fresh memory. Until the guest is resumed here nothing that its VMM writes may reach
            these files: the other one may still get the guest back. From its first ``resume`` on everything must.
        replacement: an operator's wishes.
    """

    place: str
    memory: tuple[int, ...] = ()
    replacement: Replacement = Replacement()


@dataclass(frozen=True, slots=True)
class GuestRequest:
    """A guest to create. ``options`` are the driver's own: what it does not know it refuses with a sentence."""

    name: str
    memory_bytes: int
    paused: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class Driver(ABC):
    """The driver of one kind of VMM on this host.

    Attributes:
        name: of the driver, as in a guest's description.
        takes_memory: whether its VMM can be started around memory that is handed over.

    Args:
        config: the daemon's configuration.
    """

    name: ClassVar[str]
    takes_memory: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def places(self) -> Sequence[Path]:
        """List the API sockets at which guests of this driver may be found now, each named after its place
        (PLACE.sock). A guest's place is named as the guest is, or NAME~ where another VMM of it was there when it came.
        Those of another driver than ``sim`` lie in a directory of their own below ``[vmm] directory``."""

    def tidy(self, place: Path) -> None:
        """Remove what a guest left behind whose process has ended."""
        place.unlink(missing_ok=True)

    async def offers(self) -> frozenset[str]:
        """Return what this host has for guests of this driver that not every host has: placement in a fleet sends no
        guest to a host that lacks what the guest needs."""
        return frozenset()

    @abstractmethod
    async def attach(self, api_socket: Path, timeout_s: float | None) -> VmmGuest:
        """Connect to a guest that runs already; ``timeout_s`` bounds the wait for its first answer.

        Raises:
            VmmGoneError: nobody listens there: the process has ended.
            VmmSilentError: the process is there and does not answer.
            VmmError: it cannot be used; the sentence says why.
        """

    @abstractmethod
    async def create(self, request: GuestRequest) -> VmmGuest:
        """Start a guest.

        Raises:
            VmmError: it does not start, or an option is wrong; the sentence carries the VMM's own words.
        """

    @abstractmethod
    async def create_incoming(self, description: GuestDescription, incoming: Incoming) -> VmmGuest:
        """Start a guest that equals the description and waits for state: an empty one, or one around memory that is
        handed over.

        Raises:
            RefusedError: this host cannot build an equal guest; the sentence names every difference.
            VmmError: it does not start.
        """

    def ran(self, place: str, epoch: int) -> bool | None:
        """Whether a guest at this place ran in this epoch, by a log that the VMM itself writes before its
        vCPUs run; None where the VMM keeps none, so that the daemon's own mark must do."""
        return None
