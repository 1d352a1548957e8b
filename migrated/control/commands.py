"""The commands of the control socket as one table: QEMU's names and arguments, and the operation that each calls. It is
long because every command has its row here, with its handler above it."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from migrated.base.errors import DocumentError
from migrated.control import qemu
from migrated.control.command import Arguments, Command
from migrated.control.fleet_commands import FLEET_COMMANDS
from migrated.control.operations import EVENTS_LOST, AdoptSpec, GuestSpec, OperationError, Operations
from migrated.control.schema import (
    PARAMETER_ARGUMENTS,
    PARAMETERS,
    Argument,
    parameter_document,
    parameter_values,
)
from migrated.observe.progress import Progress
from migrated.record.reading import read_record
from migrated.record.terms import FINISHED, OUTCOMES
from migrated.state.history import HistoryQuery, RecordNotFoundError
from migrated.vmm.seam import Replacement
from protocol.wrong_values import fault, first_fault

Spec = TypeVar("Spec", GuestSpec, AdoptSpec)

MAX_HISTORY: Final = 1000
"""Records in one reply; more would keep the event loop busy."""


GUEST: Final = Argument("guest", "string", "Name of the guest; may be left out where only one exists.")
ONE_GUEST: Final = Argument("guest", "string", "Name of the guest.", required=True)
DEFAULTS_GUEST: Final = Argument("guest", "string", "Name of the guest; left out: the daemon's defaults.")
MIGRATION_ID: Final = Argument("migration-id", "string", "Migration id, or a unique beginning of it.", required=True)
URI: Final = Argument("uri", "string", "The destination: tcp:HOST:PORT, unix:PATH on this host, or file:PATH.")


def _named(operations: Operations, arguments: Arguments) -> str:
    """The guest that a command means: the one named, or the only one there is."""
    if "guest" in arguments:
        return str(arguments["guest"])
    here = operations.guest_names()
    if len(here) == 1:
        return here[0]
    if not here:
        raise OperationError("There is no guest on this host; create one first.", "DeviceNotFound")
    raise OperationError(f"Several guests are on this host ({', '.join(sorted(here))}); say which with 'guest'.")


def _running(operations: Operations, arguments: Arguments) -> Progress | None:
    """The migration that a command means: the guest's, or the only one that runs; None when nothing runs."""
    found = [p for p in operations.progress(arguments.get("guest")) if p.status not in FINISHED]
    if len(found) > 1:
        names = ", ".join(sorted(p.guest for p in found))
        raise OperationError(f"Several migrations are running (of {names}); say which with 'guest'.")
    return found[0] if found else None


async def _migrate(operations: Operations, arguments: Arguments) -> Any:
    uri = qemu.uri_of(arguments)
    guest = _named(operations, arguments)
    overrides = parameter_values(arguments, operations.parameters(guest))
    return {"migration-id": await operations.migrate(guest, uri, overrides)}


async def _replace(operations: Operations, arguments: Arguments) -> Any:
    command, definition = arguments.get("vmm"), arguments.get("definition")
    if command is not None and not (command and all(isinstance(word, str) for word in command)):
        raise OperationError("Parameter 'vmm' expects a program and its arguments, each a string")
    replacement = Replacement(tuple(command) if command is not None else None, definition)
    guest = arguments["guest"]
    overrides = parameter_values(arguments, operations.parameters(guest))
    return {"migration-id": await operations.replace(guest, replacement, overrides)}


async def _save(operations: Operations, arguments: Arguments) -> Any:
    guest = arguments["guest"]
    migration_id = await operations.save(
        guest,
        arguments["file"],
        ends_guest=arguments.get("mode", "stop") == "stop",
        force=arguments.get("force", False),
        overrides=parameter_values(arguments, operations.parameters(guest)),
    )
    return {"migration-id": migration_id}


async def _restore(operations: Operations, arguments: Arguments) -> Any:
    return await _restored(operations, arguments["file"], arguments)


