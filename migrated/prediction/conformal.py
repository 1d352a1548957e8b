"""The distance of the bound from the prediction, in scales: weighted, adaptive conformal quantiles, one for every
regime.

    scores of the regime (newer ones weigh more)  +  scores of all other regimes  +  the shipped sample
                                                     worth less the more            worth less the more
                                                     the regime has of its own      is known at all

A score is (truth - prediction) / scale. Coverage must hold for fast and slow links, for guests that wait for memory or
for devices, for first and later migrations, on quiet and busy hosts, and not only on average; so each of these has
scores of its own as soon as it has enough of them. Beside that each regime's level follows its misses (adaptive
conformal inference, Gibbs and Candes 2021), within limits, so that a host that changes is followed.

No single event decides: the more general scores always weigh more than one newcomer, and while few scores are known at
all, each counts as ``_THIN_MOST`` at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

_KEPT: Final = 200
_REGIMES_KEPT: Final = 64
_AGEING: Final = 0.99
"""Weight of a score of a regime, relative to the next newer one."""
_SHARED_WORTH: Final = 20.0
_PRIOR_WORTH: Final = 40.0
"""How many own scores those of other regimes, and the shipped sample, are worth while there are none; half as much
when a regime has ``_HALF`` of its own."""
_HALF: Final = 20.0
_THIN: Final = 60
_THIN_MOST: Final = 8.0
_MOST: Final = 50.0
_STEP: Final = 0.02
_LOWEST_SHIFT, _HIGHEST_SHIFT = -0.02, 0.04
_HIGHEST_LEVEL: Final = 0.995


class ScorePools:
    """The scores of all regimes.

    Args:
        prior: scores that stand in while few are known, ascending.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = prior
        self._scores: dict[str, list[float]] = {}
        self._shifts: dict[str, float] = {}

    @property
    def known(self) -> int:
        """Scores of all regimes together."""
        return sum(len(scores) for scores in self._scores.values())

    def known_in(self, regime: str) -> int:
        """Scores of one regime."""
        return len(self._scores.get(regime, ()))

    def add(self, regime: str, score: float, coverage: float, *, held: bool) -> None:
        """Remember the score of a finished attempt.

        Args:
            coverage: what its bound was asked to cover (0.5 to 0.999).
            held: whether its bound held.
        """
        scores = self._scores.pop(regime, [])
        self._scores[regime] = [*scores, min(max(score, -_MOST), _MOST)][-_KEPT:]  # the regime used last comes last
        while len(self._scores) > _REGIMES_KEPT:
            oldest = next(iter(self._scores))
            del self._scores[oldest]
            self._shifts.pop(oldest, None)
        shift = self._shifts.get(regime, 0.0) + _STEP * (coverage - 1.0 if held else coverage)
        self._shifts[regime] = min(max(shift, _LOWEST_SHIFT), _HIGHEST_SHIFT)

    def quantile(self, regime: str, coverage: float) -> float:
        """The score that the truth of the next attempt stays under with the coverage asked for."""
        level = min(max(coverage, _HIGHEST_LEVEL), max(0.5, coverage + self._shifts.get(regime, 0.0)))
        most = _THIN_MOST if self.known < _THIN else _MOST
        weighted = sorted((min(score, most), weight) for score, weight in self._weighted(regime))
        needed = level * (1.0 + sum(weight for _, weight in weighted))  # the next one counts too
        reached = 0.0
        for score, weight in weighted:
            reached += weight
            if reached >= needed:
                return score
        return weighted[-1][0]

    def _weighted(self, regime: str) -> list[tuple[float, float]]:
        own = self._scores.get(regime, [])
        others = [score for name, scores in self._scores.items() if name != regime for score in scores]
        weighted = [(score, _AGEING**age) for age, score in enumerate(reversed(own))]
        general = _HALF / (_HALF + len(own))
        shared_worth = min(float(len(others)), _SHARED_WORTH * general)
        prior_worth = _PRIOR_WORTH * general * _HALF / (_HALF + shared_worth)
        weighted += [(score, shared_worth / len(others)) for score in others]
        return weighted + [(score, prior_worth / len(self._prior)) for score in self._prior]

    def document(self) -> dict[str, Any]:
        """The scores as JSON values."""
        return {"scores": self._scores, "shifts": self._shifts}

    def read(self, document: Mapping[str, Any]) -> None:
        """Take up what ``document`` gave, each value within the limits that learning keeps to.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is no such document.
        """
        for regime, values in document["scores"].items():
            scores = [float(value) for value in values]
            if not all(map(math.isfinite, scores)):
                raise ValueError(f"scores of {regime!r} are not finite")
            self._scores[regime] = [min(max(score, -_MOST), _MOST) for score in scores][-_KEPT:]
        for regime, value in document["shifts"].items():
            if not math.isfinite(float(value)):
                raise ValueError(f"the level of {regime!r} is not finite")
            self._shifts[regime] = min(max(float(value), _LOWEST_SHIFT), _HIGHEST_SHIFT)
