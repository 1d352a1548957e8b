"""One host: its guests, its outgoing and incoming attempts, and what a restarted daemon finds of them.

It is what the control socket operates on (``migrated.control.operations.Operations``).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import structlog
from pydantic import ValidationError

from migrated.clock import HostClock
from migrated.config import Config, parse_uri
from migrated.control.operations import EventBus, GuestSpec, OperationError
from migrated.destination.migration import IncomingMigration
from migrated.destination.recovery import RecoveredTakeover
from migrated.destination.takeover import Takeover
from migrated.environment import Environment, host_name
from migrated.errors import MigrationError, VmmError
from migrated.guests import ANSWER_S, UNRESPONSIVE, Guest, GuestRegistry, UnknownGuestError
from migrated.history import History, HistoryError, HistoryQuery, RecordNotFoundError
from migrated.journal import Attempt, Journal
from migrated.learned import keep_knowledge, load_knowledge
from migrated.link import sockets
from migrated.link.control import ControlChannel
from migrated.link.reply import Nobody, OneAnswer
from migrated.logs import LogCollector
from migrated.metrics import Metrics
from migrated.parameters import MigrationParameters
from migrated.progress import Progress
from migrated.record.model import Record
from migrated.source.estimate import estimate
from migrated.source.migration import OutgoingMigration, Target
from migrated.source.recovery import RecoveredHandover
from migrated.tasks import TaskSet
from migrated.vmm.resume_costs import ResumeCosts
from protocol import messages
from protocol.errors import ErrorCode, ProtocolError, RemoteProtocolError
from protocol.handover import DestinationEvent, DestinationState, destination_state_of
from protocol.messages import Message
from protocol.versions import MAJOR, MINOR

log = structlog.get_logger()

Found = TypeVar("Found")

_TAKEOVERS_KEPT = 64

Role = Literal["source", "destination", "host"]
"""Which directions a daemon takes part in."""


class MigrationHost:
    """All that one daemon does, without its process: sockets to listen on, signals and logging are the daemon's.

    Args:
        config: the configuration.
        role: which directions are allowed.
        collector: where the log lines of each migration are kept.
    """

    def __init__(self, config: Config, role: Role, collector: LogCollector) -> None:
        self.events = EventBus()
        self.stopping = asyncio.Event()
        """Set when an operator asked the daemon to quit."""
        self._config = config
        self._role = role
        self._clock = HostClock(config.clock.hrtime_offset_ns, config.clock.wall_offset_ns, config.clock.drift_ppm)
        self._guests = GuestRegistry(config.vmm, config.clock, config.lock)
        self._guests.on_gone = self._guest_gone
        self._guests.on_settled = self._guest_settled
        self._journal = Journal(config.state.directory)
        self._history = History(config.state.directory, config.history.max_records)
        self.metrics = Metrics()
        self._knowledge = load_knowledge(config.state.directory)
        self._env = Environment(
            config=config,
            clock=self._clock,
            journal=self._journal,
            guests=self._guests,
            knowledge=self._knowledge,
            resume_costs=ResumeCosts(),
            host=host_name(config),
            finish=self._finish,
            publish=self.events.publish,
            hold_events=self.events.hold,
            take_log=collector.take,
        )
        self._defaults = config.migration
        self._guest_parameters: dict[str, MigrationParameters] = {}
        self._outgoing: dict[str, OutgoingMigration] = {}
        self._incoming: dict[str, IncomingMigration] = {}
        self._takeovers: dict[str, Takeover] = {}
        """Finished take-overs: they answer late questions better than the journal, which may not have been written."""
        self._postponed: list[Attempt] = []
        """Open attempts of guests that do not answer: nothing is decided about a guest of which nothing is known."""
        self._recovered: dict[str, RecoveredHandover] = {}
        self._recovered_incoming: dict[str, RecoveredTakeover] = {}
        self._last: dict[tuple[str, str], OutgoingMigration | IncomingMigration] = {}
        self._tasks = TaskSet()

    # Section: life

    async def start(self) -> None:
        """Find the guests that run and finish or undo what the last daemon left open."""
        await self._guests.open()
        current, overtaken = self._journal.open_attempts()
        for attempt in overtaken:
            log.warning("an attempt that a later one has overtaken is closed", migration_id=attempt.migration_id)
            self._journal.close_attempt(attempt.migration_id, attempt.role)
        for attempt in current:
            if attempt.guest in self._guests.silent:
                log.error("an open attempt waits for its guest to answer", guest=attempt.guest, role=attempt.role)
                self._postponed.append(attempt)
            else:
                self._recover(attempt)
        await asyncio.gather(*(self._discard_abandoned(guest) for guest in self._all_guests()))

    async def stop(self) -> None:
        """Cancel what can be cancelled, let go of every guest, close every file."""
        for migration in list(self._outgoing.values()):
            await migration.cancel("the daemon is stopping")
        for incoming in list(self._incoming.values()):
            incoming.cancel("the destination's daemon is stopping")
        ending = [m.decided.wait() for m in self._outgoing.values()]
        if ending:
            await asyncio.wait({asyncio.ensure_future(w) for w in ending}, timeout=5.0)
        for migration in list(self._outgoing.values()):
            await migration.close()
        for handover in self._recovered.values():
            await handover.close()
        await self._tasks.stop()
        await self._guests.close()
        keep_knowledge(self._config.state.directory, self._knowledge)
        self._journal.close()
        self._history.close()

    def version(self) -> dict[str, Any]:
        return {"version": importlib.metadata.version("migrated"), "protocol": f"{MAJOR}.{MINOR}", "role": self._role}

    async def quit(self) -> None:
        self.stopping.set()

    # Section: guests

    async def guest_create(self, spec: GuestSpec) -> dict[str, Any]:
        arguments = ["--memory", str(spec.memory_bytes)]
        if spec.profile is not None:
            arguments += ["--profile", str(self._profile_path(spec.profile))]
        if spec.workload is not None:
            arguments += ["--workload", spec.workload]
        if spec.dirty_rate_bytes_per_s is not None:
            arguments += ["--dirty-rate", f"{spec.dirty_rate_bytes_per_s}"]
        if spec.seed is not None:
            arguments += ["--seed", str(spec.seed)]
        if spec.paused:
            arguments.append("--paused")
        for key, value in spec.options.items():
            arguments += [f"--{key}", value]
        try:
            guest = await self._guests.create(spec.name, arguments)
        except MigrationError as error:
            raise OperationError(str(error)) from error
        log.info("guest created", guest=guest.name, pid=guest.vmm.pid)
        return await self._show(guest)

    def _profile_path(self, profile: str) -> Path:
        path = Path(profile)
        if path.suffix != ".toml" and len(path.parts) == 1:
            path = self._config.vmm.profiles / f"{profile}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in self._config.vmm.profiles.glob("*.toml"))) or "none"
            raise OperationError(f"there is no guest profile {profile!r} ({path}); profiles here: {known}")
        return path

    def guest_names(self) -> list[str]:
        here = [guest.name for guest in self._all_guests() if guest.overlay != "retired"]
        return [*here, *self._guests.silent] or self._guests.names()

    async def guest_list(self) -> list[dict[str, Any]]:
        shown = await asyncio.gather(*(self._show(guest, detail=False) for guest in self._all_guests()))
        return [*shown, *(self._show_silent(name) for name in self._guests.silent)]

    async def guest_show(self, name: str) -> dict[str, Any]:
        if name in self._guests.silent:
            return self._show_silent(name)
        return await self._show(self._guest(name))

    async def guest_pause(self, name: str) -> dict[str, Any]:
        guest = self._idle_guest(name)
        await _vmm(guest.vmm.pause())
        self.events.publish("STOP", {"guest": name})
        return await self._show(guest)

    async def guest_resume(self, name: str) -> dict[str, Any]:
        guest = self._idle_guest(name)
        status = await _vmm(guest.vmm.status())
        await _vmm(guest.vmm.resume(status.epoch))
        self.events.publish("RESUME", {"guest": name})
        return await self._show(guest)

    async def guest_destroy(self, name: str) -> dict[str, Any]:
        guest = self._idle_guest(name)
        await _vmm(self._guests.destroy(guest))
        self._guest_parameters.pop(name, None)
        return {"name": name, "state": "destroyed"}

    async def guest_verify(self, name: str) -> dict[str, Any]:
        return await _vmm(self._guest(name).vmm.verify())

    def _all_guests(self) -> list[Guest]:
        return [self._guests.get(name) for name in self._guests.names()]

    def _guest(self, name: str) -> Guest:
        if (silent := self._guests.silent.get(name)) is not None:
            raise OperationError(f"guest {name!r} is unresponsive: {silent.reason}", "DeviceNotActive")
        try:
            return self._guests.get(name)
        except UnknownGuestError as error:
            raise OperationError(str(error), "DeviceNotFound") from error

    def _idle_guest(self, name: str) -> Guest:
        """A guest that no migration has its hands on: only then may an operator stop, run or end it."""
        guest = self._guest(name)
        if guest.migration_id is not None or guest.overlay is not None:
            raise OperationError(
                f"guest {name!r} is {guest.overlay or 'being migrated'} (migration {guest.migration_id}); wait for its "
                "end, cancel it, or resolve it if it is in doubt"
            )
        return guest

    async def _show(self, guest: Guest, detail: bool = True) -> dict[str, Any]:
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await guest.vmm.status()
        except (VmmError, TimeoutError) as error:
            reason = str(error) or f"its VMM (pid {guest.vmm.pid}) has not answered within {ANSWER_S:g} s"
            return guest.summary(UNRESPONSIVE) | {"reason": reason}
        summary = guest.summary(status.state)
        return {**_plain(status.detail), **summary} if detail else summary

    def _show_silent(self, name: str) -> dict[str, Any]:
        waiting = (attempt.migration_id for attempt in self._postponed if attempt.guest == name)
        return self._guests.silent[name].summary(next(waiting, None))

    async def _discard_abandoned(self, guest: Guest) -> None:
        """End an incoming guest that no attempt knows of: its daemon ended before it journaled the attempt."""
        with contextlib.suppress(VmmError):
            if guest.migration_id is None and (await guest.vmm.status()).state == "incoming":
                log.warning("an incoming guest of a migration that never began is discarded", guest=guest.name)
                await self._guests.destroy(guest)

    def _guest_settled(self, name: str) -> None:
        """A guest that was silent when this daemon began has answered, or ended."""
        waiting = [attempt for attempt in self._postponed if attempt.guest == name]
        self._postponed = [attempt for attempt in self._postponed if attempt.guest != name]
        for attempt in waiting:
            self._recover(attempt)
        if (guest := self._guests.find(name)) is not None:
            self._tasks.start(self._discard_abandoned(guest))

    def _guest_gone(self, guest: Guest) -> None:
        self.events.publish("X_MIGRATED_GUEST_GONE", {"guest": guest.name, "pid": guest.vmm.pid})
        if guest.migration_id is None:
            return
        if (outgoing := self._outgoing.get(guest.migration_id)) is not None:
            outgoing.guest_gone()
        if (incoming := self._incoming.get(guest.migration_id)) is not None:
            incoming.guest_gone()

    # Section: outgoing

    async def migrate(self, guest: str, uri: str, overrides: dict[str, object]) -> str:
        if self._role == "destination":
            raise OperationError("this daemon is a destination only; run `migrated host` to migrate guests away too")
        one = self._idle_guest(guest)
        target = _target(uri)
        parameters = _with(self.parameters(guest), overrides)
        status = await _vmm(one.vmm.status())
        if one.migration_id is not None:
            raise OperationError(f"guest {guest!r} is already being migrated (migration {one.migration_id})")
        migration_id = secrets.token_hex(16)
        migration = OutgoingMigration(
            self._env, one, target, parameters, migration_id, self._journal.next_epoch(guest, status.epoch)
        )
        one.migration_id = migration_id
        self._outgoing[migration_id] = self._last["source", guest] = migration
        self._tasks.start(self._run(migration))
        return migration_id

    async def _run(self, migration: OutgoingMigration) -> None:
        try:
            await migration.run()
        finally:
            if migration.status != "in-doubt":
                self._outgoing.pop(migration.migration_id, None)
            if migration.status == "completed":
                self._guest_parameters.pop(migration.guest_name, None)  # whoever has the name next is another guest
            await asyncio.to_thread(keep_knowledge, self._config.state.directory, self._knowledge)

    async def wait(self, migration_id: str) -> dict[str, Any]:
        migration = self._outgoing.get(migration_id)
        if migration is not None:
            await migration.decided.wait()
            if migration.record is None:
                raise OperationError(f"migration {migration_id} ended without a record; the daemon's log says why")
            return migration.record.document()
        return await asyncio.to_thread(self.record, migration_id)

    async def cancel(self, guest: str) -> None:
        self._guest_or_last(guest)
        for migration in self._outgoing.values():
            if migration.guest_name == guest and not await migration.cancel():
                raise OperationError(
                    f"the migration of {guest!r} cannot be cancelled any more: COMMIT was sent and the destination "
                    f"may run the guest (status {migration.status})"
                )
        for incoming in self._incoming.values():
            if incoming.guest_name == guest and not incoming.cancel("cancelled by the destination's operator"):
                raise OperationError(
                    f"the incoming migration of {guest!r} cannot be cancelled any more: READY was voted and only the "
                    "source decides"
                )

    async def continue_switchover(self, guest: str) -> None:
        for migration in self._outgoing.values():
            if migration.guest_name == guest and migration.continue_switchover():
                return
        status = self._last["source", guest].status if ("source", guest) in self._last else "none"
        raise OperationError(f"Migration not in expected state: {status}; only a held switchover can be continued")

    def parameters(self, guest: str | None) -> MigrationParameters:
        if guest is None:
            return self._defaults
        for migration in self._outgoing.values():
            if migration.guest_name == guest:
                return migration.parameters
        return self._guest_parameters.get(guest, self._defaults)

    async def set_parameters(self, guest: str | None, values: dict[str, object]) -> None:
        if guest is None:
            self._defaults = _with(self._defaults, values)
            return
        self._guest(guest)
        self._guest_parameters[guest] = _with(self._guest_parameters.get(guest, self._defaults), values)
        for migration in self._outgoing.values():
            if migration.guest_name == guest:  # what only this attempt was given stays with it
                migration.set_parameters(_with(migration.parameters, values))

    def set_defaults(self, parameters: MigrationParameters) -> None:
        """The configuration was reloaded: what guests without parameters of their own use from now on."""
        self._defaults = parameters

    async def estimate(self, guest: str, uri: str, overrides: dict[str, object]) -> dict[str, Any]:
        one = self._idle_guest(guest)
        target = _target(uri)
        parameters = _with(self.parameters(guest), overrides)
        one.migration_id = "estimate"
        try:
            return await estimate(self._env, one, target.host, target.port, parameters)
        except (MigrationError, ProtocolError, OSError) as error:
            raise OperationError(str(error)) from error
        finally:
            one.migration_id = None

    async def resolve(self, migration_id: str, run_here: bool) -> dict[str, Any]:
        document = await asyncio.to_thread(self.record, migration_id)
        full_id = document["migration_id"]
        migration, recovered = self._outgoing.get(full_id), self._recovered.get(full_id)
        if migration is not None and await migration.resolve(run_here):
            self._outgoing.pop(full_id, None)
        elif recovered is None or not await recovered.resolve(run_here):
            raise OperationError(f"migration {full_id} is not in doubt: its outcome is {document['outcome']}")
        return await asyncio.to_thread(self.record, full_id)

    # Section: incoming

    async def connected(self, first: Message, sock: socket.socket, agreed: sockets.Agreed) -> None:
        """Take a new connection by its first message (``link.listener.Handler``)."""
        match first:
            case messages.Hello():
                await self._hello(first, sock, agreed)
            case messages.Join(migration_id=migration_id):
                incoming = self._incoming.get(migration_id)
                if incoming is None:
                    raise RemoteProtocolError("a data channel joins a migration that is not under way", ErrorCode.AUTH)
                await sockets.send_first(sock, agreed, messages.Joined(channel=first.channel))
                incoming.join(first, sock, agreed)
            case messages.OutcomeAsk():
                self._tasks.start(self._outcome_asked(first, sock, agreed))
            case _:
                raise RemoteProtocolError(f"a connection cannot begin with {first.TYPE.name}", ErrorCode.UNEXPECTED)

    async def _hello(self, hello: messages.Hello, sock: socket.socket, agreed: sockets.Agreed) -> None:
        limits = self._config.limits
        control = ControlChannel(
            sock,
            agreed,
            self._clock,
            heartbeat_interval_s=limits.heartbeat_interval_s,
            heartbeat_timeout_s=limits.heartbeat_timeout_s,
            received=1,
        )
        await control.start()
        refusal = self._why_not(hello)
        if refusal is not None:
            log.warning("refused an incoming migration", guest=hello.guest.name, reason=refusal[1])
            control.send(messages.Refuse(code=int(refusal[0]), reason=refusal[1]))
            self._tasks.start(control.close())
            return
        await self._end_older(hello)
        incoming = IncomingMigration(self._env, control, hello)
        self._incoming[hello.migration_id] = self._last["destination", hello.guest.name] = incoming
        self._tasks.start(self._run_incoming(incoming))

    def _why_not(self, hello: messages.Hello) -> tuple[ErrorCode, str] | None:
        if self._role == "source":
            return ErrorCode.BUSY, "this daemon is a source only and takes no guests in"
        if len(self._incoming) >= self._config.limits.max_incoming:
            return ErrorCode.BUSY, (
                f"{len(self._incoming)} incoming migrations are under way, the most that [limits] max_incoming allows"
            )
        if hello.migration_id in self._incoming or self._journal.attempt(hello.migration_id, "destination"):
            return ErrorCode.UNEXPECTED, "this migration id was used before"
        return None

    async def _end_older(self, hello: messages.Hello) -> None:
        """A newer epoch of a guest is the source's ABORT of an older one whose message was lost."""
        for incoming in list(self._incoming.values()):
            takeover = incoming.takeover
            if incoming.guest_name == hello.guest.name and takeover is not None and takeover.epoch < hello.epoch:
                incoming.outcome_asked(DestinationEvent.ABORT, Nobody())
                await takeover.finished.wait()
        for recovered in self._recovered_incoming.values():
            if recovered.is_older_than(hello.guest.name, hello.epoch):
                await recovered.take(DestinationEvent.ABORT, Nobody())

    async def _run_incoming(self, incoming: IncomingMigration) -> None:
        try:
            await incoming.run()
        finally:
            self._incoming.pop(incoming.migration_id, None)
            if incoming.takeover is not None:
                self._takeovers[incoming.migration_id] = incoming.takeover
                while len(self._takeovers) > _TAKEOVERS_KEPT:
                    del self._takeovers[next(iter(self._takeovers))]

    async def _outcome_asked(self, ask: messages.OutcomeAsk, sock: socket.socket, agreed: sockets.Agreed) -> None:
        """The source tells its decision again; whoever has the hand-over answers."""
        reply = OneAnswer(sock, agreed)
        decision = DestinationEvent.COMMIT if ask.decision == "commit" else DestinationEvent.ABORT
        incoming = self._incoming.get(ask.migration_id)
        recovered = self._recovered_incoming.get(ask.migration_id)
        if incoming is not None and incoming.takeover is not None and not incoming.takeover.finished.is_set():
            incoming.outcome_asked(decision, reply)
        elif recovered is not None:
            await recovered.take(decision, reply)
        elif (takeover := self._takeovers.get(ask.migration_id)) is not None:
            await takeover.take(decision, reply, reason="the source keeps its guest")
        else:
            reply.send(self._journaled_answer(ask))
        await reply.deliver(self._config.limits.handshake_timeout_s)

    def _journaled_answer(self, ask: messages.OutcomeAsk) -> Message:
        attempt = self._journal.attempt(ask.migration_id, "destination")
        if attempt is None:
            if ask.decision == "abort":
                return messages.Discarded(epoch=ask.epoch, reason="the destination has nothing of this migration")
            return messages.OutcomeOpen(
                epoch=ask.epoch, reason="the destination's journal does not know this migration: resolve it by hand"
            )
        if destination_state_of(attempt.decisions) is DestinationState.RUNNING:
            return messages.Running(epoch=attempt.epoch, resumed_after_ns=0, sent_after_ns=0)
        if destination_state_of(attempt.decisions) is DestinationState.DISCARDED:
            return messages.Discarded(epoch=attempt.epoch, reason="the destination discarded the guest")
        return messages.OutcomeOpen(epoch=attempt.epoch, reason="the outcome is still open")

    # Section: recovery

    def _recover(self, attempt: Attempt) -> None:
        if attempt.role == "source":
            self._recover_source(attempt)
        else:
            self._recover_destination(attempt)

    def _recover_source(self, attempt: Attempt) -> None:
        handover = RecoveredHandover(self._env, attempt, self._guests.find(attempt.guest))
        self._recovered[attempt.migration_id] = handover
        self._tasks.start(handover.run())

    def _recover_destination(self, attempt: Attempt) -> None:
        takeover = RecoveredTakeover(self._env, attempt, self._guests.find(attempt.guest))
        self._recovered_incoming[attempt.migration_id] = takeover
        self._tasks.start(takeover.run())

    # Section: what happened

    def progress(self, guest: str | None) -> list[Progress]:
        known = [*(recovered.progress() for recovered in self._recovered.values())]
        known += [migration.progress() for migration in self._last.values()]
        chosen = [progress for progress in known if guest is None or progress.guest == guest]
        return sorted(chosen, key=lambda progress: progress.started_at)

    def history(self, query: HistoryQuery) -> list[dict[str, Any]]:
        return self._from_history(lambda: self._history.query(query))

    def history_stats(self, query: HistoryQuery) -> dict[str, Any]:
        return self._from_history(lambda: self._history.stats(query))

    def record(self, migration_id: str) -> dict[str, Any]:
        return self._from_history(lambda: self._history.get(migration_id))

    def metrics_text(self) -> bytes:
        return self.metrics.text()

    def _from_history(self, ask: Callable[[], Found]) -> Found:
        try:
            return ask()
        except RecordNotFoundError as error:
            raise OperationError(str(error), "DeviceNotFound") from error
        except HistoryError as error:
            raise OperationError(str(error)) from error

    def _finish(self, record: Record, role: Literal["source", "destination"]) -> None:
        """Keep a finished record. In this thread: a migration is done when its record is readable."""
        begin = time.monotonic()
        self._history.add(record, role)
        self.metrics.observe(record, role)
        log.debug("record kept", ms=round((time.monotonic() - begin) * 1e3, 1))

    def _guest_or_last(self, guest: str) -> None:
        """Refuse a name that nothing here ever had."""
        if self._guests.find(guest) is None and not any(name == guest for _, name in self._last):
            self._guest(guest)


async def _vmm(awaitable: Awaitable[Found]) -> Found:
    try:
        return await awaitable
    except VmmError as error:
        raise OperationError(str(error)) from error


def _plain(value: Any) -> Any:
    """A VMM's figures as JSON values: bytes become hexadecimal text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _target(uri: str) -> Target:
    try:
        return Target(uri, *parse_uri(uri))
    except ValueError as error:
        raise OperationError(str(error)) from error


def _with(parameters: MigrationParameters, values: dict[str, object]) -> MigrationParameters:
    """The parameters with some values replaced; the set is checked whole."""
    try:
        return MigrationParameters.model_validate({**parameters.model_dump(), **values})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise OperationError(f"parameter {name}: {first['msg']}") from error
