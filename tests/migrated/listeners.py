"""A listener to test with: it hands over to queues, and tells why it refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from migrated.link import sockets
from migrated.link.listener import Listener, bind
from migrated.link.security import LinkSecurity
from migrated.link.sockets import Connection
from migrated.settings.config import Address, AuthorisationConfig, LimitsConfig, TlsConfig
from protocol import messages
from protocol.messages import Message

WAIT_S = 30.0
ASK = messages.OutcomeAsk(migration_id="0" * 32, epoch=1, decision="abort")
PLAIN = LinkSecurity(TlsConfig(), AuthorisationConfig())


@dataclass
class Server:
    """A listener, what it was handed over, and why it refused."""

    security: LinkSecurity
    limits: LimitsConfig = field(default_factory=lambda: LimitsConfig(tcp_user_timeout_s=5.0))
    taken: asyncio.Queue[tuple[Message, Connection]] = field(default_factory=asyncio.Queue)
    refused: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.listener = Listener(self._take, self.limits, self.security, self.refused.put_nowait)

    async def _take(self, first: Message, connection: Connection) -> None:
        self.taken.put_nowait((first, connection))

    @property
    def port(self) -> int:
        assert self.listener.address is not None
        return self.listener.address.port

    async def connect(self, security: LinkSecurity, host: str = "127.0.0.1") -> Connection:
        return await sockets.connect(Address(host, self.port), WAIT_S, 5.0, security)

    async def ask(self, security: LinkSecurity) -> Message:
        """Connect and ask; what was handed over answers."""
        connection = await self.connect(security)
        asking = asyncio.create_task(sockets.ask_first(connection, ASK, WAIT_S))
        try:
            handing = asyncio.create_task(self.taken.get())
            await asyncio.wait({asking, handing}, return_when=asyncio.FIRST_COMPLETED)
            if handing.done():
                first, accepted = handing.result()
                assert first == ASK
                await sockets.send_first(accepted, messages.Discarded(epoch=1, reason="there is nothing"))
                answer = await asking
                accepted.wire.close()
                return answer
            handing.cancel()
            return await asking
        finally:
            connection.wire.close()


@contextlib.asynccontextmanager
async def listening(security: LinkSecurity, **limits: Any) -> AsyncIterator[Server]:
    server = Server(security, LimitsConfig(tcp_user_timeout_s=5.0, **limits))
    server.listener.start(bind(Address("127.0.0.1", 0)))
    try:
        yield server
    finally:
        await server.listener.stop()
        while not server.taken.empty():
            server.taken.get_nowait()[1].wire.close()


async def refusal(server: Server) -> str:
    return await asyncio.wait_for(server.refused.get(), WAIT_S)