async def _migrate_incoming(operations: Operations, arguments: Arguments) -> Any:
    return await _restored(operations, qemu.file_of(qemu.uri_of(arguments)), arguments)


async def _restored(operations: Operations, path: str, arguments: Arguments) -> Any:
    name = arguments.get("guest")
    overrides = parameter_values(arguments, operations.parameters(None))
    migration_id, guest = await operations.restore(path, name, overrides)
    return {"migration-id": migration_id, "guest": guest}


async def _migrate_cancel(operations: Operations, arguments: Arguments) -> Any:
    running = _running(operations, arguments)
    if running is not None:
        await operations.cancel(running.guest)
    return {}


async def _migrate_continue(operations: Operations, arguments: Arguments) -> Any:
    running = _running(operations, arguments)
    if running is None or running.status != arguments["state"]:
        status = running.status if running else "none"
        raise OperationError(f"Migration not in expected state: {status}")
    await operations.continue_switchover(running.guest)
    return {}


async def _set_parameters(operations: Operations, arguments: Arguments) -> Any:
    guest = arguments.get("guest")
    values = parameter_values(arguments, operations.parameters(guest))
    await operations.set_parameters(guest, values)
    return {}


async def _query_parameters(operations: Operations, arguments: Arguments) -> Any:
    return parameter_document(operations.parameters(arguments.get("guest")))


async def _set_capabilities(operations: Operations, arguments: Arguments) -> Any:
    values = qemu.capability_values(arguments["capabilities"])
    await operations.set_parameters(arguments.get("guest"), values)
    return {}


async def _query_capabilities(operations: Operations, arguments: Arguments) -> Any:
    return qemu.capability_document(operations.parameters(arguments.get("guest")))


async def _query_migrate(operations: Operations, arguments: Arguments) -> Any:
    guest = arguments.get("guest")
    known = operations.progress(guest)
    if known:
        latest = known[-1]
        if latest.status not in FINISHED:
            return qemu.migration_info(latest, None)
        try:
            record = read_record(await asyncio.to_thread(operations.record, latest.migration_id))
        except (OperationError, RecordNotFoundError):
            record = None  # not written yet, or the history could not take it; the migration's own figures do
        return qemu.migration_info(latest, record)
    remembered = await asyncio.to_thread(operations.history, HistoryQuery(last=1, guest=guest))
    try:
        return qemu.recorded_info(read_record(remembered[0])) if remembered else {}
    except DocumentError as error:
        raise OperationError(str(error)) from error


async def _query_status(operations: Operations, arguments: Arguments) -> Any:
    guest = await operations.guest_show(_named(operations, arguments))
    status = qemu.RUN_STATES.get(guest["state"], "internal-error")
    return {"running": status == "running", "status": status, "guest": guest["name"]}


async def _stop(operations: Operations, arguments: Arguments) -> Any:
    await operations.guest_pause(_named(operations, arguments))
    return {}


async def _cont(operations: Operations, arguments: Arguments) -> Any:
    await operations.guest_resume(_named(operations, arguments))
    return {}


def version_document(operations: Operations) -> dict[str, Any]:
    """QEMU's VersionInfo for this daemon."""
    version = operations.version()
    major, minor, micro = (int(part) for part in str(version["version"]).split(".")[:3])
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"migrated {version['version']}",
        **version,
    }


async def _query_version(operations: Operations, _arguments: Arguments) -> Any:
    return version_document(operations)


async def _query_commands(_operations: Operations, _arguments: Arguments) -> Any:
    return [{"name": name} for name in COMMANDS]


async def _schema(_operations: Operations, _arguments: Arguments) -> Any:
    return {
        "commands": [command.document() for command in COMMANDS.values()],
        "events": [{"name": name, "doc": doc} for name, doc in EVENTS.items()],
        "parameters": [parameter.document() for parameter in PARAMETERS.values()],
    }


