"""Which candidates get a reason: small cases by hand, and the two laws of the rule against brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrank.calibration import Calibration
from whyrank.errors import InputError
from whyrank.waves import Auto, Waves, next_wave

# A reason lifts a score below 1 to at most 1, and is expected to leave every score where it is.
STEPS = Calibration((0.0, 2.0), (0.0, 2.0), (1.0, 2.0), (1.0, 2.0), 0.9, 10, "m")


def ordered(scores: list[float]) -> list[int]:
    """Best first, ties as they stood."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def settle(waves: Waves, explained: list[float | None], tokens: int = 10) -> list[list[int]]:
    """Run to the end with these scores; returns the waves."""
    found = []
    for wave in waves:
        found.append(wave)
        for index in wave:
            waves.add(index, explained[index], tokens)
    return found


def test_next_wave_by_hand() -> None:
    # Reach: 1.5, 1.2, known .9, .9, .1. The known .9 does not hide the unknown one that can have the same.
    ceilings, explained = [1.5, 2.0, 0.9, 0.1, 1.2], [None, 0.9, None, None, None]
    assert next_wave(ceilings, explained, 1) == [0]
    assert next_wave(ceilings, explained, 3) == [0, 4, 2]
    assert next_wave(ceilings, explained, 9) == [0, 4, 2, 3]
    assert next_wave([1.0, 0.5], [0.7, None], 1) == []
    assert next_wave([], [], 3) == []


def test_waves_by_hand() -> None:
    """Ceilings 2, 1, 1, 2, 1. The first wave are the two that can reach 2, the better first; they turn out as .4 and
    1.3, so that the second place is open to all others, of which the one with the best direct score is asked; its .6
    leaves the second place open to the other two, one by one; .5 and .2 settle it."""
    waves = Waves([1.1, 0.3, 0.9, 1.2, 0.8], Auto(STEPS, top_k=2), tokens_per_reason=64)
    assert settle(waves, [0.4, 0.2, 0.6, 1.3, 0.5]) == [[3, 0], [2], [4], [1]]
    assert (waves.num_explained, waves.num_waves, waves.num_tokens, waves.is_cut_short) == (5, 4, 50, False)
    # With 1.1 in place of .4 the second place is above what the others can reach.
    waves = Waves([1.1, 0.3, 0.9, 1.2, 0.8], Auto(STEPS, top_k=2), tokens_per_reason=64)
    assert settle(waves, [1.1, 0.2, 0.6, 1.3, 0.5]) == [[3, 0]]


def test_a_tolerance_by_hand() -> None:
    """As above; with a tolerance of .4 the candidates without a reason can reach .6, so that c's .6 settles it."""
    waves = Waves([1.1, 0.3, 0.9, 1.2, 0.8], Auto(STEPS, top_k=2, tolerance=0.4), tokens_per_reason=64)
    assert settle(waves, [0.4, 0.2, 0.61, 1.3, 0.5]) == [[3, 0], [2]]


def test_what_could_not_be_read() -> None:
    """A direct answer without a label has no ceiling and is asked first; a reason without one holds no place, so that
    the next candidate is asked in its stead."""
    waves = Waves([0.5, None, 0.4], Auto(STEPS, top_k=1), tokens_per_reason=64)
    assert settle(waves, [1.0, None, 0.2]) == [[1], [0], [2]]  # 1.0 can be reached by the third, too
    waves = Waves([1.5, None, 0.4], Auto(STEPS, top_k=1), tokens_per_reason=64)
    assert settle(waves, [1.2, None, 0.2]) == [[1], [0]]


