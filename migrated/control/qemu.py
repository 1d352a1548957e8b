"""Our terms in QEMU's: MigrationInfo, capabilities, run states, and the ``channels`` form of a migration URI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from migrated.control.operations import OperationError
from migrated.observe.progress import Progress
from migrated.record.model import Ram, Record
from migrated.record.terms import FINISHED, STATUS_OF
from migrated.settings.parameters import MigrationParameters
from protocol.guest import PAGE_SIZE

FILE_SCHEME: Final = "file:"

RUN_STATES: Final = {
    "running": "running",
    "paused": "paused",
    "incoming": "inmigrate",
    "in-doubt": "finish-migrate",
    "retired": "postmigrate",
    "unresponsive": "internal-error",
}
"""A guest's state here, and QEMU's RunState for it."""

CAPABILITIES: Final = {
    "switchover-abort": "switchover_abort",
    "pause-before-switchover": "pause_before_switchover",
    "xor-delta": "xor_delta",
    "auto-converge": "auto_converge",
}
"""Capabilities that can be switched, and the field of MigrationParameters behind each, where it exists."""
ALWAYS_ON: Final = ("events", "return-path", "multifd")
"""QEMU's capabilities that this daemon cannot work without; switching them on is fine, off is an error."""


def capability_document(parameters: MigrationParameters) -> list[dict[str, Any]]:
    """For ``query-migrate-capabilities``."""
    switched = [{"capability": name, "state": getattr(parameters, field)} for name, field in _switchable().items()]
    return switched + [{"capability": name, "state": True} for name in ALWAYS_ON]


def capability_values(capabilities: Sequence[object]) -> dict[str, object]:
    """The fields of MigrationParameters that a ``migrate-set-capabilities`` argument changes.

    Raises:
        OperationError: an unknown capability, or one that cannot be off.
    """
    switchable = _switchable()
    values: dict[str, object] = {}
    for item in capabilities:
        if not isinstance(item, dict) or set(item) != {"capability", "state"}:
            raise OperationError("Parameter 'capabilities' expects objects with 'capability' and 'state'")
        name, state = item["capability"], item["state"]
        if not isinstance(name, str):
            raise OperationError("Invalid parameter type for 'capability', expected: string")
        if not isinstance(state, bool):
            raise OperationError("Invalid parameter type for 'state', expected: boolean")
        if name in switchable:
            values[switchable[name]] = state
        elif name not in ALWAYS_ON:
            known = ", ".join([*switchable, *ALWAYS_ON])
            raise OperationError(f"Parameter 'capability' does not accept value '{name}'; it accepts {known}")
        elif not state:
            raise OperationError(f"Capability '{name}' cannot be switched off: it is part of every migration here")
    return values


def _switchable() -> dict[str, str]:
    return {name: field for name, field in CAPABILITIES.items() if field in MigrationParameters.model_fields}


def uri_of(arguments: Mapping[str, Any]) -> str:
    """The URI of a ``migrate`` command, from ``uri`` or from QEMU's ``channels``.

    Raises:
        OperationError: neither or both, or channels of another kind than one TCP or unix address.
    """
    if ("uri" in arguments) == ("channels" in arguments):
        raise OperationError("need either 'uri' or 'channels' argument")
    if "uri" in arguments:
        return str(arguments["uri"])
    match arguments["channels"]:
        case [
            {
                "channel-type": "main",
                "addr": {"transport": "socket", "type": "inet", "host": str(host), "port": str(port)},
            }
        ]:
            return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
        case [{"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": str(path)}}]:
            return f"unix:{path}"
        case [{"channel-type": "main", "addr": {"transport": "file", "filename": str(path), "offset": 0}}]:
            return f"{FILE_SCHEME}{path}"
    raise OperationError(
        "Parameter 'channels' expects one channel of type 'main' with a socket address of type 'inet', "
        "whose host and port are strings, or of type 'unix' with its path, or a file with its name and offset 0"
    )


def file_of(uri: str) -> str:
    """The path in a ``file:`` URI.

    Raises:
        OperationError: it is of another kind.
    """
    if not uri.startswith(FILE_SCHEME):
        raise OperationError(f"{uri!r} is no file: give it as file:PATH; guests from other hosts come by themselves")
    return uri.removeprefix(FILE_SCHEME)


