"""Steps of jobs whose guests are on this host: its daemon, and nobody else, moves them.

step is RESERVED -> write MIGRATING with a new migration id -> attempt -> its record -> write what became of it
step is MIGRATING, nobody here sees to it (the daemon was restarted) -> wait for what recovery makes of it -> write
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import structlog

from migrated.base.tasks import TaskSet
from migrated.control.operations import OperationError
from migrated.fleet.costs import limit_of
from migrated.fleet.jobs import JobError, StepEvent
from migrated.fleet.model import JobSpec, JobStep, StepState
from migrated.fleet.store import StoreError, Transaction
from migrated.fleet.worker import begin, ended, is_cancelled, steps_here
from migrated.member.follower import Follower
from migrated.member.identity import Identity
from migrated.member.local import LocalHost
from migrated.member.sharing import LinkSharing

log = structlog.get_logger()

_AGAIN_S: Final = 0.5


class _End(NamedTuple):
    """The end of an attempt."""

    event: StepEvent
    reason: str = ""
    downtime_ns: int | None = None


class StepRunner:
    """Carries out the steps of this host's guests.

    Args:
        local: this host.
        follower: the mirror.
        host: this host's name in the fleet.
        identity: whether that is its own; if it is not, the steps are another host's.
        told: called when an attempt has begun or ended.
    """

    def __init__(
        self, local: LocalHost, follower: Follower, host: str, identity: Identity, told: Callable[[], None]
    ) -> None:
        self._local = local
        self._follower = follower
        self._host = host
        self._identity = identity
        self._told = told
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By job and guest."""
        self._changed = asyncio.Event()
        self._sharing = LinkSharing(local, follower, host)
        self._tasks = TaskSet()

    async def run(self) -> None:
        """See to the steps until cancelled."""
        await self._follower.ready.wait()
        while True:
            mirror = self._follower.mirror
            mine = () if self._identity.stranger(mirror) is not None else tuple(steps_here(mirror, self._host))
            for spec, step in mine:
                key = (spec.job, step.guest)
                if key not in self._running:
                    task = self._running[key] = self._tasks.start(self._carry_out(spec, step))
                    task.add_done_callback(partial(self._ended, key))
            await self._follower.change(None)

    def look_again(self) -> None:
        """An attempt of this host has ended."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        """Wait until an attempt has ended, or for a while."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN_S):
                await changed.wait()

    async def close(self) -> None:
        """Leave the steps as the keys have them; attempts are the host's."""
        await self._tasks.stop()
        await self._sharing.close()

    def _ended(self, key: tuple[str, str], _task: asyncio.Task[None]) -> None:
        self._running.pop(key, None)
        self._follower.wake()

    async def _carry_out(self, spec: JobSpec, step: JobStep) -> None:
        migration_id = step.migration_id or ""
        if step.state is StepState.RESERVED:
            migration_id = secrets.token_hex(16)
            if not await self._begin(spec, step, migration_id):
                await self._follower.change(_AGAIN_S)
                return
            end = await self._attempt(spec, step, migration_id)
        else:
            end = await self._outcome(spec, step, migration_id)
        self._told()

        def write() -> Transaction | None:
            now = self._step(spec.job, step.guest)
            if now is None or now.state is not StepState.MIGRATING or now.migration_id != migration_id:
                return None
            work = ended(
                self._follower.mirror, spec, now, end.event, time.time_ns(), reason=end.reason,
                downtime_ns=end.downtime_ns,
            )  # fmt: skip
            return work.transaction

        await self._follower.insist(write)

    async def _begin(self, spec: JobSpec, step: JobStep, migration_id: str) -> bool:
        """Write that the attempt begins. Nothing begins without."""
        try:
            work = begin(self._follower.mirror, spec, step, migration_id, time.time_ns())
            return (await self._follower.transact(work.transaction)).succeeded
        except JobError:
            return False  # the step has gone on
        except StoreError as error:
            self._follower.failed(error)
            return False

    async def _attempt(self, spec: JobSpec, step: JobStep, migration_id: str) -> _End:
        destination = self._follower.mirror.hosts.get(step.destination or "")
        if destination is None:
            return _End(StepEvent.FAILED, f"The host {step.destination} is not there any more.")
        here = self._follower.mirror.hosts.get(self._host)
        overrides: dict[str, object] = {}
        if here is not None and here.link_bytes_per_s:
            # While nobody knows what the link moves, the first migrations show it.
            overrides["max_bandwidth_bytes_per_s"] = step.bytes_per_s
        guest = self._follower.mirror.guests.get(step.guest)
        if guest is not None:
            overrides["downtime_limit_ms"] = limit_of(guest, spec.downtime_limit_ns) / 1e6
        try:
            await self._local.begin_migration(step.guest, destination.address, overrides, migration_id)
        except OperationError as error:
            return _End(StepEvent.FAILED, str(error))
        self._told()
        if "max_bandwidth_bytes_per_s" not in overrides:
            return await self._outcome(spec, step, migration_id)
        with self._sharing.share(migration_id, destination.name, step.bytes_per_s):
            return await self._outcome(spec, step, migration_id)

    async def _outcome(self, spec: JobSpec, step: JobStep, migration_id: str) -> _End:
        """Wait for the end of an attempt; one that nobody here knows of has never begun. One that is open has not
        ended, whatever becomes of its record: a step that is told to have failed would have its guest moved again."""
        cancelling = self._tasks.start(self._cancel_when_asked(spec, step, migration_id))
        try:
            while True:
                # Asked before: an attempt that ends in between has left its record by then.
                is_open = self._local.is_open(migration_id)
                try:
                    record = await self._local.outcome(migration_id)
                    unknown = "The daemon ended before the migration had begun."
                except OperationError as error:
                    record, unknown = None, str(error)
                if record is not None and record["outcome"] != "in-doubt":
                    return self._end_of(spec, record)
                if not is_open:
                    doubt = "It was in doubt, and the record of its end could not be kept."
                    return _End(StepEvent.FAILED, unknown if record is None else doubt)
                await self._change()
        finally:
            cancelling.cancel()

    def _end_of(self, spec: JobSpec, record: dict[str, Any]) -> _End:
        if record["outcome"] == "completed":
            downtime = record["downtime"]
            return _End(StepEvent.COMPLETED, downtime_ns=downtime["measured_ns"] if downtime is not None else None)
        reason = f"{record['outcome']}: {record['reason']}"
        if is_cancelled(self._follower.mirror, spec):
            return _End(StepEvent.CANCELLED, reason)
        return _End(StepEvent.FAILED, reason)

    async def _cancel_when_asked(self, spec: JobSpec, step: JobStep, migration_id: str) -> None:
        await self._follower.until(lambda: is_cancelled(self._follower.mirror, spec))
        while self._local.is_open(migration_id):
            try:
                await self._local.cancel(step.guest)
            except OperationError as error:
                log.info("a migration of a cancelled job goes on", guest=step.guest, reason=str(error))
                return
            await asyncio.sleep(_AGAIN_S)

    def _step(self, job: str, guest: str) -> JobStep | None:
        return self._follower.mirror.steps[job].get(guest)
