"""The hand-over tables, row by row: every event in every state, and what a journal gives back after a restart.

What the rows are worth together is shown by the explorer (scripts/proof), which runs both sides against a bad
network, crashes and restarts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.handover import (
    DESTINATION,
    FLEET_ROWS,
    FLEET_SOURCE,
    SOURCE,
    Action,
    Decision,
    DestinationEvent,
    DestinationState,
    IllegalEventError,
    Machine,
    SourceEvent,
    SourceState,
    check_epoch,
    destination_state_of,
    source_state_of,
)

S, D, A = SourceState, DestinationState, Action

# The state after each event, by first letters; "." is an event that the state does not allow.
SOURCE_MATRIX = """
                    RUNNING    STOPPED    COMMITTED  ABORTED    RETIRED
stop                STOPPED    .          .          .          .
ready-in-time       .          COMMITTED  COMMITTED  ABORTED    RETIRED
ready-late          .          ABORTED    COMMITTED  ABORTED    RETIRED
no                  ABORTED    ABORTED    .          ABORTED    .
deadline            .          ABORTED    COMMITTED  ABORTED    RETIRED
link-lost           ABORTED    ABORTED    COMMITTED  ABORTED    RETIRED
fault               ABORTED    ABORTED    COMMITTED  ABORTED    RETIRED
cancel              ABORTED    ABORTED    COMMITTED  ABORTED    RETIRED
running             .          .          RETIRED    .          RETIRED
discarded           .          ABORTED    ABORTED    ABORTED    .
resolve-run-here    .          .          ABORTED    .          .
resolve-discard     .          .          RETIRED    .          .
restart             .          ABORTED    COMMITTED  ABORTED    RETIRED
journal-failed      .          .          ABORTED    .          .
"""
FLEET_MATRIX = """
                    RUNNING    STOPPED    COMMITTED  ABORTED    RETIRED    HELD
stop                STOPPED    .          .          .          .          .
ready-in-time       .          COMMITTED  COMMITTED  ABORTED    RETIRED    HELD
ready-late          .          ABORTED    COMMITTED  ABORTED    RETIRED    HELD
no                  ABORTED    ABORTED    .          ABORTED    RETIRED    HELD
deadline            .          ABORTED    COMMITTED  ABORTED    RETIRED    HELD
link-lost           ABORTED    ABORTED    COMMITTED  ABORTED    RETIRED    HELD
fault               ABORTED    ABORTED    COMMITTED  ABORTED    RETIRED    HELD
cancel              ABORTED    ABORTED    COMMITTED  ABORTED    RETIRED    HELD
running             .          .          RETIRED    .          RETIRED    .
discarded           .          ABORTED    ABORTED    ABORTED    RETIRED    HELD
resolve-run-here    .          .          ABORTED    .          .          ABORTED
resolve-discard     .          .          RETIRED    .          .          RETIRED
restart             .          ABORTED    COMMITTED  ABORTED    RETIRED    .
journal-failed      .          .          ABORTED    .          .          .
ownership-unknown   .          .          ABORTED    HELD       .          .
ownership-lost      .          .          HELD       HELD       .          .
ask-again           .          .          .          .          .          ABORTED
"""
DESTINATION_MATRIX = """
                    LOADING    READY      COMMITTED  RUNNING    DISCARDED
