"""The systems that the demo compares, each measured in the same way on the same candidate lists."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from whyrank.almanac import Collection
from whyrank.evaluation import evaluate
from whyrank.generators.hf import HfGenerator
from whyrank.records import Judgment, Mode, Query, ScoredDocument
from whyrank.rerank import Reranker
from whyrank.search import Bm25Index
from whyrank.stages.rerank import Candidates, rerank_files
from whyrank.store import Manifest, read_jsonl

__all__ = [
    "MEASURE",
    "Row",
    "bm25_row",
    "bootstrap_interval",
    "candidates_of",
    "loaded",
    "per_query",
    "random_row",
    "student_row",
]

MEASURE = "nDCG@10"
NUM_SHUFFLES = 200
RANKING_BATCH = 48
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One system's figures. `per_query` holds nDCG@10 by query_id; the rest are means over all pairs."""

    system: str
    per_query: Mapping[str, float]
    label_accuracy: float | None = None
    tokens_per_document: float = 0.0
    documents_per_second: float | None = None

    @property
    def ndcg(self) -> float:
        """Mean over queries."""
        return fmean(self.per_query.values())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over queries."""
        return bootstrap_interval(list(self.per_query.values()))

    def to_json(self) -> dict[str, JsonValue]:
        """As written to `results.json`."""
        return {
            "system": self.system,
            MEASURE: self.ndcg,
            f"{MEASURE}_interval": list(self.interval),
            "label_accuracy": self.label_accuracy,
            "tokens_per_document": self.tokens_per_document,
            "documents_per_second": self.documents_per_second,
        }


def candidates_of(collection: Collection) -> Candidates:
    """The candidate lists as a first-stage run in their own shuffled order, all scores equal in worth."""
    run = {
        query.query_id: [
            ScoredDocument(query.query_id, doc_id, rank, -float(rank))
            for rank, doc_id in enumerate(collection.candidates[query.query_id], start=1)
        ]
        for query in collection.queries
    }
    documents = {document.doc_id: document for document in collection.documents}
    return Candidates(collection.queries, documents, run, num_excluded=0, num_bad_lines=0)


def random_row(collection: Collection, seed: int) -> Row:
    """The mean over random orders of every list."""
    rng = Random(seed)

    def shuffled(query: Query) -> list[str]:
        return sorted(collection.candidates[query.query_id], key=lambda _: rng.random())

    values = [per_query(collection, shuffled) for _ in range(NUM_SHUFFLES)]
    return Row("random", {query_id: fmean(value[query_id] for value in values) for query_id in values[0]})


def bm25_row(collection: Collection, *, is_reversed: bool = False) -> Row:
    """BM25 with the statistics of the split's documents; candidates that share no word come last, as they stood.

    Reversed, the least similar document is the first: in a fair collection that is no better than the other way.
    """
    start = time.perf_counter()
    index = Bm25Index.build(collection.documents)
    found = index.search(collection.queries, top_k=len(collection.documents))

    def ranked(query: Query) -> list[str]:
        candidates = collection.candidates[query.query_id]
        matching = [line.doc_id for line in found[query.query_id] if line.doc_id in set(candidates)]
        best_first = matching + [doc_id for doc_id in candidates if doc_id not in set(matching)]
        return best_first[::-1] if is_reversed else best_first

    values = per_query(collection, ranked)
    return Row(
        "bm25-reversed" if is_reversed else "bm25",
        values,
        documents_per_second=len(collection.labels) / (time.perf_counter() - start),
    )


def loaded(model: Path) -> HfGenerator:
    """A student, ready to rank."""
    return HfGenerator.load(model, device="cpu", dtype="float32", batch_size=RANKING_BATCH, name=model.name)


def student_row(collection: Collection, reranker: Reranker, system: str, out: Path) -> Row:
    """A trained model, run by the same code as `whyrank rerank`; leaves run, judgments and manifest in `out`."""
    candidates = candidates_of(collection)
    mode: Mode = reranker.judge.mode
    manifest = Manifest("rerank", {"model": reranker.judge.generator.name, "mode": mode, "collection": "almanac"})
    done = rerank_files(candidates, reranker, out, manifest)
    judgments = {(j.query_id, j.doc_id): j for j in read_jsonl(out / "judgments.jsonl", Judgment)}
    rankings = {
        query.query_id: reranker.arrange(
            query,
            candidates.documents,
            candidates.run[query.query_id],
            {line.doc_id: judgments[query.query_id, line.doc_id] for line in candidates.run[query.query_id]},
        )
        for query in collection.queries
    }
    values = per_query(collection, lambda query: [result.id for result in rankings[query.query_id]])
    right = [judgments[pair].label == str(label) for pair, label in collection.labels.items()]
    spent = fmean(judgment.num_completion_tokens for judgment in judgments.values())
    num_new = done.counts.num_new  # a demo that goes on after a stop has judged some before
    return Row(system, values, fmean(right), spent, num_new / done.seconds if num_new == len(judgments) else None)


def per_query(collection: Collection, ranked: Callable[[Query], Sequence[str]]) -> dict[str, float]:
    """nDCG@10 by query_id of the candidates in the order that `ranked` gives for each query."""
    run = {
        query.query_id: [
            ScoredDocument(query.query_id, doc_id, rank, -float(rank)) for rank, doc_id in enumerate(ranked(query), 1)
        ]
        for query in collection.queries
    }
    return dict(evaluate(collection.qrels, {"run": run}, [MEASURE]).runs[0].per_query[MEASURE])


def bootstrap_interval(
    values: Sequence[float] | Sequence[Sequence[float]] | NDArray[np.float64], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: one per query, or `(runs, queries)`: then runs and queries are both drawn anew, so that the interval
            covers another training run as well as other queries.
        seed: fixes the resamples.
    """
    data = np.atleast_2d(np.asarray(values, dtype=np.float64))
    num_runs, num_queries = data.shape
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(NUM_RESAMPLES):
        runs, queries = rng.integers(0, num_runs, num_runs), rng.integers(0, num_queries, num_queries)
        means.append(data[np.ix_(runs, queries)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
