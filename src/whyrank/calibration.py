"""What reasons have been seen to do to direct scores: measured on development pairs, kept in a checkpoint's card.

Mode `auto` rests on it. A *ceiling* tells which documents cannot reach the first places however they are explained;
an *expected* score makes documents with and without a reason comparable. Both grow with the direct score.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from whyrank.errors import InputError

__all__ = ["COVERAGE", "NUM_BINS", "Calibration", "calibration_from_dict", "fit_calibration"]

COVERAGE = 0.99
NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Calibration:
    """From direct scores to scores with a reason, all in the units of the template's scale.

    `expected` are mean scores with a reason at the direct scores `knots` (both increasing), linear in between.
    `ceilings` (non-decreasing) hold for direct scores up to and including the `edges` (increasing, the last is the top
    of the scale): of documents with such a direct score, a share of `coverage` (0 to 1) or more got no higher score
    with their reason. `num_pairs` were judged in both modes by the model whose weights
    have the digest `weights`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    knots: tuple[float, ...]
    expected: tuple[float, ...]
    edges: tuple[float, ...]
    ceilings: tuple[float, ...]
    coverage: float
    num_pairs: int
    weights: str

    def __post_init__(self) -> None:
        is_whole = len(self.knots) == len(self.expected) > 0 and len(self.edges) == len(self.ceilings) > 0
        numbers = (*self.knots, *self.expected, *self.edges, *self.ceilings)
        is_growing = _is_growing(self.knots, is_strict=True) and _is_growing(self.edges, is_strict=True)
        is_growing = is_growing and _is_growing(self.expected) and _is_growing(self.ceilings)
        if not (is_whole and is_growing and all(map(math.isfinite, numbers)) and 0 < self.coverage <= 1):
            raise InputError(
                "expected a calibration with as many expected as knots and as many ceilings as edges, all finite and "
                f"growing, and a coverage above 0 and up to 1, found {self}"
            )

    def expect(self, score: float) -> float:
        """The mean score with a reason of documents with this direct score; non-decreasing."""
        place = bisect_right(self.knots, score)
        if place in (0, len(self.knots)):
            return self.expected[0 if place == 0 else -1]
        (low, high), (below, above) = self.knots[place - 1 : place + 1], self.expected[place - 1 : place + 1]
        # Not numpy's interp: its slopes overflow where two knots lie next to each other.
        return min(below + (score - low) / (high - low) * (above - below), above)

    def ceiling(self, score: float) -> float:
        """The score with a reason that documents with this direct score seldom exceed; non-decreasing, and never below
        what is expected."""
        place = min(int(np.searchsorted(self.edges, score)), len(self.edges) - 1)
        return max(self.ceilings[place], self.expect(score))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `calibration_from_dict` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


_ADAPTER: TypeAdapter[Calibration] = TypeAdapter(Calibration)


def calibration_from_dict(data: Mapping[str, Any], *, where: str) -> Calibration:
    """Read what `Calibration.to_dict` gave.

    Raises:
        InputError: it is something else; the message names `where`.
    """
    try:
        return _ADAPTER.validate_python(data)
    except (ValidationError, InputError) as cause:
        found = cause.errors(include_url=False)[0]["msg"] if isinstance(cause, ValidationError) else str(cause)
        raise InputError(f"{where}: the calibration is damaged: {found}; run `whyrank calibrate` again") from cause


def fit_calibration(
    scores: Sequence[tuple[float, float]],
    *,
    lowest: float,
    highest: float,
    weights: str,
    coverage: float = COVERAGE,
    num_bins: int = NUM_BINS,
) -> Calibration:
    """Learn from pairs that were judged in both modes what a reason does to a direct score.

    Direct scores are cut into bins of equal counts. A bin's ceiling is the score with a reason of rank
    ceil((n + 1) coverage) among its n, as in split conformal prediction (Vovk, Gammerman & Shafer 2005, chapter 4.5,
    with the bins as categories), or the top of the scale if that rank is above n: so few pairs tell nothing about so
    rare an event. Lower bins never have a higher ceiling than those above them, which can only raise ceilings. Means
    that do not grow from bin to bin are pooled until they do.

    Args:
        scores: `(direct score, score with a reason)` of each pair.
        lowest: the bottom of the scale, which ends the curve of expected scores below.
        highest: its top, which ends it above.
        weights: digest of the weights of the model that made the scores.
        coverage: share of documents that may be trusted to stay below their ceiling, above 0 and up to 1.
        num_bins: how many bins at most; equal direct scores are never torn apart.

    Raises:
        InputError: no pairs, a score that is not on the scale, or a coverage that is no share.
    """
    if not scores:
        raise InputError("expected pairs that were judged in both modes, found none")
    if not 0 < coverage <= 1:
        raise InputError(f"expected a coverage above 0 and up to 1, found {coverage}")
    if num_bins < 1:
        raise InputError(f"expected at least one bin, found {num_bins}")
    direct, explained = np.array(scores, dtype=np.float64).T
    if not all(lowest <= score <= highest for score in (*direct.tolist(), *explained.tolist())):
        raise InputError(
            f"expected scores from {lowest:g} to {highest:g}, found {direct.min():g} to {direct.max():g} "
            f"without and {explained.min():g} to {explained.max():g} with a reason"
        )
    cuts = np.quantile(direct, np.linspace(0, 1, num_bins + 1)[1:], method="inverted_cdf")
    edges = np.unique(np.append(cuts[:-1], highest))
    bins = np.searchsorted(edges, direct)
    filled = np.unique(bins)
    ceilings = [_ceiling(explained[bins == number], coverage, highest) for number in filled]
    means = [(direct[bins == n].mean(), explained[bins == n].mean(), int((bins == n).sum())) for n in filled]
    knots, expected = _growing_curve(means, lowest, highest)
    tops = np.maximum.accumulate(ceilings)
    ends = [*edges[filled[:-1]].tolist(), highest]
    return Calibration(knots, expected, tuple(ends), tuple(tops.tolist()), coverage, len(scores), weights)


def _ceiling(scores: NDArray[np.float64], coverage: float, highest: float) -> float:
    # The product is a hair above a whole number where it should be one: 100 * 0.99 must not give rank 100.
    rank = math.ceil(round((len(scores) + 1) * coverage, 9))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else highest


def _growing_curve(
    means: Sequence[tuple[float, float, int]], lowest: float, highest: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bins as `(mean direct, mean explained, count)` in order, pooled until both grow (the pool-adjacent-violators
    algorithm), with the ends of the scale as first and last point."""
    pooled: list[tuple[float, float, int]] = []
    for found in means:
        latest = found
        while pooled and pooled[-1][1] >= latest[1]:
            x, y, count = pooled.pop()
            total = count + latest[2]
            latest = ((x * count + latest[0] * latest[2]) / total, (y * count + latest[1] * latest[2]) / total, total)
        pooled.append(latest)
    points = [(float(x), float(y)) for x, y, _ in pooled]
    if points[0][0] > lowest:
        points.insert(0, (lowest, lowest))
    if points[-1][0] < highest:
        points.append((highest, highest))
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def _is_growing(numbers: Sequence[float], *, is_strict: bool = False) -> bool:
    return all(a < b or (a == b and not is_strict) for a, b in pairwise(numbers))