async def _quit(operations: Operations, _arguments: Arguments) -> Any:
    await operations.quit()
    return {}


def _spec(kind: type[Spec], arguments: Arguments) -> Spec:
    fields = {name.replace("-", "_"): value for name, value in arguments.items()}
    fields["name"] = fields.pop("guest")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise OperationError(f"The guest cannot be created: {first_fault(error)}.") from None


async def _guest_create(operations: Operations, arguments: Arguments) -> Any:
    spec = _spec(GuestSpec, arguments)
    if spec.memory_bytes is None and spec.definition is None:
        raise OperationError("The guest cannot be created: give the size of its memory, or a definition.")
    return await operations.guest_create(spec)


async def _guest_adopt(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_adopt(_spec(AdoptSpec, arguments))


async def _guest_check(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_check(arguments["guest"])


async def _guest_list(operations: Operations, _arguments: Arguments) -> Any:
    return await operations.guest_list()


async def _guest_show(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_show(arguments["guest"])


async def _guest_pause(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_pause(arguments["guest"])


async def _guest_resume(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_resume(arguments["guest"])


async def _guest_destroy(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_destroy(arguments["guest"])


async def _guest_verify(operations: Operations, arguments: Arguments) -> Any:
    return await operations.guest_verify(arguments["guest"])


async def _status(operations: Operations, arguments: Arguments) -> Any:
    rounds = arguments.get("rounds")
    found = operations.progress(arguments.get("guest"))
    if rounds is not None:
        if rounds < 0:
            raise OperationError("Parameter 'rounds' expects an integer of 0 or more")
        found = [p.model_copy(update={"rounds": p.rounds[len(p.rounds) - rounds :] if rounds else ()}) for p in found]
    return [p.model_dump(mode="json") for p in found]


async def _wait(operations: Operations, arguments: Arguments) -> Any:
    return await operations.wait(arguments["migration-id"])


def _query(arguments: Arguments, **defaults: object) -> HistoryQuery:
    try:
        return HistoryQuery.model_validate(
            defaults | {name: arguments[name] for name in HISTORY_QUERY if name in arguments}
        )
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise OperationError(f"Parameter '{details['loc'][0]}' {fault(details)}") from None


async def _history(operations: Operations, arguments: Arguments) -> Any:
    query = _query(arguments, last=20)
    if query.last is None or query.last > MAX_HISTORY:
        raise OperationError(f"Parameter 'last' expects an integer in the range of 1 to {MAX_HISTORY}")
    return await asyncio.to_thread(operations.history, query)


async def _history_stats(operations: Operations, arguments: Arguments) -> Any:
    return await asyncio.to_thread(operations.history_stats, _query(arguments))


async def _show(operations: Operations, arguments: Arguments) -> Any:
    return await asyncio.to_thread(operations.record, arguments["migration-id"])


async def _resolve(operations: Operations, arguments: Arguments) -> Any:
    return await operations.resolve(arguments["migration-id"], arguments["action"] == "run-here")


async def _estimate(operations: Operations, arguments: Arguments) -> Any:
    uri = qemu.uri_of(arguments)
    guest = _named(operations, arguments)
    return await operations.estimate(guest, uri, parameter_values(arguments, operations.parameters(guest)))


async def _metrics(operations: Operations, _arguments: Arguments) -> Any:
    return {"text": (await asyncio.to_thread(operations.metrics_text)).decode()}


RESTORED_GUEST: Final = Argument("guest", "string", "The name that the guest gets; left out: its own.")
HISTORY_QUERY: Final = ("last", "guest", "outcome", "since", "until")
CHANNELS: Final = Argument(
    "channels", "array", "QEMU's other form of the destination: one 'main' channel, inet or unix."
)
HISTORY_FILTER: Final = (
    Argument("guest", "string", "Only this guest."),
    Argument("outcome", "string", "Only this outcome.", values=OUTCOMES),
    Argument("since", "string", "Only attempts that began at this ISO 8601 time with offset, or later."),
    Argument("until", "string", "Only attempts that began before this ISO 8601 time with offset."),
)
LAST: Final = Argument("last", "integer", "Only the newest so many.")

_TABLE: Final = (
    Command(
        "migrate",
        "Start to migrate a guest. Returns once the attempt has begun; events, query-migrate and x-migrated-wait tell "
        "the rest. Migration parameters given here count for this attempt only.",
        "The migration id.",
        (
            GUEST,
            URI,
            CHANNELS,
            Argument("detach", "boolean", "Accepted for QEMU's sake; the command never waits."),
            *PARAMETER_ARGUMENTS,
        ),
        _migrate,
        changes=True,
    ),
    Command(
        "migrate_cancel",
        "Cancel a running migration; its guest runs on. Nothing to cancel is no error; after COMMIT it is refused.",
        "Nothing.",
        (Argument("guest", "string", "Name of the guest; may be left out while one migration runs."),),
        _migrate_cancel,
        changes=True,
        oob=True,
    ),
    Command(
        "migrate-continue",
        "Go on with a migration that waits in pre-switchover.",
        "Nothing.",
        (
            Argument("guest", "string", "Name of the guest; may be left out while one migration runs."),
            Argument("state", "string", "The state it waits in.", required=True, values=("pre-switchover",)),
        ),
        _migrate_continue,
        changes=True,
    ),
    Command(
        "migrate-set-parameters",
        "Change migration parameters: all of them, or on an error none. Without a guest the daemon's defaults change, "
        "which hold for every guest that has no value of its own.",
        "Nothing.",
        (DEFAULTS_GUEST, *PARAMETER_ARGUMENTS),
        _set_parameters,
        changes=True,
    ),
    Command(
        "query-migrate-parameters",
        "The migration parameters that the next migration would use.",
        "All parameters by name.",
        (DEFAULTS_GUEST,),
        _query_parameters,
    ),
    Command(
        "migrate-set-capabilities",
        "Switch migration capabilities, which are the truth values among the parameters in QEMU's form.",
        "Nothing.",
        (DEFAULTS_GUEST, Argument("capabilities", "array", "Objects with 'capability' and 'state'.", required=True)),
        _set_capabilities,
        changes=True,
    ),
    Command(
        "query-migrate-capabilities",
        "The state of all migration capabilities.",
        "A list of objects with 'capability' and 'state'.",
        (DEFAULTS_GUEST,),
        _query_capabilities,
    ),
    Command(
        "query-migrate",
        "The most recent migration.",
        "QEMU's MigrationInfo and more; an empty object when there has been none.",
        (Argument("guest", "string", "Only this guest's."),),
        _query_migrate,
    ),
    Command(
        "query-status",
        "Whether a guest runs.",
        "QEMU's StatusInfo.",
        (GUEST,),
        _query_status,
    ),
    Command("query-version", "The version of the daemon.", "QEMU's VersionInfo and more.", (), _query_version),
    Command("query-commands", "All commands.", "A list of objects with 'name'.", (), _query_commands),
    Command("stop", "Stop the vCPUs of a guest.", "Nothing.", (GUEST,), _stop, changes=True),
    Command("cont", "Let the vCPUs of a guest run.", "Nothing.", (GUEST,), _cont, changes=True),
    Command("quit", "Stop the daemon in an orderly way; guests run on.", "Nothing.", (), _quit, changes=True),
    Command(
        "x-migrated-schema",
        "Every command with its arguments, every event and every migration parameter.",
        "An object with 'commands', 'events' and 'parameters'.",
        (),
        _schema,
    ),
    Command(
        "x-migrated-guest-create",
        "Start a guest in a VMM process of its own.",
        "The guest.",
        (
            ONE_GUEST,
            Argument("memory-bytes", "integer", "Size of its memory; needed without a definition."),
            Argument("definition", "string", "A definition in [qemu] definitions, for a QEMU guest: its name."),
            Argument("workload", "string", "What its vCPUs do (a workload of the VMM)."),
            Argument("dirty-rate-bytes-per-s", "integer", "How fast it writes memory."),
            Argument("profile", "string", "A guest profile of [vmm] profiles: its name, or the path of its file."),
            Argument("seed", "integer", "Seed of its memory content and of its costs."),
            Argument("paused", "boolean", "Leave the vCPUs stopped."),
            Argument("options", "object", "Further options for the VMM, text to text."),
        ),
        _guest_create,
        changes=True,
    ),
    Command(
        "x-migrated-guest-adopt",
        "Take over a QEMU that somebody else started; it runs on undisturbed.",
        "The guest.",
        (
            ONE_GUEST,
            Argument("qmp", "string", "Its QMP socket, which nobody else may hold.", required=True),
            Argument("incoming", "boolean", "It waits for a migration (-incoming defer -S)."),
            Argument("run-log", "string", "The file it logs its run state to (-D FILE -trace vm_state_notify)."),
            Argument("guest-agent", "string", "Its guest agent's socket: the agent sets its clock when it moved here."),
        ),
        _guest_adopt,
        changes=True,
    ),
    Command(
        "x-migrated-guest-check",
        "Look for everything that could break the promise of a migration.",
        "A list of what was looked at: 'name', 'verdict' (ok, warning, refused), 'sentence'.",
        (ONE_GUEST,),
        _guest_check,
        changes=True,
    ),
    Command(
        "x-migrated-guest-list",
        "All guests of this host. One whose VMM does not answer is 'unresponsive' and has a 'reason'.",
        "A list of guests.",
        (),
        _guest_list,
    ),
    Command(
        "x-migrated-guest-show", "One guest.", "The guest, with more than the list says.", (ONE_GUEST,), _guest_show
    ),
    Command("x-migrated-guest-pause", "Stop its vCPUs.", "The guest.", (ONE_GUEST,), _guest_pause, changes=True),
    Command("x-migrated-guest-resume", "Let its vCPUs run.", "The guest.", (ONE_GUEST,), _guest_resume, changes=True),
    Command(
        "x-migrated-guest-destroy", "End its VMM.", "The guest as it was.", (ONE_GUEST,), _guest_destroy, changes=True
    ),
    Command(
        "x-migrated-guest-verify",
        "Check every byte of its memory and its clock against what its seed and step count say.",
        "The findings; 'ok' sums them up.",
        (ONE_GUEST,),
        _guest_verify,
        changes=True,  # its vCPUs may stand still meanwhile
    ),
    Command(
        "x-migrated-status",
        "Running migrations and the last finished one of each guest.",
        "A list of progress objects, in order of start.",
        (
            Argument("guest", "string", "Only this guest's."),
            Argument("rounds", "integer", "How many of the last pre-copy rounds to tell; left out: all."),
        ),
        _status,
        large=True,
    ),
    Command(
        "migrate-incoming",
        "Start to restore a guest from a file ('file:' and its path). Guests that come over the network need no "
        "command.",
        "The migration id, and the name of the guest.",
        (RESTORED_GUEST, URI, CHANNELS, *PARAMETER_ARGUMENTS),
        _migrate_incoming,
        changes=True,
    ),
    Command(
        "x-migrated-save",
        "Start to save a guest in a file. It has its name only once it is complete and safe.",
        "The migration id.",
        (
            ONE_GUEST,
            Argument("file", "string", "The file's whole path on the daemon's host.", required=True),
            Argument(
                "mode",
                "string",
                "Stop the guest, and end it once the file is safe (the default); or let it run, and go on after it.",
                values=("stop", "running"),
            ),
            Argument("force", "boolean", "Replace a saved guest of that name."),
            *PARAMETER_ARGUMENTS,
        ),
        _save,
        changes=True,
    ),
    Command(
        "x-migrated-restore",
        "Start to restore a guest from a file. It runs once every byte was checked.",
        "The migration id, and the name of the guest.",
        (
            Argument("file", "string", "The file's whole path on the daemon's host.", required=True),
            RESTORED_GUEST,
            *PARAMETER_ARGUMENTS,
        ),
        _restore,
        changes=True,
    ),
    Command(
        "x-migrated-replace",
        "Start to give a guest another VMM on this host, to which its memory is handed over; memory that is in no file "
        "is copied. Otherwise like migrate.",
        "The migration id.",
        (
            ONE_GUEST,
            Argument("vmm", "array", "The new VMM's program and fixed arguments; left out: the configured one."),
            Argument("definition", "string", "The definition to build a QEMU guest from; left out: the guest's own."),
            *PARAMETER_ARGUMENTS,
        ),
        _replace,
        changes=True,
    ),
    Command(
        "x-migrated-wait",
        "Wait until an attempt has ended or is in doubt. May be executed out of band, so that a client can go on.",
        "Its record.",
        (MIGRATION_ID,),
        _wait,
        oob=True,
        waits=True,
        large=True,
    ),
    Command(
        "x-migrated-history",
        "Records of past attempts, newest first.",
        "A list of records.",
        (LAST, *HISTORY_FILTER),
        _history,
        large=True,
    ),
    Command(
        "x-migrated-history-stats",
        "Percentiles of downtime, total time and prediction error, and outcomes, over past attempts.",
        "The figures.",
        (LAST, *HISTORY_FILTER),
        _history_stats,
    ),
    Command("x-migrated-show", "The record of one attempt.", "The record.", (MIGRATION_ID,), _show, large=True),
    Command(
        "x-migrated-resolve",
        "End an attempt in doubt by hand. To run the guest here while it runs on the other host corrupts its disks; "
        "to discard it here while the other host does not have it loses it.",
        "Its record.",
        (
            MIGRATION_ID,
            Argument(
                "action", "string", "What to do with the guest here.", required=True, values=("run-here", "discard")
            ),
        ),
        _resolve,
        changes=True,
    ),
    Command(
        "x-migrated-estimate",
        "What a migration would cost, without migrating.",
        "Predicted downtime and total time with bounds, and whether the limit can be met.",
        (GUEST, URI, CHANNELS, *PARAMETER_ARGUMENTS),
        _estimate,
        changes=True,  # it connects to another host and tracks the guest's writes
    ),
    Command("x-migrated-metrics", "All metrics in Prometheus' text form.", "An object with 'text'.", (), _metrics),
)

COMMANDS: Final[dict[str, Command]] = {command.name: command for command in (*_TABLE, *FLEET_COMMANDS)}
"""Every command but ``qmp_capabilities``, which belongs to the connection."""

EVENTS: Final[dict[str, str]] = {
    "MIGRATION": "A migration changed its state: 'status', 'guest', 'migration-id'.",
    "MIGRATION_PASS": "The dirty log was read, at the start, after each round, and in the switchover: 'pass' (from 1), "
    "'guest', 'migration-id'.",
    "STOP": "The vCPUs of a guest stopped: 'guest'.",
    "RESUME": "The vCPUs of a guest run: 'guest'.",
    "X_MIGRATED_IN_DOUBT": "COMMIT was sent and nobody answers: 'guest', 'migration-id', 'reason'.",
    "X_MIGRATED_GUEST_GONE": "The VMM of a guest ended: 'guest', 'pid'.",
    "X_MIGRATED_FLEET_JOB": "A job of the fleet changed its phase: 'job', 'phase', 'reason'.",
    "X_MIGRATED_FLEET_STEP": "A guest of a job of the fleet came further: 'job', 'guest', 'state', 'source', "
    "'destination', 'reason'.",
    EVENTS_LOST: "This client read too slowly and lost 'count' events.",
}
"""Every event that the daemon sends."""
