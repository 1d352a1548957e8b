"""The event bus: who is woken when. What a slow reader loses is in the tests of the control server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from migrated.control import operations
from migrated.control.operations import EventBus, Subscription

TIMEOUT_S = 20.0


def status(name: str, migration: str = "m1") -> dict[str, Any]:
    return {"status": name, "guest": "g1", "migration-id": migration}


async def woken(reader: Subscription) -> list[str]:
    """Names or statuses of what a reader is woken for."""
    await asyncio.wait_for(reader.arrived.wait(), TIMEOUT_S)
    reader.arrived.clear()
    return [event.data.get("status", event.name) for event in reader.pending()]


@pytest.fixture
def no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold that ends only by what is published."""
    monkeypatch.setattr(operations, "HELD_S", 3600.0)


async def test_what_comes_together_wakes_once() -> None:
    bus = EventBus()
    reader = bus.subscribe()
    for name in ("A", "B", "C"):
        bus.publish(name)
    assert not reader.arrived.is_set(), "whoever publishes goes on first"
    assert await woken(reader) == ["A", "B", "C"]


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "in-doubt", "pre-switchover"])
async def test_nobody_is_woken_between_the_stop_of_a_guest_and_the_end_of_its_switchover(
    no_timeout: None, end: str
) -> None:
    """The event of the last round, just before, waits with the others: writing it would be in the downtime."""
    bus = EventBus()
    reader = bus.subscribe()
    bus.publish("MIGRATION_PASS")
    bus.hold("m1")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.arrived.wait(), 20 * operations.WAKE_S)
    bus.publish("STOP", {"guest": "g1"})
    bus.publish("MIGRATION", status("device"))
    bus.publish("MIGRATION", status("active", "m2"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.arrived.wait(), 20 * operations.WAKE_S)
    bus.publish("MIGRATION", status(end))
    assert await woken(reader) == ["MIGRATION_PASS", "STOP", "device", "active", end]


async def test_two_guests_that_are_stopped_at_once(no_timeout: None) -> None:
    bus = EventBus()
    reader = bus.subscribe()
    for migration in ("m1", "m2"):
        bus.publish("MIGRATION", status("device", migration))
    bus.publish("MIGRATION", status("completed", "m1"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.arrived.wait(), 20 * operations.WAKE_S)
    bus.publish("MIGRATION", status("completed", "m2"))
    assert await woken(reader) == ["device", "device", "completed", "completed"]


async def test_a_long_switchover_is_told_of_all_the_same() -> None:
    bus = EventBus()
    reader = bus.subscribe()
    bus.publish("MIGRATION", status("device"))
    assert await woken(reader) == ["device"]
    bus.publish("STOP")
    assert await woken(reader) == ["STOP"]


async def test_whoever_has_left_is_not_woken() -> None:
    bus = EventBus()
    gone, reader = bus.subscribe(), bus.subscribe()
    bus.publish("A")
    gone.close()
    gone.close()
    assert await woken(reader) == ["A"]
    assert not gone.arrived.is_set()
