"""A few sequences of frames that are almost right, to a real daemon; ``python -m scripts.almost_right`` has many."""

from __future__ import annotations

from scripts.almost_right import arena, play


def test_nothing_comes_of_what_is_almost_right() -> None:
    with arena() as found:
        play(found, sequences=5, steps=12, seed=1)
