"""The stories of both sides, inside one process and against real guests.

open_session   fails at each of its steps: nothing is left behind, and the destination has been told
welcome        an attempt with everything it needs, or a refusal after which nothing is left
Reservation    a guest is free again whatever happens to the attempt

The module is longer than others because all of it plays the same destination to the same source.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from migrated.base.clock import HostClock
from migrated.base.errors import LinkLostError, MigrationError, RefusedError, VmmError
from migrated.destination.migration import IncomingMigration
from migrated.destination.offer import Offer, Refusal
from migrated.destination.takeover import Takeover
from migrated.destination.view import View
from migrated.destination.welcome import welcome
from migrated.environment import Environment
from migrated.fleet.ownership import Keeper
from migrated.guests.registry import Guest, GuestRegistry
from migrated.guests.reservation import Reservation
from migrated.link.control import ControlChannel
from migrated.link.listener import Listener, bind
from migrated.link.reply import Nobody
from migrated.link.security import LinkSecurity
from migrated.link.sockets import Connection, send_first
from migrated.prediction.knowledge import Knowledge
from migrated.record.model import Record
from migrated.record.terms import Role
from migrated.settings.config import Address, Config, ControlConfig, LimitsConfig, LockConfig, StateConfig, VmmConfig
from migrated.settings.parameters import MigrationParameters
from migrated.source.handover import SourceHandover
from migrated.source.migration import OutgoingMigration
from migrated.source.offer import offer_of
from migrated.source.outcome import OutcomeAsker
from migrated.source.session import Session, connect, open_session
from migrated.source.target import target_of
from migrated.state.journal import Journal
from migrated.state.learned import load_prior
from migrated.state.run_marks import RunMarks
from migrated.vmm.drivers import load_drivers
from migrated.vmm.resume_costs import ResumeCosts
from migrated.vmm.seam import GuestRequest, OwnershipLock, Replacement
from protocol import messages
from protocol.effects import DONE, Outcome
from protocol.errors import ErrorCode
from protocol.handover import DestinationEvent, DestinationState, SourceEvent
from protocol.messages import Message
from scripts.rig.ports import free_port

ID = "0123456789abcdef" * 2
PARAMETERS = MigrationParameters(channels=2)
WELCOME = messages.Welcome(
    token=bytes(16),
    capabilities=("digest-xxh3-frames", "switchover-abort"),
    load_costs=(),
    resume_ns=0,
    ready_timeout_ns=10**9,
    host="a scripted destination",
)


def environment(directory: Path, **limits: Any) -> Environment:
    """One host's environment; its events are dropped."""
    config = Config(
        control=ControlConfig(socket=directory / "control.sock"),
        state=StateConfig(directory=directory / "state"),
        vmm=VmmConfig(directory=directory / "vmm", command=("vmm-sim",)),
        limits=LimitsConfig(**limits),
    )
    return Environment(
        config=config,
        clock=HostClock(),
        security=LinkSecurity(config.tls, config.authorisation),
        journal=Journal(config.state.directory),
        run_marks=RunMarks(config.state.directory),
        guests=GuestRegistry(config, load_drivers(config)),
        knowledge=Knowledge(load_prior()),
        resume_costs=ResumeCosts(10_000_000),
        host=directory.name,
        finish=lambda _record, _role: None,
        publish=lambda _name, _data: None,
        hold_events=lambda _migration: None,
        take_log=lambda _migration, _role: [],
        open_own=_nobody_here,
    )


def _nobody_here(_replacement: Replacement) -> socket.socket:
    raise OSError("this host does not replace guests")


@asynccontextmanager
async def opened(env: Environment) -> AsyncIterator[Environment]:
    """A host that is up; its guests end with it."""
    await env.guests.open()
    try:
        yield env
    finally:
        for name in env.guests.names():
            await env.guests.destroy(env.guests.get(name))
        await env.guests.close()
        env.journal.close()
        env.run_marks.close()


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[Environment]:
    async with opened(environment(tmp_path / "a")) as env:
        yield env


@pytest.fixture
async def guest(source: Environment) -> Guest:
    return await source.guests.create(GuestRequest("g1", 4 << 20))


