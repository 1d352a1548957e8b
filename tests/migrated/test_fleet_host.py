"""What commands do to the owner keys of a host's guests, and what odd keys do to the host: one host, a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrated.control.operations import OperationError
from migrated.fleet.etcd import EtcdStore
from migrated.fleet.keys import Keys
from migrated.fleet.model import Ownership, parse
from migrated.fleet.store import put
from migrated.settings.config import FleetConfig
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd
from scripts.rig.waiting import until
from tests.tiny_vmm.hosts import TinyHost, standing_still

pytestmark = pytest.mark.skipif(why_no_etcd() is not None, reason=why_no_etcd() or "")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with EtcdCluster(1) as cluster:
        yield cluster.endpoints[0]


@pytest.fixture
def fleet(endpoint: str, request: pytest.FixtureRequest) -> FleetConfig:
    """A fleet of its own for each test."""
    return FleetConfig(endpoints=(endpoint,), prefix=f"/{request.node.name}", name="b", memory_bytes=1 << 30)


@pytest.fixture
def keys(fleet: FleetConfig) -> Keys:
    return Keys(f"{fleet.prefix}/")


@pytest.fixture
async def store(endpoint: str) -> AsyncIterator[EtcdStore]:
    client = EtcdStore([endpoint], 10.0)
    yield client
    await client.close()


async def owner_of(store: EtcdStore, key: str) -> Ownership | None:
    entry = await store.get(key)
    return None if entry is None else parse(Ownership, key, entry.value)


async def test_a_guest_that_does_not_answer_keeps_its_owner_when_its_name_is_asked_for(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """Otherwise another host could start it beside the process that is still here."""
    async with TinyHost(short_directory, fleet=fleet) as first:
        pid = await first.add_guest("g1")
        await first.let_go()
    async with contextlib.AsyncExitStack() as stack:
        with standing_still(pid):
            later = await stack.enter_async_context(TinyHost(short_directory, fleet=fleet))
            before = await owner_of(store, keys.owner("g1"))
            assert before is not None
            with pytest.raises(OperationError, match="already on this host"):
                await later.add_guest("g1")
            await later.add_guest("g2")  # what was begun for g1 is over by then
            assert await owner_of(store, keys.owner("g1")) == before
        await until("g1 answers", lambda: _runs(later, "g1"))


async def _runs(host: TinyHost, name: str) -> bool:
    return {one["name"]: one["state"] for one in await host.operations.guest_list()}.get(name) == "running"


async def test_the_second_of_two_that_start_one_guest_leaves_the_owner_of_the_first(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    async with TinyHost(short_directory, fleet=fleet) as host:
        both = await asyncio.gather(host.add_guest("g1"), host.add_guest("g1"), return_exceptions=True)
        assert sorted(isinstance(one, OperationError) for one in both) == [False, True]
        await host.add_guest("g2")
        known = await owner_of(store, keys.owner("g1"))
        assert known is not None
        assert (known.owner, known.epoch) == ("b", 2), "the key was claimed twice and was there all the time"


async def test_a_guest_that_may_run_again_where_it_came_from_is_not_started_anew(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """It was handed over to here and is not here: a, which cannot reach the store, may have taken it back."""
    async with TinyHost(short_directory, fleet=fleet) as host:
        await put(store, keys.owner("g1"), Ownership(owner="b", epoch=5, previous="a", migration_id="m1").to_bytes())
        with pytest.raises(OperationError, match="a may have it and is not fenced"):
            await host.add_guest("g1")
        await put(store, keys.fence("a"), b'{"by": "me", "since_utc_ns": 1}')

        async def started() -> bool:
            try:
                return bool(await host.add_guest("g1"))
            except OperationError:
                return False  # the fence is not seen yet

        await until("the guest of a host that is fenced", started)
        known = await owner_of(store, keys.owner("g1"))
        assert known is not None
        assert (known.owner, known.previous) == ("b", None)


async def test_a_key_that_holds_no_owner_stops_nothing_but_its_guest(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    async with TinyHost(short_directory, fleet=fleet.model_copy(update={"lease_s": 2.0})) as host:
        await host.add_guest("g1")
        for name in ("g0", "g1"):
            await put(store, keys.owner(name), b"{}")
        with pytest.raises(OperationError, match="holds no Ownership"):
            await host.add_guest("g0")
        await host.add_guest("g2")  # looks at all keys of this host again

        async def told() -> bool:
            return await store.get(keys.guest("g2")) is not None

        await until("g2 told although g1 has no owner", told)
