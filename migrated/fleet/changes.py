"""The transactions of a fleet: each compares all that its decision rests on, as the mirror saw it, and changes all that
belongs together. One that was decided on old news changes nothing, and its sender looks again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from migrated.fleet.jobs import JobError, JobEvent, StepAction, StepEvent, is_over, job_after, step_after
from migrated.fleet.mirror import Mirror
from migrated.fleet.model import (
    Cordon,
    Fence,
    HostDocument,
    HostSlots,
    JobKind,
    JobSpec,
    JobState,
    JobStep,
    Reservation,
    WorkerClaim,
)
from migrated.fleet.store import Compare, Delete, Exists, Missing, Operation, Put, Transaction

# Section: hosts


def publish(
    mirror: Mirror,
    document: HostDocument,
    lease: int,
    counted: Collection[str],
    gone: Collection[Reservation] = (),
) -> Transaction:
    """Publish what a host says of itself, under its lease. Whoever did that under the same name meanwhile is not
    overwritten.

    Args:
        counted: guests here whose memory ``used_bytes`` counts: their reservations end with this.
        gone: reservations of guests that have landed and ended, or gone on, before they were counted: they end too.
    """
    keys, slots = mirror.keys, mirror.slots_of(document.name)
    write = Put(keys.host(document.name), document.to_bytes(), lease)
    seen = mirror.unchanged(write.key)
    left = tuple(one for one in slots.inbound if one.guest not in counted and one not in gone)
    if len(left) == len(slots.inbound):
        return Transaction((seen,), (write,))
    key = keys.slots_of(document.name)
    after = slots.model_copy(update={"inbound": left})
    return Transaction((seen, mirror.unchanged(key)), (write, Put(key, after.to_bytes())))


def cordon(mirror: Mirror, host: str, by: str, now_utc_ns: int, reason: str = "") -> Transaction:
    """Let a host take nothing in; one that is cordoned already stays as it is."""
    key = mirror.keys.cordon(host)
    return Transaction((Missing(key),), (Put(key, Cordon(by=by, since_utc_ns=now_utc_ns, reason=reason).to_bytes()),))


def uncordon(mirror: Mirror, host: str) -> Transaction:
    """Let a host take guests in again."""
    return Transaction((), (Delete(mirror.keys.cordon(host)),))


def fence(mirror: Mirror, host: str, by: str, now_utc_ns: int, reason: str = "") -> Transaction:
    """Write down somebody's word that a host surely runs nothing."""
    key = mirror.keys.fence(host)
    return Transaction((Missing(key),), (Put(key, Fence(by=by, since_utc_ns=now_utc_ns, reason=reason).to_bytes()),))


def unfence(mirror: Mirror, host: str) -> Transaction:
    """Take the fence of a host away: it is back, and what its daemon found there is in order."""
    return Transaction((), (Delete(mirror.keys.fence(host)),))


# Section: jobs


def create_job(mirror: Mirror, spec: JobSpec) -> Transaction:
    """Begin a job; a host that is to be emptied takes nothing in from now on.

    Raises:
        JobError: another job empties the host.
    """
    check_alone(mirror, spec)
    keys = mirror.keys
    then: list[Operation] = [
        Put(keys.job_spec(spec.job), spec.to_bytes()),
        Put(keys.job_state(spec.job), JobState().to_bytes()),
    ]
    compares: list[Compare] = [Missing(keys.job_spec(spec.job)), Exists(keys.host(spec.host))]
    if spec.kind is JobKind.EVACUATE:
        compare, mark = _cordon_for(mirror, spec, spec.created_utc_ns)
        compares.append(compare)
        then.append(mark)
    return Transaction(tuple(compares), tuple(then))


def resume_job(mirror: Mirror, job: str, now_utc_ns: int) -> Transaction:
    """Let a job go on that has ended; a host that it empties takes nothing in, even if it was uncordoned meanwhile.

    Raises:
        JobError: its phase does not allow it, or another job empties the host.
    """
    spec = mirror.specs[job]
    check_alone(mirror, spec)
    change = change_job(mirror, job, JobEvent.RESUME, now_utc_ns)
    if spec.kind is not JobKind.EVACUATE:
        return change
    compare, mark = _cordon_for(mirror, spec, now_utc_ns)
    return Transaction((*change.compares, compare), (*change.then, mark))


def check_alone(mirror: Mirror, spec: JobSpec) -> None:
    """Make sure that no other job empties the host of a job that shall.

    Raises:
        JobError: one does.
    """
    if spec.kind is not JobKind.EVACUATE:
        return
    for job, other in mirror.specs.items():
        state = mirror.states.get(job)
        same = other.kind is JobKind.EVACUATE and other.host == spec.host and job != spec.job
        if same and state is not None and not is_over(state):
            raise JobError(f"The host {spec.host} is being emptied already, by job {job}.")


