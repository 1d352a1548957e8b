"""The rounds: send dirty memory while the guest runs, until stopping it fits the budget.

collect -> send -> barrier on every channel -> acknowledged -> collect -> would a stop fit now?
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import Awaitable, Callable

import structlog

from migrated.base.errors import LinkLostError, MigrationError, RefusedError
from migrated.base.threads import in_thread
from migrated.kernel.scheduling import SMALL_ROUND_BYTES, Precedence, may_take_precedence, threads_of
from migrated.prediction.bandwidth import Bandwidth, DirtyCurve
from migrated.prediction.decision import Decider, Observation, Outlook, Verdict
from migrated.prediction.model import Prediction
from migrated.record.model import RoundRow
from migrated.settings.parameters import MigrationParameters, limit_of
from migrated.source.first_round import FirstRoundPace
from migrated.source.transfer import Transfer
from protocol import messages
from protocol.guest import PAGE_SIZE
from protocol.pages import NO_RUNS, Runs, count_pages

log = structlog.get_logger()

_VERDICT_NS = 2_000_000
"""How long the first verdict takes, presumably: the guest goes on writing meanwhile."""
_EAGER_ROUNDS = 40
_IDLE_PAUSE_S = 0.05
"""Pause before the next round when the last one was so short that nothing can have changed."""
_LONG_PAUSE_S = 0.5
"""The same pause once many rounds are over: little changes from one moment to the next then (s)."""


class Precopy:
    """The rounds of one attempt.

    Args:
        transfer: sends pages and states.
        parameters: called for the parameters in force; they may change while rounds run.
        predict: called for the prediction of a stop, with the pages that travel then and the rounds' bandwidth.
        acknowledged: called to wait for the acknowledgement of a round.
        round_timeout_s: bound of that wait.
        say: takes the sentence that explains the last decision, and the prediction behind it.
        measure_legs: called to measure the legs to the destination anew, after a large round, in which what decides
            waited for threads that others kept waiting; None where there are none, as for a file.
    """

    def __init__(
        self,
        transfer: Transfer,
        parameters: Callable[[], MigrationParameters],
        predict: Callable[[int, Bandwidth], Prediction],
        acknowledged: Callable[[int], asyncio.Future[messages.RoundDone]],
        round_timeout_s: float,
        say: Callable[[str, Prediction], None],
        measure_legs: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._transfer = transfer
        self._parameters = parameters
        self._predict = predict
        self._acknowledged = acknowledged
        self._round_timeout_s = round_timeout_s
        self._say = say
        self._measure_legs = measure_legs
        self._decider = Decider()
        self.bandwidth = Bandwidth()
        self.curve = DirtyCurve()
        self.remaining_pages = 0
        self.dirty_pages_per_s = 0.0
        self.throttle_percent = 0
        self._first_round: FirstRoundPace | None = FirstRoundPace()
        self._collected_ns = 0
        self._verdict_ns = _VERDICT_NS
        self._went_ahead = False

    def cap_changed(self) -> None:
        """The cap on the bandwidth is another one: what the rounds have shown does not hold any more."""
        self.bandwidth.forget()
        self._pace()

    @property
    def in_first_round(self) -> bool:
        """Whether the first round is not over yet."""
        return self._first_round is not None

    def pace_first_round(self, bytes_per_s: int) -> None:
        """Let the first round go faster or slower than the cap, if it is not over and there is a cap."""
        cap = self._parameters().max_bandwidth_bytes_per_s
        if cap and self._first_round is not None:
            self._first_round.change(bytes_per_s, cap, time.monotonic_ns())
            self._pace()

    def _pace(self) -> None:
        cap = self._parameters().max_bandwidth_bytes_per_s
        own = self._first_round.bytes_per_s if self._first_round is not None else 0
        self._transfer.sender.pace(own if own and cap else cap)

    def _end_first_round(self, sent_bytes: int, sending_ns: int) -> int:
        """End the pace of the first round, which sent so many bytes in so many ns. Returns how long that would have
        taken at the pace of the rounds after it (ns), by which their duration is predicted."""
        first, self._first_round = self._first_round, None
        cap = self._parameters().max_bandwidth_bytes_per_s
        if first is None or not first.bytes_per_s or not cap:
            return sending_ns
        self._pace()
        return first.ns_at_cap(sent_bytes, cap, time.monotonic_ns())

    async def run(self) -> Runs:
        """Run rounds until a stop fits. Returns the pages that are dirty and not sent, shape (n, 2).

        Raises:
            RefusedError: no stop can fit.
            MigrationError: it did not converge in time, or sending failed.
        """
        # What decides hardly uses a processor, and a busy host must not make the legs look longer than in the blackout.
        with Precedence([threading.get_native_id()]):
            return await self._run()

    async def _run(self) -> Runs:
        transfer, began_ns = self._transfer, time.monotonic_ns()
        if transfer.shared:
            return await self._run_without_memory()
        # The first collect arms the tracking; everything that holds data travels anyway.
        await transfer.collect()
        self._collected_ns = time.monotonic_ns()
        transfer.scan_ns = transfer.scan_cost_ns = 0  # arming walks everything: it tells nothing of what a scan costs
        self._refuse_hopeless()
        runs = await in_thread(transfer.memory.data_runs)  # the kernel walks all of it: 16 ms per GiB
        transfer.ledger.memory.sparse_pages = transfer.memory.pages - count_pages(runs)
        while True:
            scanned = transfer.memory.pages if transfer.round else count_pages(runs)
            ahead = self._goes_ahead(count_pages(runs)) and may_take_precedence()
            with Precedence(threads_of(os.getpid()) if ahead else ()):
                row = await self._round(runs, scanned, as_the_blackout=ahead)
                runs = await transfer.collect()
            self._went_ahead |= ahead
            if not ahead and self._measure_legs is not None and may_take_precedence():
                await self._measure_legs()
            verdict = await self._judge(row, count_pages(runs), (time.monotonic_ns() - began_ns) / 1e9, ahead=ahead)
            if verdict.step == "switch":
                return runs
            if verdict.step == "give-up":
                transfer.dirty_log.restore(runs)
                raise MigrationError(verdict.sentence)
            as_the_blackout = verdict.step in ("shorten", "rehearse")
            if row.ns < _IDLE_PAUSE_S * 1e9 and not as_the_blackout:
                await asyncio.sleep(_IDLE_PAUSE_S if transfer.round < _EAGER_ROUNDS else _LONG_PAUSE_S)

    def _goes_ahead(self, pages: int) -> bool:
        """Whether the threads of a round run before others, as all do in the blackout, so that small rounds show what
        it will cost; not in a large one, which would keep others waiting for long."""
        return self._transfer.round > 0 and pages * PAGE_SIZE <= SMALL_ROUND_BYTES

    async def _run_without_memory(self) -> Runs:
        """The rounds where memory is handed over and not sent: iterable devices send their state for as long as it
        gets less, and costs that cannot fit the limit are refused."""
        transfer, number = self._transfer, 0
        iterable = [device for device in transfer.guest.devices if device.kind == "iterable"]
        while (iterations := transfer.vmm.iterations) is not None and iterable:
            before_bytes = transfer.final_device_bytes()
            for device in iterable:
                transfer.ledger.memory.precopy_bytes += await transfer.send_iteration(iterations, device, number)
            number += 1
            if number > 1 and transfer.final_device_bytes() >= before_bytes:
                break
        self._refuse_hopeless()
        return NO_RUNS

    async def _judge(self, row: RoundRow, dirty_pages: int, elapsed_s: float, *, ahead: bool) -> Verdict:
        """Decide after a round, write it down, and throttle if that is the decision.

        Args:
            ahead: the round went before others.
        """
        self.remaining_pages = dirty_pages
        now_ns = time.monotonic_ns()
        since_ns, self._collected_ns = now_ns - self._collected_ns, now_ns
        self.dirty_pages_per_s = dirty_pages * 1e9 / max(1, since_ns)
        self.curve.add(since_ns, dirty_pages, ahead=ahead)
        meanwhile = self.curve.pages_meanwhile(since_ns, self._verdict_ns, kept_to=dirty_pages if ahead else None)
        seen = Observation(
            dirty_pages,
            elapsed_s,
            self.bandwidth.for_bytes(dirty_pages * PAGE_SIZE),
            self._transfer.ledger.memory.precopy_bytes,
            unlike=not self._went_ahead and self._goes_ahead(dirty_pages) and may_take_precedence(),
        )
        # A verdict asks the same several times, and whatever it takes the guest goes on writing meanwhile.
        outlook = Outlook(
            functools.cache(lambda pages: self._predict(pages + meanwhile, self.bandwidth)),
            functools.cache(self._round_ns),
            lambda: self._predict(0, self.bandwidth),
        )
        prediction = outlook.stop(dirty_pages)
        verdict = self._decider.after_round(self._parameters(), outlook, self.curve, seen)
        ledger = self._transfer.ledger
        ledger.rounds.prediction = prediction
        ledger.rounds.add(
            row.model_copy(
                update={
                    "dirty_pages": dirty_pages,
                    "dirty_rate_pages_per_s": self.dirty_pages_per_s,
                    "predicted_downtime_ns": prediction.total_ns,
                    "predicted_upper_ns": prediction.upper_ns,
                    "decision": verdict.sentence,
                    "throttle_percent": self.throttle_percent,
                }
            )
        )
        throttle = self._transfer.vmm.throttle
        if throttle is not None and verdict.throttle_percent != self.throttle_percent:
            await throttle.set_throttle(verdict.throttle_percent)
            self.throttle_percent = verdict.throttle_percent
        self._say(verdict.sentence, prediction)
        self._verdict_ns = time.monotonic_ns() - now_ns
        return verdict

    def _round_ns(self, pages: int) -> int:
        """Return the expected duration of a round of so many pages, with the read of the dirty log at its end (ns)."""
        return self.bandwidth.expect(pages, 0).ns + self._transfer.collect_cost_ns

    async def end_throttle(self) -> None:
        """Let the vCPUs run as before."""
        throttle = self._transfer.vmm.throttle
        if throttle is not None and self.throttle_percent:
            await throttle.set_throttle(0)

    def _refuse_hopeless(self) -> None:
        """Do not begin when the costs that no round can lower are over the limit already."""
        prediction = self._predict(0, self.bandwidth)
        self._say(prediction.explain(limit_of(self._parameters())), prediction)
        self._transfer.ledger.rounds.prediction = prediction
        reason = self._decider.hopeless(self._parameters(), prediction)
        if reason is not None:
            raise RefusedError(reason)

    async def _round(self, runs: Runs, scanned_pages: int, *, as_the_blackout: bool) -> RoundRow:
        """Send one round and wait for its acknowledgement.

        Args:
            as_the_blackout: its threads run before others.
        """
        transfer = self._transfer
        begin_ns = time.monotonic_ns()
        if self._first_round is not None:
            self._first_round.begin(begin_ns)
        scan_ns, fence_ns = transfer.scan_ns, transfer.fence_ns
        # Devices first: the barrier of the round then covers them, and the acknowledged bytes are those of the time.
        device_bytes = 0
        if (iterations := transfer.vmm.iterations) is not None:
            for device in transfer.guest.devices:
                if device.kind == "iterable":
                    device_bytes += await transfer.send_iteration(iterations, device, transfer.round)
        sent = await transfer.send_round(runs)
        number = transfer.round
        await self._wait_for_progress(self._acknowledged(number))
        sending_ns = time.monotonic_ns() - begin_ns
        ns = sending_ns + fence_ns
        acknowledged_bytes = sent.wire_bytes + device_bytes
        telling_ns = self._end_first_round(acknowledged_bytes, sending_ns)
        # What is left is counted in pages: where encodings gain, they move faster than their bytes.
        self.bandwidth.add(
            sent.normal_pages,
            max(sent.wire_bytes, sent.normal_pages * PAGE_SIZE) + device_bytes,
            telling_ns,
            as_the_blackout=as_the_blackout,
        )
        ledger = transfer.ledger
        ledger.memory.precopy_bytes += acknowledged_bytes
        ledger.memory.precopy_pages += sent.normal_pages + sent.zero_pages
        return RoundRow(
            round=number,
            scanned_pages=scanned_pages,
            dirty_pages=0,
            zero_pages=sent.zero_pages,
            bytes=acknowledged_bytes,
            ns=ns,
            scan_ns=scan_ns,
            fence_ns=fence_ns,
            bandwidth_bytes_per_s=acknowledged_bytes * 1e9 / max(1, sending_ns),
            dirty_rate_pages_per_s=0.0,
            predicted_downtime_ns=None,
            decision="",
        )

    async def _wait_for_progress(self, done: asyncio.Future[messages.RoundDone]) -> None:
        try:
            async with asyncio.timeout(self._round_timeout_s):
                reply = await done
        except TimeoutError as error:
            raise LinkLostError(
                f"round {self._transfer.round} was not acknowledged within {self._round_timeout_s:g} s"
            ) from error
        digest = self._transfer.sender.digest
        if digest is not None and reply.digest != digest.value:
            raise MigrationError(
                f"the destination's memory differs after round {reply.round}: digest {reply.digest:016x}, "
                f"expected {digest.value:016x}"
            )
