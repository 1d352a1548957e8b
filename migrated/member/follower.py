"""Keeps a mirror of the fleet's keys up to date: one range, then a watch, and again after whatever ended it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from migrated.fleet.keys import Keys
from migrated.fleet.mirror import Mirror
from migrated.fleet.store import (
    Answer,
    Change,
    CompactedError,
    Delete,
    Entry,
    NoAnswerError,
    Put,
    Store,
    StoreError,
    Transaction,
    read_all,
)

log = structlog.get_logger()

_PAUSE_S: Final = 0.5
_WATCH_AGAIN_S: Final = 0.1
"""Before a watch that ended is begun anew: one that always ends at once must not keep this host and the store busy."""


class Follower:
    """The mirror of this host.

    Args:
        store, keys: of the fleet.

    Attributes:
        mirror: what was last seen. It is replaced when all keys had to be read anew, so nobody keeps it.
        ready: set once the keys have been read for the first time.
        on_change: called with each key that has changed.
        failure: why the store could not be reached at the last try, a sentence; None when it was.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        self.mirror = Mirror(keys)
        self.ready = asyncio.Event()
        self.failure: str | None = None
        self.on_change: Callable[[str], None] = lambda _key: None
        self._store = store
        self._keys = keys
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                entries, revision = await read_all(self._store, self._keys.prefix)
                mirror = Mirror(self._keys)
                for entry in entries:
                    mirror.put(entry)
                before, self.mirror = self.mirror, mirror
                if self.ready.is_set():  # what changed while nobody watched
                    for key in mirror.changed_since(before):
                        self.on_change(key)
                self.reached()
                self.ready.set()
                self.wake()
                await self._watch(revision)
            except CompactedError:
                continue
            except StoreError as error:
                self.failed(error)
                await asyncio.sleep(_PAUSE_S)
            except Exception as error:  # without its mirror this host would act on old news for as long as it runs
                log.exception("the fleet's keys could not be followed, for an unexpected reason; they are read anew")
                self.failed(StoreError(f"Its keys could not be followed: internal error {error!r}."))
                await asyncio.sleep(_PAUSE_S)

    async def _watch(self, revision: int) -> None:
        """Take changes after a revision, over as many watches as it takes."""
        while True:
            try:
                async with contextlib.aclosing(self._store.watch(self._keys.prefix, revision + 1)) as watch:
                    async for changes in watch:
                        self._apply(changes)
                        revision = changes[0].revision
                        self.reached()
                        self.wake()
            except NoAnswerError:
                # Ending is what watches do, also of themselves; only a read tells whether the store is there.
                await self._store.get(self._keys.prefix)
                self.reached()
                await asyncio.sleep(_WATCH_AGAIN_S)

    def _apply(self, changes: tuple[Change, ...]) -> None:
        self.mirror.apply(changes)
        for change in changes:
            self.on_change(change.key)

    def reached(self) -> None:
        """Note that the store has answered."""
        if self.failure is not None:
            log.info("the fleet's store answers again")
        self.failure = None

    def failed(self, error: StoreError) -> None:
        """Note that the store could not be asked, or has not done what it was asked; the log tells the first time."""
        if self.failure is None:
            log.warning("the fleet's store cannot be used: guests and their migrations go on", reason=str(error))
        self.failure = str(error)

    async def look(self, key: str) -> Entry | None:
        """The entry of a key as the store has it now; the mirror has it then too."""
        entry = await self._store.get(key)
        if entry is not None:
            self._apply((Change(key, entry, entry.revision),))
        return entry

    async def transact(self, transaction: Transaction) -> Answer:
        """Carry out a transaction, and see what it wrote at once."""
        answer = await self._store.transact(transaction)
        operations = transaction.then if answer.succeeded else transaction.otherwise
        for one in operations:
            match one:
                case Put(key=key, value=value, lease=lease):
                    entry = Entry(key, value, answer.revision, lease)
                    self._apply((Change(key, entry, answer.revision),))
                case Delete(key=key):
                    self._apply((Change(key, None, answer.revision),))
        if any(isinstance(one, Put | Delete) for one in operations):
            self.wake()
        return answer

    async def insist(self, make: Callable[[], Transaction | None]) -> Answer | None:
        """Carry out a transaction until it succeeds, however long the store is away.

        Args:
            make: decides on the mirror as it is now; None when there is nothing to do any more.
        """
        while (transaction := make()) is not None:
            try:
                answer = await self.transact(transaction)
            except StoreError as error:
                self.failed(error)
                await self.change(_PAUSE_S)
                continue
            if answer.succeeded:
                return answer
            await self.change(_PAUSE_S)
        return None

    async def change(self, timeout_s: float | None) -> None:
        """Wait until something has changed, or the time is over."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    async def until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until something holds of the mirror. Returns False when the time was over first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not done():
                    await self.change(None)
        return done()

    def wake(self) -> None:
        """Let everybody who waits for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()
