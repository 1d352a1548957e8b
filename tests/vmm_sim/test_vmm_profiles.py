"""Every published trace is a guest profile with the trace's costs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from protocol.guest import GuestDescription
from vmm_sim.config import ConfigError, GuestConfig, build_config, read_profile

ROOT = Path(__file__).parents[2]
GUESTS = ROOT / "configs" / "guests"
TRACES: dict[str, Any] = {
    trace["name"]: trace
    for trace in tomllib.loads((ROOT / "tests" / "data" / "switchover_traces.toml").read_text(encoding="utf-8"))[
        "trace"
    ]
}
QEMU_TRACES = [name for name, trace in TRACES.items() if "checkpoints" in trace]
UUID = "11111111-2222-3333-4444-555555555555"


def profile(name: str) -> GuestConfig:
    return build_config({"name": "g", "uuid": UUID, **read_profile(GUESTS / f"{name}.toml")})


def costs(config: GuestConfig) -> dict[tuple[str, str], tuple[int, int]]:
    return {(device.name, device.kind): (device.save_us, device.load_us) for device in config.devices}


def test_every_trace_has_a_profile() -> None:
    assert set(TRACES) <= {path.stem for path in GUESTS.glob("*.toml")}


@pytest.mark.parametrize("name", QEMU_TRACES)
def test_a_qemu_profile_has_every_row_of_its_trace(name: str) -> None:
    trace, config = TRACES[name], profile(name)
    checkpoints = trace["checkpoints"]
    expected: dict[tuple[str, str], tuple[int, int]] = {}
    for row in trace["device"]:
        if row["name"] == "ram":
            expected["ram-sync", row["kind"]] = (row["save"], 0)
        else:
            expected[row["name"], row["kind"]] = (row.get("save", 0), row.get("load", 0))
    for kind, checkpoint in (("iterable", "src-iterable-saved"), ("non-iterable", "src-non-iterable-saved")):
        listed = sum(save for (_, device_kind), (save, _) in expected.items() if device_kind == kind)
        if checkpoints.get(checkpoint, 0) > listed:
            expected["unlisted", kind] = (checkpoints[checkpoint] - listed, 0)
    assert costs(config) == expected
    assert config.stop_us == checkpoints["src-vm-stopped"]
    assert config.resume_us == sum(us for name, us in checkpoints.items() if name.startswith("dst-precopy-bh"))


def test_the_first_traces_total_holds() -> None:
    config, trace = profile("qemu-33g-one-vf"), TRACES["qemu-33g-one-vf"]
    total_us = config.stop_us + config.resume_us + sum(sum(pair) for pair in costs(config).values())
    assert total_us / 1000 == pytest.approx(trace["measured_downtime_ms"], rel=0.01)
    vfio = [device for device in config.devices if device.name.endswith("vfio")]
    assert sum(device.state for device in vfio) == trace["vfio_bytes"]


def test_the_cloud_hypervisor_profile_has_its_parts() -> None:
    config, parts = profile("cloud-hypervisor-small"), TRACES["cloud-hypervisor-small"]["parts"]
    assert costs(config) == {
        ("ram-sync", "iterable"): (parts["final_memory_delta"], 0),
        ("vm-snapshot", "non-iterable"): (parts["snapshot"], parts["sending_snapshot"]),
    }
    assert config.resume_us == parts["completing"]


def test_the_propolis_profile_has_its_phases() -> None:
    config = profile("propolis-lab")
    phases = {name: (end - begin) // 1000 for name, (begin, end) in TRACES["propolis-lab"]["phases"].items()}
    assert costs(config) == {
        ("ram-sync", "iterable"): (phases["RamPushPostPause"], 0),
        ("device-state", "non-iterable"): (0, phases["DeviceState"]),
        ("ram-pull", "non-iterable"): (0, phases["RamPull"]),
        ("server-state", "non-iterable"): (0, phases["ServerState"]),
    }
    assert config.resume_us == phases["Finish"]


def test_the_slow_load_is_one_load_of_250_ms() -> None:
    assert [device.load_us for device in profile("slow-load").devices] == [250_000]


@pytest.mark.parametrize("path", sorted(GUESTS.glob("*.toml")), ids=lambda path: path.stem)
async def test_every_profile_starts_describes_itself_and_verifies(path: Path, house: Any) -> None:
    guest = await house.start("g1", "--name", "g1", "--profile", str(path))
    description = GuestDescription.model_validate((await guest.call("describe"))["description"])
    config = profile(path.stem)
    expected = {(device.name, device.kind): device for device in description.devices}
    for device in config.devices:
        entry = expected[device.name, device.kind]
        assert entry.expected_save_ns == device.save_us * 1000
        assert entry.expected_load_ns == device.load_us * 1000
    assert description.expected_stop_ns >= config.stop_us * 1000
    assert description.memory_bytes == config.memory_bytes
    await guest.call("pause")
    assert (await guest.call("verify"))["ok"]


def test_a_bad_profile_is_refused_with_file_and_reason(tmp_path: Path) -> None:
    for text, complaint in (
        ("[guest", "bad.toml cannot be read"),
        ("[gust]", "unknown tables: gust"),
        ("guest = 1", "needs a table"),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=complaint):
            read_profile(path)
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        read_profile(tmp_path / "absent.toml")
