"""migratectl against a control socket: what it prints, where, and its exit status."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from migrated.cli.migratectl import main
from migrated.cli.options import parameter_options
from migrated.control.operations import OperationError

URI = "tcp:127.0.0.1:4460"
MIGRATECTL = Path(sys.executable).parent / "migratectl"
COMPLETED: dict[str, Any] = {"outcome": "completed"}


@pytest.fixture
def ctl(served: Any) -> Callable[..., Result]:
    def run(*arguments: str, text: str | None = None, **environment: str) -> Result:
        return CliRunner(env={"MIGRATED_SOCKET": str(served.socket)} | environment).invoke(main, arguments, input=text)

    return run


def document(result: Result) -> Any:
    """The one JSON document on standard output."""
    assert len(result.stdout.splitlines()) == 1, result.output
    return json.loads(result.stdout)


def test_a_guest_from_creation_to_its_end(served: Any, ctl: Callable[..., Result], tmp_path: Path) -> None:
    options = ["--workload", "hot-cold", "--dirty-rate", "50MiB/s", "--seed", "7", "--paused", "--option", "a=b=c"]
    profile = os.path.relpath(tmp_path / "x.toml")
    result = ctl("--json", "guest", "create", "g2", "--memory", "256MiB", "--profile", profile, *options)
    assert document(result)["state"] == "paused"
    (spec,) = served.memory.specs
    assert (spec.memory_bytes, spec.dirty_rate_bytes_per_s, spec.seed) == (256 << 20, 50 << 20, 7)
    assert (spec.profile, spec.options) == (str(tmp_path / "x.toml"), {"a": "b=c"})
    assert ctl("guest", "resume", "g2").stdout == "Guest g2 is running.\n"
    assert ctl("guest", "pause", "g2").exit_code == 0
    assert document(ctl("guest", "show", "g2", "--json"))["state"] == "paused"
    assert [guest["name"] for guest in document(ctl("guest", "list", "--json"))] == ["g1", "g2"]
    assert "256MiB" in ctl("guest", "list").stdout
    assert ctl("guest", "destroy", "g2").exit_code == 0
    gone = ctl("guest", "show", "g2", "--json")
    assert gone.exit_code == 1
    assert document(gone) == {"error": "DeviceNotFound", "message": "There is no guest 'g2' on this host."}
    assert gone.stderr == "There is no guest 'g2' on this host.\n"


def test_verify_tells_damage_by_its_exit_status(served: Any, ctl: Callable[..., Result]) -> None:
    assert ctl("guest", "verify", "g1").exit_code == 0
    served.do(lambda: served.memory.add_guest("g1", state="retired"))
    damaged = ctl("--json", "guest", "verify", "g1")
    assert (damaged.exit_code, document(damaged)["bad_pages"]) == (1, 3)
    assert damaged.stderr == "Guest g1 is damaged: page 7 is stale\n"


def test_migrate_waits_and_prints_the_record(served: Any, ctl: Callable[..., Result]) -> None:
    served.memory.ending = COMPLETED
    options = ["--downtime-limit", "100ms", "--no-switchover-abort", "--max-bandwidth", "1MiB/s", "--timeout", "9s"]
    options += ["--on-timeout", "force", "--channels", "3", "--digest", "off"]
    result = ctl("--json", "migrate", "g1", URI, *options)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert document(result)["outcome"] == "completed"
    overrides = {
        "downtime_limit_ms": 100,
        "switchover_abort": False,
        "max_bandwidth_bytes_per_s": 1 << 20,
        "timeout_s": 9,
        "on_timeout": "force",
        "channels": 3,
        "digest": False,
    }
    assert served.memory.started == [("g1", URI, overrides)]


def test_migrate_for_a_person_shows_progress_and_the_breakdown(served: Any, ctl: Callable[..., Result]) -> None:
    served.memory.ending = COMPLETED
    result = ctl("migrate", "g1", URI)
    assert result.exit_code == 0
    assert "g1: completed after 960ms, downtime 66ms (limit 300ms" in result.stdout
    for word in ("last-pages-leg", "unattributed", "nvme0", "Rounds"):
        assert word in result.stdout
    assert "g1 " in result.stderr
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("outcome", "status"), [("aborted", 1), ("refused", 1), ("cancelled", 1), ("failed", 1), ("in-doubt", 4)]
)
@pytest.mark.parametrize("as_json", [True, False])
def test_what_did_not_complete_has_its_exit_status_and_reason(
    served: Any, ctl: Callable[..., Result], outcome: str, status: int, as_json: bool
) -> None:
    served.memory.ending = {"outcome": outcome, "reason": "The peer is on \x1b[31mfire."}
    result = ctl(*(["--json"] if as_json else []), "migrate", "g1", URI)
    assert result.exit_code == status
    assert result.stderr.endswith(f"{outcome}: The peer is on �[31mfire.\n")
    assert "\x1b" not in result.output
    if as_json:
        assert document(result)["outcome"] == outcome


def test_no_wait_prints_the_migration_id(served: Any, ctl: Callable[..., Result]) -> None:
    assert document(ctl("--json", "migrate", "g1", URI, "--no-wait")) == {"migration_id": "m-0001"}
    assert ctl("migrate", "g1", URI, "--no-wait").stdout == "m-0002\n"


def test_a_refusal_with_a_record_prints_the_record(
    served: Any, ctl: Callable[..., Result], record_of: Callable[..., Any]
) -> None:
    record = record_of(outcome="refused", reason="No.", downtime=None).document()
    served.memory.refusal = OperationError("No.", record=record)
    result = ctl("--json", "migrate", "g1", URI)
    assert (result.exit_code, document(result), result.stderr) == (1, record, "No.\n")


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
    served: Any, ctl: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = ctl(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert served.memory.started == []
    assert served.memory.own_parameters == {}
    assert served.memory.resolved == []


def test_a_uri_that_cannot_be_used_is_a_failed_operation(ctl: Callable[..., Result]) -> None:
    result = ctl("migrate", "g1", "unix:/x")
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


def test_set_changes_a_guests_parameters_by_either_name(served: Any, ctl: Callable[..., Result]) -> None:
    told = document(ctl("--json", "set", "g1", "downtime-limit=0.2s", "multifd-channels=4", "switchover-abort=off"))
    assert served.memory.own_parameters["g1"] == {"downtime_limit_ms": 200, "channels": 4, "switchover_abort": False}
    assert (told["downtime-limit"], told["multifd-channels"]) == (200, 4)
    assert ctl("set", "nobody", "channels=1").exit_code == 1


def test_continue_needs_a_migration_that_waits(served: Any, ctl: Callable[..., Result]) -> None:
    ctl("migrate", "g1", URI, "--no-wait")
    wrong = ctl("continue", "g1")
    assert (wrong.exit_code, wrong.stderr) == (1, "Migration not in expected state: active\n")
    served.do(lambda: served.memory.move("m-0001", status="pre-switchover"))
    assert ctl("continue", "g1").exit_code == 0
    assert served.memory.continued == ["g1"]


def test_cancel_waits_for_the_end_and_tells_it(served: Any, ctl: Callable[..., Result]) -> None:
    assert document(ctl("--json", "cancel", "g1")) == {}
    ctl("migrate", "g1", URI, "--no-wait")
    assert ctl("cancel", "g1").stdout == "The migration of g1 is cancelled: Cancelled by the operator.\n"
    assert "No migration of g1" in ctl("cancel", "g1").stdout


def test_status_shows_guests_and_migrations(served: Any, ctl: Callable[..., Result]) -> None:
    ctl("migrate", "g1", URI, "--no-wait")
    for arguments in (("status",), ("status", "g1")):
        found = document(ctl("--json", *arguments))
        assert [guest["name"] for guest in found["guests"]] == ["g1"]
        assert [progress["migration_id"] for progress in found["migrations"]] == ["m-0001"]
        assert "not yet: predicted 412ms, bound 455ms, limit 300ms" in ctl(*arguments).stdout


def test_watch_follows_until_all_have_ended(served: Any, ctl: Callable[..., Result]) -> None:
    """Off a terminal: a line for each change, and the end when nothing runs any more."""
    ctl("migrate", "g1", URI, "--no-wait")
    asked = 0
    original = served.memory.progress

    def progress(guest: str | None) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            served.memory.end("m-0001", outcome="completed")
        return original(guest)

    served.memory.progress = progress
    result = ctl("watch")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("g1 active, round 3,")
    assert lines[1:] == ["g1: completed after 960ms, downtime 66ms (limit 300ms, predicted 60ms, bound 75ms)"]


def test_events_one_per_line(served: Any, ctl: Callable[..., Result]) -> None:
    """Events are published until the listener has had its two."""
    command = [MIGRATECTL, "--socket", served.socket, "--json", "events", "--count", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listening:
        for number in itertools.count():
            if listening.poll() is not None:
                break
            served.do(partial(served.memory.events.publish, "MIGRATION_PASS", {"pass": number}))
            ctl("guest", "list")
        output, _ = listening.communicate(timeout=60)
    assert listening.returncode == 0
    first, second = (json.loads(line)["data"]["pass"] for line in output.splitlines())
    assert second == first + 1


def test_history_as_table_json_csv_and_stats(
    served: Any, ctl: Callable[..., Result], record_of: Callable[..., Any]
) -> None:
    store = served.memory.store
    store.add(record_of(migration_id="m1", started_at="2026-03-01T10:00:00+00:00"), "source")
    store.add(record_of(migration_id="m2", guest="g2", outcome="refused", reason='No, "no".', downtime=None), "source")
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


def test_show_has_every_section(served: Any, ctl: Callable[..., Result], record_of: Callable[..., Any]) -> None:
    served.memory.store.add(record_of(), "source")
    assert document(ctl("--json", "show", "m-0001")) == record_of().document()
    shown = ctl("show", "m-").stdout
    for section in ("Downtime", "Devices", "Rounds", "Memory", "Checkpoints", "Phases", "Guest time", "Parameters"):
        assert section in shown
    unknown = ctl("--json", "show", "zz")
    assert (unknown.exit_code, document(unknown)["error"]) == (1, "DeviceNotFound")


def test_report_writes_one_file(
    served: Any, ctl: Callable[..., Result], record_of: Callable[..., Any], tmp_path: Path
) -> None:
    served.memory.store.add(record_of(), "source")
    file = tmp_path / "report.html"
    assert document(ctl("--json", "report", "m-", "-o", str(file))) == {"migration_id": "m-0001", "file": str(file)}
    assert "m-0001" in file.read_text()
    nowhere = ctl("report", "m-0001", "-o", str(tmp_path / "none" / "report.html"))
    assert nowhere.exit_code == 1
    assert "cannot be written" in nowhere.stderr


def test_resolve_warns_of_what_it_risks(served: Any, ctl: Callable[..., Result], record_of: Callable[..., Any]) -> None:
    served.memory.store.add(record_of(outcome="in-doubt"), "source")
    warned = ctl("resolve", "m-0001", "--run-here")
    assert warned.exit_code == 2, "without a terminal there is nobody to ask"
    assert "two copies of it will run" in warned.stderr
    assert "destroys the last copy" in ctl("resolve", "m-0001", "--discard").stderr
    assert served.memory.resolved == []
    assert ctl("resolve", "m-0001", "--run-here", "--yes").exit_code == 0
    assert ctl("resolve", "m-0001", "--discard", "--yes").exit_code == 0
    assert served.memory.resolved == [("m-0001", True), ("m-0001", False)]


def test_estimate_and_metrics(ctl: Callable[..., Result]) -> None:
    assert document(ctl("--json", "estimate", "g1", URI, "--downtime-limit", "300ms"))["fits"] is False
    shown = ctl("estimate", "g1", URI).stdout
    assert "Does not fit: downtime 412ms, bound 455ms, limit 300ms" in shown
    assert "Device loads alone take 310ms." in shown
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
    served: Any, ctl: Callable[..., Result], record_of: Callable[..., Any]
) -> None:
    served.memory.store.add(record_of(), "source")

    def complete(words: str, socket: Path = served.socket) -> str:
        count = str(len(words.split(" ")) - 1)
        environment = {"_MIGRATECTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
        return CliRunner(env=environment | {"MIGRATED_SOCKET": str(socket)}).invoke(main, prog_name="migratectl").stdout

    assert complete("migratectl migrate g") == "plain,g1\n"
    assert complete("migratectl show m") == "plain,m-0001\n"
    assert "plain,--downtime-limit" in complete("migratectl migrate g1 --down")
    assert complete("migratectl migrate g", Path("/nowhere")).strip() == ""


def test_a_live_view_on_a_terminal(served: Any) -> None:
    """On a pseudo-terminal the migration is drawn; standard output stays the result alone; NO_COLOR has no colours."""
    served.memory.ending = COMPLETED
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [MIGRATECTL, "--socket", served.socket, "migrate", "g1", URI],
            stdout=subprocess.PIPE,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100", "LINES": "40"},
            timeout=60,
            check=False,
        )
        drawn = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert done.returncode == 0, drawn
    assert "╭" in drawn
    assert "g1 -> 127.0.0.1:4460" in drawn
    assert "\x1b[3" not in drawn
    assert done.stdout.decode().startswith("g1: completed")


def test_every_parameter_is_an_option_with_the_contracts_names() -> None:
    assert {"downtime-limit", "switchover-limit", "switchover-abort", "channels", "max-bandwidth", "timeout"} < set(
        parameter_options()
    )
    text = CliRunner().invoke(main, ["migrate", "--help"]).stdout
    for name in (*parameter_options(), "no-switchover-abort", "no-wait"):
        assert f"--{name}" in text
