"""The next transaction of a job's worker, and of the daemon on the source: one at a time.

    worker   no steps yet -> plan -> a step is due and a host has room -> reserve -> ... -> all final -> end the job
    source   a step here is reserved -> begin, then migrate -> the attempt ends -> completed, failed or cancelled

Whoever carries a transaction out tells the mirror what came of it and asks again. Both look only at the keys, so the
next worker, or the same daemon after a restart, goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from migrated.fleet.changes import change_job, change_step, check_alone, create_steps, resume_job
from migrated.fleet.costs import MoveCost, limit_of, move_cost, narrowest_share
from migrated.fleet.jobs import (
    ACTIVE,
    FINAL,
    LONGEST_BACK_OFF_NS,
    JobEvent,
    StepEvent,
    deadline_utc_ns,
    failure,
    is_over,
    job_after,
)
from migrated.fleet.mirror import Mirror, link_of
from migrated.fleet.model import HostDocument, JobKind, JobPhase, JobSpec, JobState, JobStep, StepState
from migrated.fleet.placement import PossibleHosts, why_not
from migrated.fleet.planner import guests_of, plan
from migrated.fleet.store import Transaction

_STEPS_AT_ONCE: Final = 50
"""Steps that one transaction creates; a store limits its operations."""


@dataclass(frozen=True, slots=True)
class Work:
    """One transaction and what it does, a phrase for the log."""

    what: str
    transaction: Transaction


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before something changes, or before a time (UTC, ns); None when only a change helps."""

    until_utc_ns: int | None


def next_work(mirror: Mirror, job: str, now_utc_ns: int) -> Work | Wait:
    """Return the worker's next piece of work for a job."""
    spec, state = mirror.specs.get(job), mirror.states.get(job)
    if spec is None or state is None or is_over(state):
        return Wait(None)
    steps = sorted(mirror.steps[job].values(), key=lambda step: (step.order, step.guest))
    missing = _without_step(mirror, spec, steps)
    if missing and state.phase is JobPhase.RUNNING:
        return _create_steps(mirror, spec, missing, len(steps), now_utc_ns)
    waits: list[int] = []
    possible = PossibleHosts(mirror, spec.host, spec.to)
    cancelling = state.phase is JobPhase.CANCELLING
    for step in steps:
        if step.state in FINAL:
            if not cancelling and _is_back(mirror, spec, step):
                return _change(mirror, spec, step, StepEvent.RETURNED, now_utc_ns, "The guest is on its host again.")
            continue
        found = _next_of_step(mirror, spec, state, step, possible, now_utc_ns)
        if isinstance(found, Work):
            return found
        if found.until_utc_ns is not None:
            waits.append(found.until_utc_ns)
    if all(step.state in FINAL for step in steps):
        left_open = () if cancelling else open_ends(mirror, spec)
        if left_open and not _is_late(spec, state, now_utc_ns):
            return Wait(deadline_utc_ns(spec, state))
        return _end(mirror, spec, steps, left_open, len(missing), now_utc_ns)
    return Wait(min(waits, default=None))


def open_ends(mirror: Mirror, spec: JobSpec) -> tuple[str, ...]:
    """Why a host that is emptied may still come to have a guest, though it owns none: clauses of a sentence."""
    if spec.kind is not JobKind.EVACUATE or spec.host in mirror.fences:
        return ()
    host, found = mirror.hosts.get(spec.host), list[str]()
    promised = mirror.slots_of(spec.host).arriving  # before it was cordoned
    found += [f"{one.guest} may still come to {spec.host} by another job" for one in promised]
    handed_over = sorted(mirror.by_previous.get(spec.host, ()))
    found += [f"{guest} was handed over by {spec.host} and does not surely run elsewhere" for guest in handed_over]
    if host is not None and spec.host in mirror.cordons and host.cordon_seen is False:
        found.append(f"{spec.host} has not said yet that it takes no guests in")
    elif host is not None and host.inbound > len(promised):
        found.append(f"migrations to {spec.host} that were begun by hand are under way")
    return tuple(found)


