"""The decision after a round: stop now, another round, throttle, or give up; with the reason.

Convergence is judged by progress (the least that remained), never by a rate: a bounded working set converges at any
dirty rate. Throttling has QEMU's meaning and names (auto-converge); the rising target is what OpenStack and oVirt do.

A stop that fits need not be made at once: the guest is stopped for less if another round is made first, as long as that
shortens the downtime by more than it costs (``downtime_goal``). The last rounds before a stop are sent as the blackout
sends its own, without a pause between, so that what it will cost was seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from migrated.prediction.bandwidth import DirtyCurve
from migrated.prediction.model import Prediction
from migrated.settings.parameters import MigrationParameters, limit_of
from protocol.guest import PAGE_SIZE

_ADVICE: Final = "raise --downtime-limit, or force the attempt with --on-timeout force"

Step = Literal["switch", "round", "throttle", "shorten", "rehearse", "give-up"]

_STALL_ROUNDS: Final = 5
"""Rounds without progress that make a stall."""
_PROGRESS: Final = 0.96
"""Less than this share of the best so far remained: that is progress."""
_UNREACHABLE_MARGIN: Final = 1.25
"""How clearly memory must be out of reach before the attempt is given up before its time."""
_FLOOR_MARGIN: Final = 1.25
"""How clearly a bound must lie over the limit before anything was measured for the attempt not to begin."""
_FLOOR_ROUNDS: Final = 3
"""So many rounds in a row must find the limit out of reach of any round: the host may have been busy at one."""
_BISECTIONS: Final = 12
_WORTH: Final = 0.1
"""A round is worth its time when it shortens the downtime by this share of it, ..."""
_LEAST_GAIN: Final = 0.05
_LEAST_GAIN_NS: Final = 500_000
"""... and by this share of the downtime, and by more than the wake-up of a thread."""
_EXTRA_TIME: Final = 0.15
_EXTRA_TIME_NS: Final = 30_000_000
_EXTRA_BYTES: Final = 0.25
_EXTRA_ROUNDS: Final = 8
"""Rounds after the first stop that would have fitted: so much more time and bytes than the attempt took until then."""
_REHEARSAL_NS: Final = 25_000_000
"""A round that takes longer tells enough of the next one, ..."""
_REHEARSAL_AHEAD_NS: Final = 50_000_000
"""... or twice as long where no round has gone before others yet, as the blackout will."""
_REHEARSALS: Final = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """The action after a round, and the sentence that explains it."""

    step: Step
    sentence: str
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """One round, as far as the decision needs it."""

    dirty_pages: int
    elapsed_s: float
    bandwidth_bytes_per_s: float
    sent_bytes: int = 0
    unlike: bool = False
    """No round has gone before others on the host yet, as the blackout will, and the next one would."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Expected costs as functions of the number of pages that are dirty then.

    Attributes:
        stop: the prediction of a stop when so many pages are found dirty.
        round_ns: the duration of a round (ns).
        floor: the prediction of a stop in which no page travels, whatever the guest writes: the least that rounds can
            reach.
    """

    stop: Callable[[int], Prediction]
    round_ns: Callable[[int], int]
    floor: Callable[[], Prediction]


def _enforced(parameters: MigrationParameters) -> bool:
    """Whether a stop is made only when it fits."""
    return parameters.switchover_abort and parameters.on_timeout != "force"


class Decider:
    """Decides after every round of one attempt."""

    def __init__(self) -> None:
        self._best_pages: int | None = None
        self._since_progress = 0
        self._rounds = 0
        self._throttle = 0
        self._floor_misses = 0
        self._fitted: Observation | None = None
        """The observation after the first round at which a stop fitted the budget, None before."""
        self._without_pause = 0
        """Rounds that were sent without a pause after the one before."""
        self._rehearsals = 0

    def hopeless(self, parameters: MigrationParameters, prediction: Prediction) -> str | None:
        """Return a sentence on why no stop can fit the limit even without memory to send; None when one may fit.
        ``prediction`` is that of a stop with nothing left to send."""
        limit_ns = limit_of(parameters)
        fits = prediction.total_ns < limit_ns and prediction.upper_ns < _FLOOR_MARGIN * limit_ns
        if not _enforced(parameters) or fits:
            return None
        return f"a switchover cannot fit the limit, whatever memory does: {prediction.explain(limit_ns)}; {_ADVICE}"

    def after_round(
        self, parameters: MigrationParameters, outlook: Outlook, curve: DirtyCurve, seen: Observation
    ) -> Verdict:
        """The verdict after one round."""
        self._rounds += 1
        prediction = outlook.stop(seen.dirty_pages)
        limit_ns = limit_of(parameters)
        target_ns = self._target_ns(parameters, limit_ns)
        explained = prediction.explain(limit_ns)
        self._note_progress(seen.dirty_pages)
        if prediction.bandwidth_known and self._fits(parameters, prediction, target_ns):
            self._floor_misses = 0
            return self._fitting(parameters, outlook, curve, seen)
        if (reason := self._below_the_floor(parameters, outlook.floor(), limit_ns)) is not None:
            return Verdict("give-up", reason)
        if parameters.timeout_s and seen.elapsed_s >= parameters.timeout_s:
            return self._out_of_time(parameters, explained, seen)
        if self._since_progress >= _STALL_ROUNDS:
            return self._stalled(parameters, outlook, curve, seen, limit_ns)
        step = f" (target {target_ns / 1e6:g} ms now)" if target_ns < limit_ns else ""
        return Verdict("round", f"not yet{step}: {explained}", self._throttle)

    def _fitting(
        self, parameters: MigrationParameters, outlook: Outlook, curve: DirtyCurve, seen: Observation
    ) -> Verdict:
        """A stop fits: make it, or go on for a shorter one."""
        explained = outlook.stop(seen.dirty_pages).explain(limit_of(parameters))
        first = self._fitted = self._fitted or seen
        if parameters.downtime_goal == "least":
            shorter = self._shorter(outlook, curve, seen, first)
            if shorter is not None:
                self._without_pause += 1
                return Verdict("shorten", f"fits, and {shorter}: {explained}", self._throttle)
        if self._rehearsal_due(outlook.round_ns(seen.dirty_pages), seen):
            self._without_pause += 1
            self._rehearsals += 1
            return Verdict(
                "rehearse", f"fits; the next round is sent as the blackout would, to see: {explained}", self._throttle
            )
        return Verdict("switch", f"switching over: {explained}", self._throttle)

    def _rehearsal_due(self, round_ns: int, seen: Observation) -> bool:
        """Whether a round is to show first what the blackout will cost, and is short enough for that."""
        if self._rehearsals >= _REHEARSALS:
            return False
        if seen.unlike:
            return round_ns <= _REHEARSAL_AHEAD_NS
        return not self._without_pause and round_ns <= _REHEARSAL_NS

    def _shorter(self, outlook: Outlook, curve: DirtyCurve, seen: Observation, first: Observation) -> str | None:
        """Return the reason why another round is worth its time although a stop fits, a phrase; None when it is not."""
        round_ns = outlook.round_ns(seen.dirty_pages)
        spent_ns = (seen.elapsed_s - first.elapsed_s) * 1e9 + round_ns
        spent_bytes = seen.sent_bytes - first.sent_bytes + seen.dirty_pages * PAGE_SIZE
        if (
            self._without_pause >= _EXTRA_ROUNDS
            or spent_ns > _EXTRA_TIME * first.elapsed_s * 1e9 + _EXTRA_TIME_NS
            or spent_bytes > _EXTRA_BYTES * first.sent_bytes
        ):
            return None
        now_ns = outlook.stop(seen.dirty_pages).total_ns
        then_ns = outlook.stop(int(curve.pages_within(round_ns))).total_ns
        gain_ns = now_ns - then_ns
        if gain_ns < max(_WORTH * round_ns, _LEAST_GAIN * now_ns, _LEAST_GAIN_NS):
            return None
        return f"a round of {round_ns / 1e6:.1f} ms is expected to shorten the downtime by {gain_ns / 1e6:.1f} ms"

    def _below_the_floor(self, parameters: MigrationParameters, floor: Prediction, limit_ns: int) -> str | None:
        """Return the reason why rounds cannot bring the bound under the limit, once several in a row have found so;
        None while they may. ``floor`` is the prediction of a stop with nothing left to send."""
        if not _enforced(parameters) or floor.upper_ns < limit_ns:
            self._floor_misses = 0
            return None
        self._floor_misses += 1
        if self._floor_misses < _FLOOR_ROUNDS:
            return None
        return (
            "no number of rounds brings the bound under the limit: even with nothing left to send, a stop is "
            f"{floor.explain(limit_ns)}; {_ADVICE}"
        )

    def _target_ns(self, parameters: MigrationParameters, limit_ns: int) -> int:
        """The target rises with the rounds, so that an idle guest gets a short pause."""
        steps = parameters.downtime_steps
        return limit_ns * min(steps, 1 + (self._rounds - 1) // 2) // steps

    def _fits(self, parameters: MigrationParameters, prediction: Prediction, target_ns: int) -> bool:
        if not parameters.switchover_abort:
            # Nothing is enforced, so the gate is QEMU's: only memory counts.
            return prediction.memory_ns < target_ns
        return prediction.upper_ns < target_ns

    def _note_progress(self, dirty_pages: int) -> None:
        """Keep the best so far."""
        if self._best_pages is None or dirty_pages < self._best_pages * _PROGRESS:
            self._best_pages = dirty_pages
            self._since_progress = 0
        else:
            self._since_progress += 1

    def _out_of_time(self, parameters: MigrationParameters, explained: str, seen: Observation) -> Verdict:
        if parameters.on_timeout == "force":
            return Verdict("switch", f"switching over by force after {seen.elapsed_s:.1f} s: {explained}")
        return Verdict(
            "give-up",
            f"no switchover fitted within {parameters.timeout_s:g} s: {explained}; raise --downtime-limit or "
            "--timeout, lower the guest's load, or use --on-timeout force",
        )

    def _stalled(
        self,
        parameters: MigrationParameters,
        outlook: Outlook,
        curve: DirtyCurve,
        seen: Observation,
        limit_ns: int,
    ) -> Verdict:
        explained = outlook.stop(seen.dirty_pages).explain(limit_ns)
        if parameters.auto_converge and self._throttle < parameters.max_cpu_throttle:
            first = parameters.cpu_throttle_initial
            self._throttle = min(
                parameters.max_cpu_throttle,
                self._throttle + parameters.cpu_throttle_increment if self._throttle else first,
            )
            self._since_progress = 0
            self._best_pages = None
            return Verdict("throttle", f"throttling the vCPUs by {self._throttle} %: {explained}", self._throttle)
        budget_ns = _memory_budget_ns(outlook, seen.dirty_pages, limit_ns)
        reachable = budget_ns > 0 and curve.reachable(
            budget_ns, seen.bandwidth_bytes_per_s, PAGE_SIZE, _UNREACHABLE_MARGIN
        )
        if reachable or not _enforced(parameters):
            return Verdict(
                "round", f"not yet, and no progress for {self._since_progress} rounds: {explained}", self._throttle
            )
        dirtied = curve.pages_within(budget_ns) * PAGE_SIZE / (1 << 20)
        return Verdict(
            "give-up",
            f"out of reach: within the {budget_ns / 1e6:.0f} ms that the limit leaves for memory the guest "
            f"dirties {dirtied:.1f} MiB and {seen.bandwidth_bytes_per_s * budget_ns / 1e9 / (1 << 20):.1f} MiB "
            f"move; {explained}; raise --downtime-limit, allow --auto-converge, or use --on-timeout force",
        )


def _memory_budget_ns(outlook: Outlook, dirty_pages: int, limit_ns: int) -> int:
    """Return the time of the memory part in the largest stop whose bound fits the limit (ns); 0 when none fits."""
    fits, too_many = 0, dirty_pages
    for _ in range(_BISECTIONS):
        middle = (fits + too_many) // 2
        if outlook.stop(middle).upper_ns < limit_ns:
            fits = middle
        else:
            too_many = middle
    return outlook.stop(fits).memory_ns if outlook.stop(fits).upper_ns < limit_ns else 0
