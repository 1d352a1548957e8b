"""Owner keys as a daemon writes them: fencing tokens, what is given back, and what a boot of the host ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from migrated.control.operations import OperationError
from migrated.fleet.model import Cordon, HostSlots, Ownership, Reservation
from migrated.fleet.ownership import NotTheOwnerError
from migrated.fleet.store import Answer, Entry, NoAnswerError, Transaction, put
from migrated.member.follower import Follower
from migrated.member.identity import Identity, boot_id
from migrated.member.leftovers import BOOT_ID, Leftovers
from migrated.member.owners import Owners
from scripts.fleet.fake_store import FakeStore, FakeStoreClient
from scripts.rig.waiting import until
from tests.migrated.fleet.fleets import KEYS


@dataclass
class Here:
    """What these tests ask of a host."""

    guests: set[str] = field(default_factory=set)
    discards: set[str] = field(default_factory=set)
    pids: dict[str, int] = field(default_factory=dict)

    def is_here(self, guest: str) -> bool:
        return guest in self.guests

    def processes(self) -> dict[str, int]:
        return self.pids

    def discarded(self, migration_id: str) -> bool:
        return migration_id in self.discards


@dataclass
class Fleet:
    """A store, and host b with its mirror of it."""

    store: FakeStoreClient
    follower: Follower
    owners: Owners
    here: set[str]
    """Guests that are here, or on their way here."""

    async def own(self, guest: str, owner: str, previous: str | None = None, migration_id: str | None = None) -> int:
        """Write an owner, and wait until host b has seen it."""
        owned = Ownership(owner=owner, epoch=3, previous=previous, migration_id=migration_id)
        revision = await put(self.store, KEYS.owner(guest), owned.to_bytes())
        assert await self.follower.until(lambda: self.follower.mirror.owners.get(guest) == owned, 5)
        return revision

    async def owner(self, guest: str) -> Ownership | None:
        entry = await self.store.get(KEYS.owner(guest))
        return None if entry is None else Ownership.model_validate_json(entry.value)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    store = FakeStoreClient(FakeStore(lambda: 0))
    follower = Follower(store, KEYS)
    here = set[str]()
    owners = Owners(follower, "b", Identity("b", tmp_path, boot_id()), here.__contains__)
    following = asyncio.create_task(follower.run())
    await follower.ready.wait()
    yield Fleet(store, follower, owners, here)
    await owners.close()
    following.cancel()


async def test_the_token_is_the_revision_at_which_the_host_became_the_owner(fleet: Fleet) -> None:
    revision = await fleet.own("g", "b")
    assert await fleet.owners.token("g", arriving=False) == revision
    await fleet.own("g", "c")
    assert await fleet.owners.token("g", arriving=False) == revision, "too old for the lock, which is what it is for"
    kept = await fleet.own("g", "c", previous="b")
    assert await fleet.owners.token("g", arriving=False) == kept, "the hand-over that it may take back"


async def test_the_token_of_an_arrival_is_asked_of_the_store_and_never_an_old_one(fleet: Fleet) -> None:
    await fleet.own("g", "b")
    await fleet.owners.token("g", arriving=False)
    await fleet.own("g", "a", previous="b")
    with pytest.raises(NotTheOwnerError, match="belongs to a now, not to b"):
        await fleet.owners.token("g", arriving=True)  # what arrives was handed over before that
    assert await fleet.owners.token("unknown", arriving=True) is None
    revision = await put(fleet.store, KEYS.owner("g"), Ownership(owner="b", epoch=9, previous="a").to_bytes())
    assert await fleet.owners.token("g", arriving=True) == revision, "before the watch has told it"


async def test_a_cordoned_host_takes_only_what_a_job_was_promised(fleet: Fleet) -> None:
    assert fleet.owners.why_not_here("g") is None
    there = Reservation(guest="promised", job="j1", peer="a", memory_bytes=1, attempt=1)
    landed = there.model_copy(update={"guest": "landed", "landed": True})
    await put(fleet.store, KEYS.slots_of("b"), HostSlots(inbound=(there, landed)).to_bytes())
    await put(fleet.store, KEYS.cordon("b"), Cordon(by="x", since_utc_ns=0).to_bytes())
    assert await fleet.follower.until(lambda: "b" in fleet.follower.mirror.cordons, 5)
    assert fleet.owners.why_not_here("promised") is None
    for guest in ("g", "landed"):
        assert "The host b is cordoned" in str(fleet.owners.why_not_here(guest))


async def test_a_discarded_guest_is_given_back_and_no_other(fleet: Fleet, tmp_path: Path) -> None:
    here = Here(guests={"here"}, discards={"m1", "m2"})
    leftovers = Leftovers(fleet.follower, here, fleet.owners, "b", tmp_path)
    await fleet.own("gone", "b", previous="a", migration_id="m1")
    await fleet.own("here", "b", previous="a", migration_id="m2")
    await fleet.own("open", "b", previous="a", migration_id="m3")
    await fleet.own("lost", "b")
    await leftovers.see_to()
    assert await fleet.owner("gone") == Ownership(owner="a", epoch=4)
    for guest in ("here", "open", "lost"):
        found = await fleet.owner(guest)
        assert found is not None
        assert found.owner == "b"


@pytest.mark.parametrize("before", [None, "this", "another"])
async def test_a_boot_ends_the_guests_before_it(fleet: Fleet, tmp_path: Path, before: str | None) -> None:
    """A daemon that never saw a boot before, or saw this one, lets go of nothing."""
    if before is not None:
        (tmp_path / BOOT_ID).write_text(boot_id() if before == "this" else before, encoding="ascii")
    here = Here(guests={"here"})
    await fleet.own("ended", "b")
    await fleet.own("here", "b")
    await fleet.own("elsewhere", "a")
    await fleet.own("in-doubt", "b", previous="a", migration_id="m1")
    leftovers = Leftovers(fleet.follower, here, fleet.owners, "b", tmp_path)
    await leftovers.see_to()
    gone = before == "another"
    assert await fleet.follower.until(lambda: ("ended" not in fleet.follower.mirror.owners) == gone, 5)
    assert set(fleet.follower.mirror.owners) == {"here", "elsewhere", "in-doubt"} | (set() if gone else {"ended"})
    await leftovers.see_to()
    assert (tmp_path / BOOT_ID).read_text(encoding="ascii").strip() == boot_id()


async def test_a_guest_whose_process_ended_while_no_daemon_was_here_is_let_go_of(fleet: Fleet, tmp_path: Path) -> None:
    """One that is only not found may run on: its socket may be gone. And one that was never noted says nothing."""
    process = await asyncio.create_subprocess_exec("sleep", "60")
    here = Here({"ended", "hidden"}, pids={"ended": process.pid, "hidden": os.getpid()})
    for guest in ("ended", "hidden", "never-noted"):
        await fleet.own(guest, "b")
    await Leftovers(fleet.follower, here, fleet.owners, "b", tmp_path).see_to()
    process.kill()
    await process.wait()
    later = Leftovers(fleet.follower, Here(), fleet.owners, "b", tmp_path)
    await later.see_to()
    assert await fleet.follower.until(lambda: "ended" not in fleet.follower.mirror.owners, 5)
    await later.see_to()
    assert set(fleet.follower.mirror.owners) == {"hidden", "never-noted"}


async def test_a_full_disk_ends_nothing_and_what_it_left_of_a_file_is_no_other_boot(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Else the host would leave the fleet, or other hosts could start guests that are here and were not found."""
    await fleet.own("lost", "b")
    kept, in_the_way = tmp_path / BOOT_ID, tmp_path / f"{BOOT_ID}.new"
    kept.touch()
    in_the_way.mkdir()
    leftovers = Leftovers(fleet.follower, Here(), fleet.owners, "b", tmp_path)
    await leftovers.see_to()
    in_the_way.rmdir()
    await leftovers.see_to()
    assert kept.read_text(encoding="ascii").strip() == boot_id()
    await asyncio.sleep(0.1)  # a key that was let go of by mistake would be deleted by a task of its own
    assert await fleet.owner("lost") is not None


