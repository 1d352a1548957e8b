"""What to do after a round: stop now, another round, throttle, wait for a better moment, or give up; and why.

Convergence is judged by progress (the least that remained), never by a rate: a bounded working set converges at any
dirty rate. Throttling has QEMU's meaning and names (auto-converge); the rising target is what OpenStack and oVirt do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from migrated.prediction.bandwidth import DirtyCurve
from migrated.prediction.model import Prediction
from migrated.settings.parameters import MigrationParameters, limit_of
from protocol.guest import PAGE_SIZE

Step = Literal["switch", "round", "throttle", "wait", "give-up"]

_STALL_ROUNDS: Final = 5
"""Rounds without progress that make a stall."""
_PROGRESS: Final = 0.96
"""Less than this share of the best so far remained: that is progress."""
_FALLING: Final = 0.5
_MAX_WAITS: Final = 3
_UNREACHABLE_MARGIN: Final = 1.25
"""How clearly memory must be out of reach before the attempt is given up before its time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do after a round, and the sentence that explains it."""

    step: Step
    sentence: str
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """One round, as far as the decision needs it."""

    dirty_pages: int
    elapsed_s: float
    bandwidth_bytes_per_s: float


class Decider:
    """Decides after every round of one attempt."""

    def __init__(self) -> None:
        self._best_pages: int | None = None
        self._since_progress = 0
        self._previous_pages: int | None = None
        self._waits = 0
        self._rounds = 0
        self._throttle = 0

    def hopeless(self, parameters: MigrationParameters, prediction: Prediction) -> str | None:
        """Why no stop can fit, whatever memory does; None when one may. The most likely figure decides, since a bound
        that is wide for want of samples proves nothing."""
        limit_ns = limit_of(parameters)
        if not parameters.switchover_abort or parameters.on_timeout == "force" or prediction.total_ns < limit_ns:
            return None
        return (
            f"a switchover cannot fit the limit, whatever memory does: {prediction.explain(limit_ns)}; raise "
            "--downtime-limit, or force the attempt with --on-timeout force"
        )

    def after_round(
        self, parameters: MigrationParameters, prediction: Prediction, curve: DirtyCurve, seen: Observation
    ) -> Verdict:
        """The verdict after one round."""
        self._rounds += 1
        limit_ns = limit_of(parameters)
        target_ns = self._target_ns(parameters, limit_ns)
        explained = prediction.explain(limit_ns)
        falling = self._note_progress(seen.dirty_pages)
        if prediction.bandwidth_known and self._fits(parameters, prediction, target_ns):
            if falling and self._waits < _MAX_WAITS and seen.elapsed_s < parameters.timeout_s / 2:
                self._waits += 1
                return Verdict("wait", f"fits, but less remains after every round: {explained}", self._throttle)
            return Verdict("switch", f"switching over: {explained}", self._throttle)
        if parameters.timeout_s and seen.elapsed_s >= parameters.timeout_s:
            return self._out_of_time(parameters, explained, seen)
        if self._since_progress >= _STALL_ROUNDS:
            return self._stalled(parameters, prediction, curve, seen, limit_ns, explained)
        step = f" (target {target_ns / 1e6:g} ms now)" if target_ns < limit_ns else ""
        return Verdict("round", f"not yet{step}: {explained}", self._throttle)

    def _target_ns(self, parameters: MigrationParameters, limit_ns: int) -> int:
        """The target rises with the rounds, so that an idle guest gets a short pause."""
        steps = parameters.downtime_steps
        return limit_ns * min(steps, 1 + (self._rounds - 1) // 2) // steps

    def _fits(self, parameters: MigrationParameters, prediction: Prediction, target_ns: int) -> bool:
        if not parameters.switchover_abort:
            # Nothing is enforced, so the gate is QEMU's: only memory counts.
            return prediction.memory_ns < target_ns
        return prediction.upper_ns < target_ns

    def _note_progress(self, dirty_pages: int) -> bool:
        """Keep the best so far. Returns whether the remaining memory still falls fast."""
        previous, self._previous_pages = self._previous_pages, dirty_pages
        if self._best_pages is None or dirty_pages < self._best_pages * _PROGRESS:
            self._best_pages = dirty_pages
            self._since_progress = 0
        else:
            self._since_progress += 1
        return previous is not None and dirty_pages > 64 and dirty_pages < previous * _FALLING

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
        prediction: Prediction,
        curve: DirtyCurve,
        seen: Observation,
        limit_ns: int,
        explained: str,
    ) -> Verdict:
        if parameters.auto_converge and self._throttle < parameters.max_cpu_throttle:
            first = parameters.cpu_throttle_initial
            self._throttle = min(
                parameters.max_cpu_throttle,
                self._throttle + parameters.cpu_throttle_increment if self._throttle else first,
            )
            self._since_progress = 0
            self._best_pages = None
            return Verdict("throttle", f"throttling the vCPUs by {self._throttle} %: {explained}", self._throttle)
        budget_ns = limit_ns - (prediction.total_ns - prediction.memory_ns)
        reachable = budget_ns > 0 and curve.reachable(
            budget_ns, seen.bandwidth_bytes_per_s, PAGE_SIZE, _UNREACHABLE_MARGIN
        )
        if reachable or parameters.on_timeout == "force" or not parameters.switchover_abort:
            return Verdict(
                "round", f"not yet, and no progress for {self._since_progress} rounds: {explained}", self._throttle
            )
        dirtied = curve.pages_within(max(0, budget_ns)) * PAGE_SIZE / (1 << 20)
        return Verdict(
            "give-up",
            f"out of reach: within the {max(0, budget_ns) / 1e6:.0f} ms that the limit leaves for memory the guest "
            f"dirties {dirtied:.1f} MiB and {seen.bandwidth_bytes_per_s * max(0, budget_ns) / 1e9 / (1 << 20):.1f} MiB "
            f"move; {explained}; raise --downtime-limit, allow --auto-converge, or use --on-timeout force",
        )
