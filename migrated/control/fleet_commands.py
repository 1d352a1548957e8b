"""The commands of the control socket on a fleet: rows of the one table in ``commands``."""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError

from migrated.control.command import Arguments, Command, Handler
from migrated.control.operations import FleetOperations, JobRequest, OperationError, Operations
from migrated.control.schema import Argument
from protocol.wrong_values import fault

HOST: Final = Argument("host", "string", "Name of the host in the fleet.", required=True)
REASON: Final = Argument("reason", "string", "Why, for whoever looks at the host.")
JOB: Final = Argument("job", "string", "Id of the job, or a unique beginning of it.", required=True)
WISHES: Final = (
    Argument("to", "array", "Names of hosts to go to; left out: any."),
    Argument("max-parallel", "integer", "Migrations at once; 0 or left out: as many as the hosts allow."),
    Argument("downtime-limit-ns", "integer", "An upper limit for all guests (ns); a guest's own holds where lower."),
    Argument("deadline-ns", "integer", "No migration begins later than this after the job (ns); 0: no deadline."),
)


def _fleet(operations: Operations) -> FleetOperations:
    if operations.fleet is None:
        raise OperationError("This host belongs to no fleet: [fleet] endpoints names no etcd.")
    return operations.fleet


def _request(arguments: Arguments) -> JobRequest:
    given = {key.replace("-", "_"): value for key, value in arguments.items() if key != "guest"}
    try:
        return JobRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])).replace("_", "-")
        raise OperationError(f"Parameter '{where}' {fault(first)}") from error


async def _hosts(operations: Operations, _arguments: Arguments) -> Any:
    return await _fleet(operations).hosts()


async def _jobs(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).jobs(arguments.get("job"))


async def _wait(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).wait(arguments["job"])


async def _evacuate(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).evacuate(_request(arguments))


async def _migrate(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).migrate(arguments["guest"], _request(arguments))


async def _cancel(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).cancel(arguments["job"])


async def _resume(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).resume(arguments["job"])


async def _cordon(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).cordon(arguments["host"], arguments.get("reason", ""))


async def _uncordon(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).uncordon(arguments["host"])


async def _fence(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).fence(arguments["host"], arguments.get("reason", ""))


async def _unfence(operations: Operations, arguments: Arguments) -> Any:
    return await _fleet(operations).unfence(arguments["host"])


def _change(name: str, doc: str, returns: str, arguments: tuple[Argument, ...], run: Handler) -> Command:
    return Command(f"x-migrated-fleet-{name}", doc, returns, arguments, run, changes=True)


FLEET_COMMANDS: Final = (
    Command("x-migrated-fleet-hosts", "The hosts of the fleet.", "A list of hosts, each with 'problems'.", (), _hosts),
    Command(
        "x-migrated-fleet-jobs",
        "Jobs of the fleet with their guests, newest first.",
        "A list of jobs.",
        (Argument("job", "string", "Only this job: its id, or a unique beginning of it."),),
        _jobs,
        large=True,
    ),
    Command(
        "x-migrated-fleet-wait",
        "Wait until a job is over. May be executed out of band, so that a client can go on.",
        "The job.",
        (JOB,),
        _wait,
        oob=True,
        waits=True,
        large=True,
    ),
    _change(
        "evacuate",
        "Begin to move all guests away from a host, which takes none in from now on. A dry run only plans.",
        "The job's id and its guests; of a dry run the plan.",
        (HOST, *WISHES, Argument("dry-run", "boolean", "Only plan.")),
        _evacuate,
    ),
    _change(
        "migrate",
        "Begin to move one guest, from whichever host of the fleet has it to the one that fits best.",
        "The job's id and its guest.",
        (Argument("guest", "string", "Name of the guest.", required=True), *WISHES),
        _migrate,
    ),
    _change("cancel", "Begin no more migrations of a job, and cancel those that run.", "The job.", (JOB,), _cancel),
    _change("resume", "Try every guest of a job again that has not moved.", "The job.", (JOB,), _resume),
    _change("cordon", "Let a host take no guests in.", "The host.", (HOST, REASON), _cordon),
    _change("uncordon", "Let a host take guests in again.", "The host.", (HOST,), _uncordon),
    _change(
        "fence",
        "Write down that a host surely runs nothing and will not: its guests may be started elsewhere. Said of a host "
        "that runs guests, this lets two copies of them run.",
        "The host.",
        (HOST, REASON),
        _fence,
    ),
    _change(
        "unfence",
        "Take the fence of a host away: it is back, and its guests are in order.",
        "The host.",
        (HOST,),
        _unfence,
    ),
)
"""Rows of the table of commands."""
