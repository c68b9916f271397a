"""How well a student ranks the dev queries, through the engine that ranks for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whyrank.evaluation import evaluate
from whyrank.generators import Generator
from whyrank.records import Document, Qrel, Query, ScoredDocument
from whyrank.rerank import Reranker
from whyrank.template import Template

__all__ = ["DEV_MEASURE", "DevSet", "rank_dev"]

DEV_MEASURE = "nDCG@10"


@dataclass(frozen=True, slots=True)
class DevSet:
    """Queries with their candidates in first-stage order, and what people say of them. All by query_id."""

    queries: Mapping[str, Query]
    documents: Mapping[str, Document]
    run: Mapping[str, Sequence[ScoredDocument]]
    qrels: tuple[Qrel, ...]


def rank_dev(generator: Generator, template: Template, dev: DevSet) -> float:
    """nDCG@10, from 0 to 1, of the dev candidates in the order of the student's scores."""
    reranker = Reranker.of(template, generator)
    jobs = (
        (dev.queries[query_id], [dev.documents[line.doc_id] for line in lines], lines)
        for query_id, lines in dev.run.items()
    )
    ranked = {ranking.query_id: ranking.to_run() for ranking in reranker.rank_many(jobs)}
    return evaluate(dev.qrels, {"dev": ranked}, [DEV_MEASURE]).runs[0].values[DEV_MEASURE]
