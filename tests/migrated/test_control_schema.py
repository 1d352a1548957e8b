"""Declared arguments and what they accept; parameters under QEMU's names and units."""

from __future__ import annotations

from typing import Any

import pytest

from migrated.control.commands import COMMANDS
from migrated.control.operations import OperationError
from migrated.control.qemu import capability_document, capability_values, migration_info, recorded_info, uri_of
from migrated.control.schema import (
    PARAMETERS,
    Argument,
    JsonType,
    check_arguments,
    parameter_document,
    parameter_values,
)
from migrated.settings.parameters import MigrationParameters

DECLARED = (
    Argument("name", "string", "", required=True),
    Argument("count", "integer", ""),
    Argument("share", "number", ""),
    Argument("deep", "boolean", ""),
    Argument("mode", "string", "", values=("abort", "force")),
)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "x", "nmae": 1}, "Parameter 'nmae' is unexpected"),
        ({}, "Parameter 'name' is missing"),
        ({"name": 1}, "Invalid parameter type for 'name', expected: string"),
        ({"name": None}, "Invalid parameter type for 'name', expected: string"),
        ({"name": "x", "count": 1.5}, "Invalid parameter type for 'count', expected: integer"),
        ({"name": "x", "count": True}, "Invalid parameter type for 'count', expected: integer"),
        ({"name": "x", "count": 1 << 64}, "Invalid parameter type for 'count', expected: integer"),
        ({"name": "x", "share": False}, "Invalid parameter type for 'share', expected: number"),
        ({"name": "x", "deep": 1}, "Invalid parameter type for 'deep', expected: boolean"),
        ({"name": "x", "mode": "maybe"}, "Parameter 'mode' does not accept value 'maybe'; it accepts abort, force"),
    ],
)
def test_a_wrong_argument_gets_qemus_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OperationError) as caught:
        check_arguments(arguments, DECLARED)
    assert str(caught.value) == sentence
    assert caught.value.kind == "GenericError"


def test_right_arguments_pass() -> None:
    check_arguments({"name": "x", "count": 3, "share": 2, "deep": True, "mode": "force"}, DECLARED)


def test_every_field_of_the_model_is_a_parameter_once() -> None:
    assert sorted(p.field for p in PARAMETERS.values()) == sorted(MigrationParameters.model_fields)


@pytest.mark.parametrize(
    ("qemu", "field"),
    [
        ("downtime-limit", "downtime_limit_ms"),
        ("switchover-limit", "switchover_limit_ms"),
        ("max-bandwidth", "max_bandwidth_bytes_per_s"),
        ("multifd-channels", "channels"),
    ],
)
def test_qemus_parameters_keep_qemus_names(qemu: str, field: str) -> None:
    assert PARAMETERS[qemu].field == field


def test_parameters_are_told_with_whole_numbers_as_integers() -> None:
    told = parameter_document(MigrationParameters(downtime_limit_ms=250, switchover_limit_ms=0.5))
    assert (told["downtime-limit"], type(told["downtime-limit"])) == (250, int)
    assert told["switchover-limit"] == 0.5


def test_values_are_checked_whole_and_named_in_the_sentence() -> None:
    current = MigrationParameters()
    assert parameter_values({"guest": "g1", "downtime-limit": 100, "digest": False}, current) == {
        "downtime_limit_ms": 100.0,
        "digest": False,
    }
    with pytest.raises(OperationError, match=r"'downtime-limit' expects a number in the range of 0 to 2000000, not -1"):
        parameter_values({"multifd-channels": 4, "downtime-limit": -1}, current)


def test_capabilities_are_the_truth_values_behind_them() -> None:
    on = [{"capability": "switchover-abort", "state": False}, {"capability": "events", "state": True}]
    assert capability_values(on) == {"switchover_abort": False}
    told = {c["capability"]: c["state"] for c in capability_document(MigrationParameters(switchover_abort=False))}
    assert told["switchover-abort"] is False
    assert told["events"] is True
    assert "xor-delta" in told


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"capability": "postcopy-ram", "state": True}, "does not accept value 'postcopy-ram'"),
        ({"capability": "events", "state": False}, "'events' cannot be switched off"),
        ({"capability": "events", "state": "on"}, "Invalid parameter type for 'state'"),
        ({"capability": "events"}, "expects objects with"),
        ("events", "expects objects with"),
    ],
)
def test_a_wrong_capability_is_refused(item: object, sentence: str) -> None:
    with pytest.raises(OperationError, match=sentence):
        capability_values([item])


def test_qemus_channels_form_is_the_uri() -> None:
    address = {"transport": "socket", "type": "inet", "host": "10.0.0.9", "port": "1050"}
    channels = [{"channel-type": "main", "addr": address}]
    assert uri_of({"channels": channels}) == "tcp:10.0.0.9:1050"
    assert uri_of({"channels": [{"channel-type": "main", "addr": address | {"host": "::1"}}]}) == "tcp:[::1]:1050"
    with pytest.raises(OperationError, match="expects one channel"):
        uri_of({"channels": [{"channel-type": "main", "addr": address | {"port": 1050}}]})
    for arguments in ({}, {"uri": "tcp:a:1", "channels": channels}):
        with pytest.raises(OperationError, match="need either 'uri' or 'channels' argument"):
            uri_of(arguments)


RAM_MEMBERS: dict[str, JsonType] = {
    "transferred": "integer",
    "remaining": "integer",
    "total": "integer",
    "duplicate": "integer",
    "normal": "integer",
    "normal-bytes": "integer",
    "dirty-pages-rate": "integer",
    "mbps": "number",
    "dirty-sync-count": "integer",
    "postcopy-requests": "integer",
    "page-size": "integer",
    "multifd-bytes": "integer",
    "pages-per-second": "integer",
    "precopy-bytes": "integer",
    "downtime-bytes": "integer",
    "postcopy-bytes": "integer",
    "dirty-sync-missed-zero-copy": "integer",
}
"""MigrationStats of QEMU 11.1."""


def test_migration_info_has_qemus_members_in_qemus_units(progress_of: Any, record_of: Any) -> None:
    running = migration_info(progress_of(), None)
    assert (running["status"], running["total-time"], running["setup-time"]) == ("active", 700, 20)
    assert (running["expected-downtime"], running["remaining"]) == (412, 12 << 20)
    assert "downtime" not in running
    ended = migration_info(progress_of(status="completed", downtime_ns=66_400_000, remaining_bytes=0), record_of())
    assert ended["downtime"] == 66
    assert "remaining" not in ended
    assert "expected-downtime" not in ended
    assert ended["ram"]["downtime-bytes"] == 10 << 20
    remembered = recorded_info(record_of(outcome="aborted", reason="Too late."))
    assert (remembered["status"], remembered["error-desc"], remembered["downtime"]) == ("failed", "Too late.", 66)
    for info in (running, ended, remembered):
        check_arguments(info["ram"], [Argument(name, kind, "", required=True) for name, kind in RAM_MEMBERS.items()])


def test_every_command_says_what_it_does_and_returns() -> None:
    for command in COMMANDS.values():
        assert command.doc.endswith(".")
        assert command.returns
        names = [argument.name for argument in command.arguments]
        assert len(set(names)) == len(names)
        assert all(argument.doc for argument in command.arguments)
