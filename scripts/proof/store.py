"""The fleet's store as the explorer sees it: who owns the guest, which hosts are fenced, and whether a third host has
started it.

    both hosts  --transfer, confirm, reclaim, settle, give back-->  Owned  <--fence, take--  operator, third host

The changes are those of ``migrated.fleet.ownership``. That a transaction compares the revision which it rests on is
here the attempt whose begin wrote the key last: every other change makes it 0, so that a delayed request fits no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from migrated.fleet import ownership
from migrated.fleet.model import Ownership
from migrated.fleet.ownership import NotTheOwnerError

SOURCE_HOST: Final = "source"
DESTINATION_HOST: Final = "destination"
THIRD_HOST: Final = "third"


class Owned(NamedTuple):
    """The guest's key and what goes with it.

    Attributes:
        ownership: the key, its epoch left out.
        begun: the attempt whose begin wrote the key last, 0 when something else did.
        fenced: hosts.
        sure: those of them whose fence is true: somebody saw it, once.
        elsewhere: a third host runs the guest.
        overtaken: it has run there, and the lock carries the token of that host. Only with a lock that is shared.
    """

    ownership: Ownership = Ownership(owner=SOURCE_HOST, epoch=0)
    begun: int = 0
    fenced: frozenset[str] = frozenset()
    sure: frozenset[str] = frozenset()
    elsewhere: bool = False
    overtaken: bool = False

    def without_fence(self, host: str) -> Owned:
        """The same when the fence of a host is withdrawn."""
        return self._replace(fenced=self.fenced - {host}, sure=self.sure - {host})


StoreStep: TypeAlias = Callable[[Owned], Owned | None]
"""What a move does to the store, None where it is not possible."""


@dataclass(frozen=True)
class SharedLock:
    """The ownership lock on storage that all hosts share. A mutant breaks one rule.

    With it nothing rests on the truth of a fence: a third host starts the guest as soon as store and lock let it, and
    its guest may end again, which leaves the lock free.

    Attributes:
        tokens: the lock carries the revision of its holder's key, and refuses a holder that comes with an older one.
        asks: a destination takes the lock when the store has shown that it is the owner, and then with its token.
    """

    tokens: bool = True
    asks: bool = True

    def taken(self, host: str, *, yes: bool) -> StoreStep:
        """One of the two hosts asks for the lock, which it does not hold, and is or is not given it."""

        def step(owned: Owned) -> Owned | None:
            has_token = host == SOURCE_HOST or self.asks
            owner = host == SOURCE_HOST or not self.asks or owned.ownership.owner == host
            stale = owned.overtaken and self.tokens and has_token
            return owned if (owner and not owned.elsewhere and not stale) is yes else None

        return step


@dataclass(frozen=True)
class Rules:
    """The rules of ownership; a mutant replaces one.

    Attributes:
        compares: a transfer compares the revision that the attempt's begin wrote.
        minds_fences: transfers and confirmations compare that the host is not fenced.
        begins: an attempt writes the key anew when it begins.
        lock: that keeps hosts apart, whatever the operator says; None where fences are true before a third host starts
            the guest, and the lock keeps nobody out.
    """

    transferred: Callable[[Ownership, str, str], Ownership] = ownership.transferred
    reclaimed: Callable[[Ownership, str], Ownership] = ownership.reclaimed
    settled: Callable[[Ownership, str, str], Ownership] = ownership.settled
    given_back: Callable[[Ownership, str, str], Ownership] = ownership.given_back
    taken: Callable[[Ownership, str, Collection[str]], Ownership] = ownership.taken
    compares: bool = True
    minds_fences: bool = True
    begins: bool = True
    lock: SharedLock | None = None

    def begin(self, attempt: int) -> StoreStep:
        """An attempt begins: the key is read, and written anew."""

        def step(owned: Owned) -> Owned | None:
            if self._fenced(owned, SOURCE_HOST):
                return None
            if not self.begins:
                return owned._replace(begun=owned.begun or attempt) if owned.ownership.owner == SOURCE_HOST else None
            return _written(owned, lambda: self.reclaimed(owned.ownership, SOURCE_HOST), begun=attempt)

        return step

    def transfer(self, attempt: int, *, yes: bool) -> StoreStep:
        """The transfer of an attempt reaches the store, which says yes or no."""

        def step(owned: Owned) -> Owned | None:
            same = owned.begun == attempt or (bool(owned.begun) and not self.begins)
            fits = (same or not self.compares) and not self._fenced(owned, SOURCE_HOST)
            if fits is not yes:
                return None
            if not yes:
                return owned
            return _written(owned, lambda: self.transferred(owned.ownership, DESTINATION_HOST, str(attempt)))

        return step

    def confirm(self, host: str, *, yes: bool) -> StoreStep:
        """A restarted host asks whether the guest is its own."""

        def step(owned: Owned) -> Owned | None:
            after = None
            if not self._fenced(owned, host):
                after = _written(owned, lambda: self.reclaimed(owned.ownership, host))
            if yes:
                return after
            return owned if after is None else None

        return step

    def reclaim(self, owned: Owned) -> Owned:
        """The source writes that it is the owner; if it is not, that is left as it is."""
        return _written(owned, lambda: self.reclaimed(owned.ownership, SOURCE_HOST)) or owned

    def settle(self, attempt: int) -> StoreStep:
        """The destination runs the guest of an attempt."""
        return lambda owned: _written(owned, lambda: self.settled(owned.ownership, DESTINATION_HOST, str(attempt)))

    def give_back(self, attempt: int) -> StoreStep:
        """The destination has discarded the guest of an attempt."""
        return lambda owned: _written(owned, lambda: self.given_back(owned.ownership, DESTINATION_HOST, str(attempt)))

    def take(self, owned: Owned) -> Owned | None:
        """A third host starts the guest."""
        after = _written(owned, lambda: self.taken(owned.ownership, THIRD_HOST, owned.fenced))
        return None if after is None else after._replace(elsewhere=True, overtaken=self.lock is not None)

    def _fenced(self, owned: Owned, host: str) -> bool:
        return self.minds_fences and host in owned.fenced


def _written(owned: Owned, change: Callable[[], Ownership], begun: int = 0) -> Owned | None:
    """The store after a change of the key, None when its rule refuses it."""
    try:
        after = change()
    except NotTheOwnerError:
        return None
    return owned._replace(ownership=after.model_copy(update={"epoch": 0}), begun=begun)