async def test_a_claim_that_was_not_answered_leaves_no_owner(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest was not started, and no other host could start it: it may have been carried out."""
    transact = fleet.store.transact

    async def answer_lost(transaction: Transaction) -> Answer:
        assert (await transact(transaction)).succeeded
        monkeypatch.setattr(fleet.store, "transact", transact)
        raise NoAnswerError("lost on its way")

    monkeypatch.setattr(fleet.store, "transact", answer_lost)
    with pytest.raises(OperationError, match="lost on its way"):
        await fleet.owners.claim_new("new")

    async def free() -> bool:
        return await fleet.owner("new") is None

    await until("the key deleted", free, 5)


async def test_the_key_of_a_guest_that_came_since_is_not_let_go_of(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier guest of its name ended while the store was away from here, and the answer to that was lost."""
    get = fleet.store.get
    back = asyncio.Event()

    async def not_yet(key: str) -> Entry | None:
        if not back.is_set():
            raise NoAnswerError("it cannot be reached from here")
        return await get(key)

    await fleet.own("g", "b")
    monkeypatch.setattr(fleet.store, "get", not_yet)
    fleet.owners.release("g")
    fleet.here.add("g")
    await fleet.own("g", "b", previous="a", migration_id="m2")
    back.set()
    await asyncio.sleep(0.7)  # it looks twice a second
    assert await fleet.owner("g") is not None


async def test_a_guest_that_is_being_started_is_no_leftover(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / BOOT_ID).write_text("another", encoding="ascii")
    await fleet.owners.claim_new("new")
    await Leftovers(fleet.follower, Here(), fleet.owners, "b", tmp_path).see_to()
    await asyncio.sleep(0.1)  # a key that was let go of by mistake would be deleted by a task of its own
    found = await fleet.owner("new")
    assert found is not None
    assert found.owner == "b"
