"""What commands do to the owner keys of a host's guests, and what odd keys do to the host: one host, a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrated.control.operations import JobRequest, OperationError
from migrated.fleet.etcd import EtcdStore
from migrated.fleet.keys import Keys
from migrated.fleet.model import HostDocument, HostSlots, Ownership, Reservation, parse
from migrated.fleet.store import Delete, Transaction, put
from migrated.host.fleet_side import FleetSide
from migrated.settings.config import FleetConfig
from migrated.vmm import spawn
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd
from scripts.rig.waiting import until
from tests.migrated.fleet.fleets import host
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


@pytest.mark.usefixtures("little_patience")
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


@pytest.mark.usefixtures("little_patience")
async def test_a_guest_that_does_not_answer_and_then_ends_has_no_owner_any_more(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    async with TinyHost(short_directory, fleet=fleet) as first:
        pid = await first.add_guest("g1")
        await first.let_go()
    with standing_still(pid):
        async with TinyHost(short_directory, fleet=fleet):
            assert await owner_of(store, keys.owner("g1")) is not None
            os.kill(pid, signal.SIGKILL)

            async def free() -> bool:
                return await store.get(keys.owner("g1")) is None

            await until("the key of the guest that ended deleted", free)


async def test_a_daemon_with_a_name_that_is_taken_keeps_out_of_the_fleet(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """Else both would count each other's guests as their own. When the other one leaves, the name is free."""
    async with TinyHost(short_directory / "1", fleet=fleet) as first, contextlib.AsyncExitStack() as stack:
        pid = await first.add_guest("g1")
        stack.push_async_callback(spawn.make_sure_gone, pid, 10)  # the host that lets go leaves it running
        await until("the first one in the fleet", lambda: _there(first))
        second = await stack.enter_async_context(TinyHost(short_directory / "2", fleet=fleet))
        with pytest.raises(OperationError, match=f"Another daemon is in the fleet as 'b', at {first.uri}"):
            await second.add_guest("g2")
        assert await store.get(keys.owner("g2")) is None
        assert second.operations.fleet is not None
        (seen,) = await second.operations.fleet.hosts()
        assert seen["address"] == first.uri
        assert [problem for problem in seen["problems"] if "Another daemon" in problem]
        await first.let_go()

        async def in_its_place() -> bool:
            try:
                return bool(await second.add_guest("g2"))
            except OperationError:
                return False

        await until("the second one in the place of the first", in_its_place)


async def _runs(here: TinyHost, name: str) -> bool:
    return {one["name"]: one["state"] for one in await here.operations.guest_list()}.get(name) == "running"