def _is_back(mirror: Mirror, spec: JobSpec, step: JobStep) -> bool:
    """Whether a guest that had left the host that is emptied is there again."""
    return (
        spec.kind is JobKind.EVACUATE
        and step.state is StepState.DONE
        and step.guest in mirror.by_owner.get(spec.host, ())
    )


def _is_late(spec: JobSpec, state: JobState, now_utc_ns: int) -> bool:
    deadline = deadline_utc_ns(spec, state)
    return deadline is not None and now_utc_ns >= deadline


def _change(
    mirror: Mirror, spec: JobSpec, step: JobStep, event: StepEvent, now_utc_ns: int, reason: str, **facts: object
) -> Work:
    """Take an event of a step, as the job's worker."""
    change = change_step(mirror, spec.job, step.guest, event, now_utc_ns, by_worker=True, reason=reason, **facts)
    return Work(f"{step.guest}: {event}", change)


def _without_step(mirror: Mirror, spec: JobSpec, steps: list[JobStep]) -> set[str]:
    """Guests of the job that have no step yet: at first all, later those that came to the host meanwhile."""
    return set(guests_of(mirror, spec)) - {step.guest for step in steps}


def _create_steps(mirror: Mirror, spec: JobSpec, missing: set[str], first: int, now_utc_ns: int) -> Work:
    """Plan the guests that have no step, and write the first of their steps down."""
    made = plan(mirror, spec.model_copy(update={"guests": tuple(sorted(missing))}))
    elapsed_ns = max(0, now_utc_ns - spec.created_utc_ns)
    steps = [
        JobStep(
            guest=move.guest,
            source=spec.host,
            destination=move.destination,
            memory_bytes=mirror.guests[move.guest].memory_bytes,
            order=first + number,
            lanes=made.lanes,
            bytes_per_s=move.bytes_per_s,
            reason=move.doubt,
            expected_begin_ns=elapsed_ns + move.begin_ns,
            expected_end_ns=elapsed_ns + move.end_ns,
            expected_downtime_ns=move.cost.downtime_ns,
        )
        for number, move in enumerate(made.moves)
    ]
    for guest, reason in made.refusals.items():
        known = mirror.guests.get(guest)
        memory_bytes = known.memory_bytes if known is not None else 0
        order = first + len(steps)
        steps.append(JobStep(guest=guest, source=spec.host, memory_bytes=memory_bytes, order=order, reason=reason))
    steps = steps[:_STEPS_AT_ONCE]
    return Work(f"plan {len(steps)} guests", create_steps(mirror, spec.job, steps))


def _next_of_step(
    mirror: Mirror, spec: JobSpec, state: JobState, step: JobStep, possible: PossibleHosts, now_utc_ns: int
) -> Work | Wait:
    """Return the worker's next piece of work for one step that is not final."""

    def work(event: StepEvent, reason: str = "", **facts: object) -> Work:
        return _change(mirror, spec, step, event, now_utc_ns, reason, **facts)

    if step.source in mirror.fences:
        return work(StepEvent.LOST, f"The host {step.source} was fenced; its guests can be started elsewhere.")
    if step.state is StepState.MIGRATING:
        return Wait(None)
    if state.phase is JobPhase.CANCELLING:
        return work(StepEvent.CANCEL, "The job was cancelled.")
    owner = mirror.owners.get(step.guest)
    if owner is not None and owner.previous == step.source:
        return Wait(None)  # the source has the guest too, and runs it unless the owner shows that it does
    if owner is None or owner.owner != step.source:
        where = "it has no owner any more" if owner is None else f"{owner.owner} owns it"
        return work(StepEvent.GONE, f"The guest is not on {step.source} any more: {where}.")
    if step.state is StepState.RESERVED:
        if step.destination in mirror.fences or step.destination in mirror.cordons:
            return work(failure(step, spec), f"The host {step.destination} takes no guests any more.")
        return Wait(None)
    if _is_late(spec, state, now_utc_ns):
        return work(StepEvent.GIVE_UP, _late(step))
    if step.attempt >= spec.max_attempts:
        return work(StepEvent.GIVE_UP, step.reason)
    if 0 < step.not_before_utc_ns - now_utc_ns <= LONGEST_BACK_OFF_NS:  # later than that: a clock was set back
        return Wait(step.not_before_utc_ns)
    chosen = choose_host(mirror, spec, step, possible)
    if isinstance(chosen, str):
        return work(StepEvent.NO_HOST, chosen)
    if chosen is None:
        return Wait(None)
    host, bytes_per_s = chosen
    memory_bytes = mirror.guests[step.guest].memory_bytes  # it may not have been known when the step was planned
    return work(StepEvent.RESERVE, destination=host.name, bytes_per_s=bytes_per_s, memory_bytes=memory_bytes)


