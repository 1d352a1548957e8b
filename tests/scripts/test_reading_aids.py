"""The two reading aids against the output that Propolis published, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.basics import ROOT

MIGRATION_ID = "0123456789abcdef0123456789abcdef"

# Both tables as printed in the review of Propolis #359.
PHASE_TABLE = """\
PHASE                      TIME ELAPSED (usec)
Sync                                       121
RamPushPrePause                        9402847
RamPushPostPause                        202005
TimeData                                   156
DeviceState                              61375
RamPull                                  57509
ServerState                              64561
Finish                                   55346
TOTAL                                  9843924
"""
TIME_TABLE = """\
GUEST FREQ (Hz)        UPTIME (usec)    TOTAL TIME (usec)
     2649958945            879497608                  148

EVENT           DURATION (usec)            GUEST TSC          BOOT HRTIME
Migration                   107        2330632597459       17148534696948
[adjustment]                                  285087          -9235619709
Propolis                     22        2330632882546       17139299077239
[adjustment]                                   84400                    0
Kernel                       18        2330632966946       17139299077239
"""

# Nanoseconds that give the published rows; they are added before they are divided, so TOTAL is 4 us more
# than the sum of the rows, as it was published.
DURATIONS = {
    "Sync": 121_900,
    "RamPushPrePause": 9_402_847_900,
    "RamPushPostPause": 202_005_900,
    "TimeData": 156_900,
    "DeviceState": 61_375_400,
    "RamPull": 57_509_000,
    "ServerState": 64_561_000,
    "Finish": 55_346_000,
}


def phases(durations: dict[str, int]) -> list[dict[str, Any]]:
    """One phase after the other, the first from 0 on."""
    rows, now = [], 0
    for name, ns in durations.items():
        rows.append({"name": name, "begin_ns": now, "end_ns": now + ns})
        now += ns
    return rows


def record() -> dict[str, Any]:
    """The two published runs as one record, with fields that these scripts do not read."""
    before = {
        "guest_freq": 2649958945,
        "guest_tsc": 2330632597459,
        "hrtime": 18028032305249,
        "hres_sec": 1683850713,
        "hres_ns": 581965192,
        "boot_hrtime": 17148534696948,
    }
    after = {
        "guest_freq": 2649958945,
        "guest_tsc": 2330632882546,
        "hrtime": 18018796793122,
        "hres_sec": 1683850713,
        "hres_ns": 582072774,
        "boot_hrtime": 17139299077239,
    }
    return {
        "migration_id": MIGRATION_ID,
        "outcome": "completed",
        "phases": phases(DURATIONS),
        "ram": {
            "total_bytes": 1 << 30,
            "page_size": 4096,
            "normal_pages": 0,
            "precopy_bytes": 0,
            "downtime_bytes": 0,
            "precopy_pages": 0,
            "downtime_pages": 0,
        },
        "time": {
            "policy": "midpoint",
            "elapsed_lower_ns": 100_000,
            "elapsed_upper_ns": 115_164,
            "elapsed_ns": 107_582,
            "before": before,
            "after": after,
            "guest_uptime_ns": 879497608301,
            "tsc_delta": 285087,
            "boot_hrtime_delta": 879497715883,
            "wall_clock_skew_ns": [-7582, 7582],
            "stages": [
                {"name": "migration", "ns": 107_582, "tsc_delta": 285087, "boot_hrtime_delta": -9235619709},
                {"name": "daemon", "ns": 22_400, "tsc_delta": 0, "boot_hrtime_delta": 0},
                {"name": "vmm", "ns": 18_400, "tsc_delta": 84400, "boot_hrtime_delta": 0},
            ],
        },
    }


def run(script: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def table(script: str, document: dict[str, Any], *arguments: str) -> str:
    done = run(script, "-", *arguments, stdin=json.dumps(document))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_phase_times_are_the_published_table(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record()))
    done = run("live_migration_times", str(file))
    assert (done.stdout, done.stderr, done.returncode) == (PHASE_TABLE, "", 0)


def test_time_adjustments_are_the_published_table(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record()))
    done = run("time_adjustments", str(file))
    assert (done.stdout, done.stderr, done.returncode) == (TIME_TABLE, "", 0)


def test_a_phase_that_took_no_time_is_left_out_and_pause_has_its_place() -> None:
    document = record() | {"phases": phases({"Finish": 1_999, "Pause": 5_000, "Sync": 0, "Setup": 7_000})}
    assert table("live_migration_times", document) == (
        "PHASE                      TIME ELAPSED (usec)\n"
        "Pause                                        5\n"
        "Finish                                       1\n"
        "TOTAL                                        6\n"
    )


def test_memory_rows_follow_when_pages_moved() -> None:
    document = record()
    document["ram"] |= {
        "precopy_pages": 262_144,
        "precopy_bytes": 1 << 30,
        "downtime_pages": 3,
        "downtime_bytes": 12_288,
    }
    assert table("live_migration_times", document) == PHASE_TABLE + (
        "\n"
        "NPAGES XFERED (total)                   262147\n"
        "NBYTES XFERED (total)               1073754112\n"
        "NPAGES XFERED (unpaused)                262144\n"
        "NBYTES XFERED (unpaused)            1073741824\n"
        "KiB/SEC (unpaused)                      111516\n"
        "NPAGES XFERED (paused)                       3\n"
        "NBYTES XFERED (paused)                   12288\n"
        "KiB/SEC (paused)                            59\n"
    )


def test_a_rate_without_bytes_is_left_out() -> None:
    document = record()
    document["ram"] |= {"precopy_pages": 1, "precopy_bytes": 0}
    text = table("live_migration_times", document)
    assert "NPAGES XFERED (unpaused)                     1\n" in text
    assert "KiB/SEC" not in text


def test_a_record_without_page_counts_is_split_by_its_bytes() -> None:
    document = record()
    document["ram"] |= {"normal_pages": 10, "precopy_bytes": 8 * 4096, "downtime_bytes": 2 * 4096}
    del document["ram"]["precopy_pages"], document["ram"]["downtime_pages"]
    text = table("live_migration_times", document)
    assert "NPAGES XFERED (unpaused)                     8\n" in text
    assert "NPAGES XFERED (paused)                       2\n" in text


def test_verbose_prints_every_begin_and_end_and_warns() -> None:
    document = record()
    document["phases"] = [
        {"name": "Sync", "begin_ns": 0, "end_ns": 5_000},
        {"name": "Pause", "begin_ns": 5_000, "end_ns": None},
        {"name": "Finish", "begin_ns": None, "end_ns": 9_000},
    ]
    mark = "{:<12} {:<10} {:>30}".format
    assert table("live_migration_times", document, "--verbose").splitlines() == [
        mark("PHASE", "", "TIMESTAMP"),
        mark("Sync", "BEGIN", 0),
        mark("Sync", "END", 5_000),
        mark("Pause", "BEGIN", 5_000),
        mark("Finish", "END", 9_000),
        'WARNING: phase "Finish" could not be measured',
        "",
        "",
        "PHASE                      TIME ELAPSED (usec)",
        "Sync                                         5",
        "TOTAL                                        5",
    ]


def test_both_as_json() -> None:
    times = json.loads(table("live_migration_times", record(), "--json"))
    assert times["phases"] == [{"name": name, "ns": ns} for name, ns in DURATIONS.items()]
    assert times["total_ns"] == sum(DURATIONS.values())
    assert (times["ram"], times["unmeasured"]) == ({}, [])

    assert json.loads(table("time_adjustments", record(), "--json")) == {
        "guest_freq": 2649958945,
        "guest_uptime_ns": 879497608301,
        "total_ns": 107_582 + 22_400 + 18_400,
        "events": [
            {"name": "migration", "ns": 107_582, "guest_tsc": 2330632597459, "boot_hrtime": 17148534696948},
            {"name": "daemon", "ns": 22_400, "guest_tsc": 2330632882546, "boot_hrtime": 17139299077239},
            {"name": "vmm", "ns": 18_400, "guest_tsc": 2330632966946, "boot_hrtime": 17139299077239},
        ],
        "adjustments": [
            {"guest_tsc": 285087, "boot_hrtime": -9235619709},
            {"guest_tsc": 84400, "boot_hrtime": 0},
        ],
        "errors": [],
    }


def test_a_wrapped_tsc_is_a_small_adjustment() -> None:
    document = record()
    document["time"]["before"]["guest_tsc"] = (1 << 64) - 1
    document["time"]["after"]["guest_tsc"] = 285086
    lines = table("time_adjustments", document).splitlines()
    assert lines[4] == "Migration                   107 18446744073709551615       17148534696948"
    assert lines[5] == "[adjustment]                                  285087          -9235619709"


def test_a_record_without_stages_implies_the_migration() -> None:
    document = record()
    del document["time"]["stages"], document["time"]["elapsed_ns"]
    lines = table("time_adjustments", document).splitlines()
    assert lines[1] == "     2649958945            879497608                  107"
    assert lines[4] == TIME_TABLE.splitlines()[4]
    assert lines[8] == "Kernel                        0        2330632882546       17139299077239"


def test_time_data_that_was_not_computed_so_is_an_error() -> None:
    document = record()
    document["time"]["after"]["guest_tsc"] += 1
    done = run("time_adjustments", "-", stdin=json.dumps(document))
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == [
        "ERROR: computed and imported guest TSC differ",
        "computed_val = 2330632882546, imported_val = 2330632882547",
    ]
    document["time"]["before"]["guest_freq"] = 0
    done = run("time_adjustments", "-", "--json", stdin=json.dumps(document))
    assert done.returncode == 1
    assert "InvalidFrequency" in json.loads(done.stdout)["errors"][0]


@pytest.mark.parametrize("script", ["live_migration_times", "time_adjustments"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "7", "{", '{"phases": [7], "time": 7}'])
def test_what_is_no_record_is_one_sentence(script: str, text: str) -> None:
    done = run(script, "-", stdin=text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("- is not ")
    assert len(done.stderr.splitlines()) == 1


def test_an_attempt_that_never_carried_time_is_one_sentence() -> None:
    done = run("time_adjustments", "-", stdin=json.dumps(record() | {"time": None}))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("- holds no time data")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["live_migration_times", "time_adjustments"])
def test_a_migration_id_asks_the_daemon_and_passes_on_that_none_answers(script: str, tmp_path: Path) -> None:
    done = run(script, MIGRATION_ID, "--socket", str(tmp_path / "control.sock"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "control.sock" in done.stderr
