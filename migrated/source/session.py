"""A session with a destination: the connections and all other objects that an attempt needs to move state.

    connect      a control channel to the destination
    open_session HELLO -> WELCOME, data channels, memory, tracking of writes, sender, legs

Each returns a complete object, or raises and leaves nothing of its own behind. None of it disturbs the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from migrated.base.errors import LinkLostError, MigrationError, RefusedError, VmmError
from migrated.environment import Environment
from migrated.kernel.processor import ProcessorLoad
from migrated.link import sockets
from migrated.link.control import ControlChannel
from migrated.link.data import DataChannel
from migrated.link.sockets import Place
from migrated.prediction.bandwidth import Bandwidth
from migrated.prediction.model import Bases
from migrated.settings.parameters import MigrationParameters
from migrated.source.encoding import encoder_factory
from migrated.source.offer import Offer, bases_of, hello_of, limits_of
from migrated.source.pages import PageSender
from migrated.vmm.dirty_log import DirtyLog
from migrated.vmm.handed_over import HandedOverMemory, NoDirtyLog
from migrated.vmm.memory import GuestMemory
from migrated.vmm.seam import VmmGuest
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.messages import Limits
from protocol.versions import SHARED

_MEASURE_S = 5.0


@dataclass(frozen=True, slots=True)
class Connection:
    """A control channel to a destination that was not offered anything yet.

    Attributes:
        control: started; whoever holds the connection closes it.
        place: where the destination listens.
    """

    control: ControlChannel
    place: Place

    @property
    def where(self) -> str:
        """The destination's address, for sentences."""
        return str(self.place)

    def give_up(self, epoch: int, reason: str) -> None:
        """Tell the destination that this attempt ends, if the channel still stands."""
        with contextlib.suppress(LinkLostError):
            self.control.send(messages.Abort(epoch=epoch, reason=reason[:2000]))


async def connect(env: Environment, place: Place) -> Connection:
    """Open a control channel.

    Raises:
        LinkLostError: no daemon answers there.
        RefusedError: this host may not talk to that one.
    """
    bounds = env.config.limits
    control = ControlChannel(
        await _open(env, place),
        env.clock,
        heartbeat_interval_s=bounds.heartbeat_interval_s,
        heartbeat_timeout_s=bounds.heartbeat_timeout_s,
    )
    try:
        await control.start()
    except BaseException:
        await control.close()
        raise
    return Connection(control, place)


async def _open(env: Environment, place: Place) -> sockets.Connection:
    bounds = env.config.limits
    return await sockets.connect(place, bounds.connect_timeout_s, bounds.tcp_user_timeout_s, env.security)


class Tracking:
    """The tracking of a guest's writes, from its begin to its end.

    Args:
        vmm: the guest.
        log: its dirty log, owned from here on.
    """

    def __init__(self, vmm: VmmGuest, log: DirtyLog) -> None:
        self.log = log
        self.guest_stays = True
        """False when the guest's VMM is gone and need not be told."""
        self._vmm = vmm

    async def end(self) -> None:
        """Close the log, and let the VMM stop tracking."""
        self.log.close()
        if self.guest_stays:
            await self.stop_in_vmm()

    async def stop_in_vmm(self) -> None:
        """Let the VMM stop tracking; without effect when it has."""
        with contextlib.suppress(VmmError):
            await self._vmm.stop_dirty_log()


@dataclass(frozen=True, slots=True)
class Session:
    """An offer that the destination has taken, with all objects that moving the guest needs. The control channel
    belongs to the ``Connection``.

    Attributes:
        shared: the guest's memory is handed over, so that neither memory nor tracking have anything to do.
        channels: joined data channels, in the hands of the sender's threads.
        load: how long the event loop waits for a processor, since the session was opened.
        undo: ends what the session owns: threads, tracking, the mapping, the data channels.
    """

    connection: Connection
    offer: Offer
    welcome: messages.Welcome
    shared: bool
    channels: list[DataChannel]
    memory: GuestMemory
    tracking: Tracking
    sender: PageSender
    load: ProcessorLoad
    undo: contextlib.AsyncExitStack

    def limits(self, parameters: MigrationParameters) -> Limits:
        """The budget. A guest that is paused anyway has none."""
        return limits_of(parameters, self.offer)

    def bases(self, dirty_pages: int, device_bytes: int, scan_ns: int, bandwidth: Bandwidth) -> Bases:
        """Return the bases of the prediction of a stop now: rehearsed on both sides, or measured in this attempt.

        Args:
            dirty_pages: pages that would travel while the guest stands still.
            device_bytes: size of the device states that would travel with them.
            scan_ns: cost of a dirty-log read, with its fence.
            bandwidth: the link.
        """
        return bases_of(
            self.offer,
            bandwidth,
            dirty_pages=dirty_pages,
            device_bytes=device_bytes,
            scan_ns=scan_ns,
            load=self.load,
            load_costs=self.welcome.load_costs,
            legs_ns=2 * self.connection.control.typical_round_trip_ns(),
            resume_ns=self.welcome.resume_ns,
        )

    async def close(self, *, guest_stays: bool = True) -> None:
        """End threads, mappings and tracking; the control channel stays for the last messages. Idempotent.

        Args:
            guest_stays: False when the guest's process is gone, so that there is nothing to tell it.
        """
        self.tracking.guest_stays = guest_stays
        await self.undo.aclose()


