"""Which candidates of a query are worth a reason: the rule of mode `auto`, as pure functions of scores.

Every candidate has a direct score, and from it a ceiling (`calibration`). With a reason, its score is known; without
one, it can be anything up to the ceiling. The candidates are put in the order of the best that each can still reach,
and the first k of them are looked at:

- all of them have a reason: nobody outside can enter the first k places any more, and the order is settled;
- some have none: these are the next wave. None of them could be spared: it stays among the first k, because others'
  reasons only lower what they can reach, until its own reason is known.

So if no reason lifts a score above its ceiling, the first k places, and their order, are those of explaining every
candidate; and no set of reasons that leaves one of ours out could have told so (Chang & Hwang, "Minimal probing",
SIGMOD 2002, prove both for expensive predicates). With a tolerance, all ceilings are that much lower: what is left out
can then be better than the last of the first k by no more than the tolerance. With a budget, the waves are cut short,
best first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from whyrank.calibration import Calibration
from whyrank.errors import InputError

__all__ = ["Auto", "Waves", "next_wave"]


@dataclass(frozen=True, slots=True)
class Auto:
    """What mode `auto` is told: reasons for whatever can change the first `top_k` places, within a budget.

    `max_tokens_per_query` bounds the tokens that the model writes for one query, direct answers included; `None` is
    without a bound. `tolerance`, in units of the template's scale, is by how much a document must be able to exceed the
    last of these places to be worth a reason.
    """

    calibration: Calibration
    top_k: int = 10
    max_tokens_per_query: int | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"expected auto_top_k of at least 1, found {self.top_k}")
        if self.max_tokens_per_query is not None and self.max_tokens_per_query < 0:
            raise InputError(f"expected max_tokens_per_query of at least 0, found {self.max_tokens_per_query}")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise InputError(f"expected auto_tolerance of at least 0, found {self.tolerance}")


def next_wave(ceilings: Sequence[float], explained: Sequence[float | None], top_k: int) -> list[int]:
    """Indices of the candidates to be explained next, best first; none if the first `top_k` places are settled.

    Args:
        ceilings: the best score that each candidate can reach with a reason, in first-stage order.
        explained: its score with a reason, `None` where it has none yet.
        top_k: how many places have to be right.
    """

    def reach(index: int) -> tuple[float, bool, int]:
        # Where both could have the same score, the one without a reason comes first: it must not be overlooked.
        known = explained[index]
        return (-ceilings[index], False, index) if known is None else (-known, True, index)

    best = sorted(range(len(ceilings)), key=reach)[:top_k]
    return [index for index in best if explained[index] is None]


class Waves:
    """The reasons of one query, wave by wave.

    Args:
        direct: direct scores in first-stage order; `None` where no label could be read. Such a candidate has no ceiling
            and is among the first to be explained.
        auto: the settings.
        tokens_per_reason: most tokens that one explanation can take.
        num_tokens: tokens written for the query so far.
    """

    def __init__(
        self, direct: Sequence[float | None], auto: Auto, *, tokens_per_reason: int, num_tokens: int = 0
    ) -> None:
        self.num_tokens = num_tokens
        self.num_explained = 0
        self.num_waves = 0
        self.is_cut_short = False
        self._auto = auto
        self._tokens_per_reason = tokens_per_reason
        # Within a step of the ceiling the higher direct score goes first, so that a budget is spent on the likelier.
        self._best_first = sorted(range(len(direct)), key=lambda index: (-_or_infinite(direct[index]), index))
        ceilings = [math.inf if score is None else auto.calibration.ceiling(score) - auto.tolerance for score in direct]
        self._ceilings = [ceilings[index] for index in self._best_first]
        self._explained: list[float | None] = [None] * len(direct)
        self._place = {index: place for place, index in enumerate(self._best_first)}

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the waves: indices in first-stage order of candidates, best first. `add` every one of them before the
        next wave is asked for."""
        while wave := next_wave(self._ceilings, self._explained, self._auto.top_k):
            affordable = self._affordable(wave)
            self.is_cut_short = len(affordable) < len(wave)
            if not affordable:
                return
            self.num_waves += 1
            yield [self._best_first[place] for place in affordable]

    def add(self, index: int, score: float | None, num_tokens: int) -> None:
        """Note the score with a reason of a candidate, and what it took. One that could not be read (`None`) holds none
        of the first places, so that another candidate is explained in its stead."""
        self._explained[self._place[index]] = -math.inf if score is None else score
        self.num_tokens += num_tokens
        self.num_explained += 1

    def _affordable(self, wave: list[int]) -> list[int]:
        """As much of a wave as cannot exceed the budget, whatever its reasons take."""
        budget = self._auto.max_tokens_per_query
        if budget is None:
            return wave
        return wave[: max(0, budget - self.num_tokens) // max(1, self._tokens_per_reason)]


def _or_infinite(score: float | None) -> float:
    return math.inf if score is None else score
