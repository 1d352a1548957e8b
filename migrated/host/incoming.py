"""The incoming attempts of this host, and who answers when a source asks late for the outcome of one.

A new connection says by its first message what it is: an offer (HELLO), a data channel (JOIN), or a question about an
outcome (OUTCOME_ASK).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from migrated.base.tasks import TaskSet
from migrated.control.operations import OperationError
from migrated.destination.migration import IncomingMigration
from migrated.destination.offer import Offer, Refusal, RefusalKind
from migrated.destination.recovery import RecoveredTakeover
from migrated.destination.takeover import EndedTakeover, Takeover, answer_message
from migrated.destination.view import View
from migrated.destination.welcome import welcome
from migrated.environment import DaemonRole, Environment
from migrated.guests.registry import Guest
from migrated.host.recovery import Recovery
from migrated.kernel.memory import available_bytes
from migrated.link.control import ControlChannel
from migrated.link.reply import Nobody, OneAnswer
from migrated.link.security import Names
from migrated.link.sockets import Connection, send_first
from migrated.observe.progress import Progress
from migrated.state.learned import keep_resume_costs
from migrated.vmm.seam import Replacement
from protocol import messages
from protocol.answers import journaled_answer, newer_epoch, who_answers
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.handover import DestinationEvent
from protocol.messages import Message

log = structlog.get_logger()

_TAKEOVERS_KEPT: Final = 64
_SHOWN_KEPT: Final = 256
"""Guests whose last attempt is still shown after its end: a peer may offer any number of names."""
_EPOCHS_AHEAD: Final = 1 << 20
"""How far an epoch may be ahead of what is known here: a guest that was never here has migrated before, though not a
million times, and no number may come near the end of numbers."""


class IncomingAttempts:
    """All attempts to take a guest in.

    Args:
        env: the daemon.
        role: a source takes nothing in.
        recovery: has the attempts that the last daemon left open.
        tasks: where they run.
        count_refused: counts offers that are not taken, by kind of the reason.
    """

    def __init__(
        self,
        env: Environment,
        role: DaemonRole,
        recovery: Recovery,
        tasks: TaskSet,
        count_refused: Callable[[RefusalKind], None],
    ) -> None:
        self._env = env
        self._role = role
        self._recovery = recovery
        self._tasks = tasks
        self._count_refused = count_refused
        self.on_ended: Callable[[], None] = lambda: None
        """Called when there is an attempt less, whatever became of it."""
        self._offered: dict[str, Offer] = {}
        """Offers that are looked at, by migration id."""
        self._running: dict[str, IncomingMigration] = {}
        """Attempts under way, by migration id."""
        self._last: dict[str, Callable[[], Progress]] = {}
        """Snapshots of the last one of each guest since the daemon's start."""
        self._unsettled: dict[str, Takeover] = {}
        """Take-overs of attempts that failed unexpectedly before it was decided who runs the guest."""
        self._takeovers: dict[str, EndedTakeover] = {}
        """Finished take-overs: they answer late questions better than the journal, which may not have been written."""

    async def connected(self, first: Message, connection: Connection, replacement: Replacement | None = None) -> None:
        """Take a new connection by its first message (``link.listener.Handler``).

        Args:
            replacement: what is wanted of a guest's new VMM, for a connection of this daemon to itself; else None.
        """
        match first:
            case messages.Hello():
                await self._hello(first, connection, replacement)
            case messages.Join(migration_id=migration_id):
                incoming = self._running.get(migration_id)
                if incoming is None:
                    raise RemoteProtocolError("a data channel joins a migration that is not under way", ErrorCode.AUTH)
                incoming.check_join(first, connection.wire.names)
                await send_first(connection, messages.Joined(channel=first.channel))
                incoming.join(first, connection)
            case messages.OutcomeAsk():
                self._check_asker(first, connection.wire.names)
                self._tasks.start(self._outcome_asked(first, connection))
            case _:
                raise RemoteProtocolError(f"a connection cannot begin with {first.TYPE.name}", ErrorCode.UNEXPECTED)

    def cancel(self, guest: str) -> None:
        """Give up what is under way for a guest that comes from another daemon; the source of one that this daemon
        itself sends is here, and is cancelled instead.

        Raises:
            OperationError: only the source decides any more.
        """
        reason = "cancelled by the destination's operator"
        for offer in self._offered.values():
            if offer.hello.guest.name == guest and offer.replacement is None:
                offer.cancel(reason)
        for incoming in self._running.values():
            if incoming.guest_name == guest and not incoming.own and not incoming.cancel(reason):
                raise OperationError(
                    f"the incoming migration of {guest!r} cannot be cancelled any more: READY was voted and only the "
                    "source decides"
                )

    def cancel_all(self, reason: str) -> None:
        """Give up what can be given up."""
        for offer in self._offered.values():
            offer.cancel(reason)
        for incoming in self._running.values():
            incoming.cancel(reason)

    def guest_gone(self, guest: Guest) -> None:
        """A guest's process ended by itself."""
        holder = guest.migration_id or ""
        attempt = self._running.get(holder) or self._offered.get(holder)
        if attempt is not None:
            attempt.guest_gone()

    async def ended(self, migration_id: str) -> None:
        """Wait for the end of an attempt, if it is under way."""
        if (incoming := self._running.get(migration_id)) is not None:
            await incoming.ended.wait()

    @property
    def under_way(self) -> int:
        """The number of guests that are being taken in."""
        return len(self._offered) + len(self._running)

    def knows(self, guest: str) -> bool:
        """Whether a guest of this name was taken in, or was to be, since the daemon's start."""
        return guest in self._last

    def progress(self) -> list[Progress]:
        """A snapshot of the last attempt of every guest."""
        return [progress() for progress in self._last.values()]

    # Section: offers

    async def _hello(self, hello: messages.Hello, connection: Connection, replacement: Replacement | None) -> None:
        limits = self._env.config.limits
        control = ControlChannel(
            connection,
            self._env.clock,
            heartbeat_interval_s=limits.heartbeat_interval_s,
            heartbeat_timeout_s=limits.heartbeat_timeout_s,
            received=1,
        )
        await control.start()
        offer = Offer(control, hello, View(self._env, hello, control.peer), replacement=replacement)
        refusal = self._why_not(offer)
        if refusal is not None:
            log.warning("refused an incoming migration", guest=hello.guest.name, reason=refusal.reason)
            self._count_refused(refusal.kind)
            refusal.tell(control)
            self._tasks.start(control.close())
            return
        self._offered[hello.migration_id] = offer
        self._last[hello.guest.name] = offer.progress
        self._tasks.start(self._run(offer))

    def _why_not(self, offer: Offer) -> Refusal | None:
        hello, origin = offer.hello, offer.origin
        if self._role == "source":
            return Refusal(ErrorCode.BUSY, "this daemon is a source only and takes no guests in", "role")
        keeper = self._env.keeper if offer.replacement is None else None
        if keeper is not None and (cordoned := keeper.why_not_here(hello.guest.name)) is not None:
            return Refusal(ErrorCode.BUSY, cordoned, "cordon")
        under_way = self.under_way
        if under_way >= self._env.config.limits.max_incoming:
            return Refusal(
                ErrorCode.BUSY,
                f"{under_way} incoming migrations are under way, the most that [limits] max_incoming allows",
                "busy",
            )
        known = hello.migration_id in self._offered or hello.migration_id in self._running
        if known or self._env.journal.attempt(hello.migration_id, "destination"):
            return Refusal(ErrorCode.UNEXPECTED, "this migration id was used before", "used")
        others = [offer.origin for offer in self._offered.values() if offer.hello.guest.name == hello.guest.name]
        others += [one.origin for one in self._running.values() if one.guest_name == hello.guest.name]
        others += self._recovery.sources_of(hello.guest.name)
        if not all(other.same_host(origin) for other in others):
            return Refusal(ErrorCode.BUSY, f"guest {hello.guest.name!r} is being taken in from another host", "owner")
        if hello.epoch > (most := self._env.journal.next_epoch(hello.guest.name, 0) + _EPOCHS_AHEAD):
            return Refusal(
                ErrorCode.UNEXPECTED,
                f"epoch {hello.epoch} of guest {hello.guest.name!r} is beyond what migrations can have come to: at "
                f"most {most} is taken here",
                "epoch",
            )
        return self._why_no_memory(offer.promised_bytes)

    def _why_no_memory(self, memory_bytes: int) -> Refusal | None:
        """A host that promises more memory than it has loses guests that run on it already."""
        promised: list[Offer | IncomingMigration] = [*self._offered.values(), *self._running.values()]
        promised_bytes = sum(one.promised_bytes for one in promised)
        free_bytes, spare_bytes = available_bytes(), self._env.config.limits.spare_memory_bytes
        if memory_bytes + promised_bytes + spare_bytes <= free_bytes:
            return None
        return Refusal(
            ErrorCode.BUSY,
            f"the guest has {memory_bytes >> 20} MiB of memory; this host has {free_bytes >> 20} MiB free, of which "
            f"{promised_bytes >> 20} MiB are promised to guests that come in and {spare_bytes >> 20} MiB are kept "
            "([limits] spare_memory_bytes)",
            "memory",
        )

    async def _end_older(self, hello: messages.Hello) -> None:
        """End every older attempt of a guest that is offered with a newer epoch, and wait for the end of each."""
        for incoming in list(self._running.values()):
            if incoming.guest_name == hello.guest.name and incoming.takeover.epoch < hello.epoch:
                if (event := newer_epoch(incoming.takeover.state)) is not None:
                    incoming.outcome_asked(event, Nobody())
                await incoming.takeover.finished.wait()
        await self._recovery.end_older(hello.guest.name, hello.epoch)

    async def _welcome(self, offer: Offer) -> IncomingMigration | Refusal:
        """Take an offer, once every older attempt of its guest is through; it has its place meanwhile."""
        try:
            await self._end_older(offer.hello)
        except BaseException:
            await offer.control.close()
            raise
        return await welcome(self._env, offer)

    async def _run(self, offer: Offer) -> None:
        migration_id = offer.hello.migration_id
        try:
            answer = await self._welcome(offer)
        finally:
            del self._offered[migration_id]
            self._show_as_ended(offer.hello.guest.name, offer.progress)
        if isinstance(answer, Refusal):
            self._count_refused(answer.kind)
            self.on_ended()
            return
        self._running[migration_id] = answer
        self._last[offer.hello.guest.name] = answer.progress
        daemon_ends = False
        try:
            await answer.run()
        except asyncio.CancelledError:
            daemon_ends = True  # what is open then is in the journal, and the next daemon settles it
            raise
        finally:
            del self._running[migration_id]
            self.on_ended()
            self._show_as_ended(answer.guest_name, answer.progress)
            costs = self._env.resume_costs.document()
            await asyncio.to_thread(keep_resume_costs, self._env.config.state.directory, costs)
            if not daemon_ends:
                await self._keep(migration_id, answer.takeover)

    async def _keep(self, migration_id: str, takeover: Takeover) -> None:
        """Keep the little that a late question needs, once it is decided who runs the guest."""
        if not takeover.finished.is_set():
            self._unsettled[migration_id] = takeover
            try:
                if takeover.awaits_decision:
                    await takeover.await_decision(self._env.config.limits.ready_timeout_s)
                await takeover.finished.wait()
            finally:
                del self._unsettled[migration_id]
        self._takeovers[migration_id] = takeover.ended()
        while len(self._takeovers) > _TAKEOVERS_KEPT:
            del self._takeovers[next(iter(self._takeovers))]

    def _show_as_ended(self, guest: str, progress: Callable[[], Progress]) -> None:
        """Show the last snapshot from now on, not the attempt, which holds all that it had; unless a newer one is
        shown already."""
        if self._last.get(guest) == progress:
            last = progress()
            self._last[guest] = lambda: last
        ended = [name for name in self._last if not self._under_way_of(name)]
        for name in ended[: max(0, len(ended) - _SHOWN_KEPT)]:
            del self._last[name]

    def _under_way_of(self, guest: str) -> bool:
        return any(offer.hello.guest.name == guest for offer in self._offered.values()) or any(
            one.guest_name == guest for one in self._running.values()
        )

    # Section: late questions

    def _check_asker(self, ask: messages.OutcomeAsk, names: Names) -> None:
        """Only the host that the guest came from may tell what becomes of it.

        Raises:
            RemoteProtocolError: another one asks.
        """
        attempt = self._env.journal.attempt(ask.migration_id, "destination")
        owner = tuple(attempt.facts.get("peer_names", ())) if attempt is not None else ()
        if owner and owner != names:  # a migration over plain TCP belongs to nobody
            raise RemoteProtocolError("the outcome of this migration is asked for by another host", ErrorCode.AUTH)

    async def _outcome_asked(self, ask: messages.OutcomeAsk, connection: Connection) -> None:
        """The source tells its decision again; whoever has the hand-over answers."""
        reply = OneAnswer(connection)
        decision = DestinationEvent.COMMIT if ask.decision == "commit" else DestinationEvent.ABORT
        one = who_answers(
            self._under_way(ask.migration_id),
            self._recovery.takeover(ask.migration_id) or self._unsettled.get(ask.migration_id),
            self._takeovers.get(ask.migration_id),
        )
        match one:
            case IncomingMigration():
                one.outcome_asked(decision, reply)
            case RecoveredTakeover():
                await one.take(decision, reply)
            case Takeover() | EndedTakeover():
                takeover = one.again(self._env) if isinstance(one, EndedTakeover) else one
                try:
                    await takeover.take(decision, reply, reason="the source keeps its guest")
                except RemoteProtocolError as error:
                    log.error("the source broke the hand-over", reason=str(error))
            case None:
                attempt = self._env.journal.attempt(ask.migration_id, "destination")
                answer = journaled_answer(decision, attempt.decisions if attempt is not None else None)
                reply.send(answer_message(answer, attempt.epoch if attempt is not None else ask.epoch))
        await reply.deliver(self._env.config.limits.handshake_timeout_s)

    def _under_way(self, migration_id: str) -> IncomingMigration | None:
        """An attempt whose hand-over is not finished, None when there is none."""
        incoming = self._running.get(migration_id)
        if incoming is None or incoming.takeover.finished.is_set():
            return None
        return incoming