async def open_session(
    env: Environment,
    vmm: VmmGuest,
    connection: Connection,
    offer: Offer,
    parameters: MigrationParameters,
    migration_id: str,
    epoch: int,
) -> Session:
    """Negotiate, join the data channels, map the guest's memory, begin to track writes, and measure the legs.

    Memory that the guest has in files is offered to a destination on this host. Where that takes it, it is neither
    mapped nor tracked here, and one data channel is left, for device states.

    When it fails, what was opened is closed again and the destination has been told why.

    Args:
        parameters: in force when the session is opened.
        migration_id, epoch: the attempt.

    Raises:
        RefusedError: the destination does not take the guest; its reason is in the sentence.
        LinkLostError, MigrationError, VmmError: it could not be set up.
    """
    env.security.check_send(connection.control.names, offer.description.name)
    load = ProcessorLoad()
    async with contextlib.AsyncExitStack() as undo:
        try:
            files = await vmm.memory_files() if connection.control.local else ()
            try:
                if files:  # what is in no file travels with the device states then
                    offer = replace(offer, description=await vmm.describe())
                hello = hello_of(env, offer, parameters, migration_id, epoch, shared=bool(files))
                welcome = await _negotiate(env, connection, hello, files)
            finally:
                for fd in files:
                    os.close(fd)
            shared = bool(files) and SHARED in welcome.capabilities
            channels: list[DataChannel] = []
            for number in range(hello.channels):
                channel = await _join(env, connection, migration_id, welcome, number)
                undo.callback(channel.close)
                channels.append(channel)
            memory = HandedOverMemory(offer.description.pages) if shared else await vmm.memory()
            undo.push_async_callback(asyncio.to_thread, memory.release)
            log = NoDirtyLog() if shared else await vmm.start_dirty_log(parameters.dirty_tracking)
            tracking = Tracking(vmm, log)
            undo.push_async_callback(tracking.end)
            sender = PageSender(
                memory,
                channels,
                MemoryDigest(offer.description.pages) if parameters.digest and not shared else None,
                encoder_factory(parameters, welcome.capabilities),
                None if vmm.needs_fence else tracking.log.clear,
                announce="extents" in welcome.capabilities,
            )
            undo.push_async_callback(sender.stop)
            sender.pace(parameters.max_bandwidth_bytes_per_s)
            sender.start()
            await connection.control.measure(_MEASURE_S)
        except BaseException as error:
            connection.give_up(epoch, str(error) or "the source gave up")  # before the data channels are closed
            raise
        return Session(connection, offer, welcome, shared, channels, memory, tracking, sender, load, undo.pop_all())


async def _negotiate(
    env: Environment, connection: Connection, hello: messages.Hello, files: Sequence[int]
) -> messages.Welcome:
    bound_s = env.config.limits.handshake_timeout_s
    connection.control.send(hello, descriptors=files)
    try:
        async with asyncio.timeout(bound_s):
            answer = (await connection.control.receive()).message
    except TimeoutError as error:
        raise LinkLostError(f"{connection.where} did not answer the offer within {bound_s:g} s") from error
    if isinstance(answer, messages.Refuse):
        raise RefusedError(f"the destination refused: {answer.reason}")
    if not isinstance(answer, messages.Welcome):
        raise MigrationError(f"the destination answered the offer with {answer.TYPE.name}")
    if invented := set(answer.capabilities) - set(hello.capabilities):
        raise MigrationError(f"the destination agreed to what was not offered: {', '.join(sorted(invented)):.200}")
    return answer


async def _join(
    env: Environment, connection: Connection, migration_id: str, welcome: messages.Welcome, number: int
) -> DataChannel:
    opened = await _open(env, connection.place)
    try:
        if opened.wire.names != connection.control.names:
            raise LinkLostError(f"{connection.where} shows another certificate on data channel {number}")
        join = messages.Join(migration_id=migration_id, token=welcome.token, channel=number)
        answer = await sockets.ask_first(opened, join, env.config.limits.handshake_timeout_s)
        if not isinstance(answer, messages.Joined):
            raise MigrationError(f"data channel {number} was answered with {answer.TYPE.name}")
    except TimeoutError as error:
        opened.wire.close()
        raise LinkLostError(f"data channel {number} was not answered in time") from error
    except BaseException:
        opened.wire.close()
        raise
    return DataChannel(opened, number)
