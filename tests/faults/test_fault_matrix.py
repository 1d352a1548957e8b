"""The core of the fault matrix; ``python -m scripts.prove matrix`` runs the whole."""

from __future__ import annotations

import asyncio

import pytest

from scripts.rig.matrix import ALL_CELLS, FAULTS, STEPS, Cell, Judged, run_matrix

LANES = 4

KILLS = tuple(fault for fault in FAULTS if fault.startswith("kill-"))
AROUND = ("cut", "reset", "duplicate", "kill-source-daemon", "kill-destination-daemon", "stop-source-daemon")
STEP = {step.name: step for step in STEPS}
CORE = (
    # every process killed, in the rounds and between the stop and READY
    *(Cell(STEP[name], fault) for name in ("round-end", "state-end") for fault in KILLS),
    # every fault at the decision itself
    *(Cell(STEP["commit"], fault) for fault in FAULTS),
    # the first word of the blackout, the vote and the answer
    *(Cell(STEP[name], fault) for name in ("downtime", "ready", "running") for fault in AROUND),
)


@pytest.fixture(scope="module")
def judged() -> dict[str, Judged]:
    """The core, judged on several pairs of hosts at once: most of a cell's time is waiting."""
    return {str(one.cell): one for one in asyncio.run(run_matrix(CORE, LANES))}


@pytest.mark.timeout(900)  # the first test waits for all
@pytest.mark.parametrize("cell", CORE, ids=str)
def test_one_whole_guest_is_left(judged: dict[str, Judged], cell: Cell) -> None:
    assert judged[str(cell)].violations == [], str(judged[str(cell)])


def test_every_step_and_every_fault_is_in_the_matrix() -> None:
    assert {cell.step for cell in ALL_CELLS} == set(STEPS)
    assert {cell.fault for cell in ALL_CELLS} == set(FAULTS)
    assert len(set(map(str, ALL_CELLS))) == len(ALL_CELLS) == len(STEPS) * len(FAULTS) - 2
