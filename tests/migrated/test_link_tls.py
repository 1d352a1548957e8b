"""Connections between two ends in one process: what TLS lets through, and the sentence for everything it does not.

connect(...)  ---- real TCP on loopback ----  Listener -> what came first
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import structlog

from migrated.base.errors import LinkLostError
from migrated.link import sockets
from migrated.link.data import DataChannel
from migrated.link.sockets import Connection
from protocol import messages
from protocol.messages import Barrier, Message
from protocol.versions import MAJOR, pack_preface
from scripts.authority import Authority, HostFiles
from tests.migrated.certificates import past, security_of
from tests.migrated.listeners import ASK, WAIT_S, listening, refusal


async def test_two_hosts_of_one_authority_talk_and_know_each_other(pki: Authority) -> None:
    a = security_of(pki.host("a.example", "127.0.0.1"))
    async with listening(security_of(pki.host("b.example", "127.0.0.1"))) as server:
        connection = await server.connect(a)
        await sockets.send_first(connection, ASK)
        first, accepted = await asyncio.wait_for(server.taken.get(), WAIT_S)
        assert first == ASK
        assert connection.wire.names == ("127.0.0.1", "b.example")
        assert accepted.wire.names == ("127.0.0.1", "a.example")
        assert server.listener.connections == 1
        connection.wire.close()
        accepted.wire.close()
        assert server.listener.connections == 0


@dataclass
class Mismatch:
    """Two ends that must not talk, and what each says."""

    client: Callable[[Authority, Authority], HostFiles | None]
    server: Callable[[Authority, Authority], HostFiles | None]
    client_says: str
    server_says: str


def good(name: str) -> Callable[[Authority, Authority], HostFiles]:
    return lambda ours, _: ours.host(name, "127.0.0.1")


def foreign(name: str) -> Callable[[Authority, Authority], HostFiles]:
    """Certified by strangers, and believing our authority."""

    def make(ours: Authority, theirs: Authority) -> HostFiles:
        files = theirs.host(name, "127.0.0.1")
        return HostFiles(files.certificate, files.key, ours.path)

    return make


def expired(name: str) -> Callable[[Authority, Authority], HostFiles]:
    return lambda ours, _: ours.host(name, "127.0.0.1", not_before=past(30), not_after=past(1))


def early(name: str) -> Callable[[Authority, Authority], HostFiles]:
    return lambda ours, _: ours.host(name, "127.0.0.1", not_before=past(-1), not_after=past(-30))


def self_signed(name: str) -> Callable[[Authority, Authority], HostFiles]:
    """A host that is its own authority."""

    def make(ours: Authority, _theirs: Authority) -> HostFiles:
        own = Authority(ours.directory / f"own-{name}", name)
        return HostFiles(own.path, own.directory / "authority.key", ours.path)

    return make


MISMATCHES = {
    "a client of another authority": Mismatch(
        foreign("x.example"),
        good("b.example"),
        "does not know the authority of our certificate",
        "of another authority",
    ),
    "a server of another authority": Mismatch(
        good("a.example"),
        foreign("y.example"),
        "of another authority",
        "does not know the authority of our certificate",
    ),
    "an expired client": Mismatch(
        expired("late-a.example"), good("b.example"), "our certificate has expired", "has expired: renew it there"
    ),
    "an expired server": Mismatch(
        good("a.example"), expired("late-b.example"), "has expired: renew it there", "our certificate has expired"
    ),
    "a client before its time": Mismatch(
        early("early.example"), good("b.example"), "does not take our certificate", "compare the clocks of both hosts"
    ),
    "a self-signed client": Mismatch(self_signed("s.example"), good("b.example"), "no TLS with", "self-signed"),
    "a self-signed server": Mismatch(good("a.example"), self_signed("t.example"), "self-signed", "no TLS with"),
    "a server of another name": Mismatch(
        good("a.example"), lambda ours, _: ours.host("c.example"), "does not carry 127.0.0.1", "no TLS with"
    ),
    "a plain client": Mismatch(
        lambda _ours, _theirs: None,
        good("b.example"),
        "this destination takes TLS only",
        "it does not use TLS and we do",
    ),
    "a plain server": Mismatch(
        good("a.example"),
        lambda _ours, _theirs: None,
        "it does not use TLS and we do",
        "opened with TLS and [tls] is not",
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES.values(), ids=MISMATCHES.keys())
async def test_a_handshake_that_must_fail_says_why_on_both_sides(
    pki: Authority, strangers: Authority, mismatch: Mismatch
) -> None:
    server_files, client_files = mismatch.server(pki, strangers), mismatch.client(pki, strangers)
    with structlog.testing.capture_logs() as logs:
        async with listening(security_of(server_files)) as server:
            with pytest.raises(LinkLostError) as told:
                await server.ask(security_of(client_files))
            await refusal(server)
            assert server.taken.empty()
    assert mismatch.client_says in str(told.value)
    assert f"127.0.0.1:{server.port}" in str(told.value)
    (line,) = [line for line in logs if line["event"] == "a connection was refused"]
    assert mismatch.server_says in line["reason"]


@pytest.mark.parametrize(
    ("version", "with_certificate", "said"),
    [
        (ssl.TLSVersion.TLSv1_3, False, "it showed no certificate"),
        (ssl.TLSVersion.TLSv1_2, True, "it does not speak TLS 1.3"),
    ],
)
async def test_a_client_without_certificate_or_of_an_older_version(
    pki: Authority, version: ssl.TLSVersion, with_certificate: bool, said: str
) -> None:
    files = pki.host("a.example", "127.0.0.1")
    context = ssl.create_default_context(cafile=str(pki.path))
    context.maximum_version = version
    if with_certificate:
        context.load_cert_chain(files.certificate, files.key)
    with structlog.testing.capture_logs() as logs:
        async with listening(security_of(pki.host("b.example", "127.0.0.1"))) as server:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
                assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
                writer.close()
            assert await refusal(server) == "tls"
    assert any(said in line.get("reason", "") for line in logs)


@pytest.mark.parametrize(
    "opening", [b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n" * 10, b"\x16\x03\x01" + b"\xff" * 600, bytes(100)]
)
async def test_what_is_no_tls_is_refused(pki: Authority, opening: bytes) -> None:
    async with listening(security_of(pki.host("b.example", "127.0.0.1"))) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(opening)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), WAIT_S)
        assert await refusal(server) == "tls"
        writer.close()


async def test_a_recorded_session_is_worth_nothing(pki: Authority) -> None:
    """Every byte that an honest client sent, sent again."""
    a, b = security_of(pki.host("a.example", "127.0.0.1")), security_of(pki.host("b.example", "127.0.0.1"))
    sent: list[bytes] = []
    async with listening(b) as server:
        tls = a.connecting("127.0.0.1", "127.0.0.1", "b")
        assert tls is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        received = b""
        while not tls.handshake(received):
            sent.append(tls.to_send())
            writer.write(sent[-1])
            received = await asyncio.wait_for(reader.read(1 << 16), WAIT_S)
        head = messages.frame_head(MAJOR, ASK, sequence=0)
        sent.append(tls.to_send() + tls.encrypt(pack_preface(1 << 20), head))
        writer.write(sent[-1])
        first, accepted = await asyncio.wait_for(server.taken.get(), WAIT_S)
        assert first == ASK
        accepted.wire.close()
        writer.close()

        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for piece in sent:
            writer.write(piece)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), WAIT_S)
        assert await refusal(server) == "tls"
        assert server.taken.empty()
        writer.close()


async def test_bulk_data_arrives_as_it_was_sent_whatever_its_pieces(pki: Authority) -> None:
    a = security_of(pki.host("a.example", "127.0.0.1"))
    content = memoryview(bytes(range(256)) * (3 << 12) + b"end")  # 3 MiB and a bit
    pieces = [content[:1], content[1:1], content[1:70_000], content[70_000:]]
    async with listening(security_of(pki.host("b.example", "127.0.0.1"))) as server:
        connection = await server.connect(a)
        await sockets.send_first(connection, ASK)
        _, accepted = await asyncio.wait_for(server.taken.get(), WAIT_S)
        sending, receiving = DataChannel(connection, 0), DataChannel(accepted, 0)
        arrived = memoryview(bytearray(len(content)))
        places = [arrived[:5], arrived[5:100_000], arrived[100_000:]]

        def receive() -> Message:
            header, message = receiving.read_header()
            assert header.payload_bytes == len(content)
            receiving.read_into(places)
            return message

        reading = asyncio.create_task(asyncio.to_thread(receive))
        await asyncio.to_thread(sending.send, Barrier(round=1), pieces, 1)
        assert await asyncio.wait_for(reading, WAIT_S) == Barrier(round=1)
        assert arrived == content
        ending = asyncio.create_task(asyncio.to_thread(receiving.read_header))
        sending.close()
        with pytest.raises(LinkLostError, match="was closed by the peer"):
            await asyncio.wait_for(ending, WAIT_S)
        receiving.close()


async def test_strangers_make_room_and_who_is_honest_gets_through(pki: Authority) -> None:
    """Connections that say nothing, and half of a handshake, from the same address."""
    a = security_of(pki.host("a.example", "127.0.0.1"))
    async with listening(security_of(pki.host("b.example", "127.0.0.1")), max_handshakes=8) as server:
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(40)]
        for _, writer in idle[::2]:
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00")
        for _ in range(32):
            assert await refusal(server) == "slow"
        assert server.listener.connections <= 9
        assert isinstance(await server.ask(a), messages.Discarded)
        for _, writer in idle:
            writer.close()


async def test_connections_are_counted_by_address_and_given_back() -> None:
    plain = security_of(None)
    async with listening(plain, max_connections=8, max_connections_per_address=4) as server:
        held: list[Connection] = []
        for _ in range(4):
            held.append(await server.connect(plain))
            await sockets.send_first(held[-1], ASK)
        accepted = [(await asyncio.wait_for(server.taken.get(), WAIT_S))[1] for _ in range(4)]
        with pytest.raises(LinkLostError):
            await server.ask(plain)
        assert await refusal(server) == "full"
        accepted[0].wire.close()
        assert isinstance(await server.ask(plain), messages.Discarded)
        for connection in (*held, *accepted):
            connection.wire.close()
        assert server.listener.connections == 0
