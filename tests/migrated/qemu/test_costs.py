"""What the next stop, save, load and resume will take: by this guest's earlier ones, its class's, or the prior."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.vmm.qemu.blueprint import Blueprint
from migrated.vmm.qemu.costs import PRIOR, STEPS, Cost, CostKeys, Step, SwitchoverCosts, keys_of

MS = 1_000_000
BLUEPRINT = Blueprint(
    qemu="7.2.0",
    machine="pc-q35-7.2",
    cpu="max",
    accelerator="tcg",
    features={},
    vcpus=1,
    uuid="6f0c1b7e-0000-4000-8000-000000000001",
    blocks=("ram@0x0 268435456 main",),
    devices=("virtio-net-pci: addr=02.0", "VGA: addr=01.0"),
)
WEB = keys_of(BLUEPRINT)
TWIN = keys_of(BLUEPRINT.model_copy(update={"uuid": "6f0c1b7e-0000-4000-8000-000000000002"}))
OTHER = keys_of(
    BLUEPRINT.model_copy(update={"uuid": "6f0c1b7e-0000-4000-8000-000000000003", "devices": ("VGA: addr=01.0",)})
)


@pytest.fixture
def costs(tmp_path: Path) -> SwitchoverCosts:
    return SwitchoverCosts(tmp_path / "costs.json")


def seen(costs: SwitchoverCosts, keys: CostKeys, *took_ms: int) -> None:
    for one in took_ms:
        costs.note(keys, "load", one * MS)


@pytest.mark.parametrize("step", STEPS)
def test_until_enough_was_seen_the_measured_prior_counts(costs: SwitchoverCosts, step: Step) -> None:
    seen(costs, WEB, 90, 90)
    assert costs.expect(WEB, step) == PRIOR[step]
    assert PRIOR[step].tries == 0
    assert PRIOR[step].spread_ns > 0


def test_a_guest_is_expected_to_take_what_it_took_and_one_stall_does_not_decide(costs: SwitchoverCosts) -> None:
    seen(costs, WEB, 4, 6, 5, 900)
    assert costs.expect(WEB, "load") == Cost(int(5.5 * MS), int(1.5 * MS), 4)
    assert costs.expect(WEB, "save") == PRIOR["save"]


def test_another_guest_of_the_class_is_judged_by_the_class_until_it_has_moved_itself(costs: SwitchoverCosts) -> None:
    seen(costs, WEB, 20, 20, 20)
    assert costs.expect(TWIN, "load").ns == 20 * MS
    assert costs.expect(OTHER, "load") == PRIOR["load"]
    seen(costs, TWIN, 40, 40, 40)
    assert costs.expect(TWIN, "load").ns == 40 * MS
    assert costs.expect(WEB, "load").ns == 20 * MS


def test_where_a_device_sits_makes_no_other_class() -> None:
    moved = BLUEPRINT.model_copy(update={"devices": ("VGA: addr=07.0", "virtio-net-pci: addr=09.0")})
    assert keys_of(moved) == WEB


def test_what_was_learned_outlives_the_daemon(costs: SwitchoverCosts, tmp_path: Path) -> None:
    seen(costs, WEB, 20, 21, 22)
    assert SwitchoverCosts(tmp_path / "costs.json").expect(WEB, "load") == PRIOR["load"]
    costs.keep()
    assert SwitchoverCosts(tmp_path / "costs.json").expect(WEB, "load") == costs.expect(WEB, "load")


@pytest.mark.parametrize("text", ["", "{}", '{"seen_ns": {"x": {"load": [-1]}}}', '{"seen_ns": {"x": {"dance": [1]}}}'])
def test_a_file_that_cannot_be_used_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    costs = SwitchoverCosts(tmp_path / "costs.json")
    assert costs.expect(WEB, "load") == PRIOR["load"]
    seen(costs, WEB, 20, 20, 20)
    costs.keep()
    assert SwitchoverCosts(tmp_path / "costs.json").expect(WEB, "load").ns == 20 * MS


def test_a_directory_that_is_not_there_costs_only_the_memory_of_it(tmp_path: Path) -> None:
    costs = SwitchoverCosts(tmp_path / "gone" / "costs.json")
    seen(costs, WEB, 20, 20, 20)
    costs.keep()
    assert costs.expect(WEB, "load").ns == 20 * MS


def test_the_keys_used_last_are_kept(costs: SwitchoverCosts) -> None:
    seen(costs, WEB, 20, 20, 20)
    for number in range(300):
        costs.note(CostKeys(f"guest {number}", "class of many"), "load", MS)
    assert costs.expect(WEB, "load") == PRIOR["load"]
    assert costs.expect(CostKeys("guest new", "class of many"), "load").ns == MS