def _late(step: JobStep) -> str:
    why = f" Last: {step.reason}" if step.reason else ""
    return f"The job's deadline passed before {step.guest} could begin.{why}"


def _end(
    mirror: Mirror, spec: JobSpec, steps: list[JobStep], left_open: tuple[str, ...], unplanned: int, now_utc_ns: int
) -> Work:
    """End a job whose steps are all final.

    Args:
        left_open: why its host may still come to have a guest, when its deadline passed.
        unplanned: guests of the job without a step: it was cancelled before they were planned.
    """
    left = unplanned + sum(step.state is not StepState.DONE for step in steps)
    event, reason = JobEvent.ALL_DONE, ""
    if left:
        event, reason = JobEvent.SOME_LEFT, f"{left} of {len(steps) + unplanned} guests did not move."
    elif left_open:
        event, reason = JobEvent.SOME_LEFT, f"{'; '.join(left_open)}."
    elif spec.guests and not steps:
        event, reason = JobEvent.SOME_LEFT, f"The host {spec.host} owns no guest named {' or '.join(spec.guests[:3])}."
    return Work(f"end the job: {event}", change_job(mirror, spec.job, event, now_utc_ns, reason))


def choose_host(
    mirror: Mirror, spec: JobSpec, step: JobStep, possible: PossibleHosts
) -> tuple[HostDocument, int] | str | None:
    """The host that a step goes to now, with its share of the link; None when it must wait for a slot or a link; a
    sentence when no host can take it.

    The planned host comes first while it was not tried, then whichever is least full. Hosts that were tried come last.

    Args:
        possible: the hosts that this job's guests can go to, as the mirror is now.
    """
    guest, source = mirror.guests.get(step.guest), mirror.hosts.get(step.source)
    if guest is None:
        return f"Nothing is known of {step.guest} but its owner."
    if source is None:
        return f"The host {step.source} is not there: its daemon holds no lease."
    held = mirror.slots_of(step.source)
    if (
        len(held.outbound) >= source.max_outbound
        or any(one.guest == step.guest for one in held.outbound)  # another job moves it
        or (spec.max_parallel and _active(mirror, spec) >= spec.max_parallel)
    ):
        return None
    link, limit_ns = link_of(source), limit_of(guest, spec.downtime_limit_ns)

    def cost(rate: int) -> MoveCost:
        return move_cost(guest, limit_ns, rate)

    share = narrowest_share(cost, link, step.lanes or max(1, source.max_outbound))
    share = _granted(cost, share, link - held.outbound_bytes_per_s)
    if not share:
        return None
    planned = mirror.hosts.get(step.destination or "")
    if planned is not None and planned.name not in step.tried and why_not(mirror, guest, planned) is None:
        rate = _rate_to(mirror, planned, cost, share)
        if rate:
            return planned, rate
    hosts, refusal = possible.of(guest)
    if not hosts:
        return refusal
    untried = [host for host in hosts if host.name not in step.tried]
    able = ((host, _rate_to(mirror, host, cost, share)) for host in untried or hosts)
    return next(((host, rate) for host, rate in able if rate), None)


