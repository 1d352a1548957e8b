"""A retry after a fault fits as the first try would have. ``python -m scripts.prove_retries`` makes a hundred."""

from __future__ import annotations

import asyncio

from scripts.prove_retries import Retry, judge, measure


def test_what_a_fault_made_of_the_prediction_does_not_keep_the_guest_from_moving() -> None:
    found, undisturbed_s = asyncio.run(measure(2, seed=3))
    assert [retry.outcome for retry in found] == ["completed"] * 2, found
    assert undisturbed_s > 0


def test_slow_and_failed_retries_are_counted() -> None:
    good, slow, failed = (
        Retry("a", "completed", None, 1.0),
        Retry("b", "completed", None, 9.0),
        Retry("c", "aborted", "x", 1.0),
    )
    counts, held = judge([good, slow, failed], 0.5)
    assert not held
    assert (counts["completed"], counts["quick"], counts["violations"]) == (2, 1, 2)
    assert judge([good] * 20 + [slow], 0.5)[1]