loaded              READY      .          .          .          DISCARDED
limit               DISCARDED  READY      COMMITTED  RUNNING    DISCARDED
fault               DISCARDED  DISCARDED  COMMITTED  RUNNING    DISCARDED
link-lost           DISCARDED  READY      COMMITTED  RUNNING    DISCARDED
cancel              DISCARDED  READY      COMMITTED  RUNNING    DISCARDED
commit              .          COMMITTED  COMMITTED  RUNNING    DISCARDED
abort               DISCARDED  DISCARDED  .          .          DISCARDED
ready-timeout       .          DISCARDED  COMMITTED  RUNNING    DISCARDED
resumed             .          .          RUNNING    .          .
resume-failed       .          .          DISCARDED  .          .
restart             DISCARDED  READY      COMMITTED  RUNNING    DISCARDED
journal-failed      .          DISCARDED  READY      .          .
"""


def cells(matrix: str, states: type[StrEnum], events: type[StrEnum]) -> list[Any]:
    head, *rows = matrix.strip("\n").splitlines()
    columns = [states[name] for name in head.split()]
    found = []
    for row in rows:
        event, *results = row.split()
        found += [
            pytest.param(state, events(event), None if result == "." else states[result], id=f"{state}-{event}")
            for state, result in zip(columns, results, strict=True)
        ]
    return found


SOURCE_CELLS = cells(SOURCE_MATRIX, SourceState, SourceEvent)
FLEET_CELLS = cells(FLEET_MATRIX, SourceState, SourceEvent)
DESTINATION_CELLS = cells(DESTINATION_MATRIX, DestinationState, DestinationEvent)


def check_cell(machine: Machine[Any, Any], side: str, event: StrEnum, after: StrEnum | None) -> None:
    before = machine.state
    if after is None:
        with pytest.raises(IllegalEventError, match=f"the {side} is {before} and cannot take {event}") as caught:
            machine.take(event)
        assert caught.value.code is ErrorCode.UNEXPECTED
        assert machine.state is before
    else:
        machine.take(event)
        assert machine.state is after


@pytest.mark.parametrize(("state", "event", "after"), SOURCE_CELLS)
def test_source(state: SourceState, event: SourceEvent, after: SourceState | None) -> None:
    check_cell(Machine("source", SOURCE, state), "source", event, after)


@pytest.mark.parametrize(("state", "event", "after"), FLEET_CELLS)
def test_source_in_a_fleet(state: SourceState, event: SourceEvent, after: SourceState | None) -> None:
    check_cell(Machine("source", FLEET_SOURCE, state), "source", event, after)


@pytest.mark.parametrize(("state", "event", "after"), DESTINATION_CELLS)
def test_destination(state: DestinationState, event: DestinationEvent, after: DestinationState | None) -> None:
    check_cell(Machine("destination", DESTINATION, state), "destination", event, after)


def test_the_matrices_are_whole() -> None:
    assert len(FLEET_CELLS) == len(SourceState) * len(SourceEvent)
    only_in_a_fleet = {SourceEvent.OWNERSHIP_UNKNOWN, SourceEvent.OWNERSHIP_LOST, SourceEvent.ASK_AGAIN}
    assert len(SOURCE_CELLS) == (len(SourceState) - 1) * len(set(SourceEvent) - only_in_a_fleet)
    assert all(state is not S.HELD and event not in only_in_a_fleet for state, event in SOURCE)
    assert len(DESTINATION_CELLS) == len(DestinationState) * len(DestinationEvent)


def rows(table: Mapping[Any, Any]) -> list[tuple[StrEnum, StrEnum, StrEnum, tuple[Action, ...]]]:
    return [(state, event, after, actions) for (state, event), (after, actions) in table.items()]


@pytest.mark.parametrize(
    ("table", "final"), [(SOURCE, {S.ABORTED, S.RETIRED}), (DESTINATION, {D.DISCARDED, D.RUNNING})]
)
def test_nothing_leaves_a_final_state(table: Any, final: set[StrEnum]) -> None:
    assert {after for state, _, after, _ in rows(table) if state in final} == final
    assert all(after is state for state, _, after, _ in rows(table) if state in final)


def test_in_a_fleet_the_destination_owns_the_guest_before_commit_is_journaled() -> None:
    """Every new decision to commit begins with the transfer, and what follows from another answer sends no COMMIT."""
    for (state, event), (after, actions) in FLEET_SOURCE.items():
        if A.JOURNAL_COMMIT in actions:
            assert actions[0] is A.TRANSFER_OWNERSHIP, (state, event)
        if event in (SourceEvent.OWNERSHIP_UNKNOWN, SourceEvent.OWNERSHIP_LOST):
            assert A.SEND_COMMIT not in actions
            assert after in (S.ABORTED, S.HELD)
    resumes = {row for row, (_, actions) in FLEET_ROWS.items() if A.RESUME_GUEST in actions}
    leaves_held = {event for state, event in resumes if state is S.HELD}
    assert leaves_held == {SourceEvent.ASK_AGAIN, SourceEvent.RESOLVE_RUN_HERE}


def test_the_guest_runs_only_on_these_rows() -> None:
    assert {(state, event) for state, event, _, actions in rows(DESTINATION) if A.RESUME_GUEST in actions} == {
        (D.READY, DestinationEvent.COMMIT),
        (D.COMMITTED, DestinationEvent.RESTART),
    }
    for state, event, after, actions in rows(SOURCE):
        if A.RESUME_GUEST in actions:
            assert after is S.ABORTED
            if state is S.COMMITTED:
                assert event in (SourceEvent.DISCARDED, SourceEvent.RESOLVE_RUN_HERE, SourceEvent.JOURNAL_FAILED)


DURABLE_FIRST = [
    (SOURCE, A.JOURNAL_COMMIT, A.SEND_COMMIT),
    (SOURCE, A.JOURNAL_RETIRED, A.RETIRE_GUEST),
    (DESTINATION, A.JOURNAL_READY, A.SEND_READY),
    (DESTINATION, A.JOURNAL_COMMIT, A.RESUME_GUEST),
    (DESTINATION, A.JOURNAL_RUNNING, A.SEND_RUNNING),
    (DESTINATION, A.JOURNAL_DISCARD, A.SEND_NO),
    (DESTINATION, A.JOURNAL_DISCARD, A.SEND_DISCARDED),
]


@pytest.mark.parametrize(("table", "journal", "deed"), DURABLE_FIRST, ids=lambda value: getattr(value, "value", ""))
def test_what_is_decided_is_journaled_before_it_is_told(table: Any, journal: Action, deed: Action) -> None:
    both = [actions for _, _, _, actions in rows(table) if journal in actions and deed in actions]
    assert both
    for actions in both:
        assert actions.index(journal) < actions.index(deed)


@pytest.mark.parametrize(
    ("table", "needs"),
    [
        (SOURCE, {S.COMMITTED: A.JOURNAL_COMMIT, S.RETIRED: A.JOURNAL_RETIRED}),
        (
            DESTINATION,
            {
                D.READY: A.JOURNAL_READY,
                D.COMMITTED: A.JOURNAL_COMMIT,
                D.RUNNING: A.JOURNAL_RUNNING,
                D.DISCARDED: A.JOURNAL_DISCARD,
            },
        ),
    ],
    ids=["source", "destination"],
)
def test_entering_a_decided_state_is_journaled(table: Any, needs: dict[StrEnum, Action]) -> None:
    for state, event, after, actions in rows(table):
        if after is not state and after in needs and event != SourceEvent.JOURNAL_FAILED:
            assert needs[after] in actions, f"{state} on {event}"
        if state is S.COMMITTED and after is S.ABORTED and event is not SourceEvent.JOURNAL_FAILED:
            assert A.JOURNAL_ABORT in actions, f"{state} on {event}"


@pytest.mark.parametrize(
    ("decisions", "state"),
    [
        ("", S.STOPPED),
        ("begin", S.STOPPED),
        ("begin commit", S.COMMITTED),
        ("begin commit abort", S.ABORTED),
        ("begin commit retired", S.RETIRED),
    ],
)
def test_source_journal(decisions: str, state: SourceState) -> None:
    assert source_state_of(Decision(word) for word in decisions.split()) is state


@pytest.mark.parametrize(
    ("decisions", "state"),
    [
        ("", D.LOADING),
        ("begin", D.LOADING),
        ("begin ready", D.READY),
        ("begin ready commit", D.COMMITTED),
        ("begin ready commit running", D.RUNNING),
        ("begin discard", D.DISCARDED),
        ("begin ready discard", D.DISCARDED),
        ("begin ready commit discard", D.DISCARDED),
    ],
)
def test_destination_journal(decisions: str, state: DestinationState) -> None:
    assert destination_state_of(Decision(word) for word in decisions.split()) is state


def test_a_discard_is_final_whatever_stands_around_it() -> None:
    for length in range(1, 5):
        for decisions in permutations([Decision.READY, Decision.COMMIT, Decision.RUNNING, Decision.DISCARD], length):
            assert (destination_state_of(decisions) is D.DISCARDED) == (Decision.DISCARD in decisions)


def walk(
    machine: Machine[Any, Any], table: Any, steps: list[tuple[Any, bool]], failed: Any
) -> Iterator[list[Decision]]:
    """The journal after each event; where a step says so, a COMMIT or READY cannot be written."""
    journal = [Decision.BEGIN]
    for event, fails in steps:
        if (machine.state, event) in table and event is not failed:
            actions = machine.take(event)
            if fails and {A.JOURNAL_COMMIT, A.JOURNAL_READY} & set(actions):
                actions = machine.take(failed)
            journal += [Decision(action.removeprefix("journal-")) for action in actions if "journal-" in action]
        yield journal


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(SourceEvent), st.booleans()), max_size=30))
def test_a_restart_finds_the_source_where_it_was(steps: list[tuple[SourceEvent, bool]]) -> None:
    machine = Machine("source", SOURCE, S.RUNNING)
    # Before COMMIT the journal need not tell one state from another: the guest is the source's in each.
    mine = {S.RUNNING, S.STOPPED, S.ABORTED}
    for journal in walk(machine, SOURCE, steps, SourceEvent.JOURNAL_FAILED):
        found = source_state_of(journal)
        assert found is machine.state or {found, machine.state} <= mine


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(DestinationEvent), st.booleans()), max_size=30))
def test_a_restart_finds_the_destination_where_it_was(steps: list[tuple[DestinationEvent, bool]]) -> None:
    machine = Machine("destination", DESTINATION, D.LOADING)
    for journal in walk(machine, DESTINATION, steps, DestinationEvent.JOURNAL_FAILED):
        found = destination_state_of(journal)
        # A READY that could not be written leaves LOADING behind, which a restart discards as well.
        assert found is machine.state or (found, machine.state) == (D.LOADING, D.DISCARDED)


@pytest.mark.parametrize(("received", "counts"), [(1, False), (2, False), (3, True)])
def test_an_older_epoch_does_not_count(received: int, counts: bool) -> None:
    assert check_epoch(3, received) is counts


def test_an_epoch_that_does_not_exist_yet_is_named() -> None:
    with pytest.raises(RemoteProtocolError, match="names epoch 4, but this is epoch 3") as caught:
        check_epoch(3, 4)
    assert caught.value.code is ErrorCode.UNEXPECTED
