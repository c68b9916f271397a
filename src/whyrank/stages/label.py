"""`whyrank label`: pairs and a teacher in, judgments with explanations out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from whyrank.datasets import read_corpus, read_queries
from whyrank.errors import InputError
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.progress import Progress
from whyrank.records import Document, Pair, Query
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.failures import require_answers
from whyrank.store import BadLines, Manifest, read_jsonl

__all__ = ["Labelled", "PairTexts", "label_files", "read_pairs"]


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Pairs with the texts they name."""

    pairs: tuple[Pair, ...]
    queries: Mapping[str, Query]
    documents: Mapping[str, Document]
    num_bad_lines: int


def read_pairs(
    pairs: Path, queries: Path, corpus: Path, *, limit: int | None = None, skip_bad: bool = False
) -> PairTexts:
    """Read pairs and the texts they name.

    Raises:
        InputError: a file cannot be read, or a text is missing.
    """
    bad = BadLines() if skip_bad else None
    chosen = tuple(islice(read_jsonl(pairs, Pair, bad=bad), limit))
    if not chosen:
        raise InputError(f"{pairs}: expected at least one pair, found none")
    wanted = {pair.doc_id for pair in chosen}
    asked = {query.query_id: query for query in read_queries(queries, bad=bad)}
    documents = {doc.doc_id: doc for doc in read_corpus(corpus, bad=bad) if doc.doc_id in wanted}
    for pair in chosen:
        if pair.query_id not in asked:
            raise InputError(f"{pairs}: query {pair.query_id!r} is not in {queries}")
        if pair.doc_id not in documents:
            raise InputError(f"{pairs}: document {pair.doc_id!r} is not in {corpus}")
    return PairTexts(chosen, asked, documents, bad.count if bad else 0)


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a labelling job did. `labels` counts labels by the relation of their pair; `first_error` is why the first of
    the failed requests failed."""

    out: Path
    counts: JudgingCounts
    labels: Mapping[str, Mapping[str, int]]
    num_bad_lines: int
    first_error: str | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0, or 7 where requests failed or more than 1 % of the pairs could not be read."""
        return EXIT_PARTIAL if self.counts.is_partial else EXIT_OK


def label_files(texts: PairTexts, judge: Judge, out: Path, manifest: Manifest) -> Labelled:
    """Judge every pair into `out/judgments.jsonl`; `out/manifest.json` tells how. Resumes after a kill.

    Raises:
        WhyrankError: see `judge_into`.
        GenerationError: every request failed.
    """
    start = time.perf_counter()
    counts = JudgingCounts()
    relations = {(pair.query_id, pair.doc_id): pair.relation for pair in texts.pairs}
    labels: dict[str, Counter[str]] = {}
    first_error: str | None = None
    num_new = 0
    pairs = ((texts.queries[pair.query_id], texts.documents[pair.doc_id]) for pair in texts.pairs)
    with Progress(f"labelling with {judge.generator.name}", len(texts.pairs)) as progress:
        for judgment in judge_into(out / "judgments.jsonl", judge, pairs, counts):
            if counts.num_judgments == 1:  # not earlier: a folder that is refused keeps the manifest of its own job
                manifest.write(out)
            relation = relations[(judgment.query_id, judgment.doc_id)]
            labels.setdefault(relation, Counter())[judgment.label or judgment.status] += 1
            first_error = first_error or judgment.error
            progress.advance(is_from_before=counts.num_new == num_new)
            num_new = counts.num_new
    require_answers(counts.statuses["error"], counts.num_judgments, first_error)
    seconds = round(time.perf_counter() - start, 3)
    manifest.finished(start, counts={**counts.to_counts(), "num_bad_lines": texts.num_bad_lines}).write(out)
    return Labelled(out, counts, labels, texts.num_bad_lines, first_error, seconds)
