"""What a fleet relies on of its store. The fake that simulations use must keep the same promises as etcd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from migrated.fleet.etcd import EtcdStore
from migrated.fleet.store import (
    PAGE_ENTRIES,
    Change,
    Delete,
    Exists,
    LeaseEndedError,
    Missing,
    Put,
    Read,
    Store,
    Transaction,
    Unchanged,
    put,
    read_all,
)
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd
from scripts.fleet.fake_store import FakeStore, FakeStoreClient


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    if (reason := why_no_etcd()) is not None:
        pytest.skip(reason)
    with EtcdCluster(1) as cluster:
        yield cluster.endpoints[0]


@pytest.fixture(params=["fake", "etcd"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "fake":
        yield FakeStoreClient(FakeStore(time.monotonic_ns))
        return
    client = EtcdStore([request.getfixturevalue("endpoint")], 10.0)
    for entry in (await read_all(client, "/t/"))[0]:
        await client.transact(Transaction((), (Delete(entry.key),)))
    yield client
    await client.close()


async def test_what_is_put_is_there_until_it_is_deleted(store: Store) -> None:
    assert await store.get("/t/k") is None
    revision = await put(store, "/t/k", b"\x00\xffv")
    entry = await store.get("/t/k")
    assert entry is not None
    assert (entry.key, entry.value, entry.revision, entry.lease) == ("/t/k", b"\x00\xffv", revision, 0)
    answer = await store.transact(Transaction((), (Delete("/t/k"), Delete("/t/none"))))
    assert answer.revision == revision + 1
    assert await store.get("/t/k") is None


async def test_a_transaction_is_one_branch_or_the_other(store: Store) -> None:
    first = await put(store, "/t/a", b"1")
    both = Transaction(
        (Unchanged("/t/a", first), Missing("/t/b"), Exists("/t/a")),
        (Put("/t/a", b"2"), Put("/t/b", b"2"), Read("/t/none")),
        (Read("/t/a"), Read("/t/b")),
    )
    done = await store.transact(both)
    assert done.succeeded
    assert done.found == (None,)
    entries = [await store.get(key) for key in ("/t/a", "/t/b")]
    assert [entry.revision if entry else None for entry in entries] == [done.revision] * 2
    again = await store.transact(both)
    assert not again.succeeded
    assert again.revision == done.revision
    assert [entry.value if entry else None for entry in again.found] == [b"2", b"2"]


async def test_a_key_that_does_not_exist_has_the_revision_0(store: Store) -> None:
    create = Transaction((Unchanged("/t/k", 0),), (Put("/t/k", b"1"),))
    assert (await store.transact(create)).succeeded
    assert not (await store.transact(create)).succeeded


async def test_a_range_comes_in_pages_of_one_revision(store: Store) -> None:
    count = PAGE_ENTRIES + 7
    for first in range(0, count, 100):
        keys = [f"/t/r/{number:05}" for number in range(first, min(first + 100, count))]
        await store.transact(Transaction((), tuple(Put(key, b"v") for key in keys)))
    await put(store, "/t/s", b"outside")
    page = await store.range("/t/r/")
    assert page.more
    assert len(page.entries) == PAGE_ENTRIES
    await put(store, "/t/r/99999", b"later")
    rest = await store.range("/t/r/", after=page.entries[-1].key, revision=page.revision)
    assert [entry.key for entry in rest.entries] == [f"/t/r/{number:05}" for number in range(PAGE_ENTRIES, count)]
    assert not rest.more
    entries, revision = await read_all(store, "/t/r/")
    assert len(entries) == count + 1
    assert revision > page.revision


async def test_a_key_ends_with_its_lease(store: Store) -> None:
    lease = await store.grant(60)
    await put(store, "/t/leased", b"v", lease)
    await put(store, "/t/free", b"v")
    entry = await store.get("/t/leased")
    assert entry is not None
    assert entry.lease == lease
    await store.keep_alive(lease)
    await store.revoke(lease)
    await store.revoke(lease)
    assert await store.get("/t/leased") is None
    assert await store.get("/t/free") is not None
    with pytest.raises(LeaseEndedError):
        await store.keep_alive(lease)
    with pytest.raises(LeaseEndedError):
        await put(store, "/t/leased", b"v", lease)


async def test_a_watch_tells_every_change_since_its_revision_one_revision_at_a_time(store: Store) -> None:
    """Before the watch begins and after; deletions; those of other keys not at all."""
    first = await put(store, "/t/w/a", b"1")
    await put(store, "/t/other", b"1")
    watch = store.watch("/t/w/", first)
    seen = [await asyncio.wait_for(anext(watch), 5)]
    lease = await store.grant(60)
    pair = Transaction((), (Put("/t/w/a", b"2"), Put("/t/w/b", b"2", lease), Put("/t/other", b"2")))
    second = (await store.transact(pair)).revision
    seen.append(await asyncio.wait_for(anext(watch), 5))
    await store.transact(Transaction((), (Delete("/t/w/a"),)))
    await store.revoke(lease)
    seen += [await asyncio.wait_for(anext(watch), 5) for _ in range(2)]
    await watch.aclose()
    assert [[(change.key, change.entry and change.entry.value) for change in changes] for changes in seen] == [
        [("/t/w/a", b"1")],
        [("/t/w/a", b"2"), ("/t/w/b", b"2")],
        [("/t/w/a", None)],
        [("/t/w/b", None)],
    ]
    assert [changes[0].revision for changes in seen[:2]] == [first, second]
    assert isinstance(seen[0][0], Change)
