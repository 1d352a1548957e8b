"""A store in memory that answers as etcd does: for tests, and for fleets in virtual time.

The same tests check it and etcd (``tests/migrated/fleet/test_store.py``). ``FakeStore`` is the store itself, whose
calls take no time; ``FakeStoreClient`` is it behind the interface that daemons use.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator

from migrated.fleet.store import (
    PAGE_ENTRIES,
    Answer,
    Change,
    Compare,
    Delete,
    Entry,
    Exists,
    LeaseEndedError,
    Missing,
    Operation,
    Page,
    Put,
    Read,
    StoreError,
    Transaction,
)

_S = 1_000_000_000


class FakeStore:
    """Keys with all their past values, leases, and whoever watches.

    Args:
        now_ns: the time, for leases.
        keep: whether past values are kept; a long simulation that reads no old revision does without.

    Attributes:
        revision: of the last change.
        calls: how often each kind of call was made.
        largest: the largest value ever written, and its key.
        watchers: called with the changes of each revision.
    """

    def __init__(self, now_ns: Callable[[], int], *, keep: bool = True) -> None:
        self.revision = 1
        self.calls: Counter[str] = Counter()
        self.largest: tuple[int, str] = (0, "")
        self.watchers: list[Callable[[tuple[Change, ...]], None]] = []
        self._now_ns = now_ns
        self._keep = keep
        self._entries: dict[str, Entry] = {}
        self._past: dict[str, list[tuple[int, Entry | None]]] = defaultdict(list)
        self._changes: list[tuple[Change, ...]] = []
        self._leases: dict[int, tuple[int, int]] = {}
        self._leased: dict[int, set[str]] = defaultdict(set)
        self._next_lease = 1000

    def get(self, key: str) -> Entry | None:
        """The entry of a key now."""
        self.calls["get"] += 1
        return self._entries.get(key)

    def range(self, prefix: str, after: str = "", revision: int = 0) -> Page:
        """A page of entries, as ``Store.range`` says."""
        self.calls["range"] += 1
        if revision > self.revision:
            raise StoreError(f"The revision {revision} does not exist yet.")
        at = revision or self.revision
        keys = sorted(key for key in self._entries.keys() | self._past.keys() if key.startswith(prefix) and key > after)
        found = [entry for key in keys if (entry := self._as_of(key, at)) is not None]
        return Page(tuple(found[:PAGE_ENTRIES]), at, len(found) > PAGE_ENTRIES)

    def transact(self, transaction: Transaction) -> Answer:
        """Carry out a transaction."""
        self.calls["transact"] += 1
        succeeded = all(map(self._holds, transaction.compares))
        operations = transaction.then if succeeded else transaction.otherwise
        self._check(operations)
        found, changes = [], []
        revision = self.revision + 1
        for operation in operations:
            match operation:
                case Put(key=key, value=value, lease=lease):
                    changes.append(Change(key, Entry(key, value, revision, lease), revision))
                case Delete(key=key):
                    if key in self._entries:
                        changes.append(Change(key, None, revision))
                case Read(key=key):
                    found.append(self._entries.get(key))
        if changes:
            self._apply(tuple(changes))
        return Answer(succeeded, self.revision, tuple(found))

    def grant(self, ttl_s: int) -> int:
        """Begin a lease."""
        self.calls["grant"] += 1
        self._next_lease += 1
        self._leases[self._next_lease] = (ttl_s, self._now_ns() + ttl_s * _S)
        return self._next_lease

    def keep_alive(self, lease: int) -> None:
        """Begin the time of a lease anew."""
        self.calls["keep_alive"] += 1
        self.end_leases()
        if lease not in self._leases:
            raise LeaseEndedError(f"The lease {lease} has ended.")
        ttl_s = self._leases[lease][0]
        self._leases[lease] = (ttl_s, self._now_ns() + ttl_s * _S)

    def revoke(self, lease: int) -> None:
        """End a lease and delete its keys."""
        self.calls["revoke"] += 1
        self._end(lease)

    def end_leases(self) -> None:
        """End the leases whose time is over."""
        for lease in [lease for lease, (_, end_ns) in self._leases.items() if end_ns <= self._now_ns()]:
            self._end(lease)

    def since(self, prefix: str, revision: int) -> Iterator[tuple[Change, ...]]:
        """The changes below a prefix from a revision on, those of one revision together."""
        for changes in self._changes:
            if changes[0].revision >= revision and (mine := below(prefix, changes)):
                yield mine

    def _holds(self, compare: Compare) -> bool:
        entry = self._entries.get(compare.key)
        match compare:
            case Missing():
                return entry is None
            case Exists():
                return entry is not None
            case _:
                return (0 if entry is None else entry.revision) == compare.revision

    def _check(self, operations: tuple[Operation, ...]) -> None:
        written = [one.key for one in operations if not isinstance(one, Read)]
        if len(set(written)) < len(written):
            raise StoreError("A transaction writes the same key twice.")
        for one in operations:
            if isinstance(one, Put) and one.lease and one.lease not in self._leases:
                raise LeaseEndedError(f"The lease {one.lease} has ended.")

    def _apply(self, changes: tuple[Change, ...]) -> None:
        self.revision += 1
        for change in changes:
            old = self._entries.pop(change.key, None)
            if old is not None and old.lease:
                self._leased[old.lease].discard(change.key)
            if change.entry is not None:
                self._entries[change.key] = change.entry
                self.largest = max(self.largest, (len(change.entry.value), change.key))
                if change.entry.lease:
                    self._leased[change.entry.lease].add(change.key)
            if self._keep:
                self._past[change.key].append((change.revision, change.entry))
        if self._keep:
            self._changes.append(changes)
        for watcher in self.watchers:
            watcher(changes)

    def _end(self, lease: int) -> None:
        self._leases.pop(lease, None)
        keys = self._leased.pop(lease, set())
        if keys:
            revision = self.revision + 1
            self._apply(tuple(Change(key, None, revision) for key in sorted(keys)))

    def _as_of(self, key: str, revision: int) -> Entry | None:
        if revision == self.revision:
            return self._entries.get(key)
        past = self._past[key]
        index = bisect_right(past, revision, key=lambda version: version[0])
        return past[index - 1][1] if index else None


def below(prefix: str, changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The changes of keys that begin with a prefix."""
    return tuple(change for change in changes if change.key.startswith(prefix))


