"""``migrated``: configuration checks and roles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from migrated.cli.daemon import main


def test_check_config_names_every_problem_and_exits_2(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[listen]\naddress = 5\n[limts]\n")
    result = CliRunner().invoke(main, ["check-config", str(file)])
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[str(file), "listen.address"], [str(file), "limts"]]
    assert "did you mean 'limits'?" in lines[1]


def test_check_config_of_a_good_file_exits_0(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[log]\nlevel = 'debug'\n")
    result = CliRunner().invoke(main, ["check-config", str(file)])
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("role", ["source", "destination", "host"])
def test_each_role_starts_with_its_configuration(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.toml"
    file.write_text(f'[control]\nsocket = "{tmp_path}/c.sock"\n')
    started: list[Any] = []

    def run(config: Any, role: str, read_again: Any) -> int:
        started.append((config.control.socket, role))
        assert read_again() == config
        return 7

    monkeypatch.setattr("migrated.service.daemon.run_daemon", run)
    assert CliRunner().invoke(main, [role, "--config", str(file)]).exit_code == 7
    assert started == [(tmp_path / "c.sock", role)]
    file.write_text("[control]\nsock = 1\n")
    result = CliRunner().invoke(main, [role, "--config", str(file)])
    assert result.exit_code == 2
    assert "did you mean 'socket'?" in result.stderr
    assert len(started) == 1


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ('[vmm]\ndirectory = "{0}/file/guests"', "{0}/file/guests cannot be used: Not a directory"),
        ('[lock]\ndirectory = "{0}/file/locks"', "{0}/file/locks cannot be used: Not a directory"),
        ("", "the run marks {0}/state/run-marks cannot be opened: Is a directory"),
    ],
)
def test_a_file_that_a_daemon_cannot_use_is_one_sentence(short_directory: Path, section: str, sentence: str) -> None:
    (short_directory / "file").touch()
    if not section:
        (short_directory / "state" / "run-marks").mkdir(parents=True)
    file = short_directory / "x.toml"
    file.write_text(
        f'[control]\nsocket = "{short_directory}/c.sock"\n[state]\ndirectory = "{short_directory}/state"\n'
        f"{section.format(short_directory)}\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "migrated", "source", "--config", str(file)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert sentence.format(short_directory) in ran.stderr
    assert "Traceback" not in ran.stderr


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "migrated", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Usage: migrated " in done.stdout
    for command in ("source", "destination", "host", "check-config"):
        assert command in done.stdout


def test_wrong_usage_is_2() -> None:
    assert CliRunner().invoke(main, ["source"]).exit_code == 2
    assert CliRunner().invoke(main, ["fly"]).exit_code == 2
