"""Runs in memory: their order, their exclusions, and scores that leave no doubt about the order.

A run maps each query id to its documents, best first. Within a query the score decides, then the rank the file
gave, then the document id; ranks are counted anew from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from whyrank.datasets.formats import Located, reject
from whyrank.errors import InputError
from whyrank.records import ScoredDocument
from whyrank.store import BadLines

__all__ = ["Run", "collect", "strictly_decreasing", "without_excluded"]

Run = Mapping[str, Sequence[ScoredDocument]]
"""Query id to documents, best first, with ranks 1, 2, 3, ..."""

SMALLEST_STEP = 1e-30  # below it single precision has subnormal numbers, which some tools read as 0


def collect(items: Iterable[Located[ScoredDocument]], bad: BadLines | None) -> dict[str, list[ScoredDocument]]:
    """Order documents into a run; the queries keep the order of their first line.

    Raises:
        InputError: a document comes twice for a query (with `bad`, the first counts).
    """
    found: dict[str, dict[str, ScoredDocument]] = {}
    for where, scored in items:
        documents = found.setdefault(scored.query_id, {})
        if scored.doc_id in documents:
            reject(
                f"{where}: expected every document once for a query, found document {scored.doc_id!r} "
                f"a second time for query {scored.query_id!r}",
                bad,
            )
            continue
        documents[scored.doc_id] = scored
    return {query_id: _ranked(documents.values()) for query_id, documents in found.items()}


def _ranked(documents: Iterable[ScoredDocument]) -> list[ScoredDocument]:
    ordered = sorted(documents, key=lambda scored: (-scored.score, scored.rank, scored.doc_id))
    return [replace(scored, rank=rank) for rank, scored in enumerate(ordered, start=1)]


def without_excluded(run: Run, excluded: Mapping[str, AbstractSet[str]]) -> tuple[dict[str, list[ScoredDocument]], int]:
    """The run without each query's excluded documents, ranks counted anew, and how many documents went.

    A query of which nothing is left keeps an empty list.
    """
    kept = {
        query_id: [scored for scored in documents if scored.doc_id not in excluded.get(query_id, frozenset())]
        for query_id, documents in run.items()
    }
    num_dropped = sum(map(len, run.values())) - sum(map(len, kept.values()))
    return {
        query_id: [replace(scored, rank=rank) for rank, scored in enumerate(documents, start=1)]
        for query_id, documents in kept.items()
    }, num_dropped


def strictly_decreasing(scores: Sequence[float]) -> list[float]:
    """The scores, lowered where needed so that each is below the one before it even in single precision.

    Tools that read a run sort it by score and order ties each in its own way, and trec_eval holds scores as
    32-bit floats. A score that is not lower than its predecessor as a 32-bit float becomes the next 32-bit float
    below that predecessor; all others keep their value. Scores without ties therefore come back unchanged.

    Raises:
        InputError: the scores increase somewhere, or one is not finite in single precision.
    """
    written: list[float] = []
    for position, score in enumerate(scores):
        if not abs(score) <= float(np.finfo(np.float32).max):
            raise InputError(f"expected finite scores within the range of 32-bit floats, found {score!r}")
        if position and score > scores[position - 1]:
            raise InputError(
                f"expected scores that decrease with rank, found {scores[position - 1]!r} before {score!r}"
            )
        if written and not np.float32(score) < np.float32(written[-1]):
            below = float(np.nextafter(np.float32(written[-1]), np.float32(-math.inf)))
            score = below if abs(below) >= SMALLEST_STEP else -SMALLEST_STEP
        written.append(score)
    return written
