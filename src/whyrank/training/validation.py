"""How well a student in training ranks: the dev queries, through the same engine that will rank with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from whyrank.errors import InputError
from whyrank.evaluation import evaluate
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens
from whyrank.judging import Judge
from whyrank.records import Document, Mode, Qrel, Query, ScoredDocument
from whyrank.rerank import Reranker
from whyrank.store import content_key
from whyrank.template import Template

__all__ = ["DevSet", "DevValue", "rank_dev"]

MEASURE = "nDCG@10"
ANSWERS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class DevSet:
    """Queries with candidates and relevance labels.

    Args:
        queries: with candidates each.
        documents: by doc_id; those of the run.
        run: query id to candidates, in the order of the first stage.
        qrels: the measure is averaged over their queries.

    Raises:
        InputError: there is no query, or one that is judged has no candidates.
    """

    queries: tuple[Query, ...]
    documents: Mapping[str, Document]
    run: Mapping[str, Sequence[ScoredDocument]]
    qrels: tuple[Qrel, ...]

    def __post_init__(self) -> None:
        missing = sorted({qrel.query_id for qrel in self.qrels} - {query.query_id for query in self.queries})
        if not self.queries or missing:
            found = f"none for {missing[0]!r}" if missing else "none at all"
            raise InputError(f"expected candidates for every dev query that is judged, found {found}")

    @property
    def key(self) -> str:
        """Changes with anything in it."""
        texts = sorted(f"{doc_id} {document.full_text}" for doc_id, document in self.documents.items())
        lines = [repr(line) for query in self.queries for line in self.run[query.query_id]]
        return content_key(*map(repr, self.queries), *texts, *lines, *map(repr, self.qrels))


@dataclass(frozen=True, slots=True)
class DevValue:
    """nDCG@10, the mean over the judged queries, and the share of judgments without a label, whose documents keep
    their first-stage place."""

    ndcg: float
    unparsed_rate: float


def rank_dev(model: PreTrainedModel, tokens: ChatTokens, template: Template, mode: Mode, dev: DevSet) -> DevValue:
    """Rank the dev queries and measure the order.

    The model is put into evaluation mode for that and back into the one it was in.
    """
    was_training = model.training
    torch.nn.Module.train(model, False)
    try:
        generator = HfGenerator("student", model, tokens, ANSWERS_AT_ONCE)
        reranker = Reranker(Judge(template, generator, mode))
        jobs = (
            (query, [dev.documents[line.doc_id] for line in dev.run[query.query_id]], dev.run[query.query_id])
            for query in dev.queries
        )
        rankings = list(reranker.rank_many(jobs))
    finally:
        torch.nn.Module.train(model, was_training)
    run = {ranking.query_id: ranking.to_run() for ranking in rankings}
    values = evaluate(dev.qrels, {"dev": run}, [MEASURE]).runs[0].values
    num_unreadable = sum(ranking.num_unreadable for ranking in rankings)
    return DevValue(values[MEASURE], num_unreadable / max(1, sum(map(len, rankings))))
