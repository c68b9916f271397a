"""Documents that no answer links to: hard ones, which a first stage ranks high, and random ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from whyrank.mining.config import MiningConfig
from whyrank.records import Document, Pair, Query, ScoredDocument
from whyrank.search import Bm25Config, Bm25Index
from whyrank.store import content_key

__all__ = ["FirstStage", "Search", "bm25", "negative_pairs"]

Search = Callable[[Sequence[Query], int], Mapping[str, Sequence[ScoredDocument]]]
"""`(queries, top_k)` to the best documents of each query, by query id, best first."""

FirstStage = Callable[[Sequence[Document]], Search]
"""Indexes documents and gives the search over them."""

BATCH = 1000
"""Queries searched at once; bounds the memory of the results."""


def bm25(documents: Sequence[Document], config: Bm25Config | None = None) -> Search:
    """The default first stage."""
    return Bm25Index.build(documents, config).search


def negative_pairs(
    queries: Sequence[Query],
    documents: Sequence[Document],
    banned: Mapping[str, frozenset[str]],
    config: MiningConfig,
    first_stage: FirstStage,
    counts: Counter[str],
) -> Iterator[Pair]:
    """Yield the negatives of each query in turn: hard ones by rank, then random ones.

    `banned` holds per query id the documents that may not be negatives. Hard negatives are drawn without
    replacement from the first stage's ranks `first_rank` to `last_rank`, counted without banned documents.
    The draw depends on the seed and the query id alone. `counts` receives `negatives.hard`,
    `negatives.random` and, where a small corpus has too few, `negatives.missing`.
    """
    doc_ids = [document.doc_id for document in documents]
    if not doc_ids or not queries:
        return
    search = first_stage(documents) if config.num_negatives else None
    remaining = iter(queries)
    while batch := list(islice(remaining, BATCH)):
        reach = config.last_rank + max(len(banned[query.query_id]) for query in batch)
        found = search(batch, min(reach, len(doc_ids))) if search else {}
        for query in batch:
            forbidden = banned[query.query_id]
            draw = random.Random(content_key(str(config.seed), query.query_id))
            hard = _hard(found.get(query.query_id, ()), forbidden, config, draw)
            pairs = [Pair(query.query_id, doc_id, "negative", f"first-stage rank {rank}") for rank, doc_id in hard]
            chosen = forbidden | {doc_id for _, doc_id in hard}
            others = _random(doc_ids, chosen, config.num_random, draw)
            pairs += [Pair(query.query_id, doc_id, "negative", "random") for doc_id in others]
            counts["negatives.hard"] += len(hard)
            counts["negatives.random"] += len(others)
            counts["negatives.missing"] += config.num_negatives + config.num_random - len(pairs)
            yield from pairs


def _hard(
    ranking: Sequence[ScoredDocument], forbidden: frozenset[str], config: MiningConfig, draw: random.Random
) -> list[tuple[int, str]]:
    """`(rank without forbidden documents, doc_id)` of the documents drawn, by rank."""
    allowed = [scored.doc_id for scored in ranking if scored.doc_id not in forbidden]
    window = list(enumerate(allowed, start=1))[config.first_rank - 1 : config.last_rank]
    return sorted(draw.sample(window, min(config.num_negatives, len(window))))


def _random(doc_ids: Sequence[str], forbidden: frozenset[str], number: int, draw: random.Random) -> list[str]:
    """Distinct documents outside `forbidden`; drawn by rejection while that is quick, else from a list."""
    if len(doc_ids) < 2 * (len(forbidden) + number):
        allowed = [doc_id for doc_id in doc_ids if doc_id not in forbidden]
        return draw.sample(allowed, min(number, len(allowed)))
    found: dict[str, None] = {}
    while len(found) < number:
        doc_id = draw.choice(doc_ids)
        if doc_id not in forbidden:
            found[doc_id] = None
    return list(found)
