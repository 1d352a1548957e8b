"""The client of etcd where an endpoint is away: reads go on elsewhere, a transaction is never sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from migrated.fleet.etcd import EtcdStore
from migrated.fleet.store import Missing, NoAnswerError, Put, Transaction, put
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd
from scripts.rig.ports import free_port

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
    return f"http://127.0.0.1:{free_port()}"


class Stranger:
    """Something that answers every request with 200 and the same document, and is not etcd."""

    def __init__(self, document: bytes) -> None:
        self.endpoint = ""
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(document), document)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(self._answer)


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


@pytest.mark.parametrize(
    "document", [b"{}", b'{"result": []}', b'{"header": {"revision": "x"}, "kvs": [{}]}', b'{"ID": []}']
)
async def test_what_is_not_etcd_is_no_answer_and_never_an_empty_store(document: bytes) -> None:
    """Above all not to the question who owns a guest."""
    stranger = Stranger(document)
    listener = await asyncio.start_server(stranger.take, "127.0.0.1", 0)
    store = EtcdStore([f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"], TIMEOUT_S)
    write = Transaction((Missing("/e/a"),), (Put("/e/a", b"1"),))
    watch = store.watch("/e/", 1)
    try:
        for call in (
            store.get("/e/a"), store.range("/e/"), store.transact(write), store.grant(5), store.keep_alive(5),
            anext(watch),
        ):  # fmt: skip
            with pytest.raises(NoAnswerError):
                await call
    finally:
        await store.close()
        listener.close()


async def test_calls_that_fail_at_once_go_on_at_the_same_endpoint(etcd: str, mute: Mute) -> None:
    """Each of them moved on by one, which led back to the endpoint that is away."""
    store = EtcdStore([mute.endpoint, etcd], 1.0)
    try:
        await asyncio.gather(store.get("/e/none"), store.get("/e/none"))
        assert await put(store, "/e/b", b"1")
    finally:
        await store.close()
    store = EtcdStore([mute.endpoint, etcd], 30.0)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):  # as a hand-over asks, which has no more time
                await put(store, "/e/b", b"2")
        assert await put(store, "/e/b", b"3")
    finally:
        await store.close()


async def test_a_key_that_is_no_text_hides_no_other(etcd: str) -> None:
    store = EtcdStore([etcd], TIMEOUT_S)
    raw = {"key": "L2Uv/w==", "value": "MQ=="}  # b"/e/\xff"
    try:
        revision = await put(store, "/e/a", b"1")
        async with aiohttp.ClientSession() as session, session.post(f"{etcd}/v3/kv/put", json=raw) as answer:
            assert answer.status == 200
        assert "/e/a" in [entry.key for entry in (await store.range("/e/")).entries]
        watch = store.watch("/e/", revision)
        assert [change.key for _ in range(2) for change in await anext(watch)] == ["/e/a", "/e/\\xff"]
        await watch.aclose()
    finally:
        await store.close()
