"""The figures of scripts/bench/operators_cost.py: medians, quartiles, the change and its interval."""

from __future__ import annotations

import pytest

from scripts.bench import operators_cost


def test_a_change_that_is_there_is_told_with_its_interval() -> None:
    without = [5.0 + 0.01 * k for k in range(40)]
    found = operators_cost.compared({False: without, True: [1.2 * ms for ms in without]}, "ms")
    assert found["change_pct"] == pytest.approx(20, abs=0.1)
    low, high = found["change_ci_pct"]
    assert 15 < low < 20 < high < 25
    assert found["without"]["median"] == pytest.approx(5.195)
    assert found["without"]["quartiles"] == [pytest.approx(5.0975), pytest.approx(5.2925)]


def test_noise_is_no_change() -> None:
    noisy = [5.0, 9.0, 4.0, 7.0, 6.0, 5.5, 8.0, 4.5]
    low, high = operators_cost.compared({False: noisy, True: noisy[::-1]}, "ms")["change_ci_pct"]
    assert low < 0 < high


async def test_samples_alternate_and_turn_round() -> None:
    asked = []

    async def sample(observed: bool) -> float:
        asked.append(observed)
        return float(len(asked))

    found = await operators_cost.alternately("x", sample, 2)
    assert asked == [False, True, True, False]
    assert found == {False: [1.0, 4.0], True: [2.0, 3.0]}
