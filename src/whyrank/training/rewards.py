"""Rewards: pure functions from the rollouts of a query to one number for each.

They see all candidates of a query at once, so that a reward can be about their order. Names lead to the functions
below, `module:function` to anybody's; weights add them up. An answer that hit its cap or has no label gets a fixed
negative reward in place of the sum, so that no combination can make such answers worth while.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby

from whyrank.errors import InputError
from whyrank.training.rollouts import RolloutGroup

__all__ = [
    "REWARDS",
    "Reward",
    "Rewarded",
    "WeightedReward",
    "agreement",
    "brevity",
    "evidence",
    "find_reward",
    "format",
    "length_costs",
    "parse_reward",
    "ranking_gain",
    "reward_group",
    "tied_ndcg",
]

Reward = Callable[[RolloutGroup], Sequence[float]]
"""One number per rollout, in the order of `RolloutGroup.pairs`."""

RANKING_DEPTH = 10
MIN_QUOTE_WORDS = 2  # one word in quotation marks is found anywhere
FREE_LENGTH_CHANGE = 0.1  # the project lets explanations grow by so much
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|‘([^’]+)’(?!\w)|(?<!\w)'([^']+)'(?!\w)")


def agreement(group: RolloutGroup) -> list[float]:
    """How near the sampled label is to what is known, from 0 to the sum of trusts.

    sum over the evidence of trust * (1 - |value - evidence| / span of the scale); 0 without label or evidence.
    """
    return [
        0.0
        if rollout.value is None
        else sum(found.trust * (1 - abs(rollout.value - found.value) / group.span) for found in candidate.evidence)
        for candidate, rollout in group.pairs
    ]


def ranking_gain(group: RolloutGroup) -> list[float]:
    """What a sample does to the order of the query's candidates, from -1 to 1.

    nDCG@10 when this document's score is the sampled label, minus nDCG@10 when all scores are the means of their
    document's samples. The gains of nDCG are what the evidence believes, above the lowest label; documents without
    evidence have gain 0, those without any label stand last. Ties are averaged over their orders.
    """
    lowest = min(group.values)
    gains = [
        (candidate.believed if candidate.believed is not None else lowest) - lowest for candidate in group.candidates
    ]
    labelled = [
        [rollout.value for rollout in candidate.rollouts if rollout.value is not None] for candidate in group.candidates
    ]
    means = [sum(values) / len(values) if values else -math.inf for values in labelled]
    before = tied_ndcg(means, gains)
    changes = []
    for place, candidate in enumerate(group.candidates):
        for rollout in candidate.rollouts:
            if rollout.value is None:
                changes.append(0.0)
                continue
            scores = [*means[:place], rollout.value, *means[place + 1 :]]
            changes.append(tied_ndcg(scores, gains) - before)
    return changes


def tied_ndcg(scores: Sequence[float], gains: Sequence[float], depth: int = RANKING_DEPTH) -> float:
    """Expected nDCG when equal scores are put in random order (McSherry & Najork 2008); gains count as they are.

    0 where no gain is positive, as trec_eval has it.

    Args:
        scores: one per document, higher first.
        gains: one per document, at least 0.
        depth: places that count.
    """
    discounts = [1 / math.log2(rank + 1) for rank in range(1, min(depth, len(scores)) + 1)]
    best = sum(gain * discount for gain, discount in zip(sorted(gains, reverse=True), discounts, strict=False))
    if best == 0:
        return 0.0
    ranked = sorted(zip(scores, gains, strict=True), key=lambda pair: -pair[0])
    start, total = 0, 0.0
    for _, tied in groupby(ranked, key=lambda pair: pair[0]):
        found = [gain for _, gain in tied]
        total += sum(discounts[start : start + len(found)]) * sum(found) / len(found)
        start += len(found)
    return total / best


def format(group: RolloutGroup) -> list[float]:
    """1 for an answer that is in form: it ended by itself, has an explanation, and put most of its probability on the
    labels; else 0."""
    return [float(rollout.status == "ok" and bool(rollout.explanation.strip())) for _, rollout in group.pairs]


def evidence(group: RolloutGroup) -> list[float]:
    """Share of the quotations in the explanation that really stand in the passage or the query, from 0 to 1.

    Quotations have at least two words; case and white space are passed over. 0 without quotations: an explanation that
    points at nothing shows nothing.
    """
    asked = _plain(group.query)
    return [_share_found(rollout.explanation, (_plain(candidate.passage), asked)) for candidate, rollout in group.pairs]


def brevity(group: RolloutGroup) -> list[float]:
    """1 for an empty explanation, 0 for one that is as long as the cap, linear between."""
    return [1 - min(rollout.num_tokens / group.max_tokens, 1.0) for _, rollout in group.pairs]


def _share_found(explanation: str, sources: Sequence[str]) -> float:
    quoted = [_plain("".join(groups)) for groups in QUOTED.findall(explanation)]
    long = [text for text in quoted if len(text.split()) >= MIN_QUOTE_WORDS]
    return sum(any(text in source for source in sources) for text in long) / len(long) if long else 0.0


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".,;:!?")


REWARDS: Mapping[str, Reward] = {
    "agreement": agreement,
    "ranking_gain": ranking_gain,
    "format": format,
    "evidence": evidence,
    "brevity": brevity,
}
"""The rewards that have a short name."""


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward, what it is called in the metrics, and what it counts."""

    name: str
    reward: Reward
    weight: float


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What the rollouts of a group got, in their order: the sum, and every component before its weight."""

    total: tuple[float, ...]
    components: Mapping[str, tuple[float, ...]]


def reward_group(group: RolloutGroup, rewards: Sequence[WeightedReward], *, unreadable: float) -> Rewarded:
    """Add the weighted rewards up; a rollout without label or without an end of its own gets `unreadable` instead.

    Raises:
        InputError: a reward gives another number of values than there are rollouts, or one that is not finite.
    """
    components = {}
    for item in rewards:
        values = tuple(float(value) for value in item.reward(group))
        if len(values) != group.num_rollouts:
            raise InputError(
                f"reward {item.name!r}: expected one number for each of the {group.num_rollouts} rollouts of query "
                f"{group.query_id!r}, found {len(values)}"
            )
        if not all(map(math.isfinite, values)):
            raise InputError(
                f"reward {item.name!r}: expected finite numbers for query {group.query_id!r}, found {values}"
            )
        components[item.name] = values
    sums = [sum(item.weight * components[item.name][place] for item in rewards) for place in range(group.num_rollouts)]
    total = tuple(
        value if rollout.is_as_asked else unreadable for value, (_, rollout) in zip(sums, group.pairs, strict=True)
    )
    return Rewarded(total, components)


def find_reward(name: str) -> Reward:
    """A reward by its short name, or by `module:function`.

    Raises:
        InputError: there is no such reward.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise InputError(f"expected a reward among {', '.join(REWARDS)}, or module:function, found {name!r}")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as cause:
        raise InputError(
            f"reward {name!r}: {cause}; give an importable module and the name of a function in it"
        ) from cause
    if not callable(found):
        raise InputError(f"reward {name!r}: expected a function of a rollout group, found a {type(found).__name__}")
    reward: Reward = found
    return reward


def parse_reward(text: str) -> tuple[str, float]:
    """`NAME=WEIGHT` or `NAME`, which has weight 1.

    Raises:
        InputError: the weight is no finite number.
    """
    name, separator, weight = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError as cause:
        raise InputError(f"reward {text!r}: expected a number after {name}=, found {weight!r}") from cause
    if not math.isfinite(value):
        raise InputError(f"reward {text!r}: expected a finite weight, found {weight}")
    return name, value


def length_costs(group: RolloutGroup, usual: float, price: float) -> list[float]:
    """What explanations cost that have another length than usual: price * max(0, |length / usual - 1| - 0.1).

    Args:
        group: its rollouts' `num_tokens` are the lengths.
        usual: tokens, above 0; the mean at the beginning.
        price: of a whole usual length.
    """
    return [price * max(0.0, abs(rollout.num_tokens / usual - 1) - FREE_LENGTH_CHANGE) for _, rollout in group.pairs]
