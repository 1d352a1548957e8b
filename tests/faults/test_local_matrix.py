"""The core of the fault matrix between daemons on one host, which hand memory over: devices write to it when they are
loaded, and an abort must leave every byte of it. ``python -m scripts.prove_matrix --local`` runs the whole."""

from __future__ import annotations

import asyncio

import pytest

from scripts.rig.faulty import FaultyPair
from scripts.rig.matrix import LOCAL_CELLS, Judged, run_matrix

LANES = 3
CORE = (
    "welcome/kill-destination-vmm",
    "device-state/kill-destination-vmm",
    "state-end/kill-source-daemon",
    "state-end/kill-destination-daemon",
    "ready/kill-destination-vmm",
    "ready/cancel",
    "commit/kill-source-daemon",
    "commit/kill-destination-daemon",
    "commit/kill-destination-vmm",
    "running/kill-source-daemon",
)


@pytest.fixture(scope="module")
def judged() -> dict[str, Judged]:
    """The core, judged on several pairs of hosts at once: most of a cell's time is waiting."""
    cells = [cell for cell in LOCAL_CELLS if str(cell) in CORE]
    found = asyncio.run(run_matrix(cells, LANES, make_pair=lambda: FaultyPair(local=True)))
    return {str(one.cell): one for one in found}


@pytest.mark.timeout(600)  # the first test waits for all
@pytest.mark.parametrize("cell", CORE)
def test_one_whole_guest_is_left(judged: dict[str, Judged], cell: str) -> None:
    assert judged[cell].violations == [], str(judged[cell])
