"""Which queries and documents come next: hard pairs more often, and linked ones always.

A pair's hardness runs from 0 to 1: how far its last sampled labels were from the evidence, or how undecided they were,
whichever is more. Pairs that have not come yet count as hard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean

from whyrank.training.rewards import agreement
from whyrank.training.rollouts import Evidence, RolloutGroup

__all__ = ["choose", "hardness_of"]

PairIds = tuple[str, str]
SURE_SOURCES = ("link", "qrels")  # rare and telling: a round without them would teach that nothing is relevant


def choose(
    evidence: Mapping[PairIds, tuple[Evidence, ...]],
    hardness: Mapping[PairIds, float],
    *,
    num_queries: int,
    num_candidates: int,
    strength: float,
    rng: Random,
) -> list[tuple[str, list[str]]]:
    """Draw queries with candidates, each `(query_id, doc_ids)`, without repetition.

    The odds of a pair are 1 + strength * hardness, those of a query the mean of its pairs'. Candidates that a link or
    a person speaks for come first, for up to half of the places.
    """
    by_query: dict[str, list[str]] = {}
    for (query_id, doc_id), found in evidence.items():
        if found:
            by_query.setdefault(query_id, []).append(doc_id)

    def odds(query_id: str, doc_id: str) -> float:
        return 1 + strength * hardness.get((query_id, doc_id), 1.0)

    queries = {query_id: fmean(odds(query_id, doc_id) for doc_id in ids) for query_id, ids in by_query.items()}
    rounds = []
    for query_id in _drawn(queries, num_queries, rng):
        weights = {doc_id: odds(query_id, doc_id) for doc_id in by_query[query_id]}
        sure = {doc_id: w for doc_id, w in weights.items() if _is_sure(evidence[query_id, doc_id])}
        first = _drawn(sure, math.ceil(num_candidates / 2), rng)
        rest = {doc_id: w for doc_id, w in weights.items() if doc_id not in first}
        rounds.append((query_id, first + _drawn(rest, num_candidates - len(first), rng)))
    return rounds


def _is_sure(found: Sequence[Evidence]) -> bool:
    return any(item.source in SURE_SOURCES for item in found)


def _drawn(weights: Mapping[str, float], count: int, rng: Random) -> list[str]:
    """So many keys without repetition, by weight (Efraimidis & Spirakis 2006: the largest u^(1/w))."""
    keyed = [(rng.random() ** (1 / weight), key) for key, weight in weights.items()]
    return [key for _, key in sorted(keyed, reverse=True)[:count]]


def hardness_of(group: RolloutGroup) -> dict[PairIds, float]:
    """Hardness of every pair of a group by what was just sampled."""
    found = {}
    for candidate, earned in zip(group.candidates, group.of_candidates(agreement(group)), strict=True):
        trust = sum(item.trust for item in candidate.evidence)
        wrong = 1 - fmean(earned) / trust if trust else 0.0
        unsure = fmean(_undecided(rollout.probs) for rollout in candidate.rollouts)
        found[group.query_id, candidate.doc_id] = max(wrong, unsure)
    return found


def _undecided(probs: Sequence[float] | None) -> float:
    """Entropy as a share of the largest possible; without a label as hard as can be."""
    if probs is None:
        return 1.0
    return -sum(p * math.log(p) for p in probs if p > 0) / math.log(len(probs))
