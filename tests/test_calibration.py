"""What reasons do to direct scores: expected values by hand, and laws on random scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from whyrank.calibration import Calibration, calibration_from_dict, fit_calibration
from whyrank.errors import InputError

SCORES = st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=60)


def fit(scores: list[tuple[float, float]], **more: Any) -> Calibration:
    return fit_calibration(scores, lowest=0.0, highest=2.0, weights="m", **more)


def test_two_bins_by_hand() -> None:
    """Direct scores .1 .2 .3 | 1.1 1.2 1.3. With coverage .75, the rank is (3 + 1) * .75 = 3 of 3: each bin's highest
    score with a reason. Means: (.2, .2) and (1.2, 1.2); the ends of the scale close the curve."""
    scores = [(0.1, 0.0), (0.2, 0.5), (0.3, 0.1), (1.1, 0.9), (1.2, 1.0), (1.3, 1.7)]
    found = fit(scores, coverage=0.75, num_bins=2)
    assert found.edges == (0.3, 2.0)
    assert found.ceilings == (0.5, 1.7)
    assert found.knots == pytest.approx((0.0, 0.2, 1.2, 2.0))
    assert found.expected == pytest.approx((0.0, 0.2, 1.2, 2.0))
    assert (found.coverage, found.num_pairs, found.weights) == (0.75, 6, "m")
    assert found.expect(0.7) == pytest.approx(0.7)  # half way from .2 to 1.2
    assert found.expect(0.1) == pytest.approx(0.1)  # half way from the bottom of the scale to the first mean
    assert [found.ceiling(score) for score in (0.0, 0.3, 0.30001, 1.3)] == [0.5, 0.5, 1.7, 1.7]
    # Above 1.7 the curve of expected scores, from (1.2, 1.2) to (2, 2), is above the step.
    assert found.ceiling(1.9) == pytest.approx(1.9)


def test_too_few_pairs_tell_nothing_about_rare_events() -> None:
    """Rank ceil(4 * .99) = 4 of 3 does not exist, so that nothing is excluded; of 99 scores it is the 99th, of 199 the
    198th."""
    assert fit([(0.1, 0.0)] * 3).ceilings == (2.0,)
    rising = [(0.1, n / 100) for n in range(99)]
    assert fit(rising).ceilings == (0.98,)
    assert fit([(0.1, n / 100) for n in range(199)]).ceilings == (1.97,)


def test_a_bin_never_has_a_higher_ceiling_than_those_above_it_and_means_are_pooled() -> None:
    """The lower bin has the higher scores with a reason. Rank ceil(3 * .5) = 2 of 2: its ceiling 1.5 holds for both.
    The two means, .9 and .2, become that of all four, (1.5 + .3 + .3 + .1) / 4, at (.1 + .2 + .8 + .9) / 4."""
    found = fit([(0.1, 1.5), (0.2, 0.3), (0.8, 0.3), (0.9, 0.1)], coverage=0.5, num_bins=2)
    assert found.ceilings == (1.5, 1.5)
    assert found.knots == pytest.approx((0.0, 0.5, 2.0))
    assert found.expected == pytest.approx((0.0, 0.55, 2.0))


def test_equal_direct_scores_are_not_torn_apart() -> None:
    found = fit([(1.0, 0.5)] * 30 + [(2.0, 2.0)] * 10, coverage=0.9)
    assert found.edges == (1.0, 2.0)
    assert found.ceilings == (0.5, 2.0)
    assert found.knots == (0.0, 1.0, 2.0)


@given(SCORES, st.floats(0.05, 1.0), st.integers(1, 12))
@example([(2.2250738585e-313, 0.0), (2.225073858507203e-309, 1.0)], 1.0, 1)  # a slope that no float holds
def test_both_curves_grow_and_the_expected_score_is_below_the_ceiling(
    scores: list[tuple[float, float]], coverage: float, num_bins: int
) -> None:
    found = fit(scores, coverage=coverage, num_bins=num_bins)
    places = sorted({0.0, 2.0, *np.linspace(0, 2, 41).tolist(), *(direct for direct, _ in scores)})
    for low, high in pairwise(places):
        assert found.expect(low) <= found.expect(high)
        assert found.ceiling(low) <= found.ceiling(high)
    assert all(found.expect(place) <= found.ceiling(place) <= 2.0 for place in places)


@given(SCORES, st.floats(0.05, 1.0))
def test_as_many_stay_below_the_ceiling_as_is_promised(scores: list[tuple[float, float]], coverage: float) -> None:
    found = fit(scores, coverage=coverage, num_bins=4)
    num_below = sum(explained <= found.ceiling(direct) for direct, explained in scores)
    assert num_below >= math.floor(coverage * len(scores))


def test_it_survives_json() -> None:
    found = fit([(0.1, 0.2), (0.4, 0.3), (1.7, 1.9)], num_bins=2)
    assert calibration_from_dict(json.loads(json.dumps(found.to_dict())), where="x") == found


@pytest.mark.parametrize(
    "changes",
    [
        {"knots": [0.0, 2.0]},
        {"knots": [0.0, 2.0, 1.0]},
        {"expected": [0.0, 0.5, 0.4]},
        {"ceilings": [1.0, 0.5]},
        {"edges": [2.0, 2.0]},
        {"edges": [], "ceilings": []},
        {"coverage": 0.0},
        {"coverage": None},
        {"ceilings": [0.5, float("nan")]},
        {"another": 1},
    ],
)
def test_what_is_damaged_is_refused(changes: dict[str, Any]) -> None:
    whole = Calibration((0.0, 1.0, 2.0), (0.0, 0.5, 2.0), (1.0, 2.0), (0.5, 1.0), 0.9, 3, "m")
    with pytest.raises(InputError, match="somewhere: the calibration is damaged"):
        calibration_from_dict({**whole.to_dict(), **changes}, where="somewhere")
    assert replace(whole, num_pairs=4) != whole


@pytest.mark.parametrize(
    ("scores", "more", "message"),
    [
        ([], {}, "judged in both modes, found none"),
        ([(0.5, 2.5)], {}, "expected scores from 0 to 2, found 0.5 to 0.5 without and 2.5 to 2.5"),
        ([(float("nan"), 1.0)], {}, "expected scores from 0 to 2"),
        ([(0.5, 0.5)], {"coverage": 0.0}, "expected a coverage above 0 and up to 1, found 0"),
        ([(0.5, 0.5)], {"num_bins": 0}, "expected at least one bin"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(
    scores: list[tuple[float, float]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(scores, **more)
