"""What the hostile command calls a violation."""

from __future__ import annotations

from dataclasses import replace

from scripts.hostile.beside import Found
from scripts.hostile.ground import MOST_MEMORY
from scripts.hostile.watch import Watched
from scripts.prove_hostile import GROUPS, MOST_LAG_MS, judged

CALM = Watched(lag_p50_ms=1, lag_p99_ms=2, lag_max_ms=3, wake_p99_ms=1, peak_bytes=100 << 20, answers=1000)
QUIET = Found("undisturbed", watched={"a": CALM, "b": CALM})


def test_lag_and_memory_beyond_their_bounds_are_violations_of_either_daemon() -> None:
    assert judged(QUIET, QUIET) == []
    late = replace(CALM, lag_p99_ms=MOST_LAG_MS + 1)
    large = replace(CALM, peak_bytes=int(CALM.peak_bytes * (MOST_MEMORY + 0.1)))
    assert judged(Found("late", watched={"a": CALM, "b": late}), QUIET) == ["a daemon answered after 51 ms (p99)"]
    (sentence,) = judged(Found("large", watched={"a": large, "b": CALM}), QUIET)
    assert "1.40 times the memory" in sentence


def test_what_did_not_hold_stays_one_when_nothing_was_watched() -> None:
    assert judged(Found("alone", wrong=["the guest is gone"]), QUIET) == ["the guest is gone"]


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for cases in GROUPS.values() for case in cases]
    assert len(set(names)) == len(names)
