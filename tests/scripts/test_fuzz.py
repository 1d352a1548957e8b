"""A short run of the fuzzer over the corpus of a real session; ``python -m scripts.fuzz`` has the long ones."""

from __future__ import annotations

import pytest

from scripts.fuzz import TARGETS, corpus, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_real_session_left_is_accepted(name: str) -> None:
    inputs = corpus()[name]
    assert inputs
    for data in inputs:
        TARGETS[name](data)


def test_damaged_inputs_are_values_or_named_errors_soon_and_without_memory() -> None:
    found = fuzz(20_000, seed=20)
    assert found.crashes == []
    assert found.accepted + found.refused == found.inputs == 20_000
    assert found.accepted > 100, "mutations must reach beyond the first check"
    assert found.slowest_ms < 1000
    assert found.peak_mib < 64