def test_a_wave_is_cut_to_what_the_budget_can_pay_whatever_it_takes() -> None:
    """4 tokens are spent. Of 40, 36 pay for 3 reasons of at most 10; they take 7 each, and 15 are left, which pay for
    one more; then 8 are left, which pay for none."""
    auto = Auto(STEPS, top_k=9, max_tokens_per_query=40)
    waves = Waves([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], auto, tokens_per_reason=10, num_tokens=4)
    assert settle(waves, [0.0] * 6, tokens=7) == [[5, 4, 3], [2]]
    assert (waves.num_tokens, waves.is_cut_short) == (32, True)
    enough = Waves([0.1, 0.2], replace(auto, max_tokens_per_query=20), tokens_per_reason=10)
    assert settle(enough, [0.0] * 2) == [[1, 0]]
    assert not enough.is_cut_short
    nothing = Waves([0.1], replace(auto, max_tokens_per_query=9), tokens_per_reason=10)
    assert (settle(nothing, [0.0]), nothing.is_cut_short) == ([], True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "auto_top_k of at least 1, found 0"),
        ({"max_tokens_per_query": -1}, "max_tokens_per_query of at least 0, found -1"),
        ({"tolerance": -0.5}, "auto_tolerance of at least 0, found -0.5"),
        ({"tolerance": math.nan}, "auto_tolerance of at least 0, found nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Auto(STEPS), **changes)  # type: ignore[arg-type]


# ---- laws -----------------------------------------------------------------------------------------------------

GRID = st.integers(0, 8).map(lambda number: number / 4)  # few values, so that ties are common
CANDIDATES = st.lists(st.tuples(GRID, GRID), min_size=1, max_size=7)


def bounded(candidates: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Direct scores, and scores with a reason that respect the ceilings of `STEPS`."""
    return [direct for direct, _ in candidates], [min(score, STEPS.ceiling(direct)) for direct, score in candidates]


def final(direct: list[float], explained: list[float], asked: set[int]) -> list[int]:
    scores = [explained[i] if i in asked else STEPS.expect(score) for i, score in enumerate(direct)]
    return ordered(scores)


@given(CANDIDATES, st.integers(1, 8))
def test_the_first_places_are_those_of_explaining_everything(candidates: list[tuple[float, float]], top_k: int) -> None:
    direct, explained = bounded(candidates)
    waves = Waves(direct, Auto(STEPS, top_k), tokens_per_reason=64)
    asked = set(chain.from_iterable(settle(waves, list(explained))))
    assert final(direct, explained, asked)[:top_k] == ordered(explained)[:top_k]
    assert set(ordered(explained)[:top_k]) <= asked


@given(CANDIDATES, st.integers(1, 8), GRID)
def test_what_is_left_out_is_better_by_no_more_than_the_tolerance(
    candidates: list[tuple[float, float]], top_k: int, tolerance: float
) -> None:
    direct, explained = bounded(candidates)
    waves = Waves(direct, Auto(STEPS, top_k, tolerance=tolerance), tokens_per_reason=64)
    asked = set(chain.from_iterable(settle(waves, list(explained))))
    assert len(asked) >= min(top_k, len(direct))
    last = sorted((explained[index] for index in asked), reverse=True)[:top_k][-1]
    assert all(explained[index] <= last + tolerance for index in range(len(direct)) if index not in asked)
    exact = Waves(direct, Auto(STEPS, top_k), tokens_per_reason=64)
    assert asked <= set(chain.from_iterable(settle(exact, list(explained))))


@given(CANDIDATES, st.integers(1, 3))
def test_no_reason_could_have_been_spared(candidates: list[tuple[float, float]], top_k: int) -> None:
    """Brute force: a set of reasons tells the first places if every candidate outside it stays behind the worst of the
    best `top_k` in it even at its ceiling. The rule asks for the smallest such set, if no scores are equal (where they
    are, it asks for those that could draw level)."""
    direct = [score + 1e-4 * index for index, (score, _) in enumerate(candidates)]
    ceilings = [STEPS.ceiling(score) for score in direct]
    ceilings = [ceiling - 1e-5 * index for index, ceiling in enumerate(ceilings)]
    explained = [min(score + 1e-6 * i, ceilings[i] - 1e-6) for i, (_, score) in enumerate(candidates)]
    known: list[float | None] = [None] * len(candidates)
    while wave := next_wave(ceilings, known, top_k):
        for index in wave:
            known[index] = explained[index]
    num_asked = sum(score is not None for score in known)

    def tells(chosen: tuple[int, ...]) -> bool:
        best = sorted((explained[i] for i in chosen), reverse=True)[:top_k]
        others = [ceilings[i] for i in range(len(candidates)) if i not in chosen]
        return not others or (len(best) == top_k and max(others) < best[-1])

    sizes = range(len(candidates) + 1)
    assert num_asked == next(n for n in sizes if any(map(tells, combinations(range(len(candidates)), n))))


@given(CANDIDATES, st.integers(1, 8), st.integers(0, 60), st.lists(st.integers(0, 10), min_size=7, max_size=7))
def test_a_budget_is_never_exceeded_and_spent_on_the_best(
    candidates: list[tuple[float, float]], top_k: int, budget: int, taken: list[int]
) -> None:
    direct, explained = bounded(candidates)
    waves = Waves(direct, Auto(STEPS, top_k, budget), tokens_per_reason=10)
    for wave in waves:
        assert wave == sorted(wave, key=lambda index: (-direct[index], index))
        for index in wave:
            waves.add(index, explained[index], taken[index])
        assert waves.num_tokens <= budget
    free = Waves(direct, Auto(STEPS, top_k), tokens_per_reason=10)
    settle(free, list(explained))
    assert waves.num_explained <= free.num_explained
    # Not cut short means settled: the same reasons as without a budget.
    assert waves.is_cut_short == (waves.num_explained < free.num_explained)


def test_a_reason_above_the_ceiling_can_change_the_places() -> None:
    """The guarantee rests on the ceilings: a candidate that would break its own is not found."""
    direct, explained = [1.5, 0.2], [1.2, 2.0]
    waves = Waves(direct, Auto(STEPS, top_k=1), tokens_per_reason=64)
    assert settle(waves, [1.2, 2.0]) == [[0]]
    assert ordered(explained) == [1, 0]
    assert math.isclose(STEPS.ceiling(0.2), 1.0)