class FakeStoreClient:
    """A fake store behind ``migrated.fleet.store.Store``."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store

    async def get(self, key: str) -> Entry | None:
        """As ``Store.get``."""
        return self.store.get(key)

    async def range(self, prefix: str, *, after: str = "", revision: int = 0) -> Page:
        """As ``Store.range``."""
        return self.store.range(prefix, after, revision)

    async def transact(self, transaction: Transaction) -> Answer:
        """As ``Store.transact``."""
        return self.store.transact(transaction)

    async def grant(self, ttl_s: int) -> int:
        """As ``Store.grant``."""
        return self.store.grant(ttl_s)

    async def keep_alive(self, lease: int) -> None:
        """As ``Store.keep_alive``."""
        self.store.keep_alive(lease)

    async def revoke(self, lease: int) -> None:
        """As ``Store.revoke``."""
        self.store.revoke(lease)

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[tuple[Change, ...], None]:
        """As ``Store.watch``."""
        queue: asyncio.Queue[tuple[Change, ...]] = asyncio.Queue()
        for changes in self.store.since(prefix, revision):
            queue.put_nowait(changes)

        def take(changes: tuple[Change, ...]) -> None:
            if mine := below(prefix, changes):
                queue.put_nowait(mine)

        self.store.watchers.append(take)
        try:
            while True:
                yield await queue.get()
        finally:
            self.store.watchers.remove(take)
