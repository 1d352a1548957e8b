"""The interface between control socket and daemon: the ``Operations`` protocol, its error, and the events.

The module is longer than others because every operation is declared here, with its errors.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from migrated.observe.progress import Progress
from migrated.settings.parameters import MigrationParameters
from migrated.state.history import HistoryQuery
from migrated.vmm.seam import Replacement
from protocol.guest import MAX_MEMORY_BYTES, NAME_PATTERN, GuestName

ErrorKind = Literal["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"]
"""QMP's error classes (qapi/error.json)."""

EVENTS_KEPT: Final = 1024
"""Events kept for one subscriber that does not read."""
WAKE_S: Final = 0.005
"""Subscribers are woken this long after an event, so that those that come together go together."""
HELD_S: Final = 0.5
"""The same, while a guest is stopped for its switchover."""
EVENTS_LOST: Final = "X_MIGRATED_EVENTS_LOST"


class OperationError(Exception):
    """An operation that was not carried out.

    Attributes:
        kind: QMP's error class: ``DeviceNotFound`` for an unknown guest or migration id, else mostly ``GenericError``.
    """

    def __init__(self, message: str, kind: ErrorKind = "GenericError") -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind


RESERVED_OPTIONS: Final = frozenset(
    {
        "api-socket", "clock-drift-ppm", "dirty-rate", "hrtime-offset-ns", "incoming-description", "lock-directory",
        "memory", "name", "paused", "profile", "seed", "wall-offset-ns", "workload",
    }
)  # fmt: skip
"""Options of a VMM that the daemon itself gives, or that have an argument of their own: a second time they would put
the guest under another name, or files elsewhere."""


def _free_option(name: str) -> str:
    if name in RESERVED_OPTIONS:
        raise ValueError(f"option {name!r} is the daemon's to give")
    return name


OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$"), AfterValidator(_free_option)]
DefinitionName = Annotated[str, Field(max_length=64, pattern=NAME_PATTERN)]
OptionValue = Annotated[str, Field(pattern=r"^[^\x00]{0,4096}$")]


class GuestSpec(BaseModel):
    """A guest to start. ``options`` go to the VMM as they are (``--key=value``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: GuestName
    memory_bytes: int | None = Field(default=None, ge=1 << 20, le=MAX_MEMORY_BYTES)
    """Needed for all guests but those of a definition, in which it stands."""
    definition: DefinitionName | None = None
    """Name of a definition in ``[qemu] definitions``: the guest is a QEMU guest."""
    workload: str | None = None
    dirty_rate_bytes_per_s: int | None = Field(default=None, ge=0, le=1 << 50)
    profile: str | None = None
    """Name of a guest profile in ``[vmm] profiles``, or the path of a file there."""
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    paused: bool = False
    options: dict[OptionName, OptionValue] = Field(default_factory=dict)


class AdoptSpec(BaseModel):
    """A QEMU that somebody else started, to be taken over as it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: GuestName
    qmp: str
    """Its QMP socket."""
    incoming: bool = False
    """It waits for a migration, started with ``-incoming defer -S``."""
    run_log: str | None = None
    """The file that it logs its run state to (``-D FILE -trace vm_state_notify``)."""
    guest_agent: str | None = None
    """The socket of its guest agent, which sets the guest's clock when it has moved here."""


class JobRequest(BaseModel):
    """An operator's request to a fleet: guests to be moved away from a host.

    Attributes:
        host: the host to empty; empty where one guest is meant, wherever it is.
        to: hosts to go to; any when empty.
        max_parallel: migrations at once, 0 for as many as the hosts allow.
        downtime_limit_ns: an upper limit for all; None for each guest's own.
        deadline_ns: no migration begins later than this; 0 for no deadline.
        dry_run: only plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: GuestName | Literal[""] = ""
    to: tuple[GuestName, ...] = ()
    max_parallel: int = Field(default=0, ge=0, le=256)
    downtime_limit_ns: int | None = Field(default=None, ge=0, lt=1 << 62)
    deadline_ns: int = Field(default=0, ge=0, lt=1 << 62)
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """One event as QMP sends it; the timestamp is the host's wall clock when it was published."""

    name: str
    data: dict[str, Any]
    seconds: int
    microseconds: int

    def document(self) -> dict[str, Any]:
        """The QMP event object; ``data`` is left out when empty."""
        stamp = {"seconds": self.seconds, "microseconds": self.microseconds}
        return {"event": self.name, **({"data": self.data} if self.data else {}), "timestamp": stamp}


