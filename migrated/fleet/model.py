"""The documents that a fleet keeps in its store, one for each key (``migrated.fleet.keys``): frozen, bounded, as JSON.

Times that several hosts compare are UTC in nanoseconds (``_utc_ns``): a back-off that one worker began must mean the
same to the next one. Nothing that is exact rests on them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from migrated.base.errors import DocumentError
from protocol.guest import MAX_MEMORY_BYTES, GuestName, Name, NonNegativeNs

MAX_SLOTS: Final = 16
"""Migrations at once that a host can allow in one direction."""
MAX_LANDING: Final = 2 * MAX_SLOTS
"""The same, with those that have landed and are not counted yet."""
MAX_NAMES: Final = 256
"""Names in one list: hosts to go to, features of a processor."""
MAX_TRIED: Final = 8
"""Hosts that a step remembers as tried; older ones may be tried again."""
MAX_CURVE_POINTS: Final = 16
MAX_REASON: Final = 500
MAX_DOCUMENT_BYTES: Final = 48 << 10

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Bytes = Annotated[int, Field(ge=0, le=MAX_MEMORY_BYTES)]
Slots = Annotated[int, Field(ge=0, le=MAX_SLOTS)]
Reason = Annotated[str, Field(max_length=MAX_REASON)]
JobId = Annotated[str, Field(pattern=r"^[0-9a-z][0-9a-z-]{0,39}$")]
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_NAMES)]
HostNames = Annotated[tuple[GuestName, ...], Field(max_length=MAX_NAMES)]


class Document(BaseModel):
    """Base of all documents. Keys that are not known are left out when it is read: a newer daemon wrote them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """The value of its key."""
        return self.model_dump_json(exclude_defaults=True).encode()


DocumentT = TypeVar("DocumentT", bound=Document)


