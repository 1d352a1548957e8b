"""What is decided after a round: stop, go on, wait, throttle, give up; and when no attempt begins."""

from __future__ import annotations

import dataclasses

import pytest

from migrated.prediction.bandwidth import DirtyCurve
from migrated.prediction.decision import Decider, Observation, Outlook, Verdict
from migrated.prediction.knowledge import Knowledge
from migrated.prediction.model import Prediction
from migrated.record.parts import Component
from migrated.settings.parameters import MigrationParameters
from tests.migrated.predictions import BASES, MS, PRIOR, predict, prediction_of, seen


def decide(
    decider: Decider, parameters: MigrationParameters, prediction: Prediction, curve: DirtyCurve, seen: Observation
) -> Verdict:
    """The verdict when a stop now is predicted so, and memory costs in proportion to its pages. Rounds are too long
    to be rehearsals."""
    pages, rest_ns = seen.dirty_pages, prediction.total_ns - prediction.memory_ns
    above_ns = prediction.upper_ns - prediction.total_ns

    def stop(dirty_pages: int) -> Prediction:
        memory_ns = prediction.memory_ns * dirty_pages // pages
        components = dict(prediction.components) | {Component.STATE: memory_ns}
        upper_ns = rest_ns + memory_ns + above_ns
        return dataclasses.replace(
            prediction, total_ns=rest_ns + memory_ns, upper_ns=upper_ns, memory_ns=memory_ns, components=components
        )

    return decider.after_round(parameters, Outlook(stop, lambda _: 50 * MS, lambda: stop(0)), curve, seen)


def test_the_bound_and_not_the_guess_must_fit() -> None:
    parameters = MigrationParameters(downtime_limit_ms=100)
    decider = Decider()
    assert decide(decider, parameters, prediction_of(80, 120), DirtyCurve(), seen(100)).step == "round"
    assert decide(decider, parameters, prediction_of(80, 99), DirtyCurve(), seen(100)).step == "switch"


def test_first_fit_stops_at_the_first_round_after_which_it_fits() -> None:
    """Although less and less remains."""
    parameters = MigrationParameters(downtime_limit_ms=100, downtime_goal="first-fit")
    decider = Decider()
    steps = [
        decide(decider, parameters, prediction_of(upper - 10, upper), DirtyCurve(), seen(1000 * upper)).step
        for upper in (160, 120, 80)
    ]
    assert steps == ["round", "round", "switch"]


def test_the_target_rises_in_steps() -> None:
    parameters = MigrationParameters(downtime_limit_ms=300, downtime_steps=3)
    decider = Decider()
    steps = [decide(decider, parameters, prediction_of(150, 180), DirtyCurve(), seen(1000)).step for _ in range(5)]
    assert steps == ["round", "round", "switch", "switch", "switch"]


def test_a_stall_is_lack_of_progress_and_throttles_if_allowed() -> None:
    parameters = MigrationParameters(downtime_limit_ms=100, auto_converge=True, cpu_throttle_initial=20,
                                     cpu_throttle_increment=30, max_cpu_throttle=60)  # fmt: skip
    decider = Decider()
    verdicts = [
        decide(decider, parameters, prediction_of(500, 540, 450), DirtyCurve(), seen(50_000)) for _ in range(24)
    ]
    throttles = [verdict.throttle_percent for verdict in verdicts if verdict.step == "throttle"]
    assert throttles == [20, 50, 60]


def test_an_unreachable_guest_is_given_up_with_figures() -> None:
    parameters = MigrationParameters(downtime_limit_ms=100)
    decider = Decider()
    curve = DirtyCurve()
    for _ in range(8):
        curve.add(100 * MS, 100_000)  # 400 MB in 100 ms; the link carries 100 MB
        verdict = decide(decider, parameters, prediction_of(500, 560, 480), curve, seen(100_000))
    assert verdict.step == "give-up"
    assert "MiB" in verdict.sentence
    assert "--downtime-limit" in verdict.sentence


@pytest.mark.parametrize(("on_timeout", "step"), [("abort", "give-up"), ("force", "switch")])
def test_when_time_is_up(on_timeout: str, step: str) -> None:
    parameters = MigrationParameters.model_validate(
        {"downtime_limit_ms": 100, "timeout_s": 10, "on_timeout": on_timeout}
    )
    verdict = decide(Decider(), parameters, prediction_of(500, 600), DirtyCurve(), seen(100, elapsed_s=10.5))
    assert verdict.step == step


def test_costs_over_the_limit_are_refused_before_anything_moves_unless_forced() -> None:
    decider = Decider()
    limit_1ms = MigrationParameters(downtime_limit_ms=1)
    reason = decider.hopeless(limit_1ms, prediction_of(4, 7))
    assert reason is not None
    assert "limit 1 ms" in reason
    forced = limit_1ms.model_copy(update={"on_timeout": "force"})
    assert decider.hopeless(forced, prediction_of(4, 7)) is None


