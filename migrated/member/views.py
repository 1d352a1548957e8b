"""Views of a fleet for operators, as JSON values: hosts with what is wrong with them, and jobs with their guests."""

from __future__ import annotations

from statistics import median
from typing import Any, Final

from migrated.fleet.costs import limit_of
from migrated.fleet.jobs import ACTIVE, FINAL, is_over
from migrated.fleet.mirror import Mirror
from migrated.fleet.model import JobPhase, JobSpec, JobState, JobStep, StepState
from migrated.fleet.planner import Plan, guests_of
from migrated.fleet.worker import open_ends
from protocol.units import format_duration_ns

_CLOCK_TOLERANCE_NS: Final = 2_000_000_000
"""Offsets are known to a second."""


def hosts_view(mirror: Mirror) -> list[dict[str, Any]]:
    """All hosts that the fleet's keys name, in the order of their names."""
    owners = {host for host, guests in mirror.by_owner.items() if guests}
    names = {*mirror.hosts, *mirror.cordons, *mirror.fences, *owners}
    return [_host_view(mirror, name) for name in sorted(names)]


def _host_view(mirror: Mirror, name: str) -> dict[str, Any]:
    host = mirror.hosts.get(name)
    slots = mirror.slots_of(name)
    cordon, fence = mirror.cordons.get(name), mirror.fences.get(name)
    view: dict[str, Any] = {
        "name": name,
        "lease": host is not None,
        "cordoned": cordon is not None,
        "cordon_reason": cordon.reason if cordon is not None else None,
        "fenced": fence is not None,
        "owned_guests": len(mirror.by_owner.get(name, ())),
        "reserved_inbound": len(slots.arriving),
        "reserved_outbound": len(slots.outbound),
        "reserved_bytes": slots.inbound_bytes,
    }
    if host is not None:
        view |= host.model_dump(mode="json", exclude={"name", "cpu_features"})
        view["free_bytes"] = mirror.free_bytes(host)
    view["problems"] = _problems(mirror, name)
    return view


def _problems(mirror: Mirror, name: str) -> list[str]:
    """Return a sentence for everything that is wrong with a host."""
    host, found = mirror.hosts.get(name), []
    if name in mirror.fences:
        found.append("It is fenced: its guests may be started elsewhere, and it may run none.")
    if host is None:
        owned = len(mirror.by_owner.get(name, ()))
        found.append(
            "It holds no lease: its daemon has ended or cannot reach the store. Guests that it owns, and that run on "
            f"as far as anybody knows: {owned}."
        )
        return found
    versions = [one.version for one in mirror.hosts.values()]
    usual = max(sorted(set(versions)), key=versions.count)
    if host.version != usual:
        found.append(f"It runs version {host.version}; most hosts run {usual}.")
    known = [one.clock_offset_ns for one in mirror.hosts.values() if one.clock_offset_ns is not None]
    if host.clock_offset_ns is not None:
        off_ns = host.clock_offset_ns - int(median(known))
        if abs(off_ns) > _CLOCK_TOLERANCE_NS:
            way = "ahead of" if off_ns > 0 else "behind"
            found.append(f"Its wall clock is {format_duration_ns(abs(off_ns))} {way} that of most hosts.")
    if mirror.slots_of(name).inbound_bytes + host.used_bytes > host.memory_bytes:
        found.append("More memory is promised or used than it gives to guests.")
    return found


def job_view(mirror: Mirror, job: str, now_utc_ns: int) -> dict[str, Any]:
    """A job with all its guests."""
    spec, state = mirror.specs[job], mirror.states[job]
    worker = mirror.workers.get(job)
    steps = sorted(mirror.steps[job].values(), key=lambda step: (step.order, step.guest))
    guests = [_step_view(mirror, spec, step) for step in steps]
    end_ns = state.ended_utc_ns if state.ended_utc_ns is not None else now_utc_ns
    expected_ns = max((step.expected_end_ns for step in steps), default=0)
    elapsed_ns = max(0, end_ns - spec.created_utc_ns)
    return {
        "job": job,
        "kind": str(spec.kind),
        "host": spec.host,
        "by": spec.by,
        "phase": str(state.phase),
        "reason": state.reason or _why_it_waits(mirror, spec, state) or None,
        "created_utc_ns": spec.created_utc_ns,
        "ended_utc_ns": state.ended_utc_ns,
        "worker": worker.host if worker is not None else None,
        "total_ns": elapsed_ns,
        "expected_total_ns": expected_ns,
        "left_ns": 0 if is_over(state) else max(0, expected_ns - elapsed_ns),
        "done": sum(step.state is StepState.DONE for step in steps),
        "late": sum(guest["late"] for guest in guests),
        "guests": guests,
    }


def _why_it_waits(mirror: Mirror, spec: JobSpec, state: JobState) -> str:
    """Return why a job goes on though each of its guests has ended, a sentence; empty when that is not so."""
    steps = mirror.steps[spec.job]
    planned = set(guests_of(mirror, spec)) <= steps.keys()
    ended = planned and all(step.state in FINAL for step in steps.values())
    if not ended or state.phase is not JobPhase.RUNNING or not (found := open_ends(mirror, spec)):
        return ""
    return f"It waits: {'; '.join(found)}."


def _step_view(mirror: Mirror, spec: JobSpec, step: JobStep) -> dict[str, Any]:
    guest = mirror.guests.get(step.guest)
    limit_ns = limit_of(guest, spec.downtime_limit_ns) if guest is not None else spec.downtime_limit_ns
    late = step.downtime_ns is not None and limit_ns is not None and step.downtime_ns > limit_ns
    return {**step.model_dump(mode="json"), "limit_ns": limit_ns, "late": late}


def jobs_view(mirror: Mirror, now_utc_ns: int) -> list[dict[str, Any]]:
    """All jobs that are known whole, the newest first."""
    whole = [job for job in mirror.states if job in mirror.specs]
    whole.sort(key=lambda job: -mirror.specs[job].created_utc_ns)
    return [job_view(mirror, job, now_utc_ns) for job in whole]


def figures(mirror: Mirror) -> dict[str, int]:
    """Figures of the fleet, by the names of their metrics."""
    steps = [step for job in mirror.steps.values() for step in job.values()]
    return {
        "hosts": len(mirror.hosts),
        "guests": len(mirror.owners),
        "cordoned": len(mirror.cordons),
        "fenced": len(mirror.fences),
        "jobs": sum(not is_over(state) for state in mirror.states.values()),
        "moving": sum(step.state in ACTIVE for step in steps),
    }


def plan_view(mirror: Mirror, spec: JobSpec, made: Plan) -> dict[str, Any]:
    """A plan that is not carried out."""
    moves = [
        {
            "guest": move.guest,
            "destination": move.destination,
            "bytes_per_s": move.bytes_per_s,
            "begin_ns": move.begin_ns,
            "end_ns": move.end_ns,
            "downtime_ns": move.cost.downtime_ns,
            "downtime_bound_ns": move.cost.bound_ns,
            "limit_ns": limit_of(mirror.guests[move.guest], spec.downtime_limit_ns),
            "fits": move.cost.fits,
            "doubt": move.doubt or None,
        }
        for move in made.moves
    ]
    late = [move.guest for move in made.late(spec.deadline_ns)]
    return {"host": spec.host, "total_ns": made.total_ns, "moves": moves, "refusals": made.refusals, "too_late": late}