def held() -> list[str]:
    """What a session holds of this process: guest memory, page maps, and threads."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the directory's own
            continue
    kept = [name for name in files if "memfd" in name or name.endswith("pagemap")]
    return sorted(kept) + sorted(thread.name for thread in threading.enumerate() if "channel" in thread.name)


class Destination:
    """A destination that does what a test says, on a real listener.

    Args:
        clock: for its end of the control channel.
        on_hello: answers the offer.
        on_join: answers a data channel.
    """

    def __init__(
        self,
        clock: HostClock,
        on_hello: Callable[[ControlChannel], None],
        on_join: Callable[[int], bool] = lambda _number: True,
    ) -> None:
        self.controls: list[ControlChannel] = []
        self.data: list[Connection] = []
        self._clock = clock
        self._on_hello = on_hello
        self._on_join = on_join

    async def connected(self, first: Message, connection: Connection) -> None:
        if isinstance(first, messages.Hello):
            control = ControlChannel(
                connection, self._clock, heartbeat_interval_s=1.0, heartbeat_timeout_s=30.0, received=1
            )
            await control.start()
            self.controls.append(control)
            self._on_hello(control)
        elif isinstance(first, messages.Join) and self._on_join(first.channel):
            await send_first(connection, messages.Joined(channel=first.channel))
            self.data.append(connection)
        else:
            connection.wire.close()

    async def heard(self) -> Message:
        """The first message after the offer."""
        return (await self.controls[0].receive()).message

    async def all_closed(self) -> bool:
        """Wait until the source has closed every data channel. Returns whether it sent nothing on them before."""
        sent = 0
        for connection in self.data:
            with contextlib.suppress(LinkLostError, OSError):
                sent += len(await connection.wire.read_exactly(1))
            connection.wire.close()
        return sent == 0

    async def close(self) -> None:
        for control in self.controls:
            await control.close()


async def open_to(
    env: Environment, guest: Guest, handler: Callable[..., Any], *, kept: Callable[[Session], None] = lambda _: None
) -> None:
    """Open a session to a handler's listener and close it again.

    Args:
        kept: called with the session while it is open.
    """
    listener = Listener(handler, env.config.limits, env.security)
    listener.start(bind(Address("127.0.0.1", 0)))
    assert listener.address is not None
    description = await guest.vmm.describe()
    connection = await connect(env, listener.address)
    try:
        offer = await offer_of(guest.vmm, description, PARAMETERS)
        session = await open_session(env, guest.vmm, connection, offer, PARAMETERS, ID, 1)
        kept(session)
        connection.give_up(1, "the test is over")
        await session.close()
    finally:
        await connection.control.close()
        await listener.stop()


def says(message: Message) -> Callable[[ControlChannel], None]:
    """Answers every offer with one message."""
    return lambda control: control.send(message)


async def test_a_session_is_complete_and_leaves_nothing_when_it_is_closed(source: Environment, guest: Guest) -> None:
    before, seen = held(), []

    def kept(session: Session) -> None:
        seen.append(held())
        assert session.welcome == WELCOME
        assert len(session.channels) == PARAMETERS.channels
        assert session.connection.control.round_trip_ns() > 0
        assert session.memory.pages == session.offer.description.pages

    destination = Destination(source.clock, says(WELCOME))
    await open_to(source, guest, destination.connected, kept=kept)
    assert seen[0] != before
    assert held() == before
    assert await destination.all_closed()
    await destination.close()


REFUSAL = messages.Refuse(code=int(ErrorCode.BUSY), reason="this host is full")


@pytest.mark.parametrize(
    ("on_hello", "error", "sentence"),
    [
        (says(REFUSAL), RefusedError, "the destination refused: this host is full"),
        (says(messages.Joined(channel=0)), MigrationError, "answered the offer with JOINED"),
        (lambda control: control._lose(LinkLostError("cut")), LinkLostError, "closed|broke|reset"),
    ],
    ids=["refused", "answered out of turn", "hung up on"],
)
async def test_an_offer_that_is_not_taken_leaves_nothing(
    source: Environment,
    guest: Guest,
    on_hello: Callable[[ControlChannel], None],
    error: type[MigrationError],
    sentence: str,
) -> None:
    before, destination = held(), Destination(source.clock, on_hello)
    with pytest.raises(error, match=sentence):
        await open_to(source, guest, destination.connected)
    assert held() == before
    assert destination.data == []
    await destination.close()


async def test_a_data_channel_that_is_refused_closes_those_before_it(source: Environment, guest: Guest) -> None:
    before, destination = held(), Destination(source.clock, says(WELCOME), lambda number: number == 0)
    with pytest.raises(LinkLostError):
        await open_to(source, guest, destination.connected)
    assert held() == before
    assert isinstance(await destination.heard(), messages.Abort)
    assert len(destination.data) == 1
    assert await destination.all_closed()
    await destination.close()


async def test_a_guest_that_ends_while_the_session_is_opened(source: Environment, guest: Guest) -> None:
    before, ending = held(), []

    def on_join(number: int) -> bool:
        if number == PARAMETERS.channels - 1:
            os.kill(guest.vmm.pid, 9)
            ending.append(number)
        return True

    destination = Destination(source.clock, says(WELCOME), on_join)
    with pytest.raises(VmmError):
        await open_to(source, guest, destination.connected)
    assert ending
    assert held() == before
    assert isinstance(await destination.heard(), messages.Abort)
    assert await destination.all_closed()
    await destination.close()


async def test_a_channel_lost_before_the_legs_are_measured_ends_threads_and_tracking(
    source: Environment, guest: Guest
) -> None:
    before = held()
    destination = Destination(source.clock, says(WELCOME))

    def on_join(number: int) -> bool:
        if number == PARAMETERS.channels - 1:
            destination.controls[0]._lose(LinkLostError("cut"))
        return True

    destination._on_join = on_join
    with pytest.raises(LinkLostError):
        await open_to(source, guest, destination.connected)
    assert held() == before
    assert await destination.all_closed()
    await destination.close()
    again = Destination(source.clock, says(WELCOME))  # the guest can be moved as if nothing had been
    await open_to(source, guest, again.connected)
    assert await again.all_closed()
    await again.close()


class Welcoming:
    """A destination's side up to the answer of an offer."""

    def __init__(self, env: Environment) -> None:
        self.answer: asyncio.Future[IncomingMigration | Refusal] = asyncio.get_running_loop().create_future()
        self.offers: list[Offer] = []
        self.ran: list[asyncio.Task[None]] = []
        self._env = env

    async def connected(self, first: Message, connection: Connection) -> None:
        if isinstance(first, messages.Hello):
            control = ControlChannel(
                connection, self._env.clock, heartbeat_interval_s=1.0, heartbeat_timeout_s=30.0, received=1
            )
            await control.start()
            self.offers.append(Offer(control, first, View(self._env, first, control.peer)))
            self.ran.append(asyncio.create_task(self._take(self.offers[0])))
        elif isinstance(first, messages.Join):
            answer = await self.answer
            assert isinstance(answer, IncomingMigration)
            await send_first(connection, messages.Joined(channel=first.channel))
            answer.join(first, connection)

    async def _take(self, offer: Offer) -> None:
        answer = await welcome(self._env, offer)
        self.answer.set_result(answer)
        if isinstance(answer, IncomingMigration):
            await answer.run()


