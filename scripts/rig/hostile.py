"""A peer that says what it likes: hand-made frames to a real daemon, plain or with any certificate, as the source that
connects or as the destination that is connected to."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from typing import Any, Final

import msgpack

from migrated.link import sockets
from migrated.link.security import LinkSecurity
from migrated.settings.config import AuthorisationConfig, TlsConfig
from protocol import messages
from protocol.frames import HEADER_BYTES, check_meta, pack_header, unpack_header
from protocol.guest import GuestDescription
from protocol.messages import FrameType
from scripts.rig.pair import Pair
from scripts.rig.waiting import RigError
from vmm_sim.client import VmmClient

PLAIN: Final = LinkSecurity(TlsConfig(), AuthorisationConfig())
ADDRESS: Final = "127.0.0.66"
"""Where hostile peers connect from: a peer's own address is what bounds it, and honest ones come from another."""
CONNECT_S: Final = 20.0
LIMITS: Final = {"downtime_limit_ns": 10**10, "switchover_limit_ns": 0, "switchover_abort": True}


class Hostile:
    """One connection, frame by frame, with metas that no model has checked."""

    def __init__(self, connection: sockets.Connection) -> None:
        self.wire = connection.wire
        self.version = connection.agreed.version
        self.sequence = 0
        self.answers_clocks = True
        """Whether ``receive`` answers CLOCK_ASK: whoever sends a frame byte by byte must send nothing in between."""
        self.migration_id = ""
        """Of the session that this control channel opened."""

    def frame(
        self, kind: FrameType, meta: dict[str, Any], round_number: int = 0, payload: bytes = b"", missing_bytes: int = 0
    ) -> bytes:
        """The next frame, of any content.

        Args:
            missing_bytes: how much more payload its header announces than there is.
        """
        packed: bytes = msgpack.packb(meta, use_bin_type=True)
        head = pack_header(self.version, kind, packed, len(payload) + missing_bytes, self.sequence, round_number)
        self.sequence += 1
        return head + packed + payload

    async def send(self, kind: FrameType, meta: dict[str, Any], round_number: int = 0, payload: bytes = b"") -> None:
        """Send a frame of any content."""
        await self.wire.send(self.frame(kind, meta, round_number, payload))

    async def receive(self) -> messages.Message:
        """The next message that is no clock ask."""
        while True:
            head = await self.wire.read_exactly(HEADER_BYTES)
            header = unpack_header(head, self.version, 1 << 20)
            meta = await self.wire.read_exactly(header.meta_bytes)
            check_meta(meta, header)
            await self.wire.read_exactly(header.payload_bytes)
            message = messages.decode(header.type, meta)
            if isinstance(message, messages.ClockAsk):
                if not self.answers_clocks:
                    continue
                now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
                await self.send(FrameType.CLOCK_REPLY, {"nonce": message.nonce, "t2_ns": now, "t3_ns": now})
                continue
            return message


async def describe(pair: Pair) -> dict[str, Any]:
    """A guest's description, from a real VMM on host a."""
    await pair.a.create_guest("victim", 16, workload="idle")
    vmm: VmmClient = await pair.a.vmm("victim")
    reply = await vmm.call("describe")
    await vmm.close()
    await pair.a.command("x-migrated-guest-destroy", {"guest": "victim"})
    return GuestDescription.model_validate(reply.meta["description"]).model_dump()


async def reach(pair: Pair, address: str = ADDRESS) -> socket.socket:
    """A fresh TCP connection to host b, from an address of this machine, on which nothing was said."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        sock.bind((address, 0))
        async with asyncio.timeout(CONNECT_S):
            await asyncio.get_running_loop().sock_connect(sock, (pair.b.address, pair.b.port))
    except BaseException:
        sock.close()
        raise
    return sock


async def connect(pair: Pair, security: LinkSecurity = PLAIN, address: str = ADDRESS) -> Hostile:
    """A fresh connection to host b, with its handshake done and its prefaces exchanged."""
    sock = await reach(pair, address)
    wire = sockets.Wire(sock, security.connecting(pair.b.address, pair.b.address, pair.b.uri))
    try:
        async with asyncio.timeout(CONNECT_S):
            await wire.secure()
            return Hostile(sockets.Connection(wire, await sockets.exchange_prefaces(wire)))
    except BaseException:
        wire.close()
        raise


def hello_of(description: dict[str, Any], migration_id: str) -> dict[str, Any]:
    """An offer as an honest source would make it."""
    return {
        "migration_id": migration_id,
        "epoch": 1,
        "guest": description,
        "guest_paused": False,
        "capabilities": ["zero-runs", "switchover-abort"],
        "required": ["zero-runs"],
        "limits": LIMITS,
        "time_rules": {"policy": "midpoint", "max_time_jump_ns": 0, "max_time_error_ns": 0},
        "channels": 1,
        "host": "hostile",
    }


async def open_session(
    pair: Pair, description: dict[str, Any], security: LinkSecurity = PLAIN
) -> tuple[Hostile, Hostile, messages.Welcome]:
    """As an honest source would, up to an acknowledged empty round: control channel, data channel, and the answer to
    the offer, which has the token.

    Raises:
        RigError: something of it is refused.
    """
    migration_id = secrets.token_hex(16)
    control = await connect(pair, security)
    control.migration_id = migration_id
    try:
        await control.send(FrameType.HELLO, hello_of(description, migration_id))
        welcome = await control.receive()
        if not isinstance(welcome, messages.Welcome):
            raise RigError(f"an honest offer is answered with {welcome!r}")
        data = await connect(pair, security)
        try:
            await data.send(FrameType.JOIN, {"migration_id": migration_id, "token": welcome.token, "channel": 0})
            await _expect(data, messages.Joined)
            await data.send(FrameType.BARRIER, {"round": 1}, round_number=1)
            await control.send(FrameType.ROUND_END, {"round": 1, "pages": 0, "zero_pages": 0})
            await _expect(control, messages.RoundDone)
        except BaseException:
            data.wire.close()
            raise
    except BaseException:
        control.wire.close()
        raise
    return control, data, welcome


async def _expect(peer: Hostile, kind: type[messages.Message]) -> None:
    if not isinstance(answer := await peer.receive(), kind):
        raise RigError(f"{kind.TYPE.name} was expected, and {answer!r} came")