def test_an_attempt_whose_bound_no_round_can_bring_under_the_limit_ends_with_that_sentence() -> None:
    """Not one round after the other until the timeout."""
    parameters = MigrationParameters(downtime_limit_ms=100)
    decider = Decider()
    verdicts = [
        decide(decider, parameters, prediction_of(95, 110, 5), DirtyCurve(), seen(1000 - number)) for number in range(3)
    ]
    assert [verdict.step for verdict in verdicts] == ["round", "round", "give-up"]
    assert "no number of rounds" in verdicts[-1].sentence
    assert "bound 105.0 ms" in verdicts[-1].sentence
    forced = parameters.model_copy(update={"on_timeout": "force"})
    decider = Decider()
    steps = [
        decide(decider, forced, prediction_of(95, 110, 5), DirtyCurve(), seen(1000 - number)).step
        for number in range(5)
    ]
    assert steps == ["round"] * 5


def test_a_busy_moment_at_the_floor_does_not_end_an_attempt() -> None:
    parameters = MigrationParameters(downtime_limit_ms=100)
    decider = Decider()
    bounds = (110, 110, 99, 110, 110, 99)
    steps = [decide(decider, parameters, prediction_of(95, bound), DirtyCurve(), seen(1000)).step for bound in bounds]
    assert "give-up" not in steps


def test_a_bound_that_is_somewhat_wide_does_not_keep_an_attempt_from_beginning() -> None:
    parameters = MigrationParameters(downtime_limit_ms=600)
    assert Decider().hopeless(parameters, prediction_of(449, 617)) is None
    assert Decider().hopeless(parameters, prediction_of(449, 900)) is not None


def converging(goal: str, working_set_pages: int = 0) -> tuple[list[str], float]:
    """Play an attempt of 100 MiB over 1 Gbit/s with 20 MiB/s dirtied and a limit of 300 ms. Returns the steps, and the
    downtime (ms)."""
    parameters = MigrationParameters.model_validate({"downtime_limit_ms": 300, "downtime_goal": goal})
    page_ns, dirty_per_ns = 35_000, 5120e-9
    decider, curve = Decider(), DirtyCurve()
    steps: list[str] = []
    fixed = dataclasses.replace(BASES, memory_ns=0, save_ns=0, load_ns=5 * MS)
    knowledge = Knowledge(PRIOR)

    def stop(pages: int) -> Prediction:
        spreads_ns = {Component.STATE: pages * page_ns // 10}
        return predict(knowledge, bases=dataclasses.replace(fixed, memory_ns=pages * page_ns, spreads_ns=spreads_ns))

    pages, elapsed_ns, sent_bytes = 25_600, 0, 0
    while not steps or steps[-1] != "switch":
        round_ns = MS + pages * page_ns
        elapsed_ns, sent_bytes = elapsed_ns + round_ns, sent_bytes + pages * 4096
        pages = max(working_set_pages, int(round_ns * dirty_per_ns))
        curve.add(round_ns, pages)
        observed = Observation(pages, elapsed_ns / 1e9, 1e9 / page_ns * 4096, sent_bytes)
        verdict = decider.after_round(
            parameters, Outlook(stop, lambda n: MS + n * page_ns, lambda: stop(0)), curve, observed
        )
        steps.append(verdict.step)
        assert len(steps) < 50
    return steps, stop(pages).total_ns / MS


def test_the_least_downtime_that_is_cheap_costs_a_few_rounds() -> None:
    first_steps, first_ms = converging("first-fit")
    least_steps, least_ms = converging("least")
    assert least_ms < 0.5 * first_ms
    assert "shorten" in least_steps
    assert len(least_steps) <= len(first_steps) + 6


def test_rounds_that_shorten_nothing_are_not_made() -> None:
    """A hot set that is dirty again after every round: one try shows it, and the stop is made."""
    steps, _ = converging("least", working_set_pages=3000)
    assert steps.count("shorten") <= 2
    assert steps[-1] == "switch"


def test_the_last_small_round_is_a_rehearsal() -> None:
    parameters = MigrationParameters(downtime_limit_ms=300)
    decider = Decider()
    outlook = Outlook(lambda _: prediction_of(20, 30), lambda _: 2 * MS, lambda: prediction_of(20, 30))
    steps = [decider.after_round(parameters, outlook, DirtyCurve(), seen(100)).step for _ in range(2)]
    assert steps == ["rehearse", "switch"]


@pytest.mark.parametrize(("round_ms", "expected"), [(40, ["rehearse", "switch"]), (80, ["switch"])])
def test_where_the_blackout_goes_before_others_a_round_does_too_before_the_stop(
    round_ms: int, expected: list[str]
) -> None:
    """However many rounds there were that waited for others; unless it takes long."""
    parameters = MigrationParameters(downtime_limit_ms=300)
    decider = Decider()
    outlook = Outlook(lambda _: prediction_of(20, 30), lambda _: round_ms * MS, lambda: prediction_of(20, 30))
    steps: list[str] = []
    unlike = True
    while not steps or steps[-1] != "switch":
        observed = dataclasses.replace(seen(100), unlike=unlike)
        steps.append(decider.after_round(parameters, outlook, DirtyCurve(), observed).step)
        unlike = False
    assert steps == expected
