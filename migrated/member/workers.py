"""Works on jobs that have no worker: any daemon of the fleet may, and goes on where the last one stopped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Final

import structlog

from migrated.base.tasks import TaskSet
from migrated.fleet.changes import claim_job
from migrated.fleet.jobs import JobError, is_over
from migrated.fleet.model import JobPhase
from migrated.fleet.planner import guests_of
from migrated.fleet.store import Delete, StoreError, Transaction
from migrated.fleet.worker import Wait, Work, next_work
from migrated.member.follower import Follower
from migrated.member.planning import PlanningError, elsewhere

log = structlog.get_logger()

JOBS_KEPT: Final = 100
"""Jobs that are over and still shown."""
_DELETED_AT_ONCE: Final = 100
_AGAIN_S: Final = 0.5
_STAND_BACK_S: Final = 1.0
"""Whoever did not create a job leaves it to the others for up to this long."""


class Workers:
    """This daemon as the worker of jobs.

    Args:
        follower: the mirror.
        host: this host's name in the fleet.
        lease: of this host's keys, 0 while it has none.
    """

    def __init__(self, follower: Follower, host: str, lease: Callable[[], int]) -> None:
        self._follower = follower
        self._host = host
        self._lease = lease
        self._mine: dict[str, int] = {}
        """Jobs that this daemon works on, with the lease of its claim."""
        self._own: set[str] = set()
        self._working: set[str] = set()
        self._tasks = TaskSet()

    def created_here(self, job: str) -> None:
        """An operator asked this daemon for a job: it does not stand back."""
        self._own.add(job)
        self._follower.wake()

    async def run(self) -> None:
        """Take up jobs until cancelled."""
        await self._follower.ready.wait()
        while True:
            mirror = self._follower.mirror
            for job, state in mirror.states.items():
                if not is_over(state) and job not in self._working and self._may_take(job):
                    self._working.add(job)
                    self._tasks.start(self._work(job))
            await self._follower.change(None)

    async def close(self) -> None:
        """Leave the jobs to others."""
        await self._tasks.stop()

    def _may_take(self, job: str) -> bool:
        claim = self._follower.mirror.workers.get(job)
        return claim is None or (claim.host == self._host and self._mine.get(job) == self._lease())

    async def _work(self, job: str) -> None:
        try:
            if job not in self._own:
                await asyncio.sleep(random.uniform(0, _STAND_BACK_S))
            while (state := self._follower.mirror.states.get(job)) is not None and not is_over(state):
                try:
                    if not await self._claim(job):
                        return
                    await self._step(job)
                except (StoreError, JobError, PlanningError) as error:
                    if isinstance(error, StoreError):
                        self._follower.failed(error)
                    elif isinstance(error, PlanningError):
                        log.error(
                            "the process that plans ended without an answer: it is tried again", reason=str(error)
                        )
                    await self._follower.change(_AGAIN_S)
            await self._forget_old()
        finally:
            self._working.discard(job)
            # The claim of a job that is over stands: an operator may resume it, and then this daemon goes on with it.
            known = self._follower.mirror.states.keys()
            self._mine = {mine: lease for mine, lease in self._mine.items() if mine in known}
            self._own &= known

    async def _claim(self, job: str) -> bool:
        """Be the job's worker; False when another daemon is."""
        lease = self._lease()
        claim = self._follower.mirror.workers.get(job)
        if claim is not None:
            return claim.host == self._host and self._mine.get(job) == lease
        if not lease:
            return False
        answer = await self._follower.transact(claim_job(self._follower.mirror, job, self._host, lease, time.time_ns()))
        if answer.succeeded:
            self._mine[job] = lease
            log.info("working on a job", job=job)
        return answer.succeeded

    async def _step(self, job: str) -> None:
        """Do the next thing of a job, or wait until there is one."""
        work = await self._next(job)
        if isinstance(work, Work):
            answer = await self._follower.transact(work.transaction)
            log.info("a job goes on", job=job, what=work.what, done=answer.succeeded)
            if not answer.succeeded:  # decided on old news
                await self._follower.change(_AGAIN_S)
            return
        wait_s = None
        if work.until_utc_ns is not None:
            wait_s = max(0.0, (work.until_utc_ns - time.time_ns()) / 1e9)
        await self._follower.change(wait_s)

    async def _next(self, job: str) -> Work | Wait:
        """Decide what is next. Planning takes seconds for many guests: it is done in a process of its own, so that the
        migrations of this host are not held up."""
        mirror = self._follower.mirror
        spec, state = mirror.specs.get(job), mirror.states.get(job)
        running = state is not None and state.phase is JobPhase.RUNNING
        if spec is not None and running and set(guests_of(mirror, spec)) - mirror.steps[job].keys():
            return await elsewhere(next_work, mirror.part(spec.host, job), job, time.time_ns())
        return next_work(mirror, job, time.time_ns())

    async def _forget_old(self) -> None:
        """Delete the oldest jobs that are over, so that they do not grow for ever."""
        mirror = self._follower.mirror
        over = [job for job, state in mirror.states.items() if is_over(state)]
        over.sort(key=lambda job: mirror.states[job].ended_utc_ns or 0)
        for job in over[: max(0, len(over) - JOBS_KEPT)]:
            keys = mirror.keys
            steps = [keys.job_step(job, guest) for guest in mirror.steps[job]]
            wanted = [*steps, keys.job_worker(job), keys.job_spec(job), keys.job_state(job)]
            still_over = mirror.unchanged(keys.job_state(job))  # an operator may resume it meanwhile
            with contextlib.suppress(StoreError):  # the next job that ends does it again
                for first in range(0, len(wanted), _DELETED_AT_ONCE):
                    deletes = tuple(Delete(key) for key in wanted[first : first + _DELETED_AT_ONCE])
                    if not (await self._follower.transact(Transaction((still_over,), deletes))).succeeded:
                        break