class Subscription:
    """One reader of the event bus: a bounded queue that drops its oldest event rather than hold up the daemon.

    The reader learns of a loss by an ``X_MIGRATED_EVENTS_LOST`` event with the count, in place of what was lost.
    """

    def __init__(self, bus: EventBus, capacity: int) -> None:
        self._bus = bus
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._lost = 0
        self.arrived = asyncio.Event()
        """Set while there is something to take; its owner may share it."""

    def put(self, event: Event) -> None:
        """Add an event without telling the reader, as ``wake`` does; never waits."""
        if len(self._events) == self._capacity:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)

    def wake(self) -> None:
        """Tell the reader that there is something to take."""
        if self._events:
            self.arrived.set()

    def pending(self) -> list[Event]:
        """Take everything there is, oldest first, without waiting."""
        events = [_stamped(EVENTS_LOST, {"count": self._lost})] if self._lost else []
        events.extend(self._events)
        self._lost = 0
        self._events.clear()
        return events

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            for event in self.pending():
                yield event

    def close(self) -> None:
        """Stop receiving. Closing twice is fine."""
        self._bus.remove(self)


class EventBus:
    """Hands events to every subscriber. Publish from the event loop's thread only; it never waits.

    Subscribers are woken a moment later, and not while a guest is stopped for its switchover, from ``hold`` on and for
    at most HELD_S: writing to twenty clients would take longer than the rest of a short downtime, and the event of the
    last round comes just before it. Events keep their time and their order.
    """

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._stopped: set[object] = set()
        """Migrations whose guest is stopped."""
        self._timer: asyncio.TimerHandle | None = None
        self._held = False
        """Whether the timer is that of a hold."""

    def subscribe(self, capacity: int = EVENTS_KEPT) -> Subscription:
        """Receive every event published from now on; close the subscription when done."""
        subscription = Subscription(self, capacity)
        self._subscriptions.add(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Forget a subscription."""
        self._subscriptions.discard(subscription)

    def publish(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Send an event to every subscriber. Names as QMP writes them (``MIGRATION``), keys in kebab-case."""
        event = _stamped(name, data or {})
        for subscription in self._subscriptions:
            subscription.put(event)
        if name == "MIGRATION":
            migration = event.data.get("migration-id")
            if event.data.get("status") == "device":
                self._stopped.add(migration)
            else:
                self._stopped.discard(migration)
        self._arm()

    def hold(self, migration: str) -> None:
        """Wake nobody from now on: the guest of a migration is about to be stopped. The migration's next event of its
        status tells whether it still is."""
        self._stopped.add(migration)
        self._arm()

    def _arm(self) -> None:
        hold = bool(self._stopped)
        if self._timer is None or hold != self._held:
            if self._timer is not None:
                self._timer.cancel()
            self._held = hold
            self._timer = asyncio.get_running_loop().call_later(HELD_S if hold else WAKE_S, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._stopped.clear()
        for subscription in self._subscriptions:
            subscription.wake()


def _stamped(name: str, data: dict[str, Any]) -> Event:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return Event(name, data, seconds, nanoseconds // 1000)


class FleetOperations(Protocol):
    """The fleet of the daemon as the control socket sees it. Every method raises OperationError when it does not do
    its work. Hosts and jobs are plain JSON values (docs/fleet.md)."""

    async def hosts(self) -> list[dict[str, Any]]:
        """All hosts: ``name``, ``lease``, ``cordoned``, ``fenced``, ``problems`` (sentences), and what each says."""

    async def jobs(self, job: str | None) -> list[dict[str, Any]]:
        """All jobs with their guests, newest first; or one, by a unique beginning of its id."""

    async def wait(self, job: str) -> dict[str, Any]:
        """A job once it is over."""

    async def evacuate(self, request: JobRequest) -> dict[str, Any]:
        """Begin to empty a host: ``job``, ``guests``. A dry run returns the plan instead."""

    async def migrate(self, guest: str, request: JobRequest) -> dict[str, Any]:
        """Begin to move one guest, from wherever it is to whichever host fits best: ``job``, ``guests``."""

    async def cancel(self, job: str) -> dict[str, Any]:
        """Begin no more migrations of a job, and cancel those that run."""

    async def resume(self, job: str) -> dict[str, Any]:
        """Try every guest of a job again that has not moved."""

    async def cordon(self, host: str, reason: str) -> dict[str, Any]:
        """Let a host take no guests in."""

    async def uncordon(self, host: str) -> dict[str, Any]:
        """Let a host take guests in again."""

    async def fence(self, host: str, reason: str) -> dict[str, Any]:
        """Write down somebody's word that a host surely runs nothing: its guests may be started elsewhere."""

    async def unfence(self, host: str) -> dict[str, Any]:
        """Take a host's fence away."""


class Operations(Protocol):
    """The daemon as the control socket sees it. Every method raises OperationError when it does not do its work.

    Results are plain JSON values. Migration ids may be given as any unique prefix. Guests in ``guest_*`` results
    have at least ``name``, ``state`` (running, paused, incoming, in-doubt, retired, unresponsive), ``memory_bytes``,
    ``api_socket``, ``pid``. A guest whose VMM does not answer is unresponsive and has a ``reason``; what nobody
    knows of it is None.
    """

    events: EventBus

    @property
    def fleet(self) -> FleetOperations | None:
        """The fleet of this host, None when it stands alone."""

    async def guest_create(self, spec: GuestSpec) -> dict[str, Any]:
        """Start a guest and wait until its VMM answers."""

    async def guest_adopt(self, spec: AdoptSpec) -> dict[str, Any]:
        """Take over a QEMU that somebody else started; it runs on undisturbed."""

    async def guest_check(self, name: str) -> list[dict[str, Any]]:
        """Everything that could break the promise of a migration: rows of ``name``, ``verdict``, ``sentence``."""

    def guest_names(self) -> list[str]:
        """Names of the guests that a command may mean, without asking any of them."""

    async def guest_list(self) -> list[dict[str, Any]]:
        """All guests of this host, retired ones too while they are kept."""

    async def guest_show(self, name: str) -> dict[str, Any]:
        """One guest, with more than the list says."""

    async def guest_pause(self, name: str) -> dict[str, Any]:
        """Stop the vCPUs; a paused guest stays paused without error."""

    async def guest_resume(self, name: str) -> dict[str, Any]:
        """Let the vCPUs run; refused where the hand-over does not allow it."""

    async def guest_destroy(self, name: str) -> dict[str, Any]:
        """End the VMM; refused while a migration of the guest is open."""

    async def guest_verify(self, name: str) -> dict[str, Any]:
        """Check every byte of memory and the clock: ``{"ok": bool, "message": sentence, ...}``."""

    async def migrate(self, guest: str, uri: str, overrides: dict[str, object]) -> str:
        """Start an attempt and return its migration id once arguments, guest and URI were accepted here.

        ``overrides`` are fields of MigrationParameters, already checked, on top of the guest's own parameters.
        """

    async def replace(self, guest: str, replacement: Replacement, overrides: dict[str, object]) -> str:
        """Start to give a guest another VMM on this host; otherwise as ``migrate``."""

    async def save(self, guest: str, path: str, *, ends_guest: bool, force: bool, overrides: dict[str, object]) -> str:
        """Start to save a guest in a file and return the attempt's id.

        Args:
            path: absolute.
            ends_guest: end the guest once the file is safe; else it goes on.
            force: replace a saved guest that is there.
        """

    async def restore(self, path: str, name: str | None, overrides: dict[str, object]) -> tuple[str, str]:
        """Start to restore a guest from a file and return the attempt's id, and the guest's name.

        Args:
            path: absolute.
            name: that the guest gets; None for its own.
        """

    async def wait(self, migration_id: str) -> dict[str, Any]:
        """Wait for the end of an attempt (or for its being in doubt) and return its record document."""

    def progress(self, guest: str | None) -> list[Progress]:
        """Running migrations and the last finished one of each guest since the daemon's start, in order of start."""

    async def cancel(self, guest: str) -> None:
        """Cancel the running migration of a guest; refused after COMMIT; nothing to do is no error."""

    async def set_parameters(self, guest: str | None, values: dict[str, object]) -> None:
        """Change parameters (fields of MigrationParameters, already checked) of a guest, of its running migration too
        where that can change; None: the daemon's defaults."""

    def parameters(self, guest: str | None) -> MigrationParameters:
        """Return the parameters of the guest's next migration; for None, the daemon's defaults."""

    async def continue_switchover(self, guest: str) -> None:
        """Go on after pause-before-switchover."""

    def history(self, query: HistoryQuery) -> list[dict[str, Any]]:
        """Record documents, newest first. May be called in a thread."""

    def history_stats(self, query: HistoryQuery) -> dict[str, Any]:
        """``History.stats`` of the query. May be called in a thread."""

    def record(self, migration_id: str) -> dict[str, Any]:
        """One record document. May be called in a thread."""

    async def resolve(self, migration_id: str, run_here: bool) -> dict[str, Any]:
        """End an attempt in doubt by hand and return its record: run the guest here, or discard it here."""

    async def estimate(self, guest: str, uri: str, overrides: dict[str, object]) -> dict[str, Any]:
        """Predict the downtime of a migration without migrating: ``predicted_ns``, ``predicted_upper_ns``,
        ``limit_ns``, ``fits``, ``reason`` (a sentence), ``parts_ns`` {name: ns}, ``total_ns`` and more."""

    def metrics_text(self) -> bytes:
        """All metrics in Prometheus' text form. May be called in a thread."""

    def version(self) -> dict[str, Any]:
        """``{"version": "0.1.0", "protocol": ..., "role": ...}``."""

    async def quit(self) -> None:
        """Begin the daemon's orderly stop; guests run on. Returns before the daemon is gone."""
