"""Errors that nobody foresaw, in the middle of what must not stop half way: each costs the attempt, never the guest.

source        the stop, the save, the resume after an abort         destination   the load, the resume after COMMIT
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migrated.settings.parameters import MigrationParameters
from tests.tiny_vmm.driver import TinyGuest
from tests.tiny_vmm.hosts import TinyHost, need_write_tracking

UNLIMITED = MigrationParameters(switchover_abort=False).model_dump(mode="json")


class StrangeError(Exception):
    """Of no kind that anybody catches by name."""


class Once:
    """In place of a method of a guest: an error at the first call, and from then on the method."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.calls = 0

    def __get__(self, guest: TinyGuest, _kind: type[TinyGuest]) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise StrangeError("nobody foresaw this")
            return self.method(guest, *arguments)

        return call


@pytest.fixture
async def pair(short_directory: Path) -> AsyncIterator[tuple[TinyHost, TinyHost]]:
    need_write_tracking()
    async with TinyHost(short_directory / "a") as a, TinyHost(short_directory / "b") as b:
        await a.add_guest()
        yield a, b


async def moved(a: TinyHost, b: TinyHost) -> dict[str, Any]:
    migration_id = await a.operations.migrate("g1", b.uri, {"switchover_abort": False})
    return await a.operations.wait(migration_id)


@pytest.mark.parametrize("method", ["pause", "state_out", "state_in"])
async def test_before_commit_the_guest_runs_on_at_the_source(
    pair: tuple[TinyHost, TinyHost], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Although no limit ends the wait for a vote."""
    a, b = pair
    once = Once(getattr(TinyGuest, method))
    monkeypatch.setattr(TinyGuest, method, once)
    record = await moved(a, b)
    assert once.calls
    assert record["outcome"] == "aborted"
    assert "nobody foresaw this" in record["reason"]
    assert await a.state_of("g1") == "running"
    assert (await moved(a, b))["outcome"] == "completed"
    assert await b.state_of("g1") == "running"


async def test_a_resume_that_fails_so_gives_the_guest_back(
    pair: tuple[TinyHost, TinyHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    monkeypatch.setattr(TinyGuest, "resume", Once(TinyGuest.resume))
    record = await moved(a, b)
    assert record["outcome"] == "aborted"
    assert "nobody foresaw this" in record["reason"]
    assert await a.state_of("g1") == "running"
    assert b.operations.guest_names() == []


async def test_a_switchover_that_its_operator_holds_has_not_stalled(short_directory: Path) -> None:
    """Nothing comes for longer than a source may be silent, which ends no attempt here, and counts again afterwards."""
    need_write_tracking()
    taker = TinyHost(short_directory / "b", handshake_timeout_s=1.5, stall_timeout_s=0.6)
    async with TinyHost(short_directory / "a") as a, taker as b:
        await a.add_guest()
        held: dict[str, object] = {"pause_before_switchover": True, "switchover_abort": False}
        migration_id = await a.operations.migrate("g1", b.uri, held)
        await a.until_status("g1", "pre-switchover")
        await b.until_status("g1", "pre-switchover")
        await asyncio.sleep(3.0)  # the destination would have given up twice: it looks once handshakes must be over
        assert a.operations.progress("g1")[-1].status == "pre-switchover"
        await a.operations.continue_switchover("g1")
        assert (await a.operations.wait(migration_id))["outcome"] == "completed"
