"""One host, put together from its parts. The control socket calls it (``migrated.control.operations.Operations``), and
the listener hands new connections to it.

    guests      the operator's commands on guests           outgoing    attempts to move a guest away, parameters
    recovery    attempts left by the last daemon                incoming    attempts to take one in, late questions
    records     history and metrics                         files       guests saved in files, and restored
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrated.base.clock import HostClock
from migrated.base.tasks import TaskSet
from migrated.control.operations import AdoptSpec, EventBus, FleetOperations, GuestSpec, OperationError
from migrated.environment import DaemonRole, Environment, host_name
from migrated.guests.registry import Guest, GuestRegistry, name_at
from migrated.host.commands import target_of, with_values
from migrated.host.files import FileAttempts
from migrated.host.fleet_side import FleetSide
from migrated.host.guests import GuestCommands
from migrated.host.incoming import IncomingAttempts
from migrated.host.outgoing import OutgoingAttempts
from migrated.host.own import OwnConnections
from migrated.host.records import FinishedRecords
from migrated.host.recovery import Recovery
from migrated.link.security import LinkSecurity
from migrated.link.sockets import Connection
from migrated.observe.logs import LogCollector
from migrated.observe.metrics import Metrics
from migrated.observe.progress import Progress
from migrated.record.model import Record
from migrated.record.terms import Role
from migrated.savefile.desk import SCHEME, SaveOrder
from migrated.settings.config import Address, Config
from migrated.settings.parameters import MigrationParameters
from migrated.source.target import target_here
from migrated.state.history import History, HistoryQuery
from migrated.state.journal import Journal
from migrated.state.learned import keep_knowledge, keep_resume_costs, load_knowledge, load_resume_costs
from migrated.state.run_marks import RunMarks
from migrated.vmm.drivers import load_drivers
from migrated.vmm.seam import Replacement
from protocol.messages import Message
from protocol.versions import MAJOR, MINOR

if TYPE_CHECKING:
    from migrated.member.member import FleetMember

_STOP_S = 5.0
_VERSION = importlib.metadata.version("migrated")  # once: it reads files, for which there may be no descriptor later


class MigrationHost:
    """One daemon without its process: the listening sockets, signals and logging belong to ``service.daemon``.

    Args:
        config: the configuration.
        role: which directions are allowed.
        collector: keeps the log lines of each migration.

    Raises:
        CredentialsError: the files of ``[tls]`` cannot be used.
        JournalError, HistoryError, RunMarkError: a file of the state directory cannot be opened.
    """

    def __init__(self, config: Config, role: DaemonRole, collector: LogCollector) -> None:
        self.events = EventBus()
        self.stopping = asyncio.Event()
        """Set when an operator asked the daemon to quit."""
        self.metrics = Metrics()
        self.security = LinkSecurity(config.tls, config.authorisation)
        self._role = role
        journal = Journal(config.state.directory)  # first: its lock keeps a second daemon away from all that lies there
        self._history = History(config.state.directory, config.history.max_records, config.history.max_bytes)
        self._records = FinishedRecords(self._history, self.metrics)
        self._env = Environment(
            config=config,
            clock=HostClock(config.clock.hrtime_offset_ns, config.clock.wall_offset_ns, config.clock.drift_ppm),
            security=self.security,
            journal=journal,
            run_marks=RunMarks(config.state.directory),
            guests=GuestRegistry(config, load_drivers(config)),
            knowledge=load_knowledge(config.state.directory),
            resume_costs=load_resume_costs(config.state.directory, int(config.limits.guessed_resume_reserve_ms * 1e6)),
            host=host_name(config),
            finish=self._records.finish,
            publish=self.events.publish,
            hold_events=self.events.hold,
            take_log=collector.take,
            open_own=lambda replacement: self._own.open(replacement),
        )
        self._tasks = TaskSet()
        self._recovery = Recovery(self._env, self._tasks)
        self._guests = GuestCommands(self._env, self._recovery)
        self._outgoing = OutgoingAttempts(self._env, self._tasks)
        self._incoming = IncomingAttempts(self._env, role, self._recovery, self._tasks, self.metrics.offer_refused)
        self._files = FileAttempts(self._env, self._tasks, self._claim, self._let_go_of)
        self._own = OwnConnections(self._incoming, self._tasks)
        self._fleet = self._join() if config.fleet.endpoints else None
        self._env.guests.on_gone = self._guest_gone
        self._env.guests.on_settled = self._guest_settled

    def _join(self) -> FleetMember:
        """Make this host a member of its fleet."""
        from migrated.member.member import FleetMember  # only here: it brings an HTTP library into memory

        side = FleetSide(self._env, self._role, self._guests, self._outgoing, self._incoming, self._records)
        member = FleetMember(self._env, side, self.metrics.count_fleet)

        def finished(record: Record, role: Role) -> None:
            side.finished(record)
            if role == "source" and record.outcome not in ("completed", "in-doubt"):
                self._let_go_of(record.guest)  # which is here, unless its process ended in the attempt
            member.look_again()

        self._records.on_finished = finished
        self._incoming.on_ended = member.look_again
        self._env.keeper = member.owners
        return member

    # Section: life

    async def start(self) -> None:
        """Find the guests that run, and finish or undo the attempts that the last daemon left open."""
        await self._env.guests.open()
        if self._fleet is not None:
            self._fleet.start()
        await self._recovery.start()
        await self._files.recover()

    def tidy(self) -> None:
        """Put files in order that grow from one migration to the next; for a moment in which none runs."""
        self._env.run_marks.tidy()

    async def stop(self) -> None:
        """Cancel the attempts that can be cancelled, disconnect from every guest, close every file."""
        ending = await self._outgoing.cancel_all("the daemon is stopping")
        self._incoming.cancel_all("the destination's daemon is stopping")
        await self._files.cancel_all("the daemon is stopping", _STOP_S)
        if ending:
            await asyncio.wait({asyncio.ensure_future(m.decided.wait()) for m in ending}, timeout=_STOP_S)
        for migration in ending:
            await migration.close()
        if self._fleet is not None:
            await self._fleet.stop()
        await self._recovery.close()
        await self._tasks.stop()
        await self._env.guests.close()
        keep_knowledge(self._env.config.state.directory, self._env.knowledge)
        keep_resume_costs(self._env.config.state.directory, self._env.resume_costs.document())
        self._env.journal.close()
        self._env.run_marks.close()
        self._history.close()

    async def connected(self, first: Message, connection: Connection) -> None:
        """Take a new connection by its first message (``link.listener.Handler``)."""
        await self._incoming.connected(first, connection)

    def listening(self, address: Address | None) -> None:
        """Other hosts can connect now; None where this host takes no guests in."""
        if self._fleet is not None:
            self._fleet.listening(address)

    def set_defaults(self, parameters: MigrationParameters) -> None:
        """Set the parameters for guests without their own, after a reload of the configuration."""
        self._outgoing.set_defaults(parameters)

    def version(self) -> dict[str, Any]:
        return {"version": _VERSION, "protocol": f"{MAJOR}.{MINOR}", "role": self._role}

    async def quit(self) -> None:
        self.stopping.set()

    def _guest_settled(self, place: str, ended: bool) -> None:
        attempt = self._recovery.postponed_of(place)
        self._recovery.guest_settled(place)
        self._files.guest_settled(place)
        if ended and attempt is None:  # an attempt that waited for it says itself whose the guest is now
            self._let_go_of(name_at(place))

    @property
    def fleet(self) -> FleetOperations | None:
        return None if self._fleet is None else self._fleet.operator

    def _guest_gone(self, guest: Guest) -> None:
        self.events.publish("X_MIGRATED_GUEST_GONE", {"guest": guest.name, "pid": guest.vmm.pid})
        (self._incoming if guest.overlay == "incoming" else self._outgoing).guest_gone(guest)
        self._files.guest_gone(guest)
        if self._fleet is not None:
            if guest.overlay is None and guest.migration_id is None:
                self._fleet.owners.release(guest.name)  # it runs nowhere now
            self._fleet.look_again()

    # Section: guests

    @contextlib.asynccontextmanager
    async def _owned(self, name: str, *, expected: bool = False) -> AsyncIterator[None]:
        """Own a new guest before it starts; not one that is expected here, whose source owns it."""
        if self._fleet is None or expected:
            yield
            return
        if not self._env.guests.holds(name):
            await self._fleet.owners.claim_new(name)
        try:
            yield
        except BaseException:
            self._let_go_of(name)
            raise
        self._fleet.look_again()

    async def _claim(self, name: str) -> None:
        """Own a guest that is about to be restored here."""
        if self._fleet is not None:
            await self._fleet.owners.claim_new(name)

    def _let_go_of(self, name: str) -> None:
        """Give a guest's owner key back after the guest has ended here, was saved, or could not be started; not while
        another process has its name."""
        if self._fleet is not None:
            if not self._env.guests.holds(name):
                self._fleet.owners.release(name)
            self._fleet.look_again()

    async def guest_create(self, spec: GuestSpec) -> dict[str, Any]:
        async with self._owned(spec.name):
            return await self._guests.create(spec)

    def guest_names(self) -> list[str]:
        return self._guests.names()

    async def guest_list(self) -> list[dict[str, Any]]:
        return await self._guests.show_all()

    async def guest_show(self, name: str) -> dict[str, Any]:
        return await self._guests.show(name)

    async def guest_pause(self, name: str) -> dict[str, Any]:
        return await self._guests.pause(name)

    async def guest_resume(self, name: str) -> dict[str, Any]:
        return await self._guests.resume(name)

    async def guest_destroy(self, name: str) -> dict[str, Any]:
        destroyed = await self._guests.destroy(name)
        self._outgoing.forget_parameters(name)
        self._let_go_of(name)
        return destroyed

    async def guest_adopt(self, spec: AdoptSpec) -> dict[str, Any]:
        async with self._owned(spec.name, expected=spec.incoming):
            return await self._guests.adopt(spec)

    async def guest_check(self, name: str) -> list[dict[str, Any]]:
        return await self._guests.check(name)

    async def guest_verify(self, name: str) -> dict[str, Any]:
        return await self._guests.verify(name)

    # Section: migrations

    async def migrate(self, guest: str, uri: str, overrides: dict[str, object]) -> str:
        if self._role == "destination":
            raise OperationError("this daemon is a destination only; run `migrated host` to migrate guests away too")
        if uri.startswith(SCHEME):
            return await self.save(guest, uri.removeprefix(SCHEME), ends_guest=True, force=False, overrides=overrides)
        return await self._outgoing.begin(self._guests.idle(guest), target_of(uri), overrides)

    async def save(self, guest: str, path: str, *, ends_guest: bool, force: bool, overrides: dict[str, object]) -> str:
        parameters = with_values(self._outgoing.parameters(guest), overrides)
        order = SaveOrder(Path(path), ends_guest, force)
        return await self._files.save(self._guests.idle(guest), order, parameters)

    async def restore(self, path: str, name: str | None, overrides: dict[str, object]) -> tuple[str, str]:
        return await self._files.restore(
            Path(path), name, lambda guest: with_values(self._outgoing.parameters(guest), overrides)
        )

    async def replace(self, guest: str, replacement: Replacement, overrides: dict[str, object]) -> str:
        if self._role != "host":
            raise OperationError(f"this daemon is a {self._role} only; run `migrated host` to give guests another VMM")
        return await self._outgoing.begin(self._guests.idle(guest), target_here(self._env, replacement), overrides)

    async def wait(self, migration_id: str) -> dict[str, Any]:
        shown = {progress.migration_id for progress in self.progress(None)}
        begun_so = [one for one in shown if migration_id and one.startswith(migration_id)]
        migration_id = begun_so[0] if len(begun_so) == 1 else migration_id
        await self._incoming.ended(migration_id)
        document = await self._outgoing.ended(migration_id) or await self._files.ended(migration_id)
        return document if document is not None else await asyncio.to_thread(self.record, migration_id)

    async def cancel(self, guest: str) -> None:
        self._refuse_unheard_of(guest)
        await self._outgoing.cancel(guest)
        self._incoming.cancel(guest)
        self._files.cancel(guest)

    async def continue_switchover(self, guest: str) -> None:
        self._outgoing.continue_switchover(guest)

    async def estimate(self, guest: str, uri: str, overrides: dict[str, object]) -> dict[str, Any]:
        return await self._outgoing.estimate(self._guests.idle(guest), uri, overrides)

    async def resolve(self, migration_id: str, run_here: bool) -> dict[str, Any]:
        document = await asyncio.to_thread(self.record, migration_id)
        full_id = document["migration_id"]
        resolved = await self._outgoing.resolve(full_id, run_here) or await self._recovery.resolve(full_id, run_here)
        if not resolved:
            raise OperationError(f"migration {full_id} is not in doubt: its outcome is {document['outcome']}")
        return await asyncio.to_thread(self.record, full_id)

    def parameters(self, guest: str | None) -> MigrationParameters:
        return self._outgoing.parameters(guest)

    async def set_parameters(self, guest: str | None, values: dict[str, object]) -> None:
        if guest is None:
            self._outgoing.set_default_values(values)
        else:
            self._outgoing.set_parameters(self._guests.get(guest).name, values)
            self._files.set_parameters(guest, self._outgoing.parameters(guest))

    def progress(self, guest: str | None) -> list[Progress]:
        known = [*self._recovery.progress(), *self._outgoing.progress(), *self._files.progress()]
        # Where this daemon is source and destination, the source's view is of both.
        told = {progress.migration_id for progress in known}
        known += [progress for progress in self._incoming.progress() if progress.migration_id not in told]
        chosen = [progress for progress in known if guest is None or progress.guest == guest]
        return sorted(chosen, key=lambda progress: progress.started_at)

    def _refuse_unheard_of(self, guest: str) -> None:
        """Refuse the name of a guest that this host never had."""
        here = self._env.guests.find(guest) is not None
        if not (here or any(one.knows(guest) for one in (self._outgoing, self._incoming, self._files))):
            self._guests.get(guest)

    # Section: finished records

    def history(self, query: HistoryQuery) -> list[dict[str, Any]]:
        return self._records.query(query)

    def history_stats(self, query: HistoryQuery) -> dict[str, Any]:
        return self._records.stats(query)

    def record(self, migration_id: str) -> dict[str, Any]:
        return self._records.get(migration_id)

    def metrics_text(self) -> bytes:
        return self.metrics.text()
