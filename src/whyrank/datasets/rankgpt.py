"""RankGPT's candidates: `{"query": text, "hits": [{"content", "docid", "qid", "rank", "score"}]}` per query.

`rank` and `score` may be missing from all hits of a query. Without scores, a document's score is how many hits
stand at or below it, so that the order of `rank`, or else of the list, is kept.
"""

from __future__ import annotations

from typing import Any

from whyrank.datasets.formats import excerpt, field_of, finite, id_of, listed, text_of
from whyrank.errors import InputError
from whyrank.records import Document, Query, ScoredDocument

__all__ = ["documents", "hits", "is_candidates", "query"]


def is_candidates(record: dict[str, Any]) -> bool:
    """Whether an object looks like a query with hits."""
    return "query" in record and "hits" in record


def _hits(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = listed(field_of(record, ("hits",)))
    if not found or not all(isinstance(hit, dict) for hit in found):
        raise InputError(f"expected hits, each an object, found {excerpt(found)}")
    return found


def query(record: dict[str, Any]) -> Query:
    """The query; its id stands in the hits.

    Raises:
        InputError: there are no hits, or they disagree on the query id.
    """
    query_ids = {id_of(field_of(hit, ("qid",))) for hit in _hits(record)}
    if len(query_ids) != 1:
        raise InputError(f"expected one qid in all hits of a query, found {', '.join(sorted(query_ids))}")
    return Query(query_ids.pop(), text_of(field_of(record, ("query",))))


def documents(record: dict[str, Any]) -> list[Document]:
    """The documents in the order of the hits."""
    return [Document(id_of(field_of(hit, ("docid",))), text_of(field_of(hit, ("content",)))) for hit in _hits(record)]


def hits(record: dict[str, Any]) -> list[ScoredDocument]:
    """One query's part of a run, not yet ordered.

    Raises:
        InputError: some hits have a score or rank and others have none, or a rank is not a whole number.
    """
    query_id, found = query(record).query_id, _hits(record)
    for name in ("score", "rank"):
        num_with = sum(hit.get(name) is not None for hit in found)
        if num_with not in (0, len(found)):
            raise InputError(f"expected {name!r} in all hits of query {query_id!r} or in none, found it in {num_with}")
    has_scores, has_ranks = (found[0].get(name) is not None for name in ("score", "rank"))
    ranks = [_whole(hit["rank"]) if has_ranks else position for position, hit in enumerate(found, start=1)]
    ordered = sorted(ranks)
    scores = [
        finite(hit["score"]) if has_scores else float(len(found) - ordered.index(rank))
        for hit, rank in zip(found, ranks, strict=True)
    ]
    return [
        ScoredDocument(query_id, id_of(field_of(hit, ("docid",))), rank, score)
        for hit, rank, score in zip(found, ranks, scores, strict=True)
    ]


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InputError(f"expected a whole number as rank, found {excerpt(value)}")
