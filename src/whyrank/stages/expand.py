"""`whyrank expand`: queries and a model in, search queries out; and what `whyrank search` makes of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from whyrank.progress import Progress
from whyrank.records import Query, ScoredDocument, SearchQueries
from whyrank.search_queries import PROMPT_VERSION, QueryWriter, WritingCounts, write_into
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.failures import require_answers
from whyrank.store import Manifest, read_jsonl

__all__ = [
    "SEARCH_QUERIES",
    "Expanded",
    "Expansion",
    "by_query",
    "expand_queries",
    "fused",
    "searched_for",
    "written_by",
]

SEARCH_QUERIES = "search-queries.jsonl"
RRF_CONSTANT = 60.0  # Cormack et al., SIGIR 2009

Expansion = Literal["append", "fuse"]
"""`append`: one search for the query's text and all of its search queries; `fuse`: a search for each, fused by rank."""


@dataclass(frozen=True, slots=True)
class Expanded:
    """What writing search queries did; `first_error` is why the first of the failed requests failed."""

    path: Path
    counts: WritingCounts
    num_search_queries: int
    first_error: str | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0, or 7 where a query has nothing to be searched with but itself."""
        return EXIT_PARTIAL if self.counts.num_unreadable else EXIT_OK


def expand_queries(queries: Sequence[Query], writer: QueryWriter, path: Path, manifest: Manifest) -> Expanded:
    """Write search queries for every query into `path`; a manifest beside it tells how. Resumes after a kill.

    Raises:
        GenerationError: every request failed.
        InputError: see `write_into`.
    """
    start = time.perf_counter()
    manifest = replace(manifest, config={**manifest.config, "model": writer.generator.name, "prompt": PROMPT_VERSION})
    counts = WritingCounts()
    num_search_queries, first_error = 0, None
    with Progress(f"writing search queries with {writer.generator.name}", len(queries)) as progress:
        for found in write_into(path, writer, queries, counts):
            num_search_queries += len(found.queries)
            first_error = first_error or found.error
            progress.advance(is_from_before=not counts.num_new)
    require_answers(counts.statuses["error"], len(queries), first_error)
    manifest = manifest.finished(start, counts={**counts.to_counts(), "search_queries": num_search_queries})
    manifest.write(path.parent, "manifest.json" if path.name == SEARCH_QUERIES else f"{path.name}.manifest.json")
    return Expanded(path, counts, num_search_queries, first_error, manifest.seconds)


def written_by(paths: Iterable[Path]) -> Iterator[SearchQueries]:
    """What files of search queries hold.

    Raises:
        InputError: a line is not one.
    """
    return (found for path in paths for found in read_jsonl(path, SearchQueries, advice="Remove the line"))


def by_query(written: Iterable[SearchQueries]) -> dict[str, tuple[str, ...]]:
    """Search queries by the id of the query they stand for; several writers' add up."""
    found: dict[str, tuple[str, ...]] = {}
    for item in written:
        found[item.query_id] = (*found.get(item.query_id, ()), *item.queries)
    return found


def fused(query_id: str, runs: Sequence[Sequence[ScoredDocument]], top_k: int) -> list[ScoredDocument]:
    """The rankings of several searches as one, by reciprocal rank fusion: a document's score is the sum of
    `1 / (60 + rank)` over the rankings that it is in. Ties are broken by its id."""
    scores: dict[str, float] = {}
    for run in runs:
        for line in run:
            scores[line.doc_id] = scores.get(line.doc_id, 0.0) + 1 / (RRF_CONSTANT + line.rank)
    best = sorted(scores, key=lambda doc_id: (-scores[doc_id], doc_id))[:top_k]
    return [ScoredDocument(query_id, doc_id, rank, scores[doc_id]) for rank, doc_id in enumerate(best, start=1)]


def searched_for(query: Query, search_queries: Sequence[str], expansion: Expansion) -> list[Query]:
    """What is searched for in place of a query: one text, or its own and each of its search queries apart."""
    texts = [query.text, *search_queries]
    return [replace(query, text=text) for text in (texts if expansion == "fuse" else ["\n".join(texts)])]
