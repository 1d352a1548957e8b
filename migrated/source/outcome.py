"""Asking for the outcome: the source sends its decision over fresh connections until the destination answers.

This ends an attempt in doubt, and saves the destination a time-out after an abort whose message was lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from migrated.base.errors import LinkLostError, MigrationError
from migrated.link import sockets
from migrated.link.security import LinkSecurity
from migrated.link.sockets import Place
from migrated.settings.config import LimitsConfig
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.messages import Message

log = structlog.get_logger()

_ABORT_TRIES = 3
_MAX_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class OutcomeAsker:
    """The way to the destination of one attempt over fresh connections.

    Attributes:
        place: where it listens.
        security: TLS, and the rules on which peers this host talks to.
        limits: bounds of every wait, and the first pause between two questions.
        migration_id, epoch: the attempt.
    """

    place: Place
    security: LinkSecurity
    limits: LimitsConfig
    migration_id: str
    epoch: int

    async def ask_commit(self) -> messages.Running | messages.Discarded:
        """Send COMMIT until the destination answers with the outcome. Never gives up."""
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, max(self.limits.outcome_retry_s, pause_s * 1.5))
            try:
                answer = await self._exchange("commit")
            except (MigrationError, RemoteProtocolError, OSError) as error:  # a TimeoutError is an OSError
                log.warning("the destination cannot be asked yet", reason=str(error), retry_s=round(pause_s, 1))
                continue
            if isinstance(answer, messages.Running | messages.Discarded):
                return answer
            log.warning("the outcome is still open", answer=answer.TYPE.name)

    async def tell_abort(self) -> None:
        """Send ABORT a few times; if none arrives, the destination's own time-out discards the guest."""
        for attempt in range(_ABORT_TRIES):
            await asyncio.sleep(attempt * self.limits.outcome_retry_s)
            try:
                await self._exchange("abort")
            except (MigrationError, RemoteProtocolError, OSError) as error:
                log.debug("the destination cannot be told of the abort", reason=str(error))
            else:
                return

    async def _exchange(self, decision: str) -> Message:
        ask = messages.OutcomeAsk.model_validate(
            {"migration_id": self.migration_id, "epoch": self.epoch, "decision": decision}
        )
        bounds = self.limits
        connection = await sockets.connect(
            self.place, bounds.connect_timeout_s, bounds.tcp_user_timeout_s, self.security
        )
        try:
            return await sockets.ask_first(connection, ask, self.limits.handshake_timeout_s)
        except OSError as error:
            raise LinkLostError(f"{self.place}: {error.strerror or error}") from error
        finally:
            connection.wire.close()