def _active(mirror: Mirror, spec: JobSpec) -> int:
    """Migrations of a job that are promised or under way."""
    return sum(other.state in ACTIVE for other in mirror.steps[spec.job].values())


def _granted(cost: Callable[[int], MoveCost], wanted: int, left: int) -> int:
    """The share of a link that a migration gets now, 0 for none: what it wants, or what is left of the link if that is
    at least half of it and no reason not to converge. What is left falls short by a little whenever the speed of the
    link was measured anew."""
    rate = min(wanted, left)
    if 2 * rate < wanted or (rate < wanted and cost(wanted).fits and not cost(rate).fits):
        return 0
    return rate


def _rate_to(mirror: Mirror, host: HostDocument, cost: Callable[[int], MoveCost], share: int) -> int:
    """The share of a destination's link that a migration gets now, 0 for none."""
    held = mirror.slots_of(host.name)
    if len(held.arriving) >= host.max_inbound:
        return 0
    return _granted(cost, min(share, link_of(host)), link_of(host) - held.inbound_bytes_per_s)


def steps_here(mirror: Mirror, host: str) -> Iterator[tuple[JobSpec, JobStep]]:
    """The steps that the daemon of a source has to begin or to end, with their jobs."""
    for job, steps in mirror.steps.items():
        spec = mirror.specs.get(job)
        if spec is not None:
            yield from ((spec, step) for step in steps.values() if step.source == host and step.state in ACTIVE)


def is_cancelled(mirror: Mirror, spec: JobSpec) -> bool:
    """Whether the attempts of a job are to be cancelled."""
    state = mirror.states.get(spec.job)
    return state is not None and state.phase is JobPhase.CANCELLING


def begin(mirror: Mirror, spec: JobSpec, step: JobStep, migration_id: str, now_utc_ns: int) -> Work:
    """Return the transaction that the source's daemon writes before it starts the attempt of a step. If that fails,
    nothing starts."""
    change = change_step(
        mirror, spec.job, step.guest, StepEvent.BEGIN, now_utc_ns, by_worker=False, migration_id=migration_id
    )
    return Work(f"{step.guest}: begin", change)


def ended(
    mirror: Mirror,
    spec: JobSpec,
    step: JobStep,
    event: StepEvent,
    now_utc_ns: int,
    *,
    reason: str = "",
    downtime_ns: int | None = None,
) -> Work:
    """Return the transaction that the source's daemon writes when the attempt of a step has ended.

    Args:
        event: COMPLETED, FAILED or CANCELLED; a failure after which nothing is left to try is given up.
    """
    if event is StepEvent.FAILED:
        event = failure(step, spec, cancelling=is_cancelled(mirror, spec))
    change = change_step(
        mirror,
        spec.job,
        step.guest,
        event,
        now_utc_ns,
        by_worker=False,
        reason=reason,
        downtime_ns=downtime_ns,
    )
    return Work(f"{step.guest}: {event}", change)


def resume_steps(mirror: Mirror, job: str, now_utc_ns: int) -> Iterator[Work]:
    """Yield the transactions of ``--resume``: every guest that did not move is tried anew, and then the job runs again;
    before that its worker would find all steps final and end it.

    Raises:
        JobError: the job does not allow it; nothing was written.
    """
    job_after(mirror.states[job], JobEvent.RESUME, now_utc_ns)
    check_alone(mirror, mirror.specs[job])
    for step in list(mirror.steps[job].values()):
        if step.state in (StepState.FAILED, StepState.CANCELLED):
            change = change_step(mirror, job, step.guest, StepEvent.RESUME, now_utc_ns, by_worker=False)
            yield Work(f"{step.guest}: resume", change)
    yield Work("resume the job", resume_job(mirror, job, now_utc_ns))