def parse(model: type[DocumentT], key: str, value: bytes) -> DocumentT:
    """The document that a key holds.

    Raises:
        DocumentError: it is no such document.
    """
    if len(value) > MAX_DOCUMENT_BYTES:
        raise DocumentError(f"The key {key} holds {len(value)} bytes, which is more than any {model.__name__} has.")
    try:
        return model.model_validate_json(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DocumentError(
            f"The key {key} holds no {model.__name__}: {where or 'it'}: {first['msg']}. Delete it if nothing needs it."
        ) from error


# Section: hosts


class HostDocument(Document):
    """A host's description of itself, under a lease that ends with its daemon.

    Attributes:
        address: where it takes migrations (``tcp:HOST:PORT``).
        daemon: tells the daemon that wrote this from another one of the same name (``migrated.member.identity``).
        version: of the daemon.
        capabilities: of the protocol.
        vmms: drivers whose guests it can run.
        devices: what it has that not every host has and a guest may need.
        cpu_features: of its processors, as guests see them.
        memory_bytes: what it would give to guests in all.
        used_bytes: memory of the guests here. A guest that is on its way here is not counted while ``HostSlots`` holds
            its reservation: the transaction that first counts it here takes the reservation away.
        guests: guests here.
        inbound, outbound: attempts that run now, in either direction.
        max_inbound, max_outbound: slots, the attempts that it allows at once.
        link_bytes_per_s: what its link was last measured to move, 0 while unknown.
        clock_offset_ns: how far its wall clock is ahead of its peers', as clock exchanges showed; None while unknown.
        cordon_seen: it had seen its own cordon when it counted ``inbound``: since then it refuses every guest that no
            job had promised to it. None from a daemon of an older version, which does not say.
    """

    name: GuestName
    address: Name
    daemon: Name = ""
    version: Name
    capabilities: Names = ()
    vmms: Names = ()
    devices: Names = ()
    cpu_features: Names = ()
    memory_bytes: Bytes
    used_bytes: Bytes = 0
    guests: Count = 0
    inbound: Count = 0
    outbound: Count = 0
    max_inbound: Slots = 2
    max_outbound: Slots = 2
    link_bytes_per_s: Count = 0
    clock_offset_ns: int | None = None
    cordon_seen: bool | None = None


class Cordon(Document):
    """A host that takes no guests in, until it is deleted. ``job`` is the last evacuation that wanted it, if one did:
    each writes the key, so that of two that are asked for at once one comes second and sees the other."""

    by: Name
    since_utc_ns: NonNegativeNs
    reason: Reason = ""
    job: JobId | None = None


class Fence(Document):
    """The word of an operator or a fencing agent that a host surely runs no guest and will not: it is off, or its
    guests' processes are gone. It is never concluded from a lease that ended."""

    by: Name
    since_utc_ns: NonNegativeNs
    reason: Reason = ""


class Reservation(Document):
    """One migration that is promised a slot, and on its destination the memory.

    Attributes:
        guest: it.
        job: whose it is.
        peer: the other host.
        memory_bytes: of the guest.
        bytes_per_s: its share of the link, which it never exceeds.
        attempt: of the job's step.
        landed: the guest runs on the destination, which has not counted it yet: only the memory is still promised.
    """

    guest: GuestName
    job: JobId
    peer: GuestName
    memory_bytes: Bytes
    bytes_per_s: Count = 0
    attempt: Count
    landed: bool = False


class HostSlots(Document):
    """The migrations that are promised to a host. Written only by transactions that compare its revision."""

    inbound: Annotated[tuple[Reservation, ...], Field(max_length=MAX_LANDING)] = ()
    outbound: Annotated[tuple[Reservation, ...], Field(max_length=MAX_SLOTS)] = ()

    @property
    def inbound_bytes(self) -> int:
        """Memory that is promised here and not counted in ``HostDocument.used_bytes``."""
        return sum(one.memory_bytes for one in self.inbound)

    @property
    def arriving(self) -> tuple[Reservation, ...]:
        """Reservations that occupy a slot for migrations to here."""
        return tuple(one for one in self.inbound if not one.landed)

    @property
    def inbound_bytes_per_s(self) -> int:
        """Shares of the link that are promised to migrations to here."""
        return sum(one.bytes_per_s for one in self.arriving)

    @property
    def outbound_bytes_per_s(self) -> int:
        """Shares of the link that are promised to migrations from here. A link moves as much in each direction."""
        return sum(one.bytes_per_s for one in self.outbound)


# Section: guests


class CurvePoint(Document):
    """Unique pages that the guest dirties within a time."""

    ns: NonNegativeNs
    pages: Count


class Forecast(Document):
    """The expected cost of moving a guest, from its last migration, an estimate or its description.

    Attributes:
        data_bytes: what a first round moves.
        dirty: unique pages dirtied within growing times (``prediction.bandwidth.DirtyCurve``).
        fixed_ns: most likely downtime with no memory left to send.
        margin_ns: how much higher the bound is.
        setup_ns: from the request to the first round.
    """

    data_bytes: Count
    setup_ns: NonNegativeNs = 0
    dirty: Annotated[tuple[CurvePoint, ...], Field(max_length=MAX_CURVE_POINTS)] = ()
    fixed_ns: NonNegativeNs = 0
    margin_ns: NonNegativeNs = 0


class GuestDocument(Document):
    """A guest's requirements of a host, written by its owner.

    Attributes:
        vmm: its driver.
        memory_bytes: all that a host must have free for it.
        downtime_limit_ns: its own limit, which every migration keeps.
        group: guests of one group are kept on different hosts where that is possible.
        devices, cpu_features: what its host must have.
        forecast: None while nothing is known of it.
    """

    name: GuestName
    vmm: Name
    memory_bytes: Bytes
    downtime_limit_ns: NonNegativeNs
    group: Name | None = None
    devices: Names = ()
    cpu_features: Names = ()
    forecast: Forecast | None = None


class Ownership(Document):
    """The host that may run a guest. The rules of its changes are in ``migrated.fleet.ownership``.

    Attributes:
        owner: the host.
        epoch: grows with every change.
        previous: a host that still holds the complete guest, stopped, because the owner has not shown yet that it runs
            it; None when the owner has.
        migration_id: the hand-over by which the owner got it, None when there was none.
    """

    owner: GuestName
    epoch: Count
    previous: GuestName | None = None
    migration_id: Name | None = None


# Section: jobs


class StepState(StrEnum):
    """The state of one guest of a job."""

    PLANNED = "planned"
    """It waits for a slot, or for its turn, or for ``not_before_utc_ns``."""
    RESERVED = "reserved"
    """Slots and memory are promised; the migration may have begun."""
    MIGRATING = "migrating"
    """The source's daemon has an attempt, ``migration_id``."""
    DONE = "done"
    FAILED = "failed"
    """For good, with the reason. ``resume`` tries it again."""
    CANCELLED = "cancelled"


class JobPhase(StrEnum):
    """The phase of a job."""

    RUNNING = "running"
    CANCELLING = "cancelling"
    """No step begins any more; those that run are cancelled."""
    DONE = "done"
    """Every guest is where it should be."""
    FAILED = "failed"
    """Nothing is left to try, and some guest has not moved."""
    CANCELLED = "cancelled"


class JobKind(StrEnum):
    """The purpose of a job."""

    EVACUATE = "evacuate"
    MIGRATE = "migrate"


class JobSpec(Document):
    """The operator's request that a job carries out.

    Attributes:
        host: the host to empty, or on which the guest is.
        guests: only these; all that the host owns when empty.
        to: hosts to go to; any when empty.
        max_parallel: migrations of this job at once, 0 for as many as slots allow.
        downtime_limit_ns: an upper limit for all; a guest's own limit counts where it is lower.
        deadline_ns: how long the job may take since it was asked for, or resumed; 0 for any time.
        max_attempts: of each guest.
        by: who asked.
    """

    job: JobId
    kind: JobKind
    host: GuestName
    guests: HostNames = ()
    to: HostNames = ()
    max_parallel: Count = 0
    downtime_limit_ns: NonNegativeNs | None = None
    deadline_ns: NonNegativeNs = 0
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 4
    created_utc_ns: NonNegativeNs
    by: Name


class JobState(Document):
    """The phase of a job, and the reason of its end. ``resumed_utc_ns``: when it was last resumed after an end."""

    phase: JobPhase = JobPhase.RUNNING
    reason: Reason = ""
    ended_utc_ns: NonNegativeNs | None = None
    resumed_utc_ns: NonNegativeNs | None = None


class WorkerClaim(Document):
    """The daemon that carries a job on, under its lease."""

    host: GuestName
    since_utc_ns: NonNegativeNs


class JobStep(Document):
    """One guest of a job.

    Attributes:
        source, destination: hosts; the destination is None while none is chosen.
        memory_bytes: of the guest.
        order: place in the plan.
        lanes: into how many shares the plan divides the source's link, 0 without a plan. What a share moves is settled
            when the step is reserved, by what is known of the link then.
        bytes_per_s: its share of the link, planned and then promised.
        attempt: of this guest in this job, from 1 once it is reserved.
        tried: destinations that failed, the last ones.
        reason: why the last attempt failed, or why it waits.
        not_before_utc_ns: when it may be tried again.
        migration_id: of the attempt that runs or was the last.
        expected_begin_ns, expected_end_ns: since the job's begin, from the plan.
        expected_downtime_ns: from the plan.
        began_utc_ns, ended_utc_ns: of the last attempt.
        downtime_ns: as measured.
    """

    guest: GuestName
    state: StepState = StepState.PLANNED
    source: GuestName
    destination: GuestName | None = None
    memory_bytes: Bytes
    order: Count = 0
    lanes: Slots = 0
    bytes_per_s: Count = 0
    attempt: Count = 0
    tried: Annotated[tuple[GuestName, ...], Field(max_length=MAX_TRIED)] = ()
    reason: Reason = ""
    not_before_utc_ns: NonNegativeNs = 0
    migration_id: Name | None = None
    expected_begin_ns: NonNegativeNs = 0
    expected_end_ns: NonNegativeNs = 0
    expected_downtime_ns: NonNegativeNs = 0
    began_utc_ns: NonNegativeNs | None = None
    ended_utc_ns: NonNegativeNs | None = None
    downtime_ns: NonNegativeNs | None = None
