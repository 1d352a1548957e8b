"""migratectl against a control socket: what it prints, where, and its exit status. The module is longer than others
because every command has its tests here, as every command stands in one module."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from migrated.cli.migratectl import main
from migrated.cli.options import parameter_options
from migrated.cli.session import exit_status
from migrated.link.sockets import Connection, send_first
from migrated.settings.parameters import MigrationParameters
from protocol import messages
from protocol.errors import ErrorCode
from protocol.messages import Message
from scripts.rig.ports import free_port
from tests.tiny_vmm.hosts import TinyHost, TinyHosts, damage, need_write_tracking

URI = "tcp:127.0.0.1:4460"
MIGRATECTL = Path(sys.executable).parent / "migratectl"


@pytest.fixture
def ctl(served: TinyHosts) -> Callable[..., Result]:
    def run(*arguments: str, text: str | None = None, **environment: str) -> Result:
        return CliRunner(env={"MIGRATED_SOCKET": str(served.socket)} | environment).invoke(main, arguments, input=text)

    return run


@pytest.fixture
def destination(served: TinyHosts) -> TinyHost:
    """A second host, to which g1 can be moved."""
    need_write_tracking()
    return served.host("b")


@pytest.fixture
def in_doubt(served: TinyHosts) -> str:
    """The id of a migration of g1 that is in doubt: COMMIT was journaled, and nobody answers where it went."""
    return served.doubt("g1")


def document(result: Result) -> Any:
    """The one JSON document on standard output."""
    assert len(result.stdout.splitlines()) == 1, result.output
    return json.loads(result.stdout)


def test_a_guest_from_creation_to_its_end(served: TinyHosts, ctl: Callable[..., Result]) -> None:
    result = ctl("--json", "guest", "create", "g2", "--memory", "2MiB", "--paused")
    assert (document(result)["state"], document(result)["memory_bytes"]) == ("paused", 2 << 20)
    assert ctl("guest", "resume", "g2").stdout == "Guest g2 is running.\n"
    assert ctl("guest", "pause", "g2").exit_code == 0
    assert document(ctl("guest", "show", "g2", "--json"))["state"] == "paused"
    assert [guest["name"] for guest in document(ctl("guest", "list", "--json"))] == ["g1", "g2"]
    assert "2MiB" in ctl("guest", "list").stdout
    assert ctl("guest", "destroy", "g2").exit_code == 0
    gone = ctl("guest", "show", "g2", "--json")
    assert gone.exit_code == 1
    told = "there is no guest 'g2' on this host; guests here: g1"
    assert document(gone) == {"error": "DeviceNotFound", "message": told}
    assert gone.stderr == told + "\n"


def test_what_a_guest_is_created_from_reaches_its_driver(
    served: TinyHosts, ctl: Callable[..., Result], tmp_path: Path
) -> None:
    """The tiny driver takes no options and names those that it was given."""
    profile = tmp_path / "x.toml"
    options = ["--workload", "hot-cold", "--dirty-rate", "50MiB/s", "--seed", "7", "--option", "a=b=c"]
    refused = ctl("guest", "create", "g2", "--memory", "2MiB", "--profile", os.path.relpath(profile), *options)
    given = {"a": "b=c", "dirty-rate": 50 << 20, "profile": str(profile), "seed": 7, "workload": "hot-cold"}
    assert (refused.exit_code, refused.stderr) == (1, f"a tiny guest has no options, and was given {given}\n")


def test_qemu_guests_come_from_definitions_of_the_daemons_host_or_are_adopted(
    served: TinyHosts, ctl: Callable[..., Result], tmp_path: Path
) -> None:
    undefined = ctl("guest", "create", "web", "--definition", "web.toml")
    assert undefined.exit_code == 1
    assert undefined.stderr.startswith("this host has no definition of a QEMU guest 'web'")
    nobody = tmp_path / "qmp"
    adopted = ctl("guest", "adopt", "db", "--qmp", os.path.relpath(nobody), "--incoming")
    assert adopted.exit_code == 1
    assert adopted.stderr.startswith("no QEMU listens on ")
    assert [guest["name"] for guest in document(ctl("guest", "list", "--json"))] == ["g1"]
    unchecked = ctl("guest", "check", "g1")
    assert (unchecked.exit_code, unchecked.stdout) == (1, "")
    assert "has no operation 'check'" in unchecked.stderr


def test_verify_tells_damage_by_its_exit_status(served: TinyHosts, ctl: Callable[..., Result]) -> None:
    assert ctl("guest", "verify", "g1").exit_code == 0
    damage(document(ctl("--json", "guest", "show", "g1")))
    damaged = ctl("--json", "guest", "verify", "g1")
    assert (damaged.exit_code, document(damaged)["wrong_pages"]) == (1, [0])
    assert damaged.stderr == "Guest g1 is damaged: pages [0] are not as step 0 leaves them\n"


def test_migrate_waits_and_prints_the_record(
    served: TinyHosts, destination: TinyHost, ctl: Callable[..., Result]
) -> None:
    options = ["--downtime-limit", "20s", "--no-switchover-abort", "--max-bandwidth", "1GiB/s", "--timeout", "9s"]
    options += ["--on-timeout", "force", "--channels", "3", "--digest", "off"]
    result = ctl("--json", "migrate", "g1", destination.uri, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    record = document(result)
    assert record["outcome"] == "completed"
    wanted = {
        "downtime_limit_ms": 20_000,
        "switchover_abort": False,
        "max_bandwidth_bytes_per_s": 1 << 30,
        "timeout_s": 9,
        "on_timeout": "force",
        "channels": 3,
        "digest": False,
    }
    assert {name: record["parameters"][name] for name in wanted} == wanted
    assert [guest["name"] for guest in served.do(destination.operations.guest_list())] == ["g1"]


def test_migrate_for_a_person_shows_progress_and_the_breakdown(
    destination: TinyHost, ctl: Callable[..., Result]
) -> None:
    result = ctl("migrate", "g1", destination.uri, "--downtime-limit", "20s")
    assert result.exit_code == 0
    assert re.search(r"g1: completed after [0-9.]+m?s, downtime [0-9.]+m?s \(limit 20s, ", result.stdout)
    for word in ("last-pages-leg", "unattributed", "everything", "Rounds"):
        assert word in result.stdout
    assert "g1 " in result.stderr
    assert "\x1b" not in result.output


@pytest.mark.parametrize("as_json", [True, False])
def test_a_refusal_has_its_exit_status_and_no_control_sequences(
    served: TinyHosts, ctl: Callable[..., Result], as_json: bool
) -> None:
    """A destination that says what it likes."""

    async def refuse(first: Message, connection: Connection) -> None:
        assert isinstance(first, messages.Hello)
        await send_first(connection, messages.Refuse(code=int(ErrorCode.BUSY), reason="We are on \x1b[31mfire."))
        connection.wire.close()

    uri = served.listen(refuse)
    result = ctl(*(["--json"] if as_json else []), "migrate", "g1", uri)
    assert result.exit_code == 1
    assert result.stderr.endswith("refused: the destination refused: We are on �[31mfire.\n")
    assert "\x1b" not in result.output
    if as_json:
        assert document(result)["outcome"] == "refused"


def test_an_attempt_that_fails_has_its_exit_status_and_reason(ctl: Callable[..., Result]) -> None:
    result = ctl("--json", "migrate", "g1", f"tcp:127.0.0.1:{free_port()}")
    assert (result.exit_code, document(result)["outcome"]) == (1, "failed")
    assert "is `migrated destination` listening there?" in result.stderr


@pytest.mark.parametrize(
    ("outcome", "status"), [("aborted", 1), ("refused", 1), ("cancelled", 1), ("failed", 1), ("in-doubt", 4)]
)
def test_every_outcome_but_completed_has_an_exit_status(
    outcome: str, status: int, record_of: Callable[..., Any]
) -> None:
    assert exit_status(record_of(outcome=outcome)) == status


def test_no_wait_prints_the_migration_id(served: TinyHosts, silent_uri: str, ctl: Callable[..., Result]) -> None:
    begun = document(ctl("--json", "migrate", "g1", silent_uri, "--no-wait"))
    (progress,) = served.a.operations.progress("g1")
    assert begun == {"migration_id": progress.migration_id}
    ctl("cancel", "g1")
    told = ctl("migrate", "g1", silent_uri, "--no-wait").stdout
    (progress,) = served.a.operations.progress("g1")
    assert told == progress.migration_id + "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("migrate", "g1", URI, "--downtime-limit", "300"),
        ("migrate", "g1", URI, "--downtime-limit", "9999s"),
        ("migrate", "g1", URI, "--channels", "99"),
        ("migrate", "g1", URI, "--max-bandwidth", "fast"),
        ("migrate", "g1", URI, "--digest", "maybe"),
        ("migrate", "g1", URI, "--on-timeout", "pray"),
        ("migrate", "g1"),
        ("guest", "create", "g2"),
        ("guest", "create", "g2", "--memory", "much"),
        ("guest", "create", "g2", "--memory", "1GiB", "--option", "x"),
        ("set", "g1"),
        ("set", "g1", "downtime-limit"),
        ("set", "g1", "downtme-limit=5ms"),
        ("set", "g1", "downtime-limit=5"),
        ("resolve", "m-0001"),
        ("resolve", "m-0001", "--discard"),
        ("resolve", "m-0001", "--discard", "--run-here", "--yes"),
        ("history", "--csv", "--stats"),
        ("history", "--outcome", "great"),
        ("fly",),
    ],
)
def test_wrong_usage_is_2_and_changes_nothing(
    served: TinyHosts, ctl: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = ctl(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert served.a.operations.progress(None) == []
    assert served.a.operations.parameters("g1") == MigrationParameters()
    assert served.a.operations.guest_names() == ["g1"]


def test_a_uri_that_cannot_be_used_is_a_failed_operation(ctl: Callable[..., Result]) -> None:
    result = ctl("migrate", "g1", "exec:/x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tcp:HOST:PORT" in result.stderr


def test_no_daemon_is_3(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    options = ("--socket", str(path), "--json")
    for arguments in ((*options, "guest", "list"), ("guest", "list", *options)):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 3
        assert document(result)["error"] == "DaemonUnreachable"
        assert str(path) in result.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("set", "g1", "channels=99"), "channels must be from 1 to 16, not 99."),
        (("set", "g1", "downtime-limit=2001s"), "downtime-limit must be from 0ns to 2000s, not 2001s."),
        (("migrate", "g1", "tcp:b:1", "--channels", "0"), "--channels must be from 1 to 16, not 0."),
        (("migrate", "g1", "tcp:b:1", "--max-bandwidth", "2TiB/s"), "must be from 0B/s to 1TiB/s, not 2TiB/s."),
        (("migrate", "g1", "tcp:b:1", "--prediction-coverage-pct", "nan"), "must be from 50 to 99.9, not nan."),
    ],
)
def test_a_value_out_of_range_is_told_as_it_was_written(
    ctl: Callable[..., Result], command: tuple[str, ...], told: str
) -> None:
    result = ctl(*command)
    assert result.exit_code == 2
    assert result.stderr.rstrip().endswith(told)


def test_set_changes_a_guests_parameters_by_either_name(served: TinyHosts, ctl: Callable[..., Result]) -> None:
    told = document(ctl("--json", "set", "g1", "downtime-limit=0.2s", "multifd-channels=4", "switchover-abort=off"))
    changed = MigrationParameters(downtime_limit_ms=200, channels=4, switchover_abort=False)
    assert served.a.operations.parameters("g1") == changed
    assert (told["downtime-limit"], told["multifd-channels"]) == (200, 4)
    assert ctl("set", "nobody", "channels=1").exit_code == 1


def test_continue_needs_a_migration_that_waits(
    served: TinyHosts, destination: TinyHost, silent_uri: str, ctl: Callable[..., Result]
) -> None:
    ctl("migrate", "g1", silent_uri, "--no-wait")
    wrong = ctl("continue", "g1")
    assert (wrong.exit_code, wrong.stderr) == (1, "Migration not in expected state: setup\n")
    ctl("cancel", "g1")
    options = ("--downtime-limit", "20s", "--pause-before-switchover", "on", "--no-wait")
    begun = ctl("migrate", "g1", destination.uri, *options)
    assert begun.exit_code == 0, begun.stderr
    served.do(served.a.until_status("g1", "pre-switchover"))
    assert ctl("continue", "g1").exit_code == 0
    served.do(served.a.until_status("g1", "completed"))


def test_cancel_waits_for_the_end_and_tells_it(silent_uri: str, ctl: Callable[..., Result]) -> None:
    assert document(ctl("--json", "cancel", "g1")) == {}
    ctl("migrate", "g1", silent_uri, "--no-wait")
    assert ctl("cancel", "g1").stdout == "The migration of g1 is cancelled: cancelled by the operator\n"
    assert "No migration of g1" in ctl("cancel", "g1").stdout


def test_status_shows_guests_and_migrations(silent_uri: str, ctl: Callable[..., Result]) -> None:
    begun = document(ctl("--json", "migrate", "g1", silent_uri, "--no-wait"))
    for arguments in (("status",), ("status", "g1")):
        found = document(ctl("--json", *arguments))
        assert [guest["name"] for guest in found["guests"]] == ["g1"]
        assert [progress["migration_id"] for progress in found["migrations"]] == [begun["migration_id"]]
        assert "negotiating" in ctl(*arguments).stdout


def test_watch_follows_until_all_have_ended(served: TinyHosts, silent_uri: str, ctl: Callable[..., Result]) -> None:
    """Off a terminal: a line for each change, and the end when nothing runs any more."""
    ctl("migrate", "g1", silent_uri, "--no-wait")
    command = [str(MIGRATECTL), "--socket", str(served.socket), "watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("g1 setup, round 0,")
        ctl("cancel", "g1")
        rest = watching.stdout.read().splitlines()
    assert watching.returncode == 0
    assert re.fullmatch(r"g1: cancelled after [0-9.]+m?s: cancelled by the operator", rest[-1])


def test_events_one_per_line(served: TinyHosts, ctl: Callable[..., Result]) -> None:
    """Events are published until the listener has had its two."""

    async def publish(number: int) -> None:
        served.a.operations.events.publish("MIGRATION_PASS", {"pass": number})

    command = [str(MIGRATECTL), "--socket", str(served.socket), "--json", "events", "--count", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listening:
        for number in itertools.count():
            if listening.poll() is not None:
                break
            served.do(publish(number))
            ctl("guest", "list")
        output, _ = listening.communicate(timeout=60)
    assert listening.returncode == 0
    first, second = (json.loads(line)["data"]["pass"] for line in output.splitlines())
    assert second == first + 1


def test_history_as_table_json_csv_and_stats(
    served: TinyHosts, ctl: Callable[..., Result], record_of: Callable[..., Any]
) -> None:
    served.a.remember(record_of(migration_id="m1", started_at="2026-03-01T10:00:00+00:00"))
    served.a.remember(record_of(migration_id="m2", guest="g2", outcome="refused", reason='No, "no".', downtime=None))
    assert [record["migration_id"] for record in document(ctl("--json", "history"))] == ["m2", "m1"]
    assert [record["migration_id"] for record in document(ctl("--json", "history", "--guest", "g1"))] == ["m1"]
    assert document(ctl("--json", "history", "--since", "2026-03-02")) == []
    assert len(document(ctl("--json", "history", "--since", "2026-02-02", "--last", "1"))) == 1
    table = ctl("history").stdout
    assert "m1" in table
    assert "refused" in table
    rows = list(csv.DictReader(io.StringIO(ctl("history", "--csv").stdout)))
    assert [(row["migration_id"], row["downtime_measured_ns"], row["reason"]) for row in rows] == [
        ("m2", "", 'No, "no".'),
        ("m1", "66000000", ""),
    ]
    assert document(ctl("--json", "history", "--stats"))["outcomes"] == {"completed": 1, "refused": 1}
    assert "66ms" in ctl("history", "--stats").stdout
    assert ctl("history", "--guest", "nobody").stdout == "No migration is in the history.\n"


def test_show_has_every_section(served: TinyHosts, ctl: Callable[..., Result], record_of: Callable[..., Any]) -> None:
    served.a.remember(record_of())
    assert document(ctl("--json", "show", "m-0001")) == record_of().document()
    shown = ctl("show", "m-").stdout
    for section in ("Downtime", "Devices", "Rounds", "Memory", "Checkpoints", "Phases", "Guest time", "Parameters"):
        assert section in shown
    unknown = ctl("--json", "show", "zz")
    assert (unknown.exit_code, document(unknown)["error"]) == (1, "DeviceNotFound")


def test_report_writes_one_file(
    served: TinyHosts, ctl: Callable[..., Result], record_of: Callable[..., Any], tmp_path: Path
) -> None:
    served.a.remember(record_of())
    file = tmp_path / "report.html"
    assert document(ctl("--json", "report", "m-", "-o", str(file))) == {"migration_id": "m-0001", "file": str(file)}
    assert "m-0001" in file.read_text()
    nowhere = ctl("report", "m-0001", "-o", str(tmp_path / "none" / "report.html"))
    assert nowhere.exit_code == 1
    assert "cannot be written" in nowhere.stderr


def test_resolve_warns_of_what_it_risks(served: TinyHosts, ctl: Callable[..., Result], in_doubt: str) -> None:
    warned = ctl("resolve", in_doubt, "--run-here")
    assert warned.exit_code == 2, "without a terminal there is nobody to ask"
    assert "two copies of it will run" in warned.stderr
    assert "destroys the last copy" in ctl("resolve", in_doubt, "--discard").stderr
    assert served.do(served.a.state_of("g1")) == "in-doubt"
    assert ctl("resolve", in_doubt, "--run-here", "--yes").exit_code == 0
    assert served.do(served.a.state_of("g1")) == "running"
    again = ctl("resolve", in_doubt, "--discard", "--yes")
    assert (again.exit_code, again.stderr) == (1, f"migration {in_doubt} is not in doubt: its outcome is aborted\n")
    assert served.do(served.a.state_of("g1")) == "running"


def test_resolve_discards_the_guest_of_whoever_says_so(
    served: TinyHosts, ctl: Callable[..., Result], in_doubt: str
) -> None:
    assert ctl("resolve", in_doubt[:9], "--discard", "--yes").exit_code == 0
    assert served.a.operations.guest_names() == []


def test_estimate_and_metrics(
    destination: TinyHost, ctl: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    # How fast memory is written does not matter here: the last look, three seconds after the first, is not waited for.
    monkeypatch.setattr("migrated.source.estimate._SAMPLES_S", (0.05, 0.1))
    found = document(ctl("--json", "estimate", "g1", destination.uri, "--downtime-limit", "1ms"))
    assert found["fits"] is False
    assert found["predicted_upper_ns"] > found["limit_ns"] == 1_000_000
    shown = ctl("estimate", "g1", destination.uri, "--downtime-limit", "1ms").stdout
    assert re.search(r"Does not fit: downtime [0-9.]+m?s, bound [0-9.]+m?s, limit 1ms", shown)
    assert "# TYPE migrated_in_doubt gauge" in ctl("metrics").stdout


def test_adjust_time_needs_no_daemon(tmp_path: Path) -> None:
    source = {
        "guest_freq": 1_000_000_000,
        "guest_tsc": 100,
        "hrtime": 2_000,
        "hres_sec": 10,
        "hres_ns": 0,
        "boot_hrtime": 1_000,
    }
    request = {"source": source, "destination": {"hrtime": 50_000, "hres_sec": 10, "hres_ns": 5}, "elapsed_ns": 500}
    result = CliRunner().invoke(main, ["adjust-time", "--input", "-", "--json"], input=json.dumps(request))
    assert result.exit_code == 0
    assert document(result)["tsc_delta"] == 500
    adjusted = document(result)["adjusted"]
    assert adjusted["hrtime"] - adjusted["boot_hrtime"] == 1_500
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request | {"elapsed_ns": float("nan")}))
    for arguments in (["adjust-time", "--input", str(file), "--json"], ["--json", "adjust-time", "--input", str(file)]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert set(document(result)) == {"error", "message"}
        assert result.stderr == document(result)["message"] + "\n"
    result = CliRunner().invoke(main, ["adjust-time", "--input", "-", "--json"], input="{")
    assert (result.exit_code, document(result)["error"]) == (1, "InvalidTimeData")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_MIGRATECTL_COMPLETE" in result.stdout


def test_completion_knows_guests_migrations_and_parameters(
    served: TinyHosts, ctl: Callable[..., Result], record_of: Callable[..., Any]
) -> None:
    served.a.remember(record_of())

    def complete(words: str, socket: Path = served.socket) -> str:
        count = str(len(words.split(" ")) - 1)
        environment = {"_MIGRATECTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
        return CliRunner(env=environment | {"MIGRATED_SOCKET": str(socket)}).invoke(main, prog_name="migratectl").stdout

    assert complete("migratectl migrate g") == "plain,g1\n"
    assert complete("migratectl show m") == "plain,m-0001\n"
    assert "plain,--downtime-limit" in complete("migratectl migrate g1 --down")
    assert complete("migratectl migrate g", Path("/nowhere")).strip() == ""


def all_that_is_drawn(screen: int) -> str:
    """Read a pseudo-terminal until the last program has left it. Who draws more than it holds waits for the reader."""
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: the last one has left
        while piece := os.read(screen, 1 << 16):
            drawn += piece
    return drawn.decode()


def test_a_live_view_on_a_terminal(served: TinyHosts, destination: TinyHost) -> None:
    """On a pseudo-terminal the migration is drawn; standard output stays the result alone; NO_COLOR has no colours."""
    master, slave = pty.openpty()
    try:
        with subprocess.Popen(
            [MIGRATECTL, "--socket", served.socket, "migrate", "g1", destination.uri, "--downtime-limit", "20s"],
            stdout=subprocess.PIPE,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100", "LINES": "40"},
        ) as process:
            os.close(slave)
            drawn = all_that_is_drawn(master)
            said, _ = process.communicate(timeout=60)
    finally:
        os.close(master)
    assert process.returncode == 0, drawn
    assert "╭" in drawn
    assert f"g1 -> {destination.uri.removeprefix('tcp:')}" in drawn
    assert "\x1b[3" not in drawn
    assert said.decode().startswith("g1: completed")


def test_every_parameter_is_an_option_with_the_contracts_names() -> None:
    assert {"downtime-limit", "switchover-limit", "switchover-abort", "channels", "max-bandwidth", "timeout"} < set(
        parameter_options()
    )
    text = CliRunner().invoke(main, ["migrate", "--help"]).stdout
    for name in (*parameter_options(), "no-switchover-abort", "no-wait"):
        assert f"--{name}" in text
