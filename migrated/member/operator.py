"""Operators' requests to a fleet (``migrated.control.operations.FleetOperations``): any daemon of it can be asked."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from migrated.control.operations import JobRequest, OperationError
from migrated.fleet.changes import change_job, cordon, create_job, fence, uncordon, unfence
from migrated.fleet.jobs import JobError, JobEvent, is_over
from migrated.fleet.mirror import Mirror
from migrated.fleet.model import MAX_NAMES, MAX_REASON, JobKind, JobSpec
from migrated.fleet.planner import guests_of, plan
from migrated.fleet.store import StoreError, Transaction
from migrated.fleet.worker import resume_steps
from migrated.member.follower import Follower
from migrated.member.identity import Identity
from migrated.member.planning import PlanningError, elsewhere
from migrated.member.views import hosts_view, job_view, jobs_view, plan_view
from migrated.member.workers import Workers

_TRIES: Final = 10
_CHANGE_S: Final = 0.5
_FIRST_READ_S: Final = 5.0


class FleetOperator:
    """The commands of a fleet.

    Args:
        follower: the mirror.
        workers: takes up new jobs at once.
        host: this host's name in the fleet.
        identity: whether that is its own.
    """

    def __init__(self, follower: Follower, workers: Workers, host: str, identity: Identity) -> None:
        self._follower = follower
        self._workers = workers
        self._host = host
        self._identity = identity

    # Section: what is seen

    async def hosts(self) -> list[dict[str, Any]]:
        """All hosts with what is wrong with them."""
        mirror = await self._mirror()
        views = hosts_view(mirror)
        if (refusal := self._identity.stranger(mirror)) is not None:
            for view in views:
                view["problems"] += [refusal] if view["name"] == self._host else []
        return views

    async def jobs(self, job: str | None) -> list[dict[str, Any]]:
        """All jobs, newest first; or one, by a unique beginning of its id."""
        mirror = await self._mirror()
        if job is not None:
            return [job_view(mirror, self._id(mirror, job), time.time_ns())]
        return jobs_view(mirror, time.time_ns())

    async def wait(self, job: str) -> dict[str, Any]:
        """A job once it is over."""
        full = self._id(await self._mirror(), job)

        def over() -> bool:
            state = self._follower.mirror.states.get(full)
            return state is None or is_over(state)

        await self._follower.until(over)
        return (await self.jobs(full))[0]

    # Section: jobs

    async def evacuate(self, request: JobRequest) -> dict[str, Any]:
        """Begin to empty a host; or only plan it."""
        mirror = await self._mirror()
        self._check(mirror, request, request.host)
        spec = self._spec(request, JobKind.EVACUATE, request.host)
        if not request.dry_run:
            return await self._create(spec)
        if not mirror.by_owner.get(request.host):
            return plan_view(mirror, spec, plan(mirror, spec))
        try:
            return plan_view(mirror, spec, await elsewhere(plan, mirror.part(spec.host), spec))
        except PlanningError as error:
            raise OperationError(str(error)) from error

    async def migrate(self, guest: str, request: JobRequest) -> dict[str, Any]:
        """Begin to move one guest to whichever host fits best."""
        mirror = await self._mirror()
        owner = mirror.owners.get(guest)
        if owner is None:
            raise OperationError(f"No host of the fleet owns a guest {guest!r}.", "DeviceNotFound")
        self._check(mirror, request, owner.owner)
        spec = self._spec(request, JobKind.MIGRATE, owner.owner).model_copy(update={"guests": (guest,)})
        return await self._create(spec)

    async def cancel(self, job: str) -> dict[str, Any]:
        """Begin no more migrations of a job, and cancel those that run."""
        full = self._id(await self._mirror(), job)
        await self._change(
            lambda mirror: change_job(mirror, full, JobEvent.CANCEL, time.time_ns(), "It was cancelled.")
        )
        return (await self.jobs(full))[0]

    async def resume(self, job: str) -> dict[str, Any]:
        """Try every guest of a job again that has not moved."""
        mirror = await self._mirror()
        full = self._id(mirror, job)
        try:
            for work in resume_steps(mirror, full, time.time_ns()):
                if not (await self._transact(work.transaction)).succeeded:
                    raise OperationError(f"Job {full} has changed meanwhile; look at it and resume it again.")
        except JobError as error:
            raise OperationError(str(error)) from error
        self._workers.created_here(full)
        return (await self.jobs(full))[0]

    # Section: hosts

    async def cordon(self, host: str, reason: str) -> dict[str, Any]:
        """Let a host take no guests in."""
        self._check_reason(reason)
        await self._known(host)
        await self._transact(cordon(self._follower.mirror, host, self._host, time.time_ns(), reason))
        return self._host_view(host)

    async def uncordon(self, host: str) -> dict[str, Any]:
        """Let a host take guests in again."""
        await self._known(host)
        await self._transact(uncordon(self._follower.mirror, host))
        return self._host_view(host)

    async def fence(self, host: str, reason: str) -> dict[str, Any]:
        """Write down somebody's word that a host surely runs nothing."""
        self._check_reason(reason)
        await self._known(host)
        await self._transact(fence(self._follower.mirror, host, self._host, time.time_ns(), reason))
        return self._host_view(host)

    async def unfence(self, host: str) -> dict[str, Any]:
        """Take a host's fence away."""
        await self._known(host)
        await self._transact(unfence(self._follower.mirror, host))
        return self._host_view(host)

    # Section: helpers

    async def _mirror(self) -> Mirror:
        """The mirror, once the store has been read.

        Raises:
            OperationError: it cannot be reached.
        """
        known = await self._follower.until(self._follower.ready.is_set, _FIRST_READ_S)
        if not known or self._follower.failure is not None:
            why = self._follower.failure or "It has not answered yet."
            raise OperationError(f"The fleet's store cannot be reached: {why}")
        return self._follower.mirror

    async def _known(self, host: str) -> None:
        names = {view["name"] for view in hosts_view(await self._mirror())}
        if host not in names:
            raise OperationError(
                f"No host of the fleet is called {host!r}; known: {', '.join(sorted(names)) or 'none'}.",
                "DeviceNotFound",
            )

    def _host_view(self, host: str) -> dict[str, Any]:
        found = [view for view in hosts_view(self._follower.mirror) if view["name"] == host]
        return found[0] if found else {"name": host}

    def _id(self, mirror: Mirror, job: str) -> str:
        """A job's id from a unique beginning of it."""
        found = [known for known in mirror.states if known.startswith(job) and known in mirror.specs]
        if len(found) != 1:
            many = "several jobs begin" if found else "no job begins"
            raise OperationError(f"There is no such job: {many} with {job!r}.", "DeviceNotFound")
        return found[0]

    def _check_reason(self, reason: str) -> None:
        if len(reason) > MAX_REASON:
            raise OperationError(f"A reason has {MAX_REASON} characters at most; this one has {len(reason)}.")

    def _check(self, mirror: Mirror, request: JobRequest, leaving: str) -> None:
        """See that a job can be done at all.

        Args:
            leaving: the host that guests are to leave.

        Raises:
            OperationError: it cannot.
        """
        if len(request.to) > MAX_NAMES:
            raise OperationError(f"A job names {MAX_NAMES} hosts to go to at most; this one names {len(request.to)}.")
        if leaving in request.to:
            raise OperationError(f"Guests that leave the host {leaving!r} cannot go to it; name other hosts.")
        for host in (request.host, *request.to):
            if host and host not in mirror.hosts:
                raise OperationError(
                    f"The host {host!r} is not there: no daemon of the fleet holds a lease for it. Known: "
                    f"{', '.join(sorted(mirror.hosts)) or 'none'}.",
                    "DeviceNotFound",
                )

    def _spec(self, request: JobRequest, kind: JobKind, host: str) -> JobSpec:
        return JobSpec(
            job=secrets.token_hex(4),
            kind=kind,
            host=host,
            to=request.to,
            max_parallel=request.max_parallel,
            downtime_limit_ns=request.downtime_limit_ns,
            deadline_ns=request.deadline_ns,
            created_utc_ns=time.time_ns(),
            by=self._host,
        )

    async def _create(self, spec: JobSpec) -> dict[str, Any]:
        await self._change(lambda mirror: create_job(mirror, spec))
        self._workers.created_here(spec.job)
        return {"job": spec.job, "guests": guests_of(self._follower.mirror, spec)}

    async def _change(self, make: Callable[[Mirror], Transaction]) -> None:
        """Carry out a transaction that is decided on the mirror, again if that was old news.

        Raises:
            OperationError: the store or the job does not allow it.
        """
        for _ in range(_TRIES):
            try:
                transaction = make(self._follower.mirror)
            except JobError as error:
                raise OperationError(str(error)) from error
            if (await self._transact(transaction)).succeeded:
                return
            await self._follower.change(_CHANGE_S)
        raise OperationError("The fleet's keys change too fast; try again.")

    async def _transact(self, transaction: Transaction) -> Any:
        try:
            return await self._follower.transact(transaction)
        except StoreError as error:
            raise OperationError(f"Whether that was done is not known, look and try again. {error}") from error
