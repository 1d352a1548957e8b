"""Taking an offer: the destination builds an empty guest equal to the offered one, and the objects that receive its
state; or it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

import structlog

from migrated.base.errors import MigrationError, RefusedError, VmmError
from migrated.base.threads import in_thread
from migrated.destination.decoding import allowed_encodings
from migrated.destination.inbox import Broken, RoundArrived
from migrated.destination.loading import Loading
from migrated.destination.migration import Equipment, IncomingMigration
from migrated.destination.offer import Offer, Refusal
from migrated.destination.pages import PageReceiver
from migrated.destination.states import ArrivingStates
from migrated.destination.takeover import Takeover
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.state.journal import JournalError
from migrated.state.run_marks import RunMarkError
from migrated.vmm.handed_over import HandedOverMemory
from migrated.vmm.memory import shared_huge_pages
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.errors import ProtocolError
from protocol.guest_time import TimeAdjustError
from protocol.handover import DestinationEvent, DestinationState
from protocol.versions import CAPABILITIES, REQUIRED_CAPABILITIES, SHARED, agree_capabilities

log = structlog.get_logger()


async def welcome(env: Environment, offer: Offer) -> IncomingMigration | Refusal:
    """Build the empty guest and take the offer.

    Returns:
        The attempt, which sends WELCOME when it runs. Or the refusal: the source has been told, all that was built is
        undone, and the channel is closed.
    """
    hello, view = offer.hello, offer.view
    structlog.contextvars.bind_contextvars(
        migration_id=hello.migration_id, guest=hello.guest.name, role="destination", peer=offer.control.peer
    )
    try:
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(offer.control.close)
            try:
                incoming = await _build(env, offer, undo)
            except (
                MigrationError,
                ProtocolError,
                TimeAdjustError,
                JournalError,
                RunMarkError,
                OSError,
                ValueError,
            ) as error:
                refusal = Refusal.because_of(error)
                view.reason = refusal.reason
                log.warning("refused an incoming migration", reason=refusal.reason)
                refusal.tell(offer.control)  # before anything is undone: the source waits for it
                return refusal
            undo.pop_all()
            return incoming
    finally:
        if view.reason is not None:
            view.set_status("failed")


async def _build(env: Environment, offer: Offer, undo: contextlib.AsyncExitStack) -> IncomingMigration:
    """Build all objects that the attempt needs.

    Args:
        undo: gets the calls that undo what was built, for an offer that is not taken in the end.

    Raises:
        RefusedError, VmmError, ProtocolError, TimeAdjustError, JournalError, RunMarkError: it cannot be taken.
    """
    hello = offer.hello
    # Announcements serve to populate huge pages; small ones cost less where their content is written.
    ours = CAPABILITIES if shared_huge_pages() else CAPABILITIES - {"extents"}
    if not (offer.memory and env.guests.takes_memory(hello.guest.vmm)):
        ours -= {SHARED}
    agreed = agree_capabilities(frozenset(hello.capabilities), ours, frozenset(hello.required) | REQUIRED_CAPABILITIES)
    if hello.guest.memory_bytes > env.config.limits.max_memory_bytes:
        raise RefusedError(
            f"the guest has {hello.guest.memory_bytes >> 20} MiB of memory, this host takes at most "
            f"{env.config.limits.max_memory_bytes >> 20} MiB ([limits] max_memory_bytes)"
        )
    shared = SHARED in agreed
    guest = await env.guests.create_incoming(hello.guest, offer.memory if shared else (), offer.replacement)
    undo.push_async_callback(_destroy, env, guest)
    guest.migration_id = hello.migration_id
    built = await guest.vmm.describe()
    if differences := hello.guest.differences(built):
        raise RefusedError(f"this host cannot build an equal guest: {'; '.join(differences)}")
    memory = HandedOverMemory(hello.guest.pages) if shared else await guest.vmm.memory()
    undo.push_async_callback(asyncio.to_thread, memory.release)
    if not shared:
        await in_thread(memory.make_zero)
    costs = await guest.vmm.expected_costs("load")
    env.run_marks.make_room()
    env.journal.begin(
        hello.migration_id,
        hello.epoch,
        hello.guest.name,
        "destination",
        {
            "peer": offer.control.peer,
            "peer_names": list(offer.control.names),
            "paused": hello.guest_paused,
            "driver": hello.guest.vmm,
            "place": guest.place,
            "started_at": offer.view.started_at,
        },
    )
    takeover = Takeover(
        env, hello.migration_id, hello.epoch, guest.place, hello.guest.vmm, guest, keep_paused=hello.guest_paused
    )
    digested = "digest-xxh3-frames" in hello.required and not shared
    inbox, digest = offer.inbox, MemoryDigest(hello.guest.pages) if digested else None

    def channel_failed(_number: int, error: Exception) -> None:
        # Once everything arrived the data channels have done their work, and their end means nothing.
        if takeover.state is DestinationState.LOADING:
            inbox.put_nowait(Broken(DestinationEvent.FAULT, "fault", f"a data channel failed: {error}"))

    states = ArrivingStates(guest.vmm.state_bounds(built))
    receiver = PageReceiver(
        memory,
        states,
        digest,
        hello.channels,
        allowed_encodings(agreed),
        announced="extents" in agreed,
        on_round=lambda number, received: inbox.put_nowait(RoundArrived(number, received)),
        on_state=inbox.put_nowait,
        on_failure=channel_failed,
    )
    loading = Loading(
        guest.vmm,
        {(d.name, d.kind) for d in hello.guest.devices},
        hello.time_rules,
        env.clock,
        states,
    )
    answer = messages.Welcome(
        token=secrets.token_bytes(16),
        capabilities=tuple(sorted(agreed)),
        load_costs=costs.devices,
        resume_ns=env.resume_costs.expected_ns(guest.vmm.driver, costs),
        ready_timeout_ns=int(env.config.limits.ready_timeout_s * 1e9),
        host=env.host,
    )
    return IncomingMigration(env, offer, Equipment(guest, memory, digest, receiver, loading, takeover, answer, costs))


async def _destroy(env: Environment, guest: Guest) -> None:
    with contextlib.suppress(VmmError):
        await env.guests.destroy(guest)
