"""The mirror of the fleet's keys while watches end and revisions are lost: nothing that changed is missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from migrated.fleet.model import JobState
from migrated.fleet.store import Change, CompactedError, Delete, NoAnswerError, Transaction, put
from migrated.member.follower import Follower
from scripts.fleet.fake_store import FakeStore, FakeStoreClient
from scripts.rig.waiting import until
from tests.migrated.fleet.fleets import KEYS


class Unsteady(FakeStoreClient):
    """A store whose watches bring nothing, or end, when a test wants it."""

    def __init__(self) -> None:
        super().__init__(FakeStore(lambda: 0))
        self.watches = 0
        self.always_ends = False
        self.deaf = False
        self.compacted = False
        self.breaks: Exception | None = None

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[tuple[Change, ...], None]:
        self.watches += 1
        if (error := self.breaks) is not None:
            self.breaks = None
            raise error
        if self.always_ends:
            raise NoAnswerError("It ended.")
        async with contextlib.aclosing(super().watch(prefix, revision)) as watch:
            async for changes in watch:
                if self.compacted:
                    raise CompactedError("It ended.")
                if not self.deaf:
                    yield changes


async def _watching(store: Unsteady) -> bool:
    return bool(store.store.watchers)


async def test_changes_that_no_watch_brought_are_told_once_all_was_read_anew() -> None:
    store = Unsteady()
    follower = Follower(store, KEYS)
    told: list[str] = []
    follower.on_change = told.append
    first, second, gone = KEYS.job_state("j1"), KEYS.job_state("j2"), KEYS.job_state("j3")
    for key in (first, gone):
        await put(store, key, JobState().to_bytes())
    running = asyncio.create_task(follower.run())
    try:
        await follower.ready.wait()
        await until("the watch", lambda: _watching(store))
        assert told == [], "what was there before is no news"
        store.deaf = True
        await put(store, first, JobState(reason="changed").to_bytes())
        await put(store, second, JobState().to_bytes())
        await store.transact(Transaction((), (Delete(gone),)))
        store.deaf, store.compacted = False, True
        await put(store, KEYS.cordon("x"), b"{}")
        assert await follower.until(lambda: "j2" in follower.mirror.states, 5.0)
        assert told == [KEYS.cordon("x"), first, second, gone]
        assert follower.mirror.states["j1"].reason == "changed"
        store.compacted = False
        assert "j3" not in follower.mirror.states
    finally:
        running.cancel()


async def test_a_watch_that_always_ends_at_once_keeps_nobody_busy() -> None:
    store = Unsteady()
    store.always_ends = True
    running = asyncio.create_task(Follower(store, KEYS).run())
    await asyncio.sleep(0.3)  # how often it watches in that time is what counts
    running.cancel()
    assert 1 <= store.watches <= 10


async def test_an_error_that_nobody_foresaw_does_not_end_the_following() -> None:
    """A host whose mirror stands still decides on old news, and nobody is told."""
    store = Unsteady()
    store.breaks = RuntimeError("the transport is closed")
    follower = Follower(store, KEYS)
    running = asyncio.create_task(follower.run())
    try:
        assert await follower.until(lambda: follower.failure is not None, 5.0)
        await put(store, KEYS.job_state("j1"), JobState().to_bytes())
        assert await follower.until(lambda: "j1" in follower.mirror.states and follower.failure is None, 5.0)
    finally:
        running.cancel()
