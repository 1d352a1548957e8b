"""A small fleet in virtual time: everything moves, nothing is promised twice, and it is the same every time."""

from __future__ import annotations

from migrated.fleet.model import MAX_DOCUMENT_BYTES
from scripts.fleet.simulation import Fleet, Size


def test_two_hosts_of_a_small_fleet_are_emptied_at_once_although_attempts_fail() -> None:
    size = Size(hosts=10, guests=60, emptied=2, failing=0.2)
    outcome = Fleet(size).run()
    assert (outcome.moved, outcome.left) == (12, 0)
    assert outcome.attempts > 12, "some failed and were made again"
    assert outcome.overcommitted == 0
    assert (outcome.most_inbound, outcome.most_outbound) == (2, 2)
    assert outcome.largest[0] < MAX_DOCUMENT_BYTES
    assert outcome.calls["transact"] < 20 * outcome.attempts
    assert Fleet(size).run() == outcome
