"""`whyrank search`: a corpus and queries in, a BM25 run out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from whyrank.datasets import read_corpus, read_excluded, read_queries, write_run
from whyrank.records import Query
from whyrank.search import Bm25Config, Bm25Index
from whyrank.store import BadLines, Manifest

__all__ = ["Searched", "search_files"]


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search did; `seconds` is wall time for reading, indexing and searching."""

    run: Path
    num_documents: int
    num_queries: int
    num_empty_queries: int
    num_lines: int
    num_bad_lines: int
    seconds: float


def search_files(
    corpus: Path,
    queries: Path,
    out: Path,
    *,
    top_k: int = 100,
    config: Bm25Config = Bm25Config(),
    excluded: Path | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Searched:
    """Index `corpus`, search `queries`, write the run to `out` (TREC, or JSON where the name ends in .json).

    Beside it, `<name of the run>.manifest.json` tells how. Its count `excluded` is of pairs: documents of the corpus
    that were not to be returned for a query.

    Args:
        top_k: documents per query.
        config: how BM25 counts.
        excluded: documents that must not be returned, per query, beside those that the queries name themselves.
        limit: only this many queries.
        skip_bad: count malformed lines and pass over them.

    Raises:
        InputError: a file cannot be read, or an id cannot be written.
    """
    start = time.perf_counter()
    manifest = Manifest("search", {"top_k": top_k, "limit": limit, "skip_bad": skip_bad, **asdict(config)})
    manifest = manifest.with_inputs(corpus, queries, excluded)
    bad = BadLines() if skip_bad else None
    more = read_excluded(excluded, bad=bad) if excluded else {}
    asked = [
        Query(query.query_id, query.text, (*query.excluded_doc_ids, *sorted(more.get(query.query_id, ()))))
        for query in islice(read_queries(queries, bad=bad), limit)
    ]
    index = Bm25Index.build(read_corpus(corpus, bad=bad), config)
    run = index.search(asked, top_k)
    write_run(out, run, tag="whyrank-bm25")
    num_lines = sum(map(len, run.values()))
    num_bad_lines = bad.count if bad else 0
    known = set(index.doc_ids)
    counts = {
        "documents": len(index.doc_ids),
        "queries": len(asked),
        "empty_queries": index.num_empty_queries,
        "excluded": sum(len(known.intersection(query.excluded_doc_ids)) for query in asked),
        "lines": num_lines,
        "bad_lines": num_bad_lines,
    }
    manifest = manifest.finished(start, counts=counts)
    manifest.write(out.parent, f"{out.name}.manifest.json")
    return Searched(
        run=out,
        num_documents=len(index.doc_ids),
        num_queries=len(asked),
        num_empty_queries=index.num_empty_queries,
        num_lines=num_lines,
        num_bad_lines=num_bad_lines,
        seconds=manifest.seconds,
    )
