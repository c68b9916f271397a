"""Which examples a step learns from: an endless, seeded order that does not depend on where a run was resumed."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from whyrank.errors import InputError
from whyrank.training.config import DistillConfig
from whyrank.training.examples import Example

__all__ = ["batches", "frequencies", "shares_of_sources", "with_share"]

BATCHES_IN_WINDOW = 16


def shares_of_sources(sizes: Sequence[int], shares: Sequence[float]) -> list[float]:
    """How often a judgment of each source is drawn so that the sources are drawn in the given proportion.

    Args:
        sizes: number of judgments of each source.
        shares: positive numbers, in any unit; 1 and 3 draw the second source three times as often in all.

    Raises:
        InputError: there are not as many shares as sources, or one is not above 0.
    """
    if len(shares) != len(sizes):
        raise InputError(f"expected one weight per judgments file ({len(sizes)}), found {len(shares)}")
    if not all(0 < share < math.inf for share in shares):
        raise InputError(f"expected source weights above 0, found {', '.join(map(str, shares))}; leave the file out")
    return [share / max(size, 1) for share, size in zip(shares, sizes, strict=True)]


def frequencies(labels: Sequence[str], weights: Sequence[float], *, is_balanced: bool) -> list[float]:
    """How often each example is drawn per epoch, 1 on average.

    Args:
        labels: of the examples.
        weights: how often an example is drawn, in any unit.
        is_balanced: bring the labels to equal shares; within a label the weights stay in proportion.
    """
    if is_balanced:
        totals: defaultdict[str, float] = defaultdict(float)
        for label, weight in zip(labels, weights, strict=True):
            totals[label] += weight
        weights = [weight / totals[label] for label, weight in zip(labels, weights, strict=True)]
    mean = math.fsum(weights) / len(weights)
    return [weight / mean for weight in weights]


def with_share(drawn: Sequence[float], num_more: int, share: float) -> list[float]:
    """How often each example is drawn when `num_more` others, all alike, are to be that share of all that are drawn;
    1 on average. Those that were there keep their proportions."""
    if not num_more:
        return list(drawn)
    each = share / (1 - share) * math.fsum(drawn) / num_more
    mean = (math.fsum(drawn) + each * num_more) / (len(drawn) + num_more)
    return [weight / mean for weight in (*drawn, *[each] * num_more)]


def batches(
    examples: Sequence[Example], drawn: Sequence[float], config: DistillConfig, *, num_done: int = 0
) -> Iterator[list[Example]]:
    """Endless epochs of batches, of which the first `num_done` are passed over.

    Within a window of several batches, examples of similar length go together, so that little is padded. With a
    `group_size`, examples with a common beginning are drawn together, other ones in every epoch.

    Args:
        examples: at least one.
        drawn: how often each is drawn per epoch, on average (see `frequencies`).
        config: `batch_size`, `group_size` and `seed`.
        num_done: batches that an interrupted run has already learned from.
    """
    rng = random.Random(config.seed)
    number = 0
    while True:
        units = _units(examples, _copies(drawn, rng), config.group_size, rng)
        rng.shuffle(units)
        window = max(1, config.batch_size // config.group_size) * BATCHES_IN_WINDOW
        epoch: list[list[int]] = []
        for start in range(0, len(units), window):
            near = sorted(units[start : start + window], key=lambda unit: max(len(examples[i].ids) for i in unit))
            epoch += _filled(near, config.batch_size)
        rng.shuffle(epoch)
        for batch in epoch:
            number += 1
            if number > num_done:
                yield [examples[i] for i in batch]


def _copies(drawn: Sequence[float], rng: random.Random) -> list[int]:
    """Every example's whole number of draws, and one more with the probability of the rest."""
    if all(often == 1 for often in drawn):
        return list(range(len(drawn)))
    return [i for i, often in enumerate(drawn) for _ in range(int(often) + (rng.random() < often % 1))]


def _units(
    examples: Sequence[Example], indices: Sequence[int], group_size: int, rng: random.Random
) -> list[tuple[int, ...]]:
    """What is drawn together: single examples, or up to so many with the same beginning."""
    if group_size == 1:
        return [(i,) for i in indices]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i in indices:
        groups[examples[i].ids[: examples[i].num_shared]].append(i)
    units = []
    for members in groups.values():
        rng.shuffle(members)
        units += [tuple(members[at : at + group_size]) for at in range(0, len(members), group_size)]
    return units


def _filled(units: Sequence[tuple[int, ...]], batch_size: int) -> list[list[int]]:
    """Units in their order, as batches of at least `batch_size` examples; the last may be smaller."""
    found: list[list[int]] = [[]]
    for unit in units:
        if len(found[-1]) >= batch_size:
            found.append([])
        found[-1] += unit
    return found
