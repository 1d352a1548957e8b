"""The story of one outgoing attempt, in order. Read ``Story.run`` first.

    connect -> negotiate -> rounds -> (a stop fits) -> switchover -> decided, or in doubt

Nothing disturbs the guest before the switchover, and until then the story can be interrupted at any point.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from migrated.base.tasks import TaskSet
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.prediction.bandwidth import Bandwidth
from migrated.prediction.knowledge import class_key
from migrated.prediction.model import Prediction
from migrated.record.terms import Phase
from migrated.settings.parameters import MigrationParameters
from migrated.source.handover import SourceHandover
from migrated.source.interruption import Interruption
from migrated.source.ledger import DeviceFigures, OutgoingLedger
from migrated.source.listener import Listener
from migrated.source.offer import offer_of
from migrated.source.outcome import OutcomeAsker
from migrated.source.phases import Beginning, Blackout, Connected, Opened, Prepared
from migrated.source.precopy import Precopy
from migrated.source.session import Session, connect, open_session
from migrated.source.switchover import Item, Switchover
from migrated.source.target import HERE, Target
from migrated.source.transfer import BESIDE_BYTES, BESIDE_LOCAL_BYTES, Transfer
from migrated.source.view import View
from protocol.blackout import SourceReserves
from protocol.budget import abort_limit_ns
from protocol.handover import SourceState
from protocol.pages import Runs
from protocol.versions import HOLD, OWNER_TOKEN

_REPORT_S = 5.0


class Story:
    """Tells one attempt.

    Args:
        env: the daemon.
        guest: the guest, reserved for this attempt.
        target: where to.
        parameters: called for the parameters in force; they may change while rounds run.
        ledger, view, listener: take the figures, the operator's view, and the destination's messages.
        interruption: ends the story from outside.
        inbox: events of the hand-over.
        tasks: where the listener runs.

    Attributes:
        phase: the last phase that it has reached.
        guest_class: the class of guests for which the predictions learn, empty before it is known.
    """

    def __init__(
        self,
        env: Environment,
        guest: Guest,
        target: Target,
        parameters: Callable[[], MigrationParameters],
        ledger: OutgoingLedger,
        view: View,
        listener: Listener,
        interruption: Interruption,
        inbox: asyncio.Queue[Item],
        tasks: TaskSet,
    ) -> None:
        self.phase = Beginning()
        self.guest_class = ""
        self._env = env
        self._guest = guest
        self._target = target
        self._parameters = parameters
        self._ledger = ledger
        self._view = view
        self._listener = listener
        self._interruption = interruption
        self._inbox = inbox
        self._tasks = tasks

    async def run(self) -> None:
        """Move the guest. When it returns the hand-over is decided, or in doubt.

        Raises:
            MigrationError, ProtocolError, JournalError, RunMarkError, OSError, ValueError: it ended before the stop;
                the caller must release ``phase``.
        """
        prepared, pending = await self._interruption.unless_ended(self._without_disturbing())
        await self._switch_over(prepared, pending)

    async def _without_disturbing(self) -> tuple[Prepared, Runs]:
        """Run all steps up to the stop. Returns also the pages that are dirty and not sent, shape (n, 2)."""
        ledger, view = self._ledger, self._view
        with ledger.phase(Phase.SYNC):
            prepared = await self._set_up()
        ledger.setup_ns = time.monotonic_ns() - ledger.began_ns
        view.set_status("active")
        with ledger.phase(Phase.PRE_COPY):
            return prepared, await prepared.precopy.run()

    async def _set_up(self) -> Prepared:
        """Open the session and journal the attempt."""
        env, ledger = self._env, self._ledger
        description = await self._guest.vmm.describe()
        self.guest_class = class_key(description)
        ledger.memory.pages = description.pages
        ledger.devices = {(d.name, d.kind): DeviceFigures(d) for d in description.devices}
        self._view.say("negotiating")
        offer = await offer_of(self._guest.vmm, description, self._parameters())
        connection = await connect(env, self._target.place)
        self.phase = Connected(connection)
        parameters = self._parameters()
        session = await open_session(
            env, self._guest.vmm, connection, offer, parameters, ledger.migration_id, ledger.epoch
        )
        opened = self.phase = Opened(session, ledger)
        # The session took the cap from when it was opened; it may have changed since.
        session.sender.pace(self._parameters().max_bandwidth_bytes_per_s)
        ledger.memory.dirty_tracking = session.tracking.log.mode
        ledger.memory.shared = session.shared
        if session.shared:
            self.guest_class += "|shared"  # what a copy teaches says nothing of a hand-over of memory
        ledger.destination_host = session.welcome.host
        for cost in session.welcome.load_costs:
            if (figures := ledger.devices.get((cost.name, cost.kind))) is not None:
                figures.expected_load_ns = cost.ns
        self._tasks.start(self._listener.listen(connection.control))
        prepared = self.phase = self._prepare(opened)
        return prepared

    def _prepare(self, opened: Opened) -> Prepared:
        """Journal the attempt: a restarted daemon then knows whose guest it is. From here on it may be stopped."""
        env, ledger, session, vmm = self._env, self._ledger, opened.session, self._guest.vmm
        parameters = self._parameters()
        env.run_marks.make_room()
        env.journal.begin(
            ledger.migration_id,
            ledger.epoch,
            ledger.guest,
            "source",
            {
                "peer": self._target.uri,
                "place": self._guest.place,
                "paused": session.offer.was_paused,
                "started_at": ledger.started_at,
                "parameters": parameters.model_dump(mode="json"),
            },
        )
        target, limits = self._target, env.config.limits
        handover = SourceHandover(
            env,
            ledger.migration_id,
            ledger.epoch,
            self._guest,
            session.offer.was_paused,
            OutcomeAsker(target.place, env.security, limits, ledger.migration_id, ledger.epoch),
            None if target.uri == HERE else env.keeper,
            on_doubt=self._view.became_doubtful,
        )
        transfer = Transfer(
            vmm,
            session.offer.description,
            session.memory,
            session.tracking.log,
            session.sender,
            session.connection.control,
            ledger,
            shared=session.shared,
            beside_limit_bytes=BESIDE_LOCAL_BYTES if session.shared else BESIDE_BYTES,
        )
        precopy = Precopy(
            transfer,
            self._parameters,
            lambda dirty_pages, bandwidth: self._predict(session, transfer, dirty_pages, bandwidth),
            self._listener.round_done,
            limits.round_timeout_s,
            self._view.say_round,
            lambda: session.connection.control.measure_anew(limits.round_timeout_s),
        )
        return Prepared(opened, handover, transfer, precopy)

    async def _switch_over(self, prepared: Prepared, pending: Runs) -> None:
        """Stop the guest and see the hand-over through."""
        env, view, session, handover = self._env, self._view, prepared.session, prepared.handover
        parameters = self._parameters()
        handover.tells_token = OWNER_TOKEN in session.welcome.capabilities
        hold = asyncio.Event() if parameters.pause_before_switchover else None
        limits = session.limits(parameters)
        driver, costs = self._guest.vmm.driver, session.offer.costs
        committed_ns = session.connection.control.round_trip_ns() + session.welcome.resume_ns
        switchover = Switchover(
            prepared.transfer,
            handover,
            limits,
            SourceReserves(
                commit_ns=env.resume_costs.commit_reserve_ns(driver, costs, committed_ns, abort_limit_ns(limits)),
                own_resume_ns=env.resume_costs.reserve_ns(driver, costs, abort_limit_ns(limits)),
            ),
            pending,
            self._inbox,
            env.config.limits,
            env.clock,
            hold,
            HOLD in session.welcome.capabilities,
            lambda: view.guest_stopped(held=hold is not None),
            view.tell_passes,
        )
        self.phase = Blackout(prepared, switchover, hold)
        if (ask := self._listener.time_ask) is not None:
            self._inbox.put_nowait(ask)  # answered as soon as the guest stands: the destination imports it meanwhile
        await switchover.run()
        if switchover.gave_back_ns is not None and not session.offer.was_paused:
            env.resume_costs.add(driver, switchover.gave_back_ns, costs)
        if switchover.after_commit_ns is not None:
            env.resume_costs.add_commit(switchover.after_commit_ns, committed_ns)
        if handover.state is SourceState.RETIRED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_S):
                    await self._listener.reported.wait()

    def _predict(self, session: Session, transfer: Transfer, dirty_pages: int, bandwidth: Bandwidth) -> Prediction:
        """Predict the downtime of a stop now: bases rehearsed or measured here, corrected by learned factors."""
        return self._env.knowledge.predict(
            self._ledger.guest,
            self.guest_class,
            session.bases(dirty_pages, transfer.final_device_bytes(), transfer.collect_cost_ns, bandwidth),
            coverage=self._parameters().prediction_coverage_pct / 100,
            bandwidth_known=bandwidth.bytes_per_s > 0 or not dirty_pages,
        )