async def test_an_offer_that_is_taken_gives_an_attempt_that_ends_with_the_source(
    source: Environment, guest: Guest, tmp_path: Path
) -> None:
    before = held()
    async with opened(environment(tmp_path / "b")) as env:
        here = Welcoming(env)
        names: list[list[str]] = []
        await open_to(source, guest, here.connected, kept=lambda _session: names.append(env.guests.names()))
        await here.ran[0]
        assert names == [["g1"]]
        assert env.guests.names() == []
        attempt = env.journal.attempt(ID, "destination")
        assert attempt is not None
        assert attempt.closed
        assert here.offers[0].view.status == "failed"
    assert held() == before


async def test_a_guest_that_is_too_large_is_refused_with_a_sentence(
    source: Environment, guest: Guest, tmp_path: Path
) -> None:
    async with opened(environment(tmp_path / "b", max_memory_bytes=1 << 20)) as env:
        here = Welcoming(env)
        with pytest.raises(RefusedError, match="this host takes at most 1 MiB"):
            await open_to(source, guest, here.connected)
        answer = await here.answer
        assert isinstance(answer, Refusal)
        assert answer.code is ErrorCode.GUEST_MISMATCH
        assert "takes at most 1 MiB" in answer.reason
        assert env.journal.attempt(ID, "destination") is None
        progress = here.offers[0].progress()
        assert (progress.status, progress.reason) == ("failed", answer.reason)