def _cordon_for(mirror: Mirror, spec: JobSpec, now_utc_ns: int) -> tuple[Compare, Operation]:
    """The cordon of an evacuation, with the compare under which it is written: of two evacuations of a host that were
    decided on the same news one is refused. What an operator said with a cordon of his own stays."""
    key, known = mirror.keys.cordon(spec.host), mirror.cordons.get(spec.host)
    if known is None:
        reason = f"It is being emptied by job {spec.job}."
        known = Cordon(by=spec.by, since_utc_ns=now_utc_ns, reason=reason)
    return mirror.unchanged(key), Put(key, known.model_copy(update={"job": spec.job}).to_bytes())


def change_job(mirror: Mirror, job: str, event: JobEvent, now_utc_ns: int, reason: str = "") -> Transaction:
    """Take an event of a job. Raises JobError when its phase does not allow it."""
    key = mirror.keys.job_state(job)
    after = job_after(mirror.states[job], event, now_utc_ns, reason)
    return Transaction((mirror.unchanged(key),), (Put(key, after.to_bytes()),))


def claim_job(mirror: Mirror, job: str, host: str, lease: int, now_utc_ns: int) -> Transaction:
    """Become the worker of a job that has none."""
    key = mirror.keys.job_worker(job)
    return Transaction((Missing(key),), (Put(key, WorkerClaim(host=host, since_utc_ns=now_utc_ns).to_bytes(), lease),))


def create_steps(mirror: Mirror, job: str, steps: Iterable[JobStep]) -> Transaction:
    """Give guests of a job their steps; none may have one."""
    keys = mirror.keys
    wanted = [(keys.job_step(job, step.guest), step) for step in steps]
    return Transaction(
        (mirror.unchanged(keys.job_worker(job)), *(Missing(key) for key, _ in wanted)),
        tuple(Put(key, step.to_bytes()) for key, step in wanted),
    )


def change_step(
    mirror: Mirror,
    job: str,
    guest: str,
    event: StepEvent,
    now_utc_ns: int,
    *,
    by_worker: bool,
    reason: str = "",
    **facts: Any,
) -> Transaction:
    """Take an event of a step, with what it does to the slots of both hosts.

    Args:
        by_worker: the job's worker does it, and only while it is the worker.
        reason, facts: as for ``step_after``.

    Raises:
        JobError: the step's state does not allow the event.
    """
    keys, step = mirror.keys, mirror.steps[job][guest]
    after, actions = step_after(step, event, now_utc_ns, reason=reason, **facts)
    compares: list[Compare] = [mirror.unchanged(keys.job_step(job, guest))]
    if by_worker:
        compares.append(mirror.unchanged(keys.job_worker(job)))
    if event in (StepEvent.RESERVE, StepEvent.BEGIN):
        compares += _may_begin(mirror, after, reserve=event is StepEvent.RESERVE)
    elif event is StepEvent.RETURNED:
        compares.append(mirror.unchanged(keys.owner(guest)))
    then: list[Operation] = [Put(keys.job_step(job, guest), after.to_bytes())]
    for host, slots in _slots_after(mirror, job, after, actions).items():
        compares.append(mirror.unchanged(keys.slots_of(host)))
        then.append(Put(keys.slots_of(host), slots.to_bytes()))
    return Transaction(tuple(compares), tuple(then))


def _may_begin(mirror: Mirror, step: JobStep, *, reserve: bool) -> list[Compare]:
    """The conditions under which a migration may be promised or begun: the source owns the guest and is not fenced.
    When it is promised, the destination is also as free as it was seen and takes guests."""
    keys, destination = mirror.keys, step.destination
    compares: list[Compare] = [mirror.unchanged(keys.owner(step.guest)), Missing(keys.fence(step.source))]
    if reserve and destination is not None:
        compares += [
            mirror.unchanged(keys.host(destination)),
            Missing(keys.cordon(destination)),
            Missing(keys.fence(destination)),
        ]
    return compares


def _slots_after(mirror: Mirror, job: str, step: JobStep, actions: tuple[StepAction, ...]) -> dict[str, HostSlots]:
    """The slots of both hosts that the actions change."""
    if step.destination is None:
        return {}
    source, destination = mirror.slots_of(step.source), mirror.slots_of(step.destination)
    outbound = tuple(one for one in source.outbound if (one.job, one.guest) != (job, step.guest))
    inbound = tuple(one for one in destination.inbound if (one.job, one.guest) != (job, step.guest))
    if StepAction.HOLD_SLOTS in actions:
        to = _reservation(job, step, step.source)
        inbound, outbound = (*inbound, to), (*outbound, to.model_copy(update={"peer": step.destination}))
    elif StepAction.LAND in actions:
        inbound = tuple(
            one.model_copy(update={"landed": True}) if (one.job, one.guest) == (job, step.guest) else one
            for one in destination.inbound
        )
    elif StepAction.FREE_SLOTS not in actions:
        return {}
    return {
        step.source: source.model_copy(update={"outbound": outbound}),
        step.destination: destination.model_copy(update={"inbound": inbound}),
    }


def _reservation(job: str, step: JobStep, peer: str) -> Reservation:
    return Reservation(
        guest=step.guest,
        job=job,
        peer=peer,
        memory_bytes=step.memory_bytes,
        bytes_per_s=step.bytes_per_s,
        attempt=step.attempt,
    )