def migration_info(progress: Progress, record: Record | None) -> dict[str, Any]:
    """QEMU's MigrationInfo (times in ms, sizes in bytes), and our own members after it.

    Args:
        progress: the migration.
        record: its record, once it has ended; exact totals come from there.
    """
    info: dict[str, Any] = {
        "status": progress.status,
        "total-time": _ms(progress.elapsed_ns),
        "setup-time": _ms(progress.setup_ns),
        "ram": _ram(progress, record.ram if record is not None else None),
    }
    if progress.status in FINISHED:
        if progress.downtime_ns is not None:
            info["downtime"] = _ms(progress.downtime_ns)
    else:
        info["remaining"] = progress.remaining_bytes
        if progress.predicted_downtime_ns is not None:
            info["expected-downtime"] = _ms(progress.predicted_downtime_ns)
    if progress.throttle_percent:
        info["cpu-throttle-percentage"] = progress.throttle_percent
    if progress.reason:
        info["error-desc"] = progress.reason
    return info | {
        "guest": progress.guest,
        "migration-id": progress.migration_id,
        "role": progress.role,
        "peer": progress.peer,
        "phase": progress.phase,
        "started-at": progress.started_at,
        "decision": progress.decision,
        "destination": progress.destination,
        "downtime-ns": progress.downtime_ns,
        "downtime-limit-ns": progress.downtime_limit_ns,
        "predicted-downtime-ns": progress.predicted_downtime_ns,
        "predicted-upper-ns": progress.predicted_upper_ns,
        "predicted-parts-ns": progress.predicted_parts_ns,
    }


def recorded_info(record: Record) -> dict[str, Any]:
    """MigrationInfo of a migration that only the history remembers."""
    ram, downtime = record.ram, record.downtime
    info: dict[str, Any] = {
        "status": STATUS_OF[record.outcome],
        "total-time": _ms(record.total_ns),
        "setup-time": _ms(record.setup_ns),
        "ram": {
            **_ram_totals(ram),
            "transferred": ram.transferred_bytes,
            "remaining": 0,
            "total": ram.total_bytes,
            "duplicate": ram.zero_pages,
            "normal": ram.normal_pages,
            "normal-bytes": ram.normal_pages * ram.page_size,
            "dirty-pages-rate": 0,
            "mbps": _mbps(ram.transferred_bytes * 1e9 / record.total_ns) if record.total_ns else 0.0,
            "dirty-sync-count": ram.dirty_sync_count,
        },
        "guest": record.guest,
        "migration-id": record.migration_id,
        "peer": record.peer,
        "started-at": record.started_at,
    }
    if downtime is not None:
        info["downtime"] = _ms(downtime.measured_ns)
        info["downtime-ns"] = downtime.measured_ns
    if record.reason:
        info["error-desc"] = record.reason
    return info


def _ram(progress: Progress, ram: Ram | None) -> dict[str, Any]:
    last = progress.rounds[-1] if progress.rounds else None
    running = {
        "page-size": PAGE_SIZE,
        "multifd-bytes": progress.transferred_bytes,
        "pages-per-second": int(last.dirty_pages * 1e9 / last.ns) if last and last.ns else 0,
        "precopy-bytes": progress.transferred_bytes,
        "downtime-bytes": 0,
        "postcopy-requests": 0,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }
    return {
        **(running if ram is None else _ram_totals(ram)),
        "transferred": progress.transferred_bytes,
        "remaining": progress.remaining_bytes,
        "total": progress.total_bytes,
        "duplicate": progress.zero_pages,
        "normal": progress.normal_pages,
        "normal-bytes": progress.normal_pages * PAGE_SIZE,
        "dirty-pages-rate": int(progress.dirty_rate_pages_per_s),
        "mbps": _mbps(progress.bandwidth_bytes_per_s),
        "dirty-sync-count": progress.dirty_sync_count,
    }


def _ram_totals(ram: Ram) -> dict[str, Any]:
    """Members of QEMU's MigrationStats that only a record has. Postcopy and zero-copy do not exist here: 0."""
    return {
        "page-size": ram.page_size,
        "multifd-bytes": ram.transferred_bytes,
        "pages-per-second": int(ram.pages_per_second),
        "precopy-bytes": ram.precopy_bytes,
        "downtime-bytes": ram.downtime_bytes,
        "postcopy-requests": 0,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }


def _ms(duration_ns: int) -> int:
    return round(duration_ns / 1_000_000)


def _mbps(bytes_per_s: float) -> float:
    return round(bytes_per_s * 8 / 1e6, 3)
