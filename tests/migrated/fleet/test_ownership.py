"""Who owns a guest: each change with the host that may make it, and the transaction that makes it."""

from __future__ import annotations

import pytest

from migrated.fleet import ownership
from migrated.fleet.model import Fence, Ownership, parse
from migrated.fleet.ownership import NotTheOwnerError, change_owner, refusal_of
from migrated.fleet.store import Put, Transaction
from scripts.fleet.fake_store import FakeStore
from tests.migrated.fleet.fleets import KEYS

A = Ownership(owner="a", epoch=4)
MOVING = Ownership(owner="b", epoch=5, previous="a", migration_id="m1")


def test_a_hand_over_goes_from_one_owner_to_the_next() -> None:
    assert ownership.transferred(A, "b", "m1") == MOVING
    assert ownership.settled(MOVING, "b", "m1") == Ownership(owner="b", epoch=6, migration_id="m1")
    assert ownership.given_back(MOVING, "b", "m1") == Ownership(owner="a", epoch=6)
    assert ownership.reclaimed(MOVING, "a") == Ownership(owner="a", epoch=6)
    assert ownership.reclaimed(A, "a") == Ownership(owner="a", epoch=5), "written anew, so that older requests are void"


@pytest.mark.parametrize(
    "change",
    [
        lambda: ownership.reclaimed(A, "b"),
        lambda: ownership.settled(MOVING, "a", "m1"),
        lambda: ownership.settled(MOVING, "b", "m0"),
        lambda: ownership.given_back(MOVING, "b", "m0"),
        lambda: ownership.given_back(A, "a", "m1"),
        lambda: ownership.taken(MOVING, "c", {"b"}),
        lambda: ownership.taken(MOVING, "c", {"a"}),
        lambda: ownership.taken(A, "c", ()),
    ],
)
def test_nobody_else_can_change_it(change: object) -> None:
    assert callable(change)
    with pytest.raises(NotTheOwnerError):
        change()


def test_a_third_host_takes_a_guest_when_all_that_have_it_are_fenced() -> None:
    assert ownership.taken(MOVING, "c", {"a", "b"}) == Ownership(owner="c", epoch=6)
    assert ownership.taken(A, "c", {"a"}) == Ownership(owner="c", epoch=5)


def test_the_transaction_compares_revision_and_fence_and_says_why_not() -> None:
    store = FakeStore(lambda: 0)
    created = store.transact(change_owner(KEYS, "g", 0, A, by="a"))
    assert created.succeeded
    moved = change_owner(KEYS, "g", created.revision, MOVING, by="a")
    store.transact(Transaction((), (Put(KEYS.fence("a"), Fence(by="me", since_utc_ns=0).to_bytes()),)))
    fenced = store.transact(moved)
    assert not fenced.succeeded
    assert refusal_of(fenced, "g", "a").startswith("The host a is fenced")
    by_fleet = change_owner(KEYS, "g", created.revision, MOVING, by=None)
    assert store.transact(by_fleet).succeeded
    late = store.transact(by_fleet)
    assert not late.succeeded
    assert refusal_of(late, "g", "a") == "The owner of g was changed in the fleet's store since a last saw it."
    entry = store.get(KEYS.owner("g"))
    assert entry is not None
    assert parse(Ownership, entry.key, entry.value) == MOVING
