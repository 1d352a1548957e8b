"""``migratectl``: guests, migrations and their records, through a daemon's control socket.

Exit status: 0 done; 1 the operation failed; 2 wrong usage; 3 daemon not reachable; 4 in doubt; 130 interrupted.
Heavy imports wait until a command needs them: this starts often, in scripts and for shell completion.
It is long because every command stands here with its help, and nothing else does.
"""

from __future__ import annotations

import asyncio
import csv
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from migrated.base.errors import DocumentError
from migrated.cli.fleet import FLEET_COMMANDS, migrate_auto, watch_fleet
from migrated.cli.options import (
    RATE,
    SIZE,
    ParameterCommand,
    key_values,
    parse_settings,
    qmp_parameters,
)
from migrated.cli.session import (
    EXIT_FAILED,
    Session,
    default_socket,
    exit_status,
    json_option,
    socket_option,
    with_session,
)
from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError
from migrated.record.terms import FINISHED, HANDED_OVER, OUTCOMES

if TYPE_CHECKING:
    from migrated.record.model import Record

TIME: Final = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S"])
WORKLOADS_HELP: Final = "What the guest's vCPUs do: idle, sequential, random, hot-cold, phased, fill and more."
COMPLETION_TIMEOUT_S: Final = 2.0

RISKS: Final = {
    True: "If the guest runs on the other host, or can still be started there, two copies of it will run and write "
    "to the same disks and network. Run it here only if you know that the other host's copy is gone for good.",
    False: "If the other host does not have the guest, this destroys the last copy of it. Discard it here only if "
    "you see it run on the other host.",
}