async def test_a_refusal_after_the_guest_was_built_ends_the_guest(
    source: Environment, guest: Guest, tmp_path: Path
) -> None:
    before = held()
    async with opened(environment(tmp_path / "b")) as env:
        env.journal.close()  # the offer cannot be journaled, so it must not be taken
        here = Welcoming(env)
        with pytest.raises(RefusedError, match=r"the journal .* has no room for another attempt"):
            await open_to(source, guest, here.connected)
        assert isinstance(await here.answer, Refusal)
        assert env.guests.names() == []
        assert list((tmp_path / "b" / "vmm").glob("*.sock")) == []
    assert held() == before


async def test_a_reservation_ends_with_an_error(guest: Guest) -> None:
    reservation = Reservation(guest, ID)
    assert guest.migration_id == ID
    with pytest.raises(VmmError), reservation:
        await guest.vmm.own_operation("no such one", {})
    assert guest.migration_id is None


async def test_a_reservation_that_has_ended_leaves_the_next_one_alone(guest: Guest) -> None:
    with Reservation(guest, ID) as first:
        first.end()
        with Reservation(guest, "estimate"):
            first.end()
            assert guest.migration_id == "estimate"
    assert guest.migration_id is None


async def test_a_guest_is_free_again_when_the_record_cannot_be_kept(source: Environment, guest: Guest) -> None:
    def finish(_record: Record, _role: Role) -> None:
        raise OSError("the disk is full")

    source.finish = finish
    reservation = Reservation(guest, ID)
    target = target_of(f"tcp:127.0.0.1:{free_port()}")
    migration = OutgoingMigration(source, guest, reservation, target, PARAMETERS, ID, 1)
    with pytest.raises(OSError, match="the disk is full"), reservation:
        await migration.run()
    assert guest.migration_id is None
    assert migration.decided.is_set()
    assert migration.status == "failed"
    assert migration.record is not None
    assert migration.record.outcome == "failed"


async def test_what_ends_an_attempt_before_it_has_begun_ends_it(source: Environment, guest: Guest) -> None:
    destination = Destination(source.clock, says(WELCOME))
    listener = Listener(destination.connected, source.config.limits, source.security)
    listener.start(bind(Address("127.0.0.1", 0)))
    assert listener.address is not None
    host, port = listener.address
    reservation = Reservation(guest, ID)
    target = target_of(f"tcp:{host}:{port}")
    migration = OutgoingMigration(source, guest, reservation, target, PARAMETERS, ID, 1)
    assert await migration.cancel()
    await migration.run()
    assert migration.status == "cancelled"
    assert destination.controls == []
    assert guest.migration_id is None
    await listener.stop()


async def test_a_ready_that_comes_before_the_whole_state_is_no_vote(source: Environment, guest: Guest) -> None:
    """Without a digest nothing else would show that the destination cannot have the guest."""

    async def ready_at_once(control: ControlChannel) -> None:
        with contextlib.suppress(LinkLostError):
            while True:
                message = (await control.receive()).message
                if isinstance(message, messages.Downtime):
                    control.send(messages.Ready(epoch=1, digest=0, elapsed_ns=0, completing_ns=0))
                if isinstance(message, messages.RoundEnd):
                    control.send(messages.RoundDone(round=message.round, bytes=0, digest=0))
                assert not isinstance(message, messages.Commit)

    async def take_pages() -> None:
        while True:
            for connection in destination.data:
                with contextlib.suppress(BlockingIOError):
                    connection.wire.sock.recv(1 << 20)
            await asyncio.sleep(0.002)

    hearing: list[asyncio.Task[None]] = []

    def on_hello(control: ControlChannel) -> None:
        control.send(WELCOME)
        hearing.append(asyncio.create_task(ready_at_once(control)))
        hearing.append(asyncio.create_task(take_pages()))

    destination = Destination(source.clock, on_hello)
    listener = Listener(destination.connected, source.config.limits, source.security)
    listener.start(bind(Address("127.0.0.1", 0)))
    parameters = PARAMETERS.model_copy(update={"digest": False, "downtime_limit_ms": 60_000.0})
    reservation = Reservation(guest, ID)
    target = target_of(f"tcp:{listener.address}")
    migration = OutgoingMigration(source, guest, reservation, target, parameters, ID, 1)
    with reservation:
        await migration.run()
    assert migration.record is not None
    assert migration.record.outcome == "aborted", migration.record.reason
    assert "READY before it had the state" in (migration.record.reason or "")
    assert (await guest.vmm.status()).state == "running"
    await destination.close()
    for task in hearing:
        task.cancel()
    ends = await asyncio.gather(*hearing, return_exceptions=True)
    assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
    for connection in destination.data:
        connection.wire.close()
    await listener.stop()


