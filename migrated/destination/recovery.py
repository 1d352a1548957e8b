"""Recovery of an incoming attempt that a restarted daemon finds open in its journal.

Before READY: discarded. After READY: it waits for the source's decision, at most the ready time-out. After COMMIT: it
runs the guest.
"""

from __future__ import annotations

import structlog

from migrated.destination.origin import Origin
from migrated.destination.takeover import Takeover
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.link.reply import Reply
from migrated.state.journal import Attempt
from protocol.errors import RemoteProtocolError
from protocol.handover import DestinationEvent, DestinationState, destination_state_of

log = structlog.get_logger()


class RecoveredTakeover:
    """One incoming attempt, taken up again.

    Args:
        env: the daemon.
        attempt: the journal's entries of it.
        guest: the incoming guest, None when its process is gone.
    """

    def __init__(self, env: Environment, attempt: Attempt, guest: Guest | None) -> None:
        self._env = env
        self._attempt = attempt
        self._takeover = Takeover(
            env,
            attempt.migration_id,
            attempt.epoch,
            attempt.place,
            guest.vmm.driver if guest is not None else attempt.facts.get("driver"),
            guest,
            destination_state_of(attempt.decisions),
            keep_paused=bool(attempt.facts["paused"]),
        )
        if guest is not None and not self._takeover.finished.is_set():
            guest.migration_id, guest.overlay = attempt.migration_id, "incoming"

    async def run(self) -> None:
        """Finish or undo the attempt."""
        structlog.contextvars.bind_contextvars(
            migration_id=self._attempt.migration_id, guest=self._attempt.guest, role="destination"
        )
        takeover = self._takeover
        log.warning("taking up an incoming migration that the last daemon left open", state=takeover.state)
        reason = "the destination's daemon was restarted during the migration"
        await takeover.take(DestinationEvent.RESTART, None, reason=reason)
        if takeover.awaits_decision:
            await takeover.await_decision(self._env.config.limits.ready_timeout_s)
        await takeover.finished.wait()
        log.info("the incoming migration is settled", state=takeover.state)
        self._env.journal.close_attempt(self._attempt.migration_id, "destination")

    @property
    def state(self) -> DestinationState:
        """The hand-over's state."""
        return self._takeover.state

    def is_open_for(self, guest: str) -> bool:
        """Whether it is of this guest and not decided."""
        return self._attempt.guest == guest and not self._takeover.finished.is_set()

    def is_older_than(self, guest: str, epoch: int) -> bool:
        """Return whether an offer of ``epoch`` is of this guest and newer than the attempt that is still open here."""
        return self.is_open_for(guest) and self._attempt.epoch < epoch

    @property
    def source(self) -> Origin:
        """The host that the guest comes from."""
        return Origin(str(self._attempt.facts["peer"]), tuple(self._attempt.facts.get("peer_names", ())))

    async def take(self, decision: DestinationEvent, reply: Reply) -> None:
        """Take the source's decision."""
        try:
            await self._takeover.take(decision, reply, reason="the source keeps its guest")
        except RemoteProtocolError as error:
            log.error("the source broke the hand-over", reason=str(error))
