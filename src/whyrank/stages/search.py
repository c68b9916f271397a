"""`whyrank search`: a corpus and queries in, a BM25 run out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from whyrank.datasets import read_corpus, read_excluded, read_queries, write_run
from whyrank.errors import InputError
from whyrank.records import Query, ScoredDocument
from whyrank.search import Bm25Config, Bm25Index
from whyrank.stages.expand import Expansion, fused, searched_for
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
    expand: Callable[[Sequence[Query]], Mapping[str, Sequence[str]]] | None = None,
    expansion: Expansion = "append",
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
        expand: gives search queries by query id, which are searched for beside the queries' own texts.
        expansion: whether they make one text, or are searched for apart and fused.
        limit: only this many queries.
        skip_bad: count malformed lines and pass over them.

    Raises:
        InputError: a file cannot be read, or an id cannot be written.
    """
    start = time.perf_counter()
    manifest = Manifest("search", {"top_k": top_k, "limit": limit, "skip_bad": skip_bad, **asdict(config)})
    if expand:
        manifest = replace(manifest, config={**manifest.config, "expansion": expansion})
    manifest = manifest.with_inputs(corpus, queries, excluded)
    bad = BadLines() if skip_bad else None
    more = read_excluded(excluded, bad=bad) if excluded else {}
    asked = [
        Query(query.query_id, query.text, (*query.excluded_doc_ids, *sorted(more.get(query.query_id, ()))))
        for query in islice(read_queries(queries, bad=bad), limit)
    ]
    index = Bm25Index.build(read_corpus(corpus, bad=bad), config)
    more_queries = expand(asked) if expand else {}
    run: dict[str, list[ScoredDocument]] = {}
    for query in asked:
        if query.query_id in run:
            raise InputError(f"{queries}: expected every query id once, found {query.query_id!r} twice")
        run[query.query_id] = _search(index, query, more_queries.get(query.query_id, ()), expansion, top_k)
    num_empty = sum(not lines for lines in run.values())
    write_run(out, run, tag="whyrank-bm25")
    num_lines = sum(map(len, run.values()))
    num_bad_lines = bad.count if bad else 0
    known = set(index.doc_ids)
    counts = {
        "documents": len(index.doc_ids),
        "queries": len(asked),
        "empty_queries": num_empty,
        "excluded": sum(len(known.intersection(query.excluded_doc_ids)) for query in asked),
        **({"expanded": sum(1 for query in asked if more_queries.get(query.query_id))} if expand else {}),
        "lines": num_lines,
        "bad_lines": num_bad_lines,
    }
    manifest = manifest.finished(start, counts=counts)
    manifest.write(out.parent, f"{out.name}.manifest.json")
    return Searched(
        run=out,
        num_documents=len(index.doc_ids),
        num_queries=len(asked),
        num_empty_queries=num_empty,
        num_lines=num_lines,
        num_bad_lines=num_bad_lines,
        seconds=manifest.seconds,
    )


def _search(
    index: Bm25Index, query: Query, more: Sequence[str], expansion: Expansion, top_k: int
) -> list[ScoredDocument]:
    runs = [index.search([text], top_k)[query.query_id] for text in searched_for(query, more, expansion)]
    return runs[0] if len(runs) == 1 else fused(query.query_id, runs, top_k)