async def test_the_second_of_two_that_start_one_guest_leaves_the_owner_of_the_first(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    async with TinyHost(short_directory, fleet=fleet) as here:
        both = await asyncio.gather(here.add_guest("g1"), here.add_guest("g1"), return_exceptions=True)
        assert sorted(isinstance(one, OperationError) for one in both) == [False, True]
        await here.add_guest("g2")
        known = await owner_of(store, keys.owner("g1"))
        assert known is not None
        assert (known.owner, known.epoch) == ("b", 2), "the key was claimed twice and was there all the time"


async def test_a_guest_that_may_run_again_where_it_came_from_is_not_started_anew(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """It was handed over to here and is not here: a, which cannot reach the store, may have taken it back."""
    async with TinyHost(short_directory, fleet=fleet) as here:
        await put(store, keys.owner("g1"), Ownership(owner="b", epoch=5, previous="a", migration_id="m1").to_bytes())
        with pytest.raises(OperationError, match="a may have it and is not fenced"):
            await here.add_guest("g1")
        await put(store, keys.fence("a"), b'{"by": "me", "since_utc_ns": 1}')

        async def started() -> bool:
            try:
                return bool(await here.add_guest("g1"))
            except OperationError:
                return False  # the fence is not seen yet

        await until("the guest of a host that is fenced", started)
        known = await owner_of(store, keys.owner("g1"))
        assert known is not None
        assert (known.owner, known.previous) == ("b", None)


async def test_a_key_that_holds_no_owner_stops_nothing_but_its_guest(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    async with TinyHost(short_directory, fleet=fleet.model_copy(update={"lease_s": 2.0})) as here:
        await here.add_guest("g1")
        for name in ("g0", "g1"):
            await put(store, keys.owner(name), b"{}")
        with pytest.raises(OperationError, match="holds no Ownership"):
            await here.add_guest("g0")
        await here.add_guest("g2")  # looks at all keys of this host again

        async def told() -> bool:
            return await store.get(keys.guest("g2")) is not None

        await until("g2 told although g1 has no owner", told)


async def test_what_no_key_can_hold_is_refused_with_a_sentence(short_directory: Path, fleet: FleetConfig) -> None:
    async with TinyHost(short_directory, fleet=fleet) as here:
        asked = here.operations.fleet
        assert asked is not None
        await here.add_guest("g1")  # this host has told of itself by then
        await until("b in the fleet", lambda: _there(here))
        for refused in (asked.cordon("b", "x" * 501), asked.fence("b", "x" * 501)):
            with pytest.raises(OperationError, match="A reason has 500 characters at most; this one has 501"):
                await refused
        with pytest.raises(OperationError, match="256 hosts to go to at most"):
            await asked.evacuate(JobRequest(host="b", to=("b",) * 257))
        with pytest.raises(OperationError, match="Guests that leave the host 'b' cannot go to it"):
            await asked.evacuate(JobRequest(host="b", to=("b",)))


async def test_memory_of_a_guest_that_landed_and_is_gone_is_not_promised_for_ever(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """It ended, or the whole host did, before the host had counted it."""
    there = Reservation(guest="g9", job="j1", peer="a", memory_bytes=1 << 20, attempt=1, landed=True)
    coming = there.model_copy(update={"guest": "g8", "landed": False})
    await put(store, keys.slots_of("b"), HostSlots(inbound=(there, coming)).to_bytes())

    async def given_back() -> bool:
        entry = await store.get(keys.slots_of("b"))
        assert entry is not None
        return parse(HostSlots, entry.key, entry.value).inbound == (coming,)

    async with TinyHost(short_directory, fleet=fleet):
        await until("the memory of g9 given back", given_back)


async def other_host(store: EtcdStore, keys: Keys, name: str, address: str) -> None:
    """Another host says that it is in the fleet."""
    await put(store, keys.host(name), host(name, address=address).to_bytes())


async def refused(here: TinyHost, uri: str) -> str:
    """Why a migration of g1 does not begin."""
    try:
        await here.operations.migrate("g1", uri, {})
    except OperationError as error:
        return str(error)
    return ""


async def test_a_guest_is_not_sent_where_two_hosts_say_that_they_are(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """One of them would get the guest, and perhaps the other one the key."""
    async with TinyHost(short_directory, fleet=fleet) as here:
        await here.add_guest("g1")
        await other_host(store, keys, "c", "tcp:127.0.0.1:9")
        await other_host(store, keys, "d", "tcp:127.0.0.1:9")

        async def told_apart() -> bool:
            return "Several hosts say that they take guests at tcp:127.0.0.1:9: c, d" in await refused(
                here, "tcp:127.0.0.1:9"
            )

        await until("both hosts seen", told_apart)
        await other_host(store, keys, "d", here.uri)
        assert "No host of the fleet takes guests at tcp:127.0.0.1:8" in await refused(here, "tcp:127.0.0.1:8")

        async def itself_too() -> bool:
            return f"at {here.uri}: b, d" in await refused(here, here.uri)

        await until("the other one that says it is here", itself_too)


async def test_a_cordoned_host_says_so_and_refuses_what_no_job_was_promised(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """Whoever empties it relies on that: else what was begun by hand before would arrive when the job is over."""

    async def says_so() -> bool:
        entry = await store.get(keys.host("b"))
        return entry is not None and parse(HostDocument, entry.key, entry.value).cordon_seen is True

    async with TinyHost(short_directory / "1") as source, TinyHost(short_directory / "2", fleet=fleet) as there:
        await source.add_guest("g1")
        await until("host b in the fleet", lambda: _there(there))
        assert there.operations.fleet is not None
        await there.operations.fleet.cordon("b", "")
        await until("the cordon seen by its host", says_so)
        ended = await source.operations.wait(await source.operations.migrate("g1", there.uri, {}))
        assert ended["outcome"] == "refused"
        assert "The host b is cordoned: it takes no guests in" in ended["reason"]
        assert b'migrated_offers_refused_total{reason="cordon"} 1.0' in there.operations.metrics_text()


async def test_a_guest_in_doubt_is_not_claimed_and_an_error_does_not_end_what_is_told(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest ran at its new host and was ended there: the copy that stands here must not come to own its name."""
    attempts = FleetSide.attempts

    def once(_side: FleetSide) -> tuple[int, int]:
        monkeypatch.setattr(FleetSide, "attempts", attempts)
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(FleetSide, "attempts", once)
    quick = fleet.model_copy(update={"lease_s": 2.0})
    async with TinyHost(short_directory, fleet=quick) as here:
        await until("in the fleet all the same", lambda: _there(here))
        await here.add_guest("g1")
        here.guest("g1").overlay = "in-doubt"
        await store.transact(Transaction((), (Delete(keys.owner("g1")),)))
        for _ in range(2):
            await put(store, keys.cordon("b"), b"")
            await asyncio.sleep(0.15)  # each time the host looks at all its guests
        assert await owner_of(store, keys.owner("g1")) is None
        here.guest("g1").overlay = None


async def takes_and_says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)
    writer.close()


async def test_a_guest_whose_process_ends_while_it_is_moved_has_no_owner_any_more(
    short_directory: Path, fleet: FleetConfig, keys: Keys, store: EtcdStore
) -> None:
    """And of two who ask to move it at once the second one is refused, and does not spoil the first one's attempt."""
    silent = await asyncio.start_server(takes_and_says_nothing, "127.0.0.1", 0)
    uri = f"tcp:127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    await other_host(store, keys, "c", uri)
    async with TinyHost(short_directory, fleet=fleet) as here:
        pid = await here.add_guest("g1")
        before = await owner_of(store, keys.owner("g1"))
        both = await asyncio.gather(refused(here, uri), refused(here, uri))
        assert sorted(map(bool, both)) == [False, True], both
        assert "already being migrated" in "".join(both)
        begun = await owner_of(store, keys.owner("g1"))
        assert before is not None
        assert begun is not None
        assert begun.epoch == before.epoch + 1
        beginning = here.operations.progress("g1")[-1].migration_id[:8]  # is enough, also while it is under way
        ended = asyncio.create_task(here.operations.wait(beginning))
        os.kill(pid, signal.SIGKILL)

        async def free() -> bool:
            return await store.get(keys.owner("g1")) is None

        await until("the key of the guest that ended deleted", free)
        assert (await ended)["outcome"] == "failed"
    silent.close()


async def _there(here: TinyHost) -> bool:
    assert here.operations.fleet is not None
    return [one["name"] for one in await here.operations.fleet.hosts()] == ["b"]