# Section: the vote, and what the destination looks at before it resumes


async def test_a_vmm_that_was_killed_after_the_vote_is_not_taken_for_one_that_may_have_run(
    source: Environment, guest: Guest
) -> None:
    incoming = await source.guests.create_incoming(await guest.vmm.describe(), replacement=Replacement())
    facts = {"paused": False, "driver": "sim", "place": incoming.place, "started_at": "2026-01-01T00:00:00Z"}
    source.journal.begin(ID, 1, "g1", "destination", facts)
    takeover = Takeover(source, ID, 1, incoming.place, "sim", incoming)
    takeover.make_ready = lambda: messages.Ready(epoch=1, digest=0, elapsed_ns=0, completing_ns=0)
    await takeover.take(DestinationEvent.LOADED, Nobody())
    assert takeover.awaits_decision
    os.kill(incoming.vmm.pid, signal.SIGKILL)
    await takeover.take(DestinationEvent.COMMIT, Nobody())
    assert takeover.state is DestinationState.DISCARDED
    assert not source.run_marks.ran(incoming.place, 1)


class Store:
    """What a fleet's store says to a host: the source has handed the guest over, the destination hears nothing."""

    async def transfer(self, _guest: str, _migration_id: str, _within_ns: int) -> Outcome:
        return DONE

    async def token(self, _guest: str, *, arriving: bool) -> int | None:
        return None if arriving else 7


class NotedLock(OwnershipLock):
    """A lock that is always free, and the tokens that it was taken with."""

    def __init__(self) -> None:
        self.tokens: list[int | None] = []

    async def take(self) -> None:
        self.tokens.append(self.token)

    async def carry(self) -> None: ...

    async def release(self) -> None: ...


class Noted:
    """The messages for a peer."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message, payload: bytes = b"") -> None:
        assert not payload
        self.sent.append(message)


@pytest.mark.parametrize("tells_token", [True, False])
async def test_a_source_in_a_fleet_tells_the_token_right_before_commit(
    source: Environment, guest: Guest, tells_token: bool
) -> None:
    facts = {"paused": False, "driver": "sim", "place": guest.place, "started_at": "2026-01-01T00:00:00Z"}
    source.journal.begin(ID, 1, "g1", "source", facts)
    asker = OutcomeAsker(target_of("tcp:127.0.0.1:9").place, source.security, source.config.limits, ID, 1)
    handover = SourceHandover(source, ID, 1, guest, False, asker, cast("Keeper", Store()))
    handover.tells_token, handover.commit_by_ns = tells_token, time.monotonic_ns() + 10**10
    reply = Noted()
    await handover.take(SourceEvent.STOP, reply)
    await handover.take(SourceEvent.READY_IN_TIME, reply)
    owned = [messages.Owned(epoch=1, token=7)] if tells_token else []
    assert reply.sent == [*owned, messages.Commit(epoch=1)]
    await handover.close()


async def test_a_destination_that_hears_nothing_of_the_store_takes_the_lock_with_the_token_that_it_was_told(
    source: Environment, guest: Guest, tmp_path: Path
) -> None:
    """Without one a host that was overtaken would get the lock once the guest has ended elsewhere."""
    incoming = await source.guests.create_incoming(await guest.vmm.describe(), replacement=Replacement())
    lock = incoming.vmm.lock = NotedLock()
    facts = {"paused": False, "driver": "sim", "place": incoming.place, "started_at": "2026-01-01T00:00:00Z"}
    source.journal.begin(ID, 1, "g1", "destination", facts)
    config = source.config.model_copy(update={"lock": LockConfig(directory=tmp_path)})
    env = dataclasses.replace(source, config=config, keeper=cast("Keeper", Store()))
    takeover = Takeover(env, ID, 1, incoming.place, "sim", incoming)
    takeover.make_ready = lambda: messages.Ready(epoch=1, digest=0, elapsed_ns=0, completing_ns=0)
    await takeover.take(DestinationEvent.LOADED, Nobody())
    takeover.told_token = 7
    await takeover.take(DestinationEvent.COMMIT, Nobody())
    assert lock.tokens == [7]
