"""``migratectl``'s commands on a fleet: hosts, evacuations, and who may take guests in. Any daemon of the fleet can be
asked."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import click

from migrated.cli.options import NANOSECONDS
from migrated.cli.session import EXIT_FAILED, Session, console, with_session
from migrated.control.client import ControlClient

OVER: Final = frozenset({"done", "failed", "cancelled"})
"""Phases of a job on which nobody works any more."""
_POLL_S: Final = 0.25

FENCE_RISK: Final = (
    "If a guest of {host} still runs there, or its daemon lives, two copies of it can run and write to the same disks "
    "and network. Fence {host} only if you know that it is off, or that its guests' processes are gone."
)


@click.command()
@with_session
def hosts(session: Session) -> None:
    """The hosts of the fleet: guests, memory, slots, and what is wrong with them. Exit status 1 if something is."""
    found = session.call("x-migrated-fleet-hosts")
    session.show(found, lambda: _views().hosts_view(found))
    if any(host["problems"] for host in found):
        sys.exit(EXIT_FAILED)


@click.command()
@click.argument("host", required=False, metavar="[HOST|JOB]")
@click.option("--to", metavar="A,B", help="Only to these hosts.")
@click.option("--max-parallel", type=click.IntRange(0, 256), metavar="N", help="Migrations at once.")
@click.option("--limit", type=NANOSECONDS, help="An upper limit of the downtime; a guest's own holds where lower.")
@click.option("--deadline", type=NANOSECONDS, help="No migration begins later than this.")
@click.option("--dry-run", is_flag=True, help="Only show the plan: order, times, downtimes.")
@click.option("--no-wait", is_flag=True, help="Return once it has begun.")
@click.option("--status", is_flag=True, help="Show the evacuation JOB, or all jobs.")
@click.option("--cancel", is_flag=True, help="Begin no more migrations of JOB, and cancel those that run.")
@click.option("--resume", is_flag=True, help="Try every guest of JOB again that has not moved.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write a report when it is over; of JOB with --status.",
)
@with_session
def evacuate(
    session: Session,
    host: str | None,
    to: str | None,
    max_parallel: int | None,
    limit: int | None,
    deadline: int | None,
    dry_run: bool,
    no_wait: bool,
    status: bool,
    cancel: bool,
    resume: bool,
    report: Path | None,
) -> None:
    """Empty a host: move all its guests to other hosts of the fleet, each within its own downtime limit.

    The host takes no guests in from now on; `uncordon` ends that. With --status, --cancel and --resume a job is meant:
    the newest one unless it is given.
    """
    if status + cancel + resume > 1 or (dry_run and (status or cancel or resume)):
        raise click.UsageError("Give one of --dry-run, --status, --cancel and --resume.")
    if report is not None and (no_wait or dry_run):
        raise click.UsageError("--report needs the job to be over: leave out --no-wait and --dry-run.")
    if status:
        _status(session, host, report)
        return
    if cancel or resume:
        command = "x-migrated-fleet-cancel" if cancel else "x-migrated-fleet-resume"
        begun = session.call(command, {"job": host or _newest(session)})
    else:
        if host is None:
            raise click.UsageError("Missing argument 'HOST'.")
        given = {
            "to": _names(to),
            "max-parallel": max_parallel,
            "downtime-limit-ns": limit,
            "deadline-ns": deadline,
            "dry-run": dry_run or None,
        }
        wishes = {key: value for key, value in given.items() if value is not None}
        begun = session.call("x-migrated-fleet-evacuate", {"host": host, **wishes})
        if dry_run:
            session.show(begun, lambda: _views().plan_view(begun))
            if begun["refusals"] or begun["too_late"]:
                sys.exit(EXIT_FAILED)
            return
    if no_wait:
        session.say({"job": begun["job"]}, begun["job"])
        return
    finish_job(session, begun["job"], report)


@click.command()
@click.argument("host")
@click.option("--reason", default="", help="Why, for whoever looks at the host.")
@with_session
def cordon(session: Session, host: str, reason: str) -> None:
    """Let a host take no guests in, until `uncordon`."""
    found = session.call("x-migrated-fleet-cordon", {"host": host, "reason": reason})
    session.say(found, f"{host} takes no guests in.")


@click.command()
@click.argument("host")
@with_session
def uncordon(session: Session, host: str) -> None:
    """Let a host take guests in again."""
    found = session.call("x-migrated-fleet-uncordon", {"host": host})
    session.say(found, f"{host} takes guests in.")


@click.command()
@click.argument("host")
@click.option("--undo", is_flag=True, help="The host is back, and its guests are in order.")
@click.option("--reason", default="", help="How it is known, for whoever looks at the host.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_session
def fence(session: Session, host: str, undo: bool, reason: str, yes: bool) -> None:
    """Say that a host surely runs nothing: its guests may then be started elsewhere, with `guest create`."""
    if undo:
        session.say(session.call("x-migrated-fleet-unfence", {"host": host}), f"{host} is not fenced any more.")
        return
    if not yes:
        click.echo(FENCE_RISK.format(host=host), err=True)
        if not sys.stdin.isatty():
            raise click.UsageError(f"To fence {host} without a terminal to ask on, give --yes.")
        click.confirm(f"Does {host} surely run nothing?", abort=True, err=True)
    found = session.call("x-migrated-fleet-fence", {"host": host, "reason": reason})
    session.say(found, f"{host} is fenced: its {found['owned_guests']} guests may be started elsewhere.")


FLEET_COMMANDS: Final = (hosts, evacuate, cordon, uncordon, fence)
"""The commands, for ``migratectl``."""


# Section: jobs


def migrate_auto(session: Session, guest: str, parameters: Mapping[str, Any], no_wait: bool) -> None:
    """``migrate NAME auto``: the fleet chooses the host. ``parameters`` as QMP names them."""
    wishes: dict[str, Any] = {}
    if "downtime-limit" in parameters:
        wishes["downtime-limit-ns"] = round(parameters["downtime-limit"] * 1e6)
    if others := parameters.keys() - {"downtime-limit"}:
        raise click.UsageError(f"With auto, --{min(others)} cannot be given; set it with 'migratectl set {guest}'.")
    begun = session.call("x-migrated-fleet-migrate", {"guest": guest, **wishes})
    if no_wait:
        session.say({"job": begun["job"]}, begun["job"])
        return
    finish_job(session, begun["job"], None)


def finish_job(session: Session, job: str, report: Path | None) -> None:
    """Follow a job, show it when it is over, and end with the exit status that it deserves."""

    async def work(client: ControlClient) -> Any:
        last: dict[str, Any] = {}
        told: dict[str, str] = {}
        async for last in _looks(client, job):
            if not session.json:
                for line in _views().step_lines(last, told):
                    click.echo(line, err=True)
        return last

    found = session.run(work, f"The job goes on; 'migratectl evacuate --cancel {job}' cancels it.")
    _write_report(session, found, report)
    session.show(found, lambda: _views().job_view(found))
    if found["phase"] != "done":
        if found["reason"]:
            click.echo(found["reason"], err=True)
        sys.exit(EXIT_FAILED)


async def _looks(client: ControlClient, job: str) -> AsyncIterator[dict[str, Any]]:
    """A job again and again until it is over."""
    while True:
        found = (await client.command("x-migrated-fleet-jobs", {"job": job}))[0]
        yield found
        if found["phase"] in OVER:
            return
        await asyncio.sleep(_POLL_S)


def _status(session: Session, job: str | None, report: Path | None) -> None:
    found = session.call("x-migrated-fleet-jobs", {"job": job} if job is not None else {})
    if report is not None:
        if not found:
            session.fail("There is no job to report on.", EXIT_FAILED, "DeviceNotFound")
        _write_report(session, found[0], report)
    if job is not None:
        session.show(found[0], lambda: _views().job_view(found[0]))
    else:
        session.show(found, lambda: _views().jobs_view(found))


def _write_report(session: Session, job: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    from migrated.report.evacuation import write_evacuation

    try:
        write_evacuation(job, path)
    except OSError as error:
        session.fail(f"The report cannot be written to {path}: {error.strerror}.", EXIT_FAILED, "OSError")


def _newest(session: Session) -> str:
    found = session.call("x-migrated-fleet-jobs")
    if not found:
        session.fail("There is no job.", EXIT_FAILED, "DeviceNotFound")
    return str(found[0]["job"])


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


# Section: watching


def watch_fleet(session: Session) -> None:
    """``watch --fleet``: hosts and running jobs, until interrupted; as JSON one object per change."""

    async def work(client: ControlClient) -> None:
        if session.json or not console().is_terminal:
            await _watch_lines(session, client)
            return
        from rich.live import Live

        with Live(console=console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(_views().fleet_view(*(await _look(client)), time.time_ns()), refresh=True)
                await asyncio.sleep(_POLL_S)

    session.run(work)


async def _look(client: ControlClient) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found = await client.command("x-migrated-fleet-hosts"), await client.command("x-migrated-fleet-jobs")
    return found[0], [job for job in found[1] if job["phase"] not in OVER]


async def _watch_lines(session: Session, client: ControlClient) -> None:
    told: dict[str, str] = {}
    before: Any = None
    while True:
        hosts, jobs = await _look(client)
        if session.json:
            # Times go on by themselves and are no change.
            now = [hosts, [{**job, "total_ns": 0, "left_ns": 0} for job in jobs]]
            if now != before:
                session.document({"hosts": hosts, "jobs": jobs})
                before = now
        else:
            for job in jobs:
                for line in _views().step_lines(job, told):
                    click.echo(line)
        sys.stdout.flush()
        await asyncio.sleep(_POLL_S)


def _views() -> Any:
    from migrated.cli import fleet_views

    return fleet_views
