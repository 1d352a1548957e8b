"""Ownership of guests in the fleet's store, which says who may run one: the changes of an ``Ownership``, each a compare
and a write.

    begin of a hand-over    A            -> A, written anew      no delayed request of an earlier one fits any more
    before COMMIT           A            -> B, previous A        transferred
    B runs it               B, prev. A   -> B                    settled: A's copy is dead
    A keeps it              B, prev. A   -> A                    reclaimed (COMMIT was not sent, or B discarded it)
    B discarded it          B, prev. A   -> A                    given back, which says the same
    A and B are fenced      B, prev. A   -> C                    taken: nobody has it any more, C starts it

While ``previous`` stands, the complete guest is on two hosts, and both must be fenced before a third may start it: the
copy of one that is not is worth more than a start from the disk.

The revision of the last change is the fencing token: whoever holds an older one is not the owner any more. How the
changes fit into the hand-over is in docs/handover.md, and ``scripts/proof`` explores them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from migrated.fleet.keys import Keys
from migrated.fleet.model import Ownership
from migrated.fleet.store import Answer, Missing, Put, Read, Transaction, Unchanged
from protocol.effects import Outcome


class NotTheOwnerError(Exception):
    """The store's word is against it; the message is a sentence."""


def transferred(known: Ownership, destination: str, migration_id: str) -> Ownership:
    """The source makes the destination the owner, right before it journals COMMIT."""
    return Ownership(owner=destination, epoch=known.epoch + 1, previous=known.owner, migration_id=migration_id)


def reclaimed(known: Ownership, host: str) -> Ownership:
    """A host that has the guest, and knows that no other host will run it, makes sure that it is the owner. The write
    itself, even where nothing else changes, makes every delayed request void.

    Raises:
        NotTheOwnerError: it belongs to another host.
    """
    if known.owner == host:
        return known.model_copy(update={"epoch": known.epoch + 1})
    if known.previous == host:
        return Ownership(owner=host, epoch=known.epoch + 1)
    raise NotTheOwnerError(f"The guest belongs to {known.owner} now, not to {host}.")


def settled(known: Ownership, host: str, migration_id: str) -> Ownership:
    """The owner runs the guest that came by a migration: the copy that it came from does not count any more.

    Raises:
        NotTheOwnerError: it belongs to another host, or came by another migration.
    """
    if known.owner != host or known.migration_id != migration_id:
        raise NotTheOwnerError(f"The guest did not come to {host} by the migration {migration_id}.")
    return Ownership(owner=host, epoch=known.epoch + 1, migration_id=migration_id)


def given_back(known: Ownership, host: str, migration_id: str) -> Ownership:
    """The owner discarded the guest of a migration before it ran: it belongs to the host that it came from.

    Raises:
        NotTheOwnerError: it belongs to another host, or came by another migration.
    """
    if known.owner != host or known.migration_id != migration_id or known.previous is None:
        raise NotTheOwnerError(f"The guest did not come to {host} by the migration {migration_id}.")
    return Ownership(owner=known.previous, epoch=known.epoch + 1)


def taken(known: Ownership, host: str, fenced: Collection[str]) -> Ownership:
    """A host starts a guest whose hosts are fenced.

    Raises:
        NotTheOwnerError: a host that has it is not fenced.
    """
    for holder in (known.owner, known.previous):
        if holder is not None and holder not in fenced:
            raise NotTheOwnerError(
                f"The guest cannot be started on {host}: {holder} may have it and is not fenced. Fence {holder} first "
                "if it surely runs nothing."
            )
    return Ownership(owner=host, epoch=known.epoch + 1)


def change_owner(keys: Keys, guest: str, revision: int, after: Ownership, *, by: str | None) -> Transaction:
    """Write a change that was decided on what the key held at ``revision`` (0: it did not exist).

    Args:
        by: the host that changes it, which must not be fenced; None for a change that a fence does not concern.
    """
    key = keys.owner(guest)
    fences = () if by is None else (Missing(keys.fence(by)),)
    reads = (Read(key), *(Read(keys.fence(host)) for host in (by,) if host is not None))
    return Transaction((Unchanged(key, revision), *fences), (Put(key, after.to_bytes()),), reads)


def refusal_of(answer: Answer, guest: str, by: str) -> str:
    """Return the reason why ``change_owner`` was refused, a sentence."""
    entry, *fence = answer.found
    if any(found is not None for found in fence):
        return f"The host {by} is fenced: somebody said that it runs nothing, and {guest} may be started elsewhere."
    if entry is None:
        return f"The fleet's store knows no owner of {guest} any more."
    return f"The owner of {guest} was changed in the fleet's store since {by} last saw it."


class Keeper(Protocol):
    """The interface of the hand-over to the fleet: it carries out the effects of ``protocol.effects`` that concern
    ownership.

    Before a migration begins, whoever implements it writes the key anew (``reclaimed``), which ends every ``reclaim``
    of the guest that is still under way; ``transfer`` compares the revision of that write.
    """

    async def begin(self, guest: str, uri: str, migration_id: str) -> str | None:
        """Write anew that this host owns the guest, before an attempt to move it to ``uri`` begins. Returns why it
        cannot begin, a sentence; None when it can."""
        ...

    async def transfer(self, guest: str, migration_id: str, within_ns: int) -> Outcome:
        """Make the destination of a migration that has begun the owner: DONE, REFUSED, or FAILED when no yes came
        within the time."""
        ...

    async def token(self, guest: str, *, arriving: bool) -> int | None:
        """The fencing token with which this host takes the guest's lock: the revision at which it became, or last was,
        the owner. None while the store has not shown that it is.

        Args:
            arriving: a hand-over to here was just committed, so that the news may still be on its way; it is asked for
                for a few milliseconds then.

        Raises:
            NotTheOwnerError: the guest arrives, and the store says that it belongs to another host: the hand-over is
                overtaken, and the guest must not run here.
        """
        ...

    def why_not_here(self, guest: str) -> str | None:
        """Return why this host takes no guest of this name in, a sentence; None when it does: it is not cordoned, or a
        job was promised the place before."""
        ...

    async def confirm(self, guest: str) -> Outcome:
        """Make sure after a restart that this host is the owner: DONE, REFUSED, or FAILED without an answer."""
        ...

    def reclaim(self, guest: str) -> None:
        """Begin to write that this host is the owner, until it is there or refused."""
        ...