def _ask_daemon(ctx: click.Context, command: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """For completion: a list from the daemon, empty when it cannot be asked in time."""
    socket = ctx.ensure_object(dict).get("socket") or default_socket()

    async def ask() -> list[dict[str, Any]]:
        async with asyncio.timeout(COMPLETION_TIMEOUT_S), await ControlClient.connect(socket) as client:
            found: list[dict[str, Any]] = await client.command(command, arguments)
            return found

    try:
        return asyncio.run(ask())
    except (DaemonUnreachableError, CommandError, TimeoutError):
        return []


def _complete_guest(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    guests = _ask_daemon(ctx, "x-migrated-guest-list", {})
    return [CompletionItem(g["name"], help=g["state"]) for g in guests if g["name"].startswith(incomplete)]


def _complete_migration(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    records = _ask_daemon(ctx, "x-migrated-history", {"last": 50})
    return [
        CompletionItem(r["migration_id"], help=f"{r['guest']} {r['outcome']}")
        for r in records
        if r["migration_id"].startswith(incomplete)
    ]


guest_argument = click.argument("name", shell_complete=_complete_guest)
optional_guest = click.argument("name", required=False, shell_complete=_complete_guest)
no_wait_option = click.option("--no-wait", is_flag=True, help="Return once it has begun.")
migration_argument = click.argument("migration_id", shell_complete=_complete_migration)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="migrated", prog_name="migratectl")
@json_option
@socket_option
def main() -> None:
    """Migrate running guests, watch it happen, and see afterwards where the downtime went.

    Sizes take KiB, MiB and GiB, durations us, ms and s, rates a size with /s.
    """


# --- guests -----------------------------------------------------------------------------------------------------------


@main.group()
@json_option
@socket_option
def guest() -> None:
    """Create, inspect and control guests."""


@guest.command()
@click.argument("name")
@click.option("--memory", type=SIZE, help="Size of its memory; needed without --definition.")
@click.option("--definition", metavar="NAME", help="A QEMU guest, by the name or file of its definition on that host.")
@click.option("--workload", metavar="WORKLOAD", help=WORKLOADS_HELP)
@click.option("--dirty-rate", type=RATE, help="How fast it writes memory.")
@click.option("--profile", metavar="PROFILE", help="A profile in the daemon's [vmm] profiles: its name, or its file.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Seed of its memory content and of its costs.")
@click.option("--paused", is_flag=True, help="Leave its vCPUs stopped.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="A further option of the VMM.")
@with_session
def create(
    session: Session,
    name: str,
    memory: int | None,
    definition: str | None,
    workload: str | None,
    dirty_rate: int | None,
    profile: str | None,
    seed: int | None,
    paused: bool,
    options: tuple[str, ...],
) -> None:
    """Start a guest in a VMM process of its own."""
    if memory is None and definition is None:
        raise click.UsageError("Missing option '--memory', or '--definition' for a QEMU guest.")
    if profile and ("/" in profile or profile.endswith(".toml")):
        profile = str(Path(profile).resolve())  # the daemon has a working directory of its own
    given = {
        "guest": name,
        "memory-bytes": memory,
        "definition": definition.removesuffix(".toml") if definition is not None else None,
        "workload": workload,
        "dirty-rate-bytes-per-s": dirty_rate,
        "profile": profile,
        "seed": seed,
        "paused": paused,
        "options": key_values(options),
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    created = session.call("x-migrated-guest-create", arguments)
    session.say(created, f"Guest {name} is {created['state']}.")


@guest.command()
@click.argument("name")
@click.option("--qmp", type=click.Path(), required=True, help="Its QMP socket, which nobody else may hold.")
@click.option("--incoming", is_flag=True, help="It waits for a migration (-incoming defer -S).")
@click.option("--run-log", type=click.Path(), help="Where it logs its run state (-D FILE -trace vm_state_notify).")
@click.option(
    "--guest-agent",
    type=click.Path(),
    help="The socket of its guest agent, which sets the guest's clock when it has moved here.",
)
@with_session
def adopt(session: Session, name: str, qmp: str, incoming: bool, run_log: str | None, guest_agent: str | None) -> None:
    """Take over a QEMU that somebody else started; it runs on undisturbed."""
    arguments: dict[str, Any] = {"guest": name, "qmp": str(Path(qmp).resolve()), "incoming": incoming}
    for key, path in (("run-log", run_log), ("guest-agent", guest_agent)):
        if path is not None:
            arguments[key] = str(Path(path).resolve())
    adopted = session.call("x-migrated-guest-adopt", arguments)
    session.say(adopted, f"Guest {name} is {adopted['state']}; see 'migratectl guest check {name}'.")


@guest.command()
@guest_argument
@with_session
def check(session: Session, name: str) -> None:
    """Look for everything that could break the promise of a migration. Exit status 1 when something is refused."""
    rows = session.call("x-migrated-guest-check", {"guest": name})
    session.show(rows, lambda: _lists().checks_table(rows))
    if any(row["verdict"] == "refused" for row in rows):
        sys.exit(EXIT_FAILED)


@guest.command("list")
@with_session
def list_guests(session: Session) -> None:
    """All guests of this host."""
    found = session.call("x-migrated-guest-list")
    session.show(found, lambda: _lists().guests_table(found))


@guest.command("show")
@guest_argument
@with_session
def show_guest(session: Session, name: str) -> None:
    """One guest: state, workload, clock, heartbeat."""
    found = session.call("x-migrated-guest-show", {"guest": name})
    session.show(found, lambda: _lists().facts_view(found))


@guest.command()
@guest_argument
@with_session
def pause(session: Session, name: str) -> None:
    """Stop its vCPUs."""
    session.say(session.call("x-migrated-guest-pause", {"guest": name}), f"Guest {name} is paused.")


@guest.command()
@guest_argument
@with_session
def resume(session: Session, name: str) -> None:
    """Let its vCPUs run."""
    session.say(session.call("x-migrated-guest-resume", {"guest": name}), f"Guest {name} is running.")


@guest.command()
@guest_argument
@with_session
def destroy(session: Session, name: str) -> None:
    """End its VMM; its memory is lost."""
    session.say(session.call("x-migrated-guest-destroy", {"guest": name}), f"Guest {name} is gone.")


@guest.command()
@guest_argument
@with_session
def verify(session: Session, name: str) -> None:
    """Check every byte of its memory, and its clock, against what its seed and step count say."""
    found = session.call("x-migrated-guest-verify", {"guest": name})
    if found["ok"]:
        session.say(found, f"Guest {name} is intact: {found['message']}")
        return
    session.document(found)
    click.echo(f"Guest {name} is damaged: {found['message']}", err=True)
    sys.exit(EXIT_FAILED)


# --- migrations -------------------------------------------------------------------------------------------------------


@main.command(cls=ParameterCommand)
@guest_argument
@click.argument("uri", metavar="tcp:HOST:PORT|unix:PATH|auto")
@no_wait_option
@with_session
def migrate(session: Session, name: str, uri: str, no_wait: bool, **parameters: Any) -> None:
    """Migrate a running guest to the daemon at HOST:PORT, and wait for the outcome.

    A daemon on this host is reached by the socket that its configuration names ([listen] unix). Memory that is in a
    file is handed over there, not copied. With auto in the place of the address, the fleet chooses the host, and the
    guest may be on any.
    """
    if uri == "auto":
        migrate_auto(session, name, qmp_parameters(parameters), no_wait)
        return
    _migrate(session, name, "migrate", {"guest": name, "uri": uri, **qmp_parameters(parameters)}, no_wait)


@main.command(cls=ParameterCommand)
@guest_argument
@click.option("--definition", metavar="FILE", help="Build a QEMU guest from this definition of the host's, by name.")
@click.option("--vmm", metavar="COMMAND", help="The new VMM: its program and fixed arguments, as a shell splits them.")
@no_wait_option
@with_session
def replace(
    session: Session, name: str, definition: str | None, vmm: str | None, no_wait: bool, **parameters: Any
) -> None:
    """Give a running guest another VMM process on this host, and wait for the outcome.

    Its memory stays where it is and is handed over; memory that is in no file is copied once, into one.
    """
    arguments: dict[str, Any] = {"guest": name, **qmp_parameters(parameters)}
    if definition is not None:
        arguments["definition"] = definition.removesuffix(".toml")
    if vmm is not None:
        try:
            arguments["vmm"] = shlex.split(vmm)
        except ValueError as error:
            raise click.UsageError(f"--vmm {vmm!r} is no command: {error}.") from error
    _migrate(session, name, "x-migrated-replace", arguments, no_wait)


@main.command(cls=ParameterCommand)
@guest_argument
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--stop",
    "mode",
    flag_value="stop",
    default=True,
    help="Stop the guest, and end it once the file is safe (default).",
)
@click.option("--running", "mode", flag_value="running", help="Let it run meanwhile, and go on after it.")
@click.option("--force", is_flag=True, help="Replace a saved guest that is there; any other file is left alone.")
@no_wait_option
@with_session
def save(session: Session, name: str, file: Path, mode: str, force: bool, no_wait: bool, **parameters: Any) -> None:
    """Save a guest in a file on the daemon's host: memory, devices and time.

    FILE comes into being complete or not at all; when a save fails, the guest goes on as before. With --running the
    guest stands still only for the end of it, within its downtime limit.
    """
    given = {"guest": name, "file": str(file.absolute()), "mode": mode, "force": force}
    _migrate(session, name, "x-migrated-save", {**given, **qmp_parameters(parameters)}, no_wait)


@main.command(cls=ParameterCommand)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--name", metavar="NAME", help="The name that the guest gets [default: its own].")
@no_wait_option
@with_session
def restore(session: Session, file: Path, name: str | None, no_wait: bool, **parameters: Any) -> None:
    """Restore a guest from a file on the daemon's host.

    Every byte is checked before the guest runs; FILE stays as it is. Of the migration parameters only those of guest
    time count here: the guest's clocks go on by the time that it lay in the file, unless --time-policy says otherwise.
    """
    arguments = {"file": str(file.absolute()), **({"guest": name} if name else {}), **qmp_parameters(parameters)}
    _migrate(session, name, "x-migrated-restore", arguments, no_wait)


def _migrate(session: Session, name: str | None, command: str, arguments: dict[str, Any], no_wait: bool) -> None:
    """Begin an attempt by a command of the control socket, and wait for its outcome unless told not to.

    Args:
        name: of the guest; None where the daemon tells it.
    """

    async def work(client: ControlClient) -> Any:
        from migrated.cli.watch import attend, display

        begun = await client.command(command, arguments)
        if no_wait:
            return begun
        guest = begun.get("guest", name)
        if session.json:
            return await attend(client, guest, begun["migration-id"], None)
        with display(as_json=False, stderr=True, rounds=0) as update:
            return await attend(client, guest, begun["migration-id"], update)

    cancel = f"'migratectl cancel {name}' cancels it" if name else "'migratectl status' shows it"
    result = session.run(work, f"The migration goes on; {cancel}.")
    if no_wait:
        session.say({"migration_id": result["migration-id"]}, result["migration-id"])
        return
    record = session.record(result)
    session.show(result, lambda: _render().record_view(record, details=False))
    session.finish(record)


@main.command(cls=ParameterCommand)
@guest_argument
@click.argument("uri", metavar="tcp:HOST:PORT|unix:PATH")
@with_session
def estimate(session: Session, name: str, uri: str, **parameters: Any) -> None:
    """Predict what a migration would cost, without migrating."""
    found = session.call("x-migrated-estimate", {"guest": name, "uri": uri, **qmp_parameters(parameters)})
    session.show(found, lambda: _lists().estimate_view(found))


@main.command()
@optional_guest
@with_session
def status(session: Session, name: str | None) -> None:
    """Guests, and migrations that run or have just ended."""

    async def work(client: ControlClient) -> Any:
        only = {"guest": name} if name else {}
        return {
            "guests": [await client.command("x-migrated-guest-show", only)]
            if name
            else await client.command("x-migrated-guest-list"),
            "migrations": await client.command("x-migrated-status", only),
        }

    found = session.run(work)

    def view() -> Any:
        from rich.console import Group

        from migrated.cli.live import progress_view
        from migrated.cli.trace import Look

        migrations = [progress_view(Look.of(progress)) for progress in found["migrations"]]
        return Group(_lists().guests_table(found["guests"]), *migrations)

    session.show(found, view)


@main.command()
@optional_guest
@click.option("--follow", is_flag=True, help="Go on when all migrations have ended.")
@click.option("--fleet", is_flag=True, help="The hosts of the fleet and its jobs instead, until interrupted.")
@with_session
def watch(session: Session, name: str | None, follow: bool, fleet: bool) -> None:
    """Watch migrations run: rounds, bandwidth, predicted downtime against its limit, why it has not switched yet."""
    if fleet:
        watch_fleet(session)
        return
    from migrated.cli.watch import display
    from migrated.cli.watch import watch as watch_migrations

    async def work(client: ControlClient) -> None:
        with display(as_json=session.json, stderr=False, full_screen=True) as update:
            await watch_migrations(client, name, update, follow=follow)

    session.run(work)


@main.command()
@guest_argument
@with_session
def cancel(session: Session, name: str) -> None:
    """Cancel the guest's migration; the guest runs on here. Waits until it has ended."""

    async def work(client: ControlClient) -> Any:
        from migrated.observe.progress import read_progress

        found = await client.command("x-migrated-status", {"guest": name, "rounds": 0})
        running = [progress for progress in map(read_progress, found) if progress.status not in FINISHED]
        await client.command("migrate_cancel", {"guest": name}, oob=True)
        if not running:
            return None
        last = running[-1]
        try:
            return last, await client.command("x-migrated-wait", {"migration-id": last.migration_id}, oob=True)
        except CommandError as error:
            if last.role == "source" or error.kind != "DeviceNotFound":
                raise
            return last, None  # the source did not tell its record

    answer = session.run(work)
    if answer is None:
        session.say({}, f"No migration of {name} is running.")
        return
    cancelled, result = answer
    if result is None:
        session.say({}, f"The incoming migration of {name} is cancelled; its source has not sent a record.")
        return
    record = session.record(result)
    if record.outcome == "cancelled" or (cancelled.role == "destination" and record.outcome not in HANDED_OVER):
        session.say(result, f"The migration of {name} is cancelled: {record.reason}")
    else:
        session.document(result)
        click.echo(f"The migration of {name} was not cancelled: it is {record.outcome} already.", err=True)
        sys.exit(exit_status(record))


@main.command("set")
@guest_argument
@click.argument("settings", nargs=-1, required=True, metavar="KEY=VALUE...")
@with_session
def set_parameters(session: Session, name: str, settings: tuple[str, ...]) -> None:
    """Change migration parameters of a guest, of its running migration too where that can change.

    Keys are the options of 'migratectl migrate' without the dashes: downtime-limit=200ms max-bandwidth=100MiB/s.
    """
    arguments = {"guest": name, **parse_settings(settings)}

    async def work(client: ControlClient) -> Any:
        await client.command("migrate-set-parameters", arguments)
        return await client.command("query-migrate-parameters", {"guest": name})

    found = session.run(work)
    session.show(found, lambda: _lists().facts_view(found))


@main.command("continue")
@guest_argument
@with_session
def continue_(session: Session, name: str) -> None:
    """Go on with a migration that waits before its switchover (pause-before-switchover)."""
    result = session.call("migrate-continue", {"guest": name, "state": "pre-switchover"})
    session.say(result, f"The migration of {name} goes on.")


# --- what happened ----------------------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--last",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Only the newest so many [default: 20, with --stats all].",
)
@click.option("--guest", "name", metavar="NAME", help="Only this guest.", shell_complete=_complete_guest)
@click.option("--outcome", type=click.Choice(OUTCOMES), help="Only this outcome.")
@click.option(
    "--since",
    type=TIME,
    metavar="TIME",
    help="Only attempts that began at this time or later: 2026-03-01, 2026-03-01T10:00:00, or with an offset behind "
    "it (+0100); else local time.",
)
@click.option("--until", type=TIME, metavar="TIME", help="Only attempts that began before this time.")
@click.option("--stats", is_flag=True, help="Percentiles of downtime, total time and prediction error instead.")
@click.option("--csv", "as_csv", is_flag=True, help="As comma-separated values.")
@with_session
def history(
    session: Session,
    last: int | None,
    name: str | None,
    outcome: str | None,
    since: Any,
    until: Any,
    stats: bool,
    as_csv: bool,
) -> None:
    """Past attempts, newest first."""
    if as_csv and (stats or session.json):
        raise click.UsageError("--csv goes with neither --stats nor --json.")
    given = {
        "last": last,
        "guest": name,
        "outcome": outcome,
        "since": since.astimezone().isoformat() if since else None,
        "until": until.astimezone().isoformat() if until else None,
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    found = session.call("x-migrated-history-stats" if stats else "x-migrated-history", arguments)
    if as_csv:
        _write_csv([session.record(document) for document in found])
    elif stats:
        session.show(found, lambda: _lists().stats_view(found))
    else:
        session.show(found, lambda: _lists().history_table(found))


def _write_csv(records: list[Record]) -> None:
    attempt = ("migration_id", "guest", "started_at", "outcome", "reason", "total_ns")
    downtime = (
        "measured_ns",
        "lower_ns",
        "upper_ns",
        "limit_ns",
        "limit_violated",
        "predicted_ns",
        "predicted_upper_ns",
    )
    writer = csv.writer(sys.stdout)
    writer.writerow([*attempt, *(f"downtime_{name}" for name in downtime), "transferred_bytes", "rounds"])
    for record in records:
        row = [getattr(record, name) for name in attempt]
        row += [None if record.downtime is None else getattr(record.downtime, name) for name in downtime]
        writer.writerow([*row, record.ram.transferred_bytes, len(record.rounds)])


@main.command()
@migration_argument
@with_session
def show(session: Session, migration_id: str) -> None:
    """The record of one attempt: downtime breakdown, devices, rounds, checkpoints, guest time."""
    result = session.call("x-migrated-show", {"migration-id": migration_id})
    session.show(result, lambda: _render().record_view(session.record(result)))


@main.command()
@click.argument("migration_id", required=False, metavar="[MIGRATION_ID]", shell_complete=_complete_migration)
@click.option("--compare", nargs=2, metavar="A B", help="Lay the records of two attempts side by side.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE.html",
    help="The file to write.",
)
@with_session
def report(session: Session, migration_id: str | None, compare: tuple[str, str] | None, output: Path) -> None:
    """Write the record of one attempt, or of two, as a self-contained HTML file."""
    if (migration_id is None) == (compare is None):
        raise click.UsageError("Give either one MIGRATION_ID or --compare A B.")
    from migrated.report import write_comparison, write_report

    wanted = (migration_id,) if compare is None else compare
    records = [session.call("x-migrated-show", {"migration-id": one}) for one in wanted]
    try:
        if compare is None:
            write_report(records[0], output)
        else:
            write_comparison(records[0], records[1], output)
    except DocumentError as error:
        session.fail(str(error), EXIT_FAILED, "DocumentError")
    except OSError as error:
        session.fail(f"The report cannot be written to {output}: {error.strerror}.", EXIT_FAILED, "OSError")
    ids = [record["migration_id"] for record in records]
    told = {"migration_id": ids[0]} if compare is None else {"compared": ids}
    session.say({**told, "file": str(output)}, f"Report written to {output}.")


@main.command()
@migration_argument
@click.option("--run-here", is_flag=True, help="Run the guest on this host.")
@click.option("--discard", is_flag=True, help="Discard the guest on this host.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_session
def resolve(session: Session, migration_id: str, run_here: bool, discard: bool, yes: bool) -> None:
    """End an attempt in doubt by hand, when the other host will never answer."""
    if run_here == discard:
        raise click.UsageError("Give either --run-here or --discard.")
    what = "run the guest on this host" if run_here else "discard the guest on this host"
    if not yes:
        click.echo(RISKS[run_here], err=True)
        if not sys.stdin.isatty():
            raise click.UsageError(f"To {what} without a terminal to ask on, give --yes.")
        click.confirm(f"Really {what}?", abort=True, err=True)
    action = "run-here" if run_here else "discard"
    result = session.call("x-migrated-resolve", {"migration-id": migration_id, "action": action})
    session.show(result, lambda: _render().record_view(session.record(result), details=False))


@main.command()
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many events.")
@with_session
def events(session: Session, count: int | None) -> None:
    """Every event as it happens, one per line, until interrupted."""

    async def work(client: ControlClient) -> None:
        seen = 0
        async for event in client.events():
            click.echo(json.dumps(event) if session.json else _lists().event_line(event))
            sys.stdout.flush()
            seen += 1
            if seen == count:
                return

    session.run(work)


@main.command()
@with_session
def metrics(session: Session) -> None:
    """All metrics of the daemon in Prometheus' text form."""
    found = session.call("x-migrated-metrics")
    if session.json:
        session.document(found)
    else:
        click.echo(found["text"], nl=False)


@main.command("adjust-time")
@click.option(
    "--input", "file", type=click.File(), required=True, metavar="FILE", help="JSON document; - for standard input."
)
@with_session
def adjust_time(session: Session, file: Any) -> None:
    """Compute a guest-time adjustment by hand; needs no daemon.

    In: {"source": VmTimeData, "destination": {"hrtime", "hres_sec", "hres_ns"}, "elapsed_ns": N}.
    """
    from protocol.guest_time import adjust_time_document

    try:
        document = json.load(file)
    except (ValueError, RecursionError) as error:
        session.fail(f"The input is not JSON: {error}.", EXIT_FAILED, "InvalidTimeData")
    result = adjust_time_document(document)
    if "error" in result:
        session.fail(result["message"], EXIT_FAILED, result["error"])
    session.show(result, lambda: _lists().facts_view(result))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell, for example: eval "$(migratectl completion bash)"."""
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"There is no completion for {shell}.")
    click.echo(script(main, {}, "migratectl", "_MIGRATECTL_COMPLETE").source())


def _render() -> Any:
    from migrated.cli import render

    return render


def _lists() -> Any:
    from migrated.cli import lists

    return lists


for _command in FLEET_COMMANDS:
    main.add_command(_command)
