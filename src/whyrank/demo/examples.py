"""Rankings that a person should look at: two that went well, and the one that went worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from whyrank.almanac import Collection
from whyrank.demo.systems import Row, candidates_of
from whyrank.records import Judgment
from whyrank.rerank import Ranking, Reranker
from whyrank.store import read_jsonl

__all__ = ["ExampleRanking", "choose_examples"]


@dataclass(frozen=True, slots=True)
class ExampleRanking:
    """One query's ranking. `gold` is the gold label by doc_id, `ndcg` its nDCG@10."""

    title: str
    query: str
    ranking: Ranking
    gold: Mapping[str, int]
    ndcg: float


def choose_examples(collection: Collection, row: Row, reranker: Reranker, folder: Path) -> tuple[ExampleRanking, ...]:
    """The best ranking of a query in known phrasings, the best of one in held-out phrasings, and the worst of all.

    Args:
        collection: what was ranked.
        row: how the system did, by query.
        reranker: made the judgments; arranges them again.
        folder: holds its `judgments.jsonl`.
    """
    known = [query_id for query_id in row.per_query if query_id not in collection.held_out]
    held_out = [query_id for query_id in row.per_query if query_id in collection.held_out]
    best = [max(ids, key=row.per_query.__getitem__) for ids in (known, held_out) if ids]
    worst = min(row.per_query, key=row.per_query.__getitem__)
    titles = {
        **dict.fromkeys(best, "The best ranking of a query in phrasings that training has seen"),
        **{
            query_id: "The best ranking of a query in phrasings that training has never seen"
            for query_id in best
            if query_id in held_out
        },
        worst: "The query on which the explaining student does worst",
    }
    candidates = candidates_of(collection)
    queries = {query.query_id: query for query in collection.queries}
    judgments: dict[str, dict[str, Judgment]] = {}
    for judgment in read_jsonl(folder / "judgments.jsonl", Judgment):
        judgments.setdefault(judgment.query_id, {})[judgment.doc_id] = judgment
    return tuple(
        ExampleRanking(
            title=title,
            query=queries[query_id].text,
            ranking=reranker.arrange(
                queries[query_id], candidates.documents, candidates.run[query_id], judgments[query_id]
            ),
            gold={doc_id: collection.labels[query_id, doc_id] for doc_id in collection.candidates[query_id]},
            ndcg=row.per_query[query_id],
        )
        for query_id, title in titles.items()
    )
