"""The store that a fleet shares, as the few calls that it needs of one: etcd in production, a fake in simulations.

    range(prefix) -> entries and the revision at which they were read
    watch(prefix, revision + 1) -> every change since, whole revisions at a time
    transact(compares, then, otherwise) -> one atomic step, or the other

Keys are text, values are bytes. Every change of the store has a revision above all earlier ones. All calls raise
``StoreError`` and what derives from it, and nothing else of their own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

PAGE_ENTRIES: Final = 500
"""Entries that one call of ``range`` returns at most, so that no answer grows with the fleet."""


class StoreError(Exception):
    """The store did not do what it was asked; the message is a sentence."""


class NoAnswerError(StoreError):
    """The store did not answer in time. Whether it carried out what it was asked is not known, and it may still do so
    later."""


class LeaseEndedError(StoreError):
    """The lease has ended, and with it every key that was put under it."""


class NameTakenError(StoreError):
    """Another daemon is in the fleet under the name of this host; the message says what to do."""


class CompactedError(StoreError):
    """The revision to watch from is no longer kept: read the range again and watch from there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key and its value.

    Attributes:
        revision: of the change that wrote it last.
        lease: the lease with which it ends, 0 for none.
    """

    key: str
    value: bytes
    revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Entries in the order of their keys.

    Attributes:
        revision: the store's revision at which they were read.
        more: there are entries after the last of these.
    """

    entries: tuple[Entry, ...]
    revision: int
    more: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A key that was written, or deleted (``entry`` None), with the change's revision."""

    key: str
    entry: Entry | None
    revision: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Holds when there is no such key."""

    key: str


@dataclass(frozen=True, slots=True)
class Exists:
    """Holds when there is such a key."""

    key: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Holds when the key was last written at this revision; a revision of 0 stands for a key that does not exist."""

    key: str
    revision: int


Compare: TypeAlias = Missing | Exists | Unchanged


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key, under a lease if it is not 0."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key; without effect when there is none."""

    key: str


@dataclass(frozen=True, slots=True)
class Read:
    """Return the entry of a key in the transaction's answer."""

    key: str


Operation: TypeAlias = Put | Delete | Read


@dataclass(frozen=True, slots=True)
class Transaction:
    """If all compares hold then ``then``, else ``otherwise``. A key is written at most once in each branch."""

    compares: tuple[Compare, ...]
    then: tuple[Operation, ...]
    otherwise: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a transaction.

    Attributes:
        succeeded: all compares held.
        revision: the store's revision afterwards; that of its writes if it wrote.
        found: what its ``Read`` operations found, in their order; None for a key that does not exist.
    """

    succeeded: bool
    revision: int
    found: tuple[Entry | None, ...] = ()


class Store(Protocol):
    """The calls. Each raises NoAnswerError when no answer comes in the time that the store was opened with."""

    async def get(self, key: str) -> Entry | None:
        """The entry of one key, as it is now (a linearizable read), None when there is none."""
        ...

    async def range(self, prefix: str, *, after: str = "", revision: int = 0) -> Page:
        """At most PAGE_ENTRIES entries whose keys begin with ``prefix`` and come after ``after``.

        Args:
            revision: read as of this revision; 0 for now.

        Raises:
            CompactedError: that revision is no longer kept.
        """
        ...

    async def transact(self, transaction: Transaction) -> Answer:
        """Carry out a transaction."""
        ...

    async def grant(self, ttl_s: int) -> int:
        """Begin a lease of ``ttl_s`` seconds and return its id."""
        ...

    async def keep_alive(self, lease: int) -> None:
        """Begin the time of a lease anew.

        Raises:
            LeaseEndedError: it has ended.
        """
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; without effect when it has ended."""
        ...

    def watch(self, prefix: str, revision: int) -> AsyncGenerator[tuple[Change, ...], None]:
        """Changes of keys that begin with ``prefix``, from ``revision`` on, those of one revision never apart.

        The iterator ends with NoAnswerError when the connection is lost; whoever watches goes on from the last
        revision that it saw, plus one.

        Raises:
            CompactedError: that revision is no longer kept.
        """
        ...


async def read_all(store: Store, prefix: str) -> tuple[list[Entry], int]:
    """All entries whose keys begin with ``prefix`` as of one revision, and that revision."""
    page = await store.range(prefix)
    entries, revision = list(page.entries), page.revision
    while page.more:
        page = await store.range(prefix, after=entries[-1].key, revision=revision)
        entries.extend(page.entries)
    return entries, revision


async def put(store: Store, key: str, value: bytes, lease: int = 0) -> int:
    """Write a key whatever it holds; the revision of the change."""
    return (await store.transact(Transaction((), (Put(key, value, lease),)))).revision
