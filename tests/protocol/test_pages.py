"""Run tables against the obvious page-by-page way of doing the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.messages import MAX_RUNS_BYTES
from protocol.pages import NO_RUNS, Runs, count_pages, indices_of, pack_runs, runs_of, split_runs, unpack_runs

TOTAL = 400
page_sets = st.sets(st.integers(0, TOTAL - 1), max_size=80)
raw_runs = st.lists(st.tuples(st.integers(0, TOTAL + 4), st.integers(0, 12)), max_size=12)


def naive_runs(pages: set[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and page == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs


def naive_fault(runs: list[tuple[int, int]], total: int) -> bool:
    """Whether a table is one that must be refused."""
    last = 0
    for start, count in runs:
        if not count or start < last or start + count > total:
            return True
        last = start + count
    return not runs


def as_runs(pairs: list[tuple[int, int]]) -> Runs:
    return np.array(pairs, np.int64).reshape(-1, 2)


@given(page_sets)
def test_runs_of_collapses_and_indices_of_expands(pages: set[int]) -> None:
    runs = runs_of(np.array(sorted(pages), np.int64))
    assert runs.tolist() == naive_runs(pages)
    assert indices_of(runs).tolist() == sorted(pages)
    assert count_pages(runs) == len(pages)


@given(page_sets.filter(bool))
def test_wire_form_round_trip(pages: set[int]) -> None:
    runs = as_runs([(start, count) for start, count in naive_runs(pages)])
    raw = pack_runs(runs)
    assert raw == b"".join(start.to_bytes(4, "big") + count.to_bytes(4, "big") for start, count in runs.tolist())
    back = unpack_runs(raw, TOTAL)
    assert back.dtype == np.int64
    assert back.tolist() == runs.tolist()


@given(raw_runs)
def test_a_table_is_accepted_exactly_when_every_rule_holds(pairs: list[tuple[int, int]]) -> None:
    raw = pack_runs(as_runs(pairs))
    if naive_fault(pairs, TOTAL):
        with pytest.raises(RemoteProtocolError):
            unpack_runs(raw, TOTAL)
    else:
        assert unpack_runs(raw, TOTAL).tolist() == [list(pair) for pair in pairs]


@given(st.binary(max_size=64), st.integers(0, 2**32))
def test_any_bytes_give_valid_runs_or_a_remote_error(raw: bytes, total: int) -> None:
    try:
        runs = unpack_runs(raw, total)
    except RemoteProtocolError:
        return
    assert not naive_fault([(start, count) for start, count in runs.tolist()], total)


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([(5, 0)], "empty run"),
        ([(0, 4), (3, 1)], "overlap or descend at page 3"),
        ([(8, 1), (2, 1)], "overlap or descend at page 2"),
        ([(0, TOTAL + 1)], f"pages 0 to {TOTAL} are outside the guest's memory of {TOTAL} pages"),
        ([(2**32 - 1, 2**32 - 1)], "outside the guest's memory"),
    ],
)
def test_the_fault_is_named_with_its_pages(pairs: list[tuple[int, int]], sentence: str) -> None:
    with pytest.raises(RemoteProtocolError, match=sentence):
        unpack_runs(pack_runs(as_runs(pairs)), TOTAL)


def test_pages_outside_the_guest_are_too_large() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        unpack_runs(pack_runs(as_runs([(TOTAL, 1)])), TOTAL)
    assert caught.value.code is ErrorCode.TOO_LARGE


@pytest.mark.parametrize("length", [0, 1, 7, 9, 15])
def test_a_table_is_a_whole_number_of_runs(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{length} bytes is not a whole number of runs"):
        unpack_runs(bytes(length), TOTAL)


@given(page_sets, st.integers(1, 50))
def test_split_runs_cuts_full_batches_in_order(pages: set[int], per_batch: int) -> None:
    batches = split_runs(runs_of(np.array(sorted(pages), np.int64)), per_batch)
    ordered = sorted(pages)
    wanted = [ordered[at : at + per_batch] for at in range(0, len(ordered), per_batch)]
    assert [indices_of(batch).tolist() for batch in batches] == wanted
    assert [batch.tolist() for batch in batches] == [naive_runs(set(chunk)) for chunk in wanted]


def test_a_single_run_over_a_huge_guest_is_split_without_expanding_it() -> None:
    batches = split_runs(as_runs([(7, 1 << 20)]), 1 << 18)
    assert [batch.tolist() for batch in batches] == [[[7 + at * (1 << 18), 1 << 18]] for at in range(4)]


def test_nothing_is_nothing() -> None:
    assert runs_of(np.array([], np.int64)).shape == NO_RUNS.shape == (0, 2)
    assert indices_of(NO_RUNS).tolist() == []
    assert split_runs(NO_RUNS, 4) == []
    assert count_pages(NO_RUNS) == 0


def test_the_longest_run_table_is_a_whole_number_of_runs() -> None:
    assert 6144 * len(pack_runs(as_runs([(0, 1)]))) == MAX_RUNS_BYTES
