"""The executor, step by step: which effects an event leads to, in which order, and what follows when one fails.

take(event) -> effect -> done(outcome) -> effect -> ... -> None
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from protocol import effects
from protocol.answers import journaled_answer, may_close, newer_epoch, who_answers
from protocol.effects import DONE, Outcome, Result, failed
from protocol.executor import DestinationExecutor, SourceExecutor
from protocol.handover import Decision, DestinationEvent, DestinationState, IllegalEventError, SourceEvent, SourceState

S, E, D, F = SourceState, SourceEvent, DestinationState, DestinationEvent

READY_TO_RUN = {"LookAtGuest": [Outcome(Result.WAITS)]}


def played(
    one: SourceExecutor | DestinationExecutor, event: Any, ends: Mapping[str, list[Outcome]] | None = None, **why: Any
) -> list[str]:
    """Take an event and carry all effects out. Returns their names; ``ends`` says how those end that are not DONE,
    the first time, the second time and so on."""
    left = {name: list(outcomes) for name, outcomes in (ends or {}).items()}
    names = []
    one.take(event, **why)
    while (effect := one.effect) is not None:
        decision = getattr(effect, "decision", None)
        name = type(effect).__name__ if decision is None else f"Journal {decision}"
        names.append(name)
        one.done(left[name].pop(0) if left.get(name) else DONE)
    return names


def source(state: SourceState = S.STOPPED, **options: Any) -> SourceExecutor:
    return SourceExecutor(state, **{"locks": True, **options})


def in_fleet(state: SourceState = S.STOPPED) -> SourceExecutor:
    return source(state, fleet=True)


def destination(state: DestinationState = D.LOADING, **options: Any) -> DestinationExecutor:
    return DestinationExecutor(state, **{"locks": True, **options})


class TestSource:
    def test_commit_is_journaled_and_the_lock_free_before_it_is_told(self) -> None:
        one = source()
        assert played(one, E.READY_IN_TIME) == ["Journal commit", "ReleaseLock", "SendCommit"]
        assert one.state is S.COMMITTED
        assert not one.final

    def test_a_commit_that_cannot_be_journaled_is_not_told(self) -> None:
        one = source()
        names = played(one, E.READY_IN_TIME, {"Journal commit": [failed("the disk is full")]})
        assert names == ["Journal commit", "TakeLock", "WriteMark", "ResumeGuest", "SendAbort"]
        assert one.state is S.ABORTED
        assert one.reason == "the disk is full"

    def test_the_guest_is_taken_back_lock_first_and_the_peer_is_told_last(self) -> None:
        one = source()
        assert played(one, E.NO, reason="too slow") == ["TakeLock", "WriteMark", "ResumeGuest", "SendAbort"]
        assert one.final

    def test_who_cannot_get_the_lock_stays_stopped_and_says_so(self) -> None:
        one = source()
        names = played(one, E.NO, {"TakeLock": [failed("another VMM holds it")]}, reason="too slow")
        assert names == ["TakeLock", "SendAbort"]
        assert one.reason == "too slow; then the guest could not be resumed: another VMM holds it"

    def test_a_mark_that_cannot_be_written_keeps_no_guest_stopped(self) -> None:
        names = played(source(), E.NO, {"WriteMark": [failed("the disk is full")]})
        assert names == ["TakeLock", "WriteMark", "ResumeGuest", "SendAbort"]

    def test_a_guest_without_locks_that_was_paused_is_only_given_back(self) -> None:
        assert played(source(locks=False, was_paused=True), E.CANCEL) == ["ResumeGuest", "SendAbort"]

    def test_a_guest_that_cannot_be_stopped_is_a_fault(self) -> None:
        one = source(S.RUNNING)
        names = played(one, E.STOP, {"StopGuest": [failed("no answer")]})
        assert names == ["StopGuest", "TakeLock", "WriteMark", "ResumeGuest", "SendAbort"]
        assert (one.state, one.reason) == (S.ABORTED, "the guest could not be stopped: no answer")

    def test_doubt_begins_once_and_ends_with_the_answer(self) -> None:
        one = source(S.COMMITTED)
        assert played(one, E.LINK_LOST) == ["ReleaseLock", "AskOutcome"]
        assert one.in_doubt
        assert played(one, E.DEADLINE) == []
        assert one.in_doubt
        assert played(one, E.RUNNING) == ["Journal retired", "RetireGuest"]
        assert not one.in_doubt

    def test_what_was_proved_stays_true_without_a_note(self) -> None:
        one = source(S.COMMITTED)
        ends = {"Journal abort": [failed("the disk is full")]}
        assert played(one, E.DISCARDED, ends, reason="it was discarded") == [
            "Journal abort",
            "TakeLock",
            "WriteMark",
            "ResumeGuest",
        ]
        assert one.reason == "it was discarded"

    def test_a_cancel_after_commit_is_refused_and_changes_nothing(self) -> None:
        one = source(S.COMMITTED)
        assert one.take(E.CANCEL, "stop it") is False
        assert one.effect is None
        assert one.reason is None

    def test_the_first_reason_is_kept_and_told(self) -> None:
        one = source()
        one.take(E.FAULT, "a save failed")
        while not isinstance(one.effect, effects.SendAbort):
            one.done(DONE)
        assert one.effect.reason == "a save failed"
        one.done(DONE)
        assert played(one, E.LINK_LOST, reason="the connection was lost") == []
        assert one.reason == "a save failed"

    def test_an_illegal_event_changes_nothing(self) -> None:
        one = source(S.RUNNING)
        with pytest.raises(IllegalEventError):
            one.take(E.RUNNING)
        assert one.effect is None
        assert one.state is S.RUNNING

    def test_one_event_at_a_time(self) -> None:
        one = source()
        one.take(E.NO)
        with pytest.raises(RuntimeError, match="while take-lock is being carried out"):
            one.take(E.NO)


class TestSourceInAFleet:
    REFUSED = Outcome(Result.REFUSED, "b owns it")

    def test_the_destination_owns_the_guest_before_commit_is_journaled(self) -> None:
        one = in_fleet()
        names = played(one, E.READY_IN_TIME)
        assert names == ["TransferOwnership", "Journal commit", "ReleaseLock", "SendCommit"]

    def test_no_answer_is_not_a_yes_and_the_guest_runs_again(self) -> None:
        one = in_fleet()
        names = played(one, E.READY_IN_TIME, {"TransferOwnership": [failed("etcd does not answer")]})
        assert names == ["TransferOwnership", "TakeLock", "WriteMark", "ResumeGuest", "SendAbort", "ReclaimOwnership"]
        assert one.state is S.ABORTED
        assert one.reason == "etcd does not answer"

    def test_a_no_holds_the_guest_until_an_operator_decides(self) -> None:
        one = in_fleet()
        assert played(one, E.READY_IN_TIME, {"TransferOwnership": [self.REFUSED]}) == ["TransferOwnership", "SendAbort"]
        assert (one.state, one.reason, one.final) == (S.HELD, "b owns it", False)
        assert played(one, E.LINK_LOST) == []
        names = played(one, E.RESOLVE_RUN_HERE)
        assert names == ["Journal abort", "TakeLock", "WriteMark", "ResumeGuest", "ReclaimOwnership"]

    def test_a_commit_that_cannot_be_journaled_takes_the_ownership_back(self) -> None:
        one = in_fleet()
        names = played(one, E.READY_IN_TIME, {"Journal commit": [failed("the disk is full")]})
        assert names[2:] == ["TakeLock", "WriteMark", "ResumeGuest", "SendAbort", "ReclaimOwnership"]

    def test_a_restarted_source_asks_before_the_guest_runs(self) -> None:
        one = in_fleet()
        names = played(one, E.RESTART)
        assert names == ["ConfirmOwnership", "TakeLock", "WriteMark", "ResumeGuest", "SendAbort"]
        assert one.state is S.ABORTED

    def test_a_restarted_source_without_an_answer_asks_again(self) -> None:
        one = in_fleet()
        names = played(one, E.RESTART, {"ConfirmOwnership": [failed("etcd does not answer")]})
        assert names == ["ConfirmOwnership", "SendAbort", "AskOwnership"]
        assert not one.final
        assert played(one, E.ASK_AGAIN) == ["ConfirmOwnership", "TakeLock", "WriteMark", "ResumeGuest"]
        assert one.state is S.ABORTED

    def test_a_restarted_source_that_is_told_no_asks_no_more(self) -> None:
        one = in_fleet()
        assert played(one, E.RESTART, {"ConfirmOwnership": [self.REFUSED]}) == ["ConfirmOwnership", "SendAbort"]
        assert one.state is S.HELD

    def test_an_operators_word_needs_no_store(self) -> None:
        one = in_fleet()
        played(one, E.RESTART, {"ConfirmOwnership": [failed("etcd does not answer")]})
        assert "ConfirmOwnership" not in played(one, E.RESOLVE_RUN_HERE)
        assert one.state is S.ABORTED

    def test_a_restarted_source_in_doubt_asks_before_it_takes_back_what_was_discarded(self) -> None:
        one = in_fleet(S.COMMITTED)
        assert played(one, E.RESTART) == ["ReleaseLock", "AskOutcome"]
        assert played(one, E.DISCARDED)[:3] == ["Journal abort", "ConfirmOwnership", "TakeLock"]

    def test_one_that_was_not_restarted_takes_back_what_was_discarded_at_once(self) -> None:
        one = in_fleet()
        played(one, E.READY_IN_TIME)
        names = played(one, E.DISCARDED)
        assert names == ["Journal abort", "TakeLock", "WriteMark", "ResumeGuest", "ReclaimOwnership"]

    def test_its_memory_holds_that_it_was_restarted(self) -> None:
        one = in_fleet()
        one.take(E.RESTART)
        other = in_fleet()
        other.recall(one.memory)
        assert isinstance(other.effect, effects.ConfirmOwnership)


class TestDestinationInAFleet:
    def test_the_commit_of_a_living_daemon_needs_no_store(self) -> None:
        one = destination(D.READY, fleet=True)
        assert "ConfirmOwnership" not in played(one, F.COMMIT, READY_TO_RUN)

    def test_a_restarted_destination_asks_before_the_guest_runs(self) -> None:
        one = destination(D.COMMITTED, fleet=True)
        names = played(one, F.RESTART, READY_TO_RUN)
        assert names[:5] == ["TakeLock", "LookAtGuest", "ConfirmOwnership", "WriteMark", "ResumeGuest"]
        assert one.state is D.RUNNING

    def test_without_a_yes_it_stays_stopped_and_is_tried_again_when_the_source_asks(self) -> None:
        one = destination(D.COMMITTED, fleet=True)
        for event, outcome in ((F.RESTART, failed("no answer")), (F.COMMIT, Outcome(Result.REFUSED, "a is fenced"))):
            names = played(one, event, {**READY_TO_RUN, "ConfirmOwnership": [outcome]})
            assert names == ["TakeLock", "LookAtGuest", "ConfirmOwnership", "SendOpen"]
            assert one.state is D.COMMITTED
        assert played(one, F.COMMIT, READY_TO_RUN)[-1] == "SendRunning"

    def test_a_guest_that_runs_already_is_not_asked_for(self) -> None:
        one = destination(D.COMMITTED, fleet=True)
        names = played(one, F.RESTART, {"LookAtGuest": [Outcome(Result.RUNS)]})
        assert names == ["TakeLock", "LookAtGuest", "Journal running", "SendRunning"]


class TestDestination:
    def test_ready_is_journaled_before_it_is_voted(self) -> None:
        assert played(destination(), F.LOADED) == ["Journal ready", "SendReady"]

    def test_a_ready_that_cannot_be_journaled_is_a_no(self) -> None:
        one = destination()
        one.take(F.LOADED)
        one.done(failed("the disk is full"))
        assert one.effect == effects.SendNo("fault", "the disk is full")
        one.done(DONE)
        assert isinstance(one.effect, effects.DestroyGuest)
        one.done(DONE)
        assert one.state is D.DISCARDED

    def test_commit_runs_the_guest_and_its_result_is_the_next_event(self) -> None:
        one = destination(D.READY)
        assert played(one, F.COMMIT, READY_TO_RUN) == [
            "Journal commit",
            "TakeLock",
            "LookAtGuest",
            "WriteMark",
            "ResumeGuest",
            "Journal running",
            "SendRunning",
        ]
        assert one.state is D.RUNNING

    def test_a_commit_that_cannot_be_journaled_runs_nothing(self) -> None:
        one = destination(D.READY)
        assert played(one, F.COMMIT, {"Journal commit": [failed("the disk is full")]}) == ["Journal commit", "SendOpen"]
        assert one.state is D.READY

    def test_a_guest_that_runs_already_is_not_run_again(self) -> None:
        names = played(destination(D.COMMITTED), F.RESTART, {"LookAtGuest": [Outcome(Result.RUNS)]})
        assert names == ["TakeLock", "LookAtGuest", "Journal running", "SendRunning"]

    def test_a_guest_that_arrives_paused_gets_no_mark(self) -> None:
        names = played(destination(D.COMMITTED, keep_paused=True, locks=False), F.RESTART, READY_TO_RUN)
        assert names == ["LookAtGuest", "ResumeGuest", "Journal running", "SendRunning"]

    def test_a_failed_resume_is_looked_at_and_its_mark_withdrawn_before_the_process_ends(self) -> None:
        one = destination(D.COMMITTED)
        ends = {
            "LookAtGuest": [Outcome(Result.WAITS), Outcome(Result.WAITS)],
            "ResumeGuest": [failed("no such device")],
            "EndGuest": [Outcome(Result.NEVER_RAN)],
        }
        assert played(one, F.RESTART, ends) == [
            "TakeLock",
            "LookAtGuest",
            "WriteMark",
            "ResumeGuest",
            "LookAtGuest",
            "WithdrawMark",
            "EndGuest",
            "DestroyGuest",
            "Journal discard",
            "SendDiscarded",
        ]
        assert one.reason == "the guest could not be resumed: no such device"

    def test_a_resume_whose_answer_is_lost_is_a_resume(self) -> None:
        one = destination(D.COMMITTED)
        ends = {
            "LookAtGuest": [Outcome(Result.WAITS), Outcome(Result.RUNS)],
            "ResumeGuest": [failed("timed out")],
        }
        assert played(one, F.RESTART, ends)[-3:] == ["LookAtGuest", "Journal running", "SendRunning"]
        assert (one.state, one.reason) == (D.RUNNING, None)

    @pytest.mark.parametrize("step", ["TakeLock", "WriteMark"])
    def test_without_lock_or_mark_the_guest_is_not_run(self, step: str) -> None:
        ends = {
            step: [failed("it cannot be had")],
            "LookAtGuest": [Outcome(Result.WAITS), Outcome(Result.WAITS)],
            "EndGuest": [Outcome(Result.NEVER_RAN)],
        }
        names = played(destination(D.COMMITTED), F.RESTART, ends)
        assert "ResumeGuest" not in names
        assert names[-1] == "SendDiscarded"

    def test_a_process_that_is_gone_is_judged_by_the_marks(self) -> None:
        gone = {"LookAtGuest": [failed("gone")], "TakeLock": [DONE]}
        ran = played(destination(D.COMMITTED), F.RESTART, {**gone, "EndGuest": [Outcome(Result.RUNS)]})
        assert ran == ["TakeLock", "LookAtGuest", "EndGuest", "Journal running", "SendRunning"]
        never = played(destination(D.COMMITTED), F.RESTART, {**gone, "EndGuest": [Outcome(Result.NEVER_RAN)]})
        assert never[-3:] == ["DestroyGuest", "Journal discard", "SendDiscarded"]

    def test_a_guest_of_which_nothing_is_known_stays_open_until_the_source_asks_again(self) -> None:
        one = destination(D.COMMITTED)
        ends = {"LookAtGuest": [failed("silence")], "EndGuest": [Outcome(Result.UNKNOWN, "it does not end")]}
        assert played(one, F.RESTART, ends) == ["TakeLock", "LookAtGuest", "EndGuest", "SendOpen"]
        assert one.state is D.COMMITTED
        assert played(one, F.LINK_LOST) == []
        assert played(one, F.COMMIT, READY_TO_RUN)[-2:] == ["Journal running", "SendRunning"]

    def test_a_mark_that_cannot_be_withdrawn_leaves_the_guest_alone(self) -> None:
        one = destination(D.COMMITTED)
        ends = {
            "LookAtGuest": [Outcome(Result.WAITS), Outcome(Result.WAITS)],
            "ResumeGuest": [failed("no such device")],
            "WithdrawMark": [failed("the disk is full")],
        }
        assert played(one, F.RESTART, ends)[-2:] == ["WithdrawMark", "SendOpen"]
        assert one.state is D.COMMITTED

    def test_what_is_not_journaled_is_not_told(self) -> None:
        full = {"Journal discard": [failed("the disk is full")]}
        assert played(destination(D.READY), F.ABORT, full) == ["Journal discard", "DestroyGuest"]
        assert played(destination(), F.LIMIT, full) == ["Journal discard", "DestroyGuest"]

    def test_a_discard_is_proved_again_whenever_it_is_asked_for(self) -> None:
        assert played(destination(D.DISCARDED), F.COMMIT) == ["Journal discard", "SendDiscarded"]

    def test_only_what_discards_the_guest_is_its_reason(self) -> None:
        one = destination(D.READY)
        played(one, F.LINK_LOST, reason="the connection was lost")
        assert one.reason is None
        played(one, F.READY_TIMEOUT, reason="no decision came", cause="lost")
        assert [one.reason, one.cause] == ["no decision came", "lost"]


class TestAnswers:
    @pytest.mark.parametrize("state", list(DestinationState))
    def test_a_newer_epoch_ends_what_is_not_decided(self, state: DestinationState) -> None:
        assert newer_epoch(state) == (F.ABORT if state in (D.LOADING, D.READY) else None)

    def test_memory_answers_before_the_journal(self) -> None:
        assert who_answers("running", "taken up", "ended") == "running"
        assert who_answers(None, "taken up", "ended") == "taken up"
        assert who_answers(None, None, "ended") == "ended"
        assert who_answers(None, None, None) is None

    @pytest.mark.parametrize(
        ("journal", "answer"),
        [
            ("begin", effects.SendOpen),
            ("begin ready", effects.SendOpen),
            ("begin ready commit", effects.SendOpen),
            ("begin ready commit running", effects.SendRunning),
            ("begin ready discard", effects.SendDiscarded),
        ],
    )
    def test_the_journal_answers_what_it_holds(self, journal: str, answer: type) -> None:
        decisions = [Decision(word) for word in journal.split()]
        assert type(journaled_answer(F.COMMIT, decisions)) is answer
        assert may_close(decisions) is (answer is not effects.SendOpen)

    def test_an_attempt_that_is_not_known_was_discarded_if_the_source_keeps_its_guest(self) -> None:
        assert isinstance(journaled_answer(F.ABORT, None), effects.SendDiscarded)
        answer = journaled_answer(F.COMMIT, None)
        assert isinstance(answer, effects.SendOpen)
        assert "resolve it by hand" in answer.reason
