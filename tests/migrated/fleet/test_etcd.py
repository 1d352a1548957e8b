"""The client of etcd where an endpoint is away: reads go on elsewhere, a transaction is never sent twice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from migrated.fleet.etcd import EtcdStore
from migrated.fleet.store import Missing, NoAnswerError, Put, Transaction, put
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def etcd() -> Iterator[str]:
    if (reason := why_no_etcd()) is not None:
        pytest.skip(reason)
    with EtcdCluster(1) as cluster:
        yield cluster.endpoints[0]


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class Mute:
    """A server that takes requests and never answers."""

    def __init__(self) -> None:
        self.requests = 0
        self.endpoint = ""

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        await reader.read(-1)
        writer.close()


@pytest.fixture
async def mute() -> AsyncIterator[Mute]:
    server = Mute()
    listener = await asyncio.start_server(server.take, "127.0.0.1", 0)
    server.endpoint = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield server
    listener.close()
    await listener.wait_closed()


async def test_an_endpoint_that_cannot_be_reached_is_passed_over(etcd: str, closed: str) -> None:
    store = EtcdStore([closed, etcd], TIMEOUT_S)
    try:
        revision = await put(store, "/e/a", b"1")
        entry = await store.get("/e/a")
        assert entry is not None
        assert entry.revision == revision
        changes = await anext(store.watch("/e/", revision))
        assert [change.key for change in changes] == ["/e/a"]
        assert store.clock_offset_ns is not None
        assert abs(store.clock_offset_ns) <= 1_000_000_000
    finally:
        await store.close()


async def test_a_read_goes_on_where_somebody_answers_and_a_transaction_is_not_sent_again(etcd: str, mute: Mute) -> None:
    store = EtcdStore([mute.endpoint, etcd], TIMEOUT_S)
    try:
        assert await store.get("/e/none") is None
        assert mute.requests == 1
    finally:
        await store.close()
    store = EtcdStore([mute.endpoint, etcd], TIMEOUT_S)
    try:
        create = Transaction((Missing("/e/once"),), (Put("/e/once", b"1"),))
        with pytest.raises(NoAnswerError, match="does not answer"):
            await store.transact(create)
        assert mute.requests == 2
        assert await store.get("/e/once") is None
        assert (await store.transact(create)).succeeded
    finally:
        await store.close()


async def test_a_call_that_nobody_answers_ends_in_time(closed: str, mute: Mute) -> None:
    store = EtcdStore([closed, mute.endpoint], 0.3)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(NoAnswerError):
                await store.get("/e/a")
            with pytest.raises(NoAnswerError):
                await anext(store.watch("/e/", 1))
    finally:
        await store.close()
