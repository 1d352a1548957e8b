"""What records teach: corrections, spreads, and bounds that hold in every regime and that no odd event carries away."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from migrated.prediction.knowledge import Knowledge
from migrated.prediction.model import Bases
from migrated.record.parts import Component, Part
from migrated.record.terms import Outcome
from migrated.state.learned import keep_knowledge, load_knowledge
from tests.migrated.predictions import BASES, EMPTY, MS, PRIOR, SMALL, predict, record_of, truth_of


def test_parts_of_a_prediction_sum_to_its_total() -> None:
    prediction = predict(Knowledge(PRIOR))
    assert sum(prediction.parts().values()) == prediction.total_ns
    assert prediction.upper_ns > prediction.total_ns


def test_memory_and_device_saves_run_side_by_side() -> None:
    saves_longer = Bases(0, 0, memory_ns=10 * MS, save_ns=50 * MS, load_ns=0, legs_ns=0, resume_ns=0)
    assert saves_longer.of(Component.STATE) == 50 * MS
    parts = predict(Knowledge(PRIOR), bases=saves_longer).parts()
    assert parts["memory"] < parts["device-saves"]


def test_an_unknown_guest_gets_a_wide_bound_that_says_why() -> None:
    prediction = predict(Knowledge(PRIOR))
    assert "wide: 0 attempts known, 19 needed" in prediction.basis
    assert prediction.upper_ns >= 1.3 * prediction.total_ns


def test_corrections_of_the_guest_are_learned() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(5):
        knowledge.learn(record_of(predict(knowledge), truth_of(2.0)), "class")
    total = predict(knowledge).total_ns
    assert total == pytest.approx(sum(truth_of(2.0).values()), rel=0.02)


def test_what_one_guest_costs_more_is_expected_of_its_class_and_of_a_stranger() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(5):
        knowledge.learn(record_of(predict(knowledge), truth_of(2.0)), "class")
    sibling = knowledge.predict("other", "class", BASES, coverage=0.95, bandwidth_known=True)
    assert sibling.total_ns == pytest.approx(sum(truth_of(2.0).values()), rel=0.02)
    stranger = knowledge.predict("other", "another class", BASES, coverage=0.95, bandwidth_known=True)
    assert stranger.total_ns == pytest.approx(sum(truth_of(2.0).values()), rel=0.02)


def test_a_stranger_does_not_inherit_a_faster_link() -> None:
    """Memory that moved faster than bandwidth said: only the guest itself may count on it."""
    knowledge = Knowledge(PRIOR)
    for _ in range(8):
        knowledge.learn(record_of(predict(knowledge), truth_of(0.3)), "class")
    assert predict(knowledge).components[Component.STATE] == pytest.approx(12 * MS, rel=0.02)
    assert predict(knowledge, "stranger").components[Component.STATE] >= BASES.memory_ns


def test_the_conformal_bound_covers_what_was_not_seen() -> None:
    """Train on 400 noisy truths, count on the next 1,000: coverage is that asked for, within sampling error."""
    draw = random.Random(7)
    knowledge = Knowledge(PRIOR)

    def truth() -> dict[Part, int]:
        outlier = 3.0 if draw.random() < 0.1 else 1.0
        return {part: int(ns * draw.uniform(0.9, 1.1) * (outlier if part is Part.DEVICE_LOADS else 1))
                for part, ns in truth_of(1.0).items()}  # fmt: skip

    held = 0
    for number in range(1400):
        prediction, actual = predict(knowledge), truth()
        if number >= 400:
            held += sum(actual.values()) <= prediction.upper_ns
        knowledge.learn(record_of(prediction, actual), "class")
    assert 925 <= held <= 980


def test_the_bound_is_as_wide_as_the_guest_is_uncertain() -> None:
    """A steady guest and a restless one share one pool of scores; each has a bound of its own width."""
    draw = random.Random(3)
    knowledge = Knowledge(PRIOR)
    held = {"steady": 0, "restless": 0}
    for number in range(400):
        for guest, jitter in (("steady", 0.01), ("restless", 0.5)):
            prediction = knowledge.predict(guest, guest, BASES, coverage=0.95, bandwidth_known=True)
            truth = truth_of(draw.uniform(1 - jitter, 1 + jitter))
            if number >= 200:
                held[guest] += sum(truth.values()) <= prediction.upper_ns
            knowledge.learn(record_of(prediction, truth, guest=guest), guest)
    steady, restless = (
        knowledge.predict(guest, guest, BASES, coverage=0.95, bandwidth_known=True) for guest in ("steady", "restless")
    )
    assert steady.upper_ns < 1.1 * steady.total_ns
    assert restless.upper_ns > 1.3 * restless.total_ns
    assert all(count >= 170 for count in held.values())


def test_what_rests_on_the_link_and_what_rests_on_devices_is_learned_apart() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(5):
        knowledge.learn(record_of(predict(knowledge), truth_of(2.0)), "class")
    saves_longer = dataclasses.replace(BASES, memory_ns=10 * MS, save_ns=40 * MS)
    assert predict(knowledge, bases=saves_longer).components[Component.STATE] == pytest.approx(41.5 * MS, rel=0.1)
    assert predict(knowledge).components[Component.STATE] == pytest.approx(80 * MS, rel=0.02)


UNREHEARSED = dataclasses.replace(BASES, memory_ns=200 * MS, memory_waited=True)


def test_what_memory_took_while_it_waited_is_what_it_takes_at_most() -> None:
    """A bound that leaves room for a tenth more, not for a half."""
    prediction = predict(Knowledge(PRIOR), bases=UNREHEARSED)
    rehearsed = predict(Knowledge(PRIOR), bases=dataclasses.replace(UNREHEARSED, memory_waited=False))
    assert 1.05 * prediction.total_ns < prediction.upper_ns < 1.35 * prediction.total_ns
    assert prediction.upper_ns < rehearsed.upper_ns


def test_memory_that_no_longer_waited_teaches_nothing_of_memory_that_was_rehearsed() -> None:
    knowledge = Knowledge(PRIOR)
    before = predict(knowledge).components[Component.STATE]
    for _ in range(8):
        knowledge.learn(record_of(predict(knowledge, bases=UNREHEARSED), truth_of(1.0)), "class")
    assert predict(knowledge).components[Component.STATE] == pytest.approx(before, rel=0.02)
    unrehearsed = predict(knowledge, bases=UNREHEARSED)
    assert unrehearsed.components[Component.STATE] == pytest.approx(40 * MS, rel=0.02)


def test_an_abort_beyond_the_prediction_widens_and_a_completion_forgives() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(30):
        knowledge.learn(record_of(predict(knowledge), truth_of(1.0)), "class")
    before = predict(knowledge).upper_ns
    knowledge.learn(record_of(predict(knowledge), truth_of(1.5), "aborted"), "class")
    after_abort = predict(knowledge).upper_ns
    assert after_abort > before
    for _ in range(60):
        knowledge.learn(record_of(predict(knowledge), truth_of(1.0)), "class")
    assert predict(knowledge).upper_ns < after_abort


def test_an_abort_below_the_prediction_tells_nothing_about_the_cost() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(5):
        knowledge.learn(record_of(predict(knowledge), truth_of(1.0)), "class")
    scores = json.dumps(knowledge.document()["scores"])
    knowledge.learn(record_of(predict(knowledge), truth_of(0.1), "aborted"), "class")
    assert json.dumps(knowledge.document()["scores"]) == scores


def stood_still(knowledge: Knowledge, outcome: Outcome, seconds: float, guest: str = "g") -> None:
    """A switchover of a small prediction in which somebody stopped for seconds."""
    prediction = predict(knowledge, guest, SMALL)
    knowledge.learn(record_of(prediction, {Part.STOP: int(seconds * 1000) * MS}, outcome, guest), "class")


@pytest.mark.parametrize("outcome", ["aborted", "completed"])
def test_a_vmm_that_stood_still_once_does_not_keep_its_guest_from_moving(outcome: Outcome) -> None:
    """8 s in a switchover that was predicted at some 8 ms: the next bound still is one of milliseconds."""
    knowledge = Knowledge(PRIOR)
    before = predict(knowledge, bases=SMALL)
    assert before.total_ns < 10 * MS
    stood_still(knowledge, outcome, 8)
    after = predict(knowledge, bases=SMALL)
    assert after.upper_ns < 1.5 * before.upper_ns


def test_a_daemon_that_stood_still_in_every_second_attempt_leaves_the_bound_alone() -> None:
    """4 s each time, as a fault campaign does it: retries fit as the first try did."""
    knowledge = Knowledge(PRIOR)
    before = predict(knowledge, bases=SMALL).upper_ns
    for _ in range(30):
        stood_still(knowledge, "aborted", 4)
        prediction = predict(knowledge, bases=SMALL)
        assert prediction.upper_ns < 1.5 * before
        truth = {Part.STOP: SMALL.stop_ns, Part.COMMIT_LEG: prediction.total_ns - SMALL.stop_ns}
        knowledge.learn(record_of(prediction, truth), "class")


def test_aborts_at_the_deadline_widen_at_most_for_a_while() -> None:
    knowledge = Knowledge(PRIOR)
    before = predict(knowledge, bases=SMALL)
    for _ in range(5):
        stood_still(knowledge, "aborted", 0.31)
    widened = predict(knowledge, bases=SMALL)
    assert before.upper_ns < widened.upper_ns < before.total_ns + 4 * (before.upper_ns - before.total_ns)
    assert predict(knowledge, "another", SMALL).upper_ns < widened.upper_ns
    knowledge.learn(record_of(widened, {}, "failed"), "class")
    assert predict(knowledge, bases=SMALL).upper_ns < widened.upper_ns


def test_what_was_kept_cannot_carry_a_poisoned_figure() -> None:
    """Whatever a file says, a bound stays within what learning itself would have allowed."""
    poisoned = {
        "corrections": {f"*/{component}/factor": [1e9] * 60 for component in ("stop", "legs", "resume")}
        | {f"*/{component}/overhead": [1e15] for component in ("stop", "legs", "resume")},
        "scores": {predict(Knowledge(PRIOR)).regime: [1e12] * 10},
        "shifts": {predict(Knowledge(PRIOR)).regime: 1e6},
    }
    knowledge = Knowledge.from_document(EMPTY | poisoned, PRIOR)
    assert predict(knowledge).upper_ns < 4 * predict(Knowledge(PRIOR)).upper_ns


def test_every_regime_gets_the_bound_that_it_needs() -> None:
    """Fast links err by far more scales than slow ones; the bound holds in both, and is not as wide in both."""
    draw = random.Random(11)
    knowledge = Knowledge(PRIOR)
    links = {"slow": 100 << 20, "fast": 1 << 30}
    held = dict.fromkeys(links, 0)
    for number in range(300):
        for link, bytes_per_s in links.items():
            bases = dataclasses.replace(BASES, bandwidth_bytes_per_s=bytes_per_s)
            prediction = predict(knowledge, f"{link}-{number % 10}", bases)
            error_ns = draw.gauss(0, 1) * (1 * MS if link == "slow" else 8 * MS)
            truth = {Part.COMMIT_LEG: int(prediction.total_ns + error_ns)}
            if number >= 100:
                held[link] += sum(truth.values()) <= prediction.upper_ns
            # Only the whole is learned here: components that are right would hide the difference.
            knowledge.learn(record_of(prediction, truth, guest=f"{link}-{number % 10}"), link)
    assert min(held.values()) >= 176  # of 200; 190 on average
    assert max(held.values()) <= 199


def test_a_host_that_becomes_slower_is_followed() -> None:
    draw = random.Random(5)
    knowledge = Knowledge(PRIOR)
    held = []
    for number in range(400):
        prediction = predict(knowledge)
        factor = 1.0 if number < 150 else 1.6
        truth = {part: int(ns * factor * draw.uniform(0.95, 1.05)) for part, ns in truth_of(1.0).items()}
        held.append(sum(truth.values()) <= prediction.upper_ns)
        knowledge.learn(record_of(prediction, truth), "class")
    assert sum(held[250:]) >= 130  # of 150


def test_refused_and_cancelled_attempts_teach_nothing() -> None:
    knowledge = Knowledge(PRIOR)
    for outcome in ("refused", "cancelled", "failed"):
        knowledge.learn(record_of(predict(knowledge), truth_of(9.0), outcome), "class")
    assert knowledge.document() == Knowledge(PRIOR).document()


def test_knowledge_survives_its_own_document_and_stays_bounded() -> None:
    knowledge = Knowledge(PRIOR)
    for number in range(1000):
        name = f"guest-{number}"
        knowledge.learn(record_of(predict(knowledge, name), truth_of(1.0 + number % 7 / 10), guest=name), "class")
    document = json.loads(json.dumps(knowledge.document()))
    assert len(json.dumps(document)) < 1_000_000
    again = Knowledge.from_document(document, PRIOR)
    assert predict(again) == predict(knowledge)


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"version": 2},
        {"version": 3},
        EMPTY | {"scores": {"regime": [float("nan")]}},
        EMPTY | {"shifts": {"regime": float("inf")}},
        EMPTY | {"corrections": {"*/stop/factor": []}},
    ],
)
def test_a_damaged_document_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        Knowledge.from_document(damage, PRIOR)


def test_a_prediction_is_cheap() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(250):
        knowledge.learn(record_of(predict(knowledge), truth_of(1.0)), "class")
    begin = time.perf_counter()
    for _ in range(50):
        predict(knowledge)
    assert (time.perf_counter() - begin) / 50 < 0.02  # 1 ms on a quiet machine; this one may be busy


def test_tries_that_lay_close_together_make_a_narrow_bound() -> None:
    """450 ms of devices that were tried fifteen times, within 5 ms: nothing is known of this guest, and it fits 600."""
    bases = Bases(
        stop_ns=MS, dirty_log_ns=MS, memory_ns=5 * MS, save_ns=2 * MS, load_ns=440 * MS, legs_ns=MS, resume_ns=MS,
        spreads_ns={Component.DEVICE_LOADS: 5 * MS},
    )  # fmt: skip
    tried = predict(Knowledge(PRIOR), bases=bases)
    guessed = predict(Knowledge(PRIOR), bases=dataclasses.replace(bases, spreads_ns={}))
    assert tried.upper_ns < 600 * MS
    assert tried.upper_ns < guessed.upper_ns
    restless = predict(Knowledge(PRIOR), bases=dataclasses.replace(bases, spreads_ns={Component.DEVICE_LOADS: 80 * MS}))
    assert restless.upper_ns > 600 * MS


def test_nothing_comes_on_top_of_a_step_that_was_timed_whole() -> None:
    """A driver that learns from moves has the calls and wake-ups in its figures; they are not added a second time, nor
    is how much those vary, which the spread of the moves shows."""
    tried_ns = dict.fromkeys((Component.STOP, Component.STATE, Component.DEVICE_LOADS), MS // 4)
    whole = Bases(
        stop_ns=MS, dirty_log_ns=MS // 2, memory_ns=MS, save_ns=4 * MS, load_ns=4 * MS, legs_ns=MS // 4,
        resume_ns=2 * MS, devices=1, device_bytes=1 << 17, whole_steps=True, spreads_ns=tried_ns,
    )  # fmt: skip
    prediction = predict(Knowledge(PRIOR), bases=whole)
    timed = (Component.STOP, Component.STATE, Component.DEVICE_LOADS, Component.RESUME)
    assert sum(prediction.components[component] for component in timed) == pytest.approx(11 * MS, rel=0.05)
    of_the_vmm_alone = predict(Knowledge(PRIOR), bases=dataclasses.replace(whole, whole_steps=False))
    assert of_the_vmm_alone.total_ns > prediction.total_ns + 2 * MS
    assert of_the_vmm_alone.upper_ns - of_the_vmm_alone.total_ns > prediction.upper_ns - prediction.total_ns
    waiting = predict(Knowledge(PRIOR), bases=dataclasses.replace(whole, load=4.0))
    assert waiting.total_ns > 1.5 * prediction.total_ns


def test_on_a_busy_host_what_waits_for_a_processor_takes_longer() -> None:
    knowledge = Knowledge(PRIOR)
    busy = dataclasses.replace(SMALL, load=4.0)
    quiet_prediction, busy_prediction = predict(knowledge, bases=SMALL), predict(knowledge, bases=busy)
    assert busy_prediction.total_ns > 1.5 * quiet_prediction.total_ns
    assert busy_prediction.upper_ns - busy_prediction.total_ns > quiet_prediction.upper_ns - quiet_prediction.total_ns
    assert "busy-host" in busy_prediction.regime


def test_what_was_learned_on_a_busy_host_does_not_lengthen_the_prediction_of_a_quiet_one() -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(10):
        knowledge.learn(record_of(predict(knowledge), truth_of(1.0)), "class")
    before = predict(knowledge).total_ns
    busy = dataclasses.replace(BASES, load=4.0)
    for _ in range(10):
        knowledge.learn(record_of(predict(knowledge, bases=busy), truth_of(3.0)), "class")
    assert predict(knowledge).total_ns == before
    assert predict(knowledge, bases=busy).total_ns == pytest.approx(sum(truth_of(3.0).values()), rel=0.02)


def test_parts_are_attributed_to_components() -> None:

    knowledge = Knowledge(PRIOR)
    knowledge.learn(record_of(predict(knowledge), truth_of(1.0)), "class")
    corrections = knowledge.document()["corrections"]
    assert corrections["class:class/state:memory/factor"][0] == pytest.approx(1.0, abs=0.01)
    assert corrections["class:class/device-loads/factor"][0] == pytest.approx(1.0, abs=0.01)


def test_a_file_of_an_older_version_is_dropped_with_a_line_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "knowledge.json").write_text(
        json.dumps({"version": 2, "corrections": {}, "scores": [9e9], "aborts": {}})
    )
    with capture_logs() as said:
        knowledge = load_knowledge(tmp_path)
    assert knowledge.document() == EMPTY
    assert [line["log_level"] for line in said] == ["warning"]
    assert "version 2" in said[0]["reason"]


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    knowledge = Knowledge(PRIOR)
    for _ in range(6):
        knowledge.learn(record_of(predict(knowledge), truth_of(1.5)), "class")
    keep_knowledge(tmp_path, knowledge)
    assert predict(load_knowledge(tmp_path)) == predict(knowledge)
