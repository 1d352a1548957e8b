"""Configuration: every problem at once, with its file, key and reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from migrated.settings.config import Address, Config, ConfigError, load_config, parse_address, parse_uri

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def load(path: Path, text: str, **environment: str) -> Config:
    path.write_text(text)
    return load_config(path, environment)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "migrated.toml"


def problems(file: Path, text: str, **environment: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, text, **environment)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return str(caught.value).splitlines()


def test_an_empty_file_is_a_configuration(file: Path) -> None:
    config = load(file, "")
    assert config.control.socket == Path("/run/migrated/control.sock")
    assert config.listen.address == Address("127.0.0.1", 4460)
    assert config.migration.downtime_limit_ms == 300
    assert config.limits.connect_timeout_s == 5
    assert config.metrics.address is None


def test_values_take_units(file: Path) -> None:
    config = load(
        file,
        """
        [listen]
        address = "[::1]:0"
        [limits]
        max_memory_bytes = "64GiB"
        round_timeout_s = "1500ms"
        heartbeat_timeout_s = 7
        [migration]
        downtime_limit_ms = "0.25s"
        max_bandwidth_bytes_per_s = "100MiB/s"
        """,
    )
    assert config.listen.address == ("::1", 0)
    assert str(config.listen.address) == "[::1]:0"
    assert config.limits.max_memory_bytes == 64 << 30
    assert config.limits.round_timeout_s == 1.5
    assert config.limits.heartbeat_timeout_s == 7
    assert config.migration.downtime_limit_ms == 250
    assert config.migration.max_bandwidth_bytes_per_s == 100 << 20


def test_paths_are_expanded(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = load(file, '[control]\nsocket = "run/c.sock"\n[state]\ndirectory = "~/state"')
    assert config.control.socket == tmp_path / "run" / "c.sock"
    assert config.state.directory == tmp_path / "home" / "state"


def test_qemu_is_named_by_its_program(file: Path) -> None:
    assert load(file, '[qemu]\nbinary = "/bin/sh"').qemu.binary == "/bin/sh"
    assert str(load(file, '[qemu]\nbinary = "sh"').qemu.binary).endswith("/sh")
    (line,) = problems(file, '[qemu]\nbinary = "no-such-qemu"')
    assert "qemu.binary: there is no program 'no-such-qemu'" in line


def test_the_home_directory_of_nobody_is_told(file: Path) -> None:
    (line,) = problems(file, '[control]\nsocket = "~no-such-user/c.sock"')
    assert line.endswith("the home directory in '~no-such-user/c.sock' is not known; write the whole path")


def test_every_problem_is_told_with_file_key_and_reason(file: Path) -> None:
    found = problems(
        file,
        """
        [control]
        sokcet = "x"
        [quantum]
        certificate = "x"
        [listen]
        address = "4460"
        [limits]
        max_incoming = 0
        connect_timeout_s = "soon"
        heartbeat_interval_s = 5
        [migration]
        downtime_limit = 5
        """,
    )
    assert all(line.startswith(f"{file}: ") for line in found)
    told = {line.split(": ")[1]: line for line in found}
    assert told["control.sokcet"].endswith("is an unknown key; did you mean 'socket'?")
    assert "is an unknown section; known here: control, process, state" in told["quantum"]
    assert "is not HOST:PORT" in told["listen.address"]
    assert told["limits.max_incoming"].endswith("must be 1 or more, not 0")
    assert "'soon' is not a duration" in told["limits.connect_timeout_s"]
    assert "did you mean 'downtime_limit_ms'" in told["migration.downtime_limit"]
    assert len(told) == 6


def test_what_does_not_go_together_is_told(file: Path) -> None:
    (line,) = problems(file, "[limits]\nheartbeat_interval_s = 4")
    assert line.endswith("limits: heartbeat_timeout_s must be at least twice heartbeat_interval_s")


def test_a_host_of_a_fleet_says_where_it_is_reached(file: Path) -> None:
    fleet = '[fleet]\nendpoints = ["http://127.0.0.1:2379"]\n'
    (line,) = problems(file, fleet + '[listen]\naddress = "0.0.0.0:4460"')
    assert line.endswith(
        "[fleet] address must say where other hosts reach this one: 0.0.0.0:4460 stands for all of its addresses"
    )
    (line,) = problems(file, fleet + 'address = "192.0.2.1:0"')
    assert line.endswith("address needs the port that other hosts connect to")
    file.write_text(fleet + 'address = "192.0.2.1:4460"\n[listen]\naddress = "[::]:4460"')
    assert load_config(file, {}).fleet.address == ("192.0.2.1", 4460)


def test_a_socket_path_that_the_kernel_would_cut_is_told(file: Path) -> None:
    lines = problems(file, f'[control]\nsocket = "/{"x" * 110}"\n[vmm]\ndirectory = "/{"y" * 90}"')
    assert [line.split(": ")[1] for line in lines] == ["control.socket", "vmm"]
    assert all("longer than the 107 bytes" in line for line in lines)


def test_the_environment_overrides_the_file_and_is_named_in_its_problems(file: Path) -> None:
    text = "[limits]\nmax_incoming = 2\n[log]\nlevel = 'debug'"
    config = load(
        file,
        text,
        MIGRATED_LIMITS__MAX_INCOMING="9",
        MIGRATED_LISTEN__ADDRESS="127.0.0.1:7",
        MIGRATED_MIGRATION__DIGEST="false",
        MIGRATED_MIGRATION__DOWNTIME_LIMIT_MS="90ms",
        MIGRATED_SOCKET="/not/ours",
        OTHER_LIMITS__MAX_INCOMING="5",
    )
    assert (config.limits.max_incoming, config.log.level) == (9, "debug")
    assert config.listen.address == ("127.0.0.1", 7)
    assert config.migration.digest is False
    assert config.migration.downtime_limit_ms == 90
    found = problems(file, text, MIGRATED_LIMITS__MAX_INCOMING="lots", MIGRATED_NOWHERE__X="1")
    assert [line.split(": ")[:2] for line in found] == [
        ["MIGRATED_LIMITS__MAX_INCOMING", "limits.max_incoming"],
        ["MIGRATED_NOWHERE__X", "nowhere"],
    ]


def test_a_file_that_is_missing_or_no_toml(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.toml", {})
    (line,) = problems(file, "[control\n")
    assert "is not valid TOML" in line
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(file, {})


def test_the_vmm_is_found_beside_the_interpreter_and_its_absence_is_told(file: Path) -> None:
    beside = Path(sys.executable)
    config = load(file, f'[vmm]\ncommand = ["{beside.name}", "-m", "vmm_sim"]')
    assert config.vmm.command == (str(beside), "-m", "vmm_sim")
    for command in ('["no-such-vmm"]', f'["{file}"]', f'["{file.parent}"]', "[]"):
        (line,) = problems(file, f"[vmm]\ncommand = {command}")
        assert line.split(": ")[1] == "vmm.command"


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:65536", "host:-1", "::1:5", "a b:1", "h:1x", "h:²"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST\]?:PORT|port from 0 to 65535"):
        parse_address(text)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "tcp",
        "tcp:",
        "tcp:host",
        "tcp:host:",
        "tcp:host:x",
        "tcp:host:99999",
        "tcp:h:0",
        "unix:x",
        "exec:x",
        "tcp:::1:5",
    ],
)
def test_a_uri_that_cannot_be_used_is_told_with_the_form_that_can(uri: str) -> None:
    with pytest.raises(ValueError, match="tcp:HOST:PORT"):
        parse_uri(uri)


def test_uris_that_can_be_used() -> None:
    assert parse_uri("unix:/run/migrated/second.sock") == Path("/run/migrated/second.sock")
    assert parse_uri("tcp:192.0.2.7:4460") == ("192.0.2.7", 4460)
    assert parse_uri("tcp:[2001:db8::7]:1") == ("2001:db8::7", 1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path, {})


def test_configurations_are_shipped_for_every_role() -> None:
    assert {path.stem for path in SHIPPED} >= {"source", "destination", "host"}
