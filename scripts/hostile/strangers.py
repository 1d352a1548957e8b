"""Attacks without a certificate of the authority, and with one that is not good: nothing of them may be heard.

stranger --TCP, anything--> [a place? TLS 1.3 with a certificate of ours?] --> nothing of it gets here
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from migrated.base.errors import LinkLostError
from migrated.link.security import LinkSecurity
from migrated.settings.config import AuthorisationConfig, TlsConfig
from protocol import messages
from protocol.messages import FrameType
from scripts.authority import Authority, HostFiles
from scripts.hostile.ground import Case, Ground, NotHeldError, addresses, connections_gone
from scripts.rig.hostile import ADDRESS, PLAIN, connect, hello_of, reach

_FLOOD: Final = 400
_HOLD_S: Final = 4.0
_GARBAGE_BYTES: Final = 4096
_TRIES: Final = 20
_GONE_S: Final = 15.0
"""Ten seconds for a stranger to tell what it is, and some."""


async def _open(ground: Ground, places: Sequence[str]) -> list[socket.socket]:
    """A connection from each address; those that are turned away at once count too."""
    opened = []
    for address in places:
        with contextlib.suppress(OSError):
            opened.append(await reach(ground.pair, address))
    return opened


async def _hold(ground: Ground, places: Sequence[str], hold_s: float = _HOLD_S) -> None:
    """Open connections, say nothing, hold them for a while; the last is not refused because of the first."""
    held = await _open(ground, places)
    try:
        await asyncio.sleep(hold_s)
    finally:
        for sock in held:
            sock.close()
    await connections_gone(ground, _GONE_S)


async def half_open_from_one(ground: Ground) -> None:
    """Many silent connections from one address."""
    await _hold(ground, [ADDRESS] * _FLOOD)


async def half_open_from_many(ground: Ground) -> None:
    """Many silent connections, each from an address of its own: more than the host takes in all."""
    await _hold(ground, addresses(600))


async def garbage(ground: Ground) -> None:
    """Random bytes on many connections, one after the other."""
    draw, loop = random.Random(13), asyncio.get_running_loop()
    for _ in range(_FLOOD):
        sock = await reach(ground.pair)
        with sock, contextlib.suppress(OSError):
            await loop.sock_sendall(sock, draw.randbytes(_GARBAGE_BYTES))
    await connections_gone(ground, _GONE_S)


async def slow_handshakes(ground: Ground) -> None:
    """Handshakes whose first message comes byte by byte, as many as one address may begin."""
    loop, hello = asyncio.get_running_loop(), _client_hello()

    async def drip() -> None:
        sock = await reach(ground.pair)
        with sock, contextlib.suppress(OSError):
            for byte in hello[:40]:
                await loop.sock_sendall(sock, bytes([byte]))
                await asyncio.sleep(0.1)  # the slowness is the attack

    await asyncio.gather(*(drip() for _ in range(24)))
    await connections_gone(ground, _GONE_S)


def _client_hello() -> bytes:
    """The first message of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="b.example")
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


async def handshakes_cut_short(ground: Ground) -> None:
    """A first message that makes the host compute its answer, again and again, and nobody reads the answer."""
    loop, hello = asyncio.get_running_loop(), _client_hello()
    for _ in range(_FLOOD):
        sock = await reach(ground.pair)
        with sock, contextlib.suppress(OSError):
            await loop.sock_sendall(sock, hello)
    await connections_gone(ground, _GONE_S)


def _security(files: HostFiles, ground: Ground) -> LinkSecurity:
    """What a peer with these files would use, believing the hosts' authority."""
    section = {**files.section(), "authority": str(ground.authority.path)}
    return LinkSecurity(TlsConfig(**section), AuthorisationConfig())


async def _offer_is_not_heard(ground: Ground, security: LinkSecurity) -> None:
    """An offer over a connection that must not come about."""
    for _ in range(_TRIES):
        try:
            async with asyncio.timeout(_GONE_S):
                peer = await connect(ground.pair, security)
                await peer.send(FrameType.HELLO, hello_of(ground.description, "0" * 32))
                answer = await peer.receive()
        except (LinkLostError, OSError):
            continue
        peer.wire.close()
        raise NotHeldError(f"a host without a good certificate was answered: {answer!r:.200}")


async def another_authority(ground: Ground) -> None:
    """A certificate of an authority that nobody here knows, with the name of a host that may come."""
    with tempfile.TemporaryDirectory(prefix="pki-") as place:
        await _offer_is_not_heard(ground, _security(Authority(Path(place)).host("a.example", "127.0.0.1"), ground))


async def self_signed(ground: Ground) -> None:
    """A certificate that certifies itself."""
    with tempfile.TemporaryDirectory(prefix="pki-") as place:
        own = Authority(Path(place), "a.example")
        files = HostFiles(own.path, own.directory / "authority.key", own.path)
        await _offer_is_not_heard(ground, _security(files, ground))


async def expired(ground: Ground) -> None:
    """A certificate of the authority that was good until yesterday."""
    now = datetime.now(UTC)
    files = ground.authority.host(
        "old.example", "127.0.0.1", not_before=now - timedelta(days=3), not_after=now - timedelta(days=1)
    )
    await _offer_is_not_heard(ground, _security(files, ground))


async def no_certificate(ground: Ground) -> None:
    """TLS 1.3 without a certificate: what is sent behind the handshake is never read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ground.authority.path)
    context.check_hostname = False
    await _alert(ground, context, "TLSV13_ALERT_CERTIFICATE_REQUIRED")


async def older_tls(ground: Ground) -> None:
    """TLS 1.2, with a good certificate."""
    files = ground.authority.files("c.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(ground.authority.path)
    context.load_cert_chain(files.certificate, files.key)
    context.check_hostname = False
    await _alert(ground, context, "TLSV1_ALERT_PROTOCOL_VERSION")


async def _alert(ground: Ground, context: ssl.SSLContext, alert: str) -> None:
    """The host ends a handshake with an alert."""
    try:
        async with asyncio.timeout(_GONE_S):
            reader, writer = await asyncio.open_connection(
                ground.pair.b.address, ground.pair.b.port, ssl=context, local_addr=(ADDRESS, 0)
            )
            writer.write(bytes(64))
            answer = await reader.read(1)
            writer.close()
    except ssl.SSLError as error:
        if error.reason != alert:
            raise NotHeldError(f"the handshake ended with {error.reason}, not with {alert}") from error
    else:
        raise NotHeldError(f"the handshake did not end with {alert}: {answer!r}")


async def plain(ground: Ground) -> None:
    """An offer without TLS."""
    for _ in range(_TRIES):
        peer = await connect(ground.pair, PLAIN)
        answer = await peer.receive()
        peer.wire.close()
        if not isinstance(answer, messages.Error) or "takes TLS only" not in answer.text:
            raise NotHeldError(f"an offer without TLS is answered with {answer!r:.200}")


CASES: Final = (
    Case("silent connections from one address", half_open_from_one, brief=False),
    Case("silent connections from 600 addresses", half_open_from_many, brief=False),
    Case("random bytes", garbage, brief=False),
    Case("handshakes byte by byte", slow_handshakes, brief=False),
    Case("handshakes that nobody ends", handshakes_cut_short, brief=False),
    Case("a certificate of another authority", another_authority),
    Case("a self-signed certificate", self_signed),
    Case("an expired certificate", expired),
    Case("no certificate", no_certificate),
    Case("TLS 1.2", older_tls),
    Case("no TLS", plain),
)
