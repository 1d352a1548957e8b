"""A session with a destination: the connections and everything that an attempt holds while it moves state.

Opening one negotiates and begins to track writes, without disturbing the guest; closing one leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib

from migrated.environment import Environment
from migrated.errors import LinkLostError, MigrationError, RefusedError, VmmError
from migrated.link import sockets
from migrated.link.control import ControlChannel
from migrated.link.data import DataChannel
from migrated.parameters import MigrationParameters
from migrated.prediction.bandwidth import Bandwidth
from migrated.prediction.model import Bases
from migrated.source.encoding import encoder_factory
from migrated.source.pages import PageSender
from migrated.vmm.dirty_log import DirtyLog
from migrated.vmm.memory import GuestMemory
from migrated.vmm.requirements import unmet
from migrated.vmm.seam import ExpectedCosts, VmmGuest
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.guest import PAGE_SIZE, GuestDescription
from protocol.messages import Limits, TimeRules
from protocol.versions import CAPABILITIES, REQUIRED_CAPABILITIES

_MEASURE_S = 5.0


class Session:
    """One session. Everything is None or empty until ``open`` got to it, so ``close`` is right at any point.

    Args:
        env: the daemon.
        vmm: the guest.
        host, port: the destination's listen address.
        parameters: in force when the session is opened.
        migration_id, epoch: the attempt.
    """

    def __init__(
        self,
        env: Environment,
        vmm: VmmGuest,
        host: str,
        port: int,
        parameters: MigrationParameters,
        migration_id: str,
        epoch: int,
    ) -> None:
        self.migration_id = migration_id
        self.epoch = epoch
        self.control: ControlChannel | None = None
        self.welcome: messages.Welcome | None = None
        self.costs = ExpectedCosts((), 0, 0, 0, "guessed")
        self.was_paused = False
        self.channels: list[DataChannel] = []
        self.memory: GuestMemory | None = None
        self.dirty_log: DirtyLog | None = None
        self.sender: PageSender | None = None
        self._env = env
        self._vmm = vmm
        self._host = host
        self._port = port
        self._parameters = parameters

    @property
    def where(self) -> str:
        """The destination's address, for sentences."""
        return f"{self._host}:{self._port}"

    async def open(self, description: GuestDescription) -> None:
        """Negotiate, join the data channels, map the guest's memory and begin to track writes.

        Raises:
            RefusedError: the destination does not take the guest; its reason is in the sentence.
            LinkLostError, MigrationError, VmmError: it could not be set up.
        """
        status = await self._vmm.status()
        if status.state == "incoming":
            raise RefusedError(f"guest {description.name!r} is itself waiting for an incoming migration")
        self.was_paused = status.state == "paused"
        reason = unmet(self._vmm, description, self._parameters) or await self._vmm.why_not_migrate()
        if reason is not None:
            raise RefusedError(reason)
        self.costs = await self._vmm.expected_costs("save")
        agreed = await self._negotiate(description)
        for number in range(self._parameters.channels):
            self.channels.append(await self._join(number, agreed))
        self.memory = await self._vmm.memory()
        self.dirty_log = await self._vmm.start_dirty_log(self._parameters.dirty_tracking)
        digest = MemoryDigest(description.pages) if self._parameters.digest else None
        assert self.welcome is not None
        agreed_on = self.welcome.capabilities
        self.sender = PageSender(
            self.memory,
            self.channels,
            digest,
            encoder_factory(self._parameters, agreed_on),
            None if self._vmm.needs_fence else self.dirty_log.clear,
            announce="extents" in agreed_on,
        )
        self.sender.pace(self._parameters.max_bandwidth_bytes_per_s)
        self.sender.start()

    async def measure(self) -> None:
        """Exchange clocks a few times, so that legs are known. The control channel must be read meanwhile."""
        assert self.control is not None
        await self.control.measure(_MEASURE_S)

    def limits(self, parameters: MigrationParameters) -> Limits:
        """The budget. A guest that is paused anyway has none."""
        return Limits(
            downtime_limit_ns=int(parameters.downtime_limit_ms * 1e6),
            switchover_limit_ns=int(parameters.switchover_limit_ms * 1e6),
            switchover_abort=parameters.switchover_abort and not self.was_paused,
        )

    def bases(self, dirty_pages: int, device_bytes: int, scan_ns: int, bandwidth: Bandwidth) -> Bases:
        """What a stop now rests on: tried on both sides, or measured in this attempt.

        Args:
            dirty_pages: pages that would travel while the guest stands still.
            device_bytes: device states that would.
            scan_ns: cost of a dirty-log read.
            bandwidth: the link.
        """
        assert self.control is not None
        assert self.welcome is not None
        remaining_bytes = dirty_pages * PAGE_SIZE + device_bytes
        rate = bandwidth.for_bytes(remaining_bytes)
        return Bases(
            stop_ns=self.costs.pause_ns,
            dirty_log_ns=2 * scan_ns,
            memory_ns=int(remaining_bytes * 1e9 / rate) if rate else 0,
            save_ns=sum(cost.ns for cost in self.costs.devices),
            load_ns=sum(cost.ns for cost in self.welcome.load_costs),
            legs_ns=2 * self.control.typical_round_trip_ns(),
            resume_ns=self.welcome.resume_ns,
        )

    async def close_state(self, *, stop_tracking: bool) -> None:
        """End threads, mappings and tracking; the control channel stays for the last messages. Idempotent."""
        if self.sender is not None:
            await self.sender.stop()
        else:
            for channel in self.channels:
                channel.close()
            self.channels = []
        if self.dirty_log is not None:
            self.dirty_log.close()
            if stop_tracking:
                with contextlib.suppress(VmmError):
                    await self._vmm.stop_dirty_log()
        if self.memory is not None:
            await asyncio.to_thread(self.memory.release)

    async def close(self) -> None:
        """Close the control channel, last of all."""
        if self.control is not None:
            await self.control.close()

    async def _negotiate(self, description: GuestDescription) -> sockets.Agreed:
        bounds = self._env.config.limits
        sock, agreed = await sockets.connect(
            self._host, self._port, bounds.connect_timeout_s, bounds.tcp_user_timeout_s
        )
        control = self.control = ControlChannel(
            sock,
            agreed,
            self._env.clock,
            heartbeat_interval_s=bounds.heartbeat_interval_s,
            heartbeat_timeout_s=bounds.heartbeat_timeout_s,
        )
        await control.start()
        control.send(self._hello(description))
        try:
            async with asyncio.timeout(bounds.handshake_timeout_s):
                answer = (await control.receive()).message
        except TimeoutError as error:
            raise LinkLostError(
                f"{self.where} did not answer the offer within {bounds.handshake_timeout_s:g} s"
            ) from error
        if isinstance(answer, messages.Refuse):
            raise RefusedError(f"the destination refused: {answer.reason}")
        if not isinstance(answer, messages.Welcome):
            raise MigrationError(f"the destination answered the offer with {answer.TYPE.name}")
        self.welcome = answer
        return agreed

    def _hello(self, description: GuestDescription) -> messages.Hello:
        parameters = self._parameters
        required = set(REQUIRED_CAPABILITIES)
        if parameters.switchover_abort:
            required.add("switchover-abort")
        if parameters.digest:
            required.add("digest-xxh3-frames")
        return messages.Hello(
            migration_id=self.migration_id,
            epoch=self.epoch,
            guest=description,
            guest_paused=self.was_paused,
            capabilities=tuple(sorted(CAPABILITIES)),
            required=tuple(sorted(required)),
            limits=self.limits(parameters),
            time_rules=TimeRules(
                policy=parameters.time_policy,
                max_time_jump_ns=int(parameters.max_time_jump_ms * 1e6),
                max_time_error_ns=int(parameters.max_time_error_ms * 1e6),
            ),
            channels=parameters.channels,
            host=self._env.host,
        )

    async def _join(self, number: int, agreed: sockets.Agreed) -> DataChannel:
        assert self.welcome is not None
        bounds = self._env.config.limits
        sock, _ = await sockets.connect(self._host, self._port, bounds.connect_timeout_s, bounds.tcp_user_timeout_s)
        try:
            join = messages.Join(migration_id=self.migration_id, token=self.welcome.token, channel=number)
            answer = await sockets.ask_first(sock, agreed, join, bounds.handshake_timeout_s)
            if not isinstance(answer, messages.Joined):
                raise MigrationError(f"data channel {number} was answered with {answer.TYPE.name}")
        except TimeoutError as error:
            sock.close()
            raise LinkLostError(f"data channel {number} was not answered in time") from error
        except BaseException:
            sock.close()
            raise
        return DataChannel(sock, number, agreed)
