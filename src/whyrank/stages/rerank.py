"""`whyrank rerank`: a run, its texts and a model in; a better run with the reasons out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from pydantic import JsonValue

from whyrank.auto import AutoCounts, in_chunks, judge_in_waves
from whyrank.datasets import Run, read_corpus, read_excluded, read_queries, read_rankgpt, read_run, write_run
from whyrank.errors import InputError, TooManyUnparsed
from whyrank.judging import Judge, JudgingCounts, judge_into, judging_into
from whyrank.progress import Progress
from whyrank.records import Document, Judgment, Query, ScoredDocument
from whyrank.rerank import Reranker
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.failures import require_answers
from whyrank.store import BadLines, Manifest
from whyrank.waves import Auto

__all__ = ["Candidates", "Reranked", "read_candidates", "rerank_files"]

RUN_TAG = "whyrank"
JUDGMENTS = "judgments.jsonl"
DIRECT_JUDGMENTS = "judgments-direct.jsonl"  # in mode auto, beside those with a reason


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is to be ranked: queries in order, the documents to be judged, and their first-stage lines.

    `tails` holds the lines of a query that are not judged; they stay below the others, as they stood.
    `num_without_text` counts the lines that were dropped because query or document has no text.
    """

    queries: tuple[Query, ...]
    documents: Mapping[str, Document]
    run: Mapping[str, Sequence[ScoredDocument]]
    num_excluded: int
    num_bad_lines: int
    tails: Mapping[str, Sequence[ScoredDocument]] = field(default_factory=dict)
    num_without_text: int = 0

    @property
    def num_pairs(self) -> int:
        """How many pairs have to be judged."""
        return sum(len(lines) for lines in self.run.values())

    def pairs(self) -> Iterator[tuple[Query, Document]]:
        """Query by query, in first-stage order, so that neighbours share a prefix."""
        for query in self.queries:
            for line in self.run[query.query_id]:
                yield query, self.documents[line.doc_id]

    def documents_of(self, query: Query) -> list[Document]:
        """The documents to be judged for a query, each once, in first-stage order."""
        return [self.documents[doc_id] for doc_id in dict.fromkeys(line.doc_id for line in self.run[query.query_id])]


def read_candidates(
    run: Path,
    *,
    corpus: Path | None = None,
    queries: Path | None = None,
    excluded: Path | None = None,
    top_k: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    fields: Mapping[str, str] | None = None,
) -> Candidates:
    """Read a run with its texts. A RankGPT file brings its own; other runs need `corpus` and `queries`.

    Args:
        excluded: documents never to be ranked, per query; those that the queries name themselves are left out too.
        top_k: judge only the first so many of each query; the others become the tails.
        limit: only the first so many queries.
        skip_bad: count malformed lines and pass over them; also candidates without a text.
        fields: names of `doc_id`, `text` and `title` in the corpus.

    Raises:
        InputError: a text is missing, a file cannot be read, or `fields` are given for a RankGPT file.
    """
    bad = BadLines() if skip_bad else None
    asked, documents, lines = _read_texts(run, corpus, queries, bad, fields)
    chosen = tuple(islice((query for query in asked if query.query_id in lines), limit))
    if not chosen:
        raise InputError(f"no query of {queries or run} is in the run {run}: are they of the same collection?")
    kept, num_excluded = _without_excluded(
        {query.query_id: lines[query.query_id] for query in chosen},
        chosen,
        read_excluded(excluded, bad=bad) if excluded else {},
    )
    judged: Run = {query_id: ranked[:top_k] for query_id, ranked in kept.items()}
    tails = {query_id: ranked[len(judged[query_id]) :] for query_id, ranked in kept.items()}
    num_without_text = 0
    if skip_bad:
        judged, num_without_text = _without_missing(judged, lines, asked, documents)
        if num_without_text and not any(judged.values()):
            raise InputError(f"none of the candidates of {run} has a text in {corpus}: is it of the same collection?")
    else:
        _check_texts(judged, lines, asked, documents, queries or run, corpus or run)
    return Candidates(chosen, documents, judged, num_excluded, bad.count if bad else 0, tails, num_without_text)


def _read_texts(
    run: Path, corpus: Path | None, queries: Path | None, bad: BadLines | None, fields: Mapping[str, str] | None
) -> tuple[Sequence[Query], dict[str, Document], Run]:
    if corpus is None and fields:
        raise InputError("--field names fields of --corpus; the fields of a RankGPT file are fixed")
    if corpus is None and queries is None:
        try:
            asked, texts, lines = read_rankgpt(run, bad=bad)
        except InputError as cause:
            raise InputError(f"{cause}\nAny other run needs its texts: give --corpus and --queries") from cause
        return asked, {document.doc_id: document for document in texts}, lines
    if corpus is None or queries is None:
        raise InputError("--corpus and --queries go together; only a RankGPT file carries both itself")
    lines = read_run(run, bad=bad)
    asked = list(read_queries(queries, bad=bad))
    wanted = {line.doc_id for ranked in lines.values() for line in ranked}
    found = (document for document in read_corpus(corpus, bad=bad, fields=fields) if document.doc_id in wanted)
    return asked, {document.doc_id: document for document in found}, lines


def _without_excluded(run: Run, queries: Sequence[Query], more: Mapping[str, set[str]]) -> tuple[Run, int]:
    banned = {query.query_id: {*query.excluded_doc_ids, *more.get(query.query_id, ())} for query in queries}
    kept: dict[str, list[ScoredDocument]] = {}
    for query_id, ranked in run.items():
        left = [line for line in ranked if line.doc_id not in banned[query_id]]
        kept[query_id] = [replace(line, rank=rank) for rank, line in enumerate(left, start=1)]
    return kept, sum(map(len, run.values())) - sum(map(len, kept.values()))


def _check_texts(
    judged: Run,
    run: Run,
    asked: Sequence[Query],
    documents: Mapping[str, Document],
    queries: Path,
    corpus: Path,
) -> None:
    advice = "give the file that the run was made from, or pass --skip-bad to drop and count such candidates"
    known = {query.query_id for query in asked}
    unknown = [query_id for query_id in run if query_id not in known]
    if unknown:
        raise InputError(
            f"{len(unknown)} of the run's {len(run)} queries are not in {queries}, the first is {unknown[0]!r}: "
            f"{advice}"
        )
    wanted = dict.fromkeys(line.doc_id for ranked in judged.values() for line in ranked)
    absent = [doc_id for doc_id in wanted if doc_id not in documents]
    if absent:
        raise InputError(
            f"{len(absent)} of the {len(wanted)} documents to be judged are not in {corpus}, the first is "
            f"{absent[0]!r}: {advice}"
        )


def _without_missing(
    judged: Run, run: Run, asked: Sequence[Query], documents: Mapping[str, Document]
) -> tuple[Run, int]:
    """The lines whose document has a text, and how many of the run's lines lack that of document or query."""
    known = {query.query_id for query in asked}
    num_dropped = sum(len(ranked) for query_id, ranked in run.items() if query_id not in known)
    kept: dict[str, list[ScoredDocument]] = {}
    for query_id, ranked in judged.items():
        left = [line for line in ranked if line.doc_id in documents]
        kept[query_id] = [replace(line, rank=rank) for rank, line in enumerate(left, start=1)]
        num_dropped += len(ranked) - len(left)
    return kept, num_dropped


@dataclass(frozen=True, slots=True)
class Reranked:
    """What a reranking job did. `first_error` is why the first of the failed requests failed; `seconds` is wall time
    of this invocation; `auto` says what mode `auto` did."""

    out: Path
    run: Path
    num_queries: int
    counts: JudgingCounts
    num_excluded: int
    num_bad_lines: int
    num_without_text: int
    first_error: str | None
    seconds: float
    auto: AutoCounts | None = None

    @property
    def exit_code(self) -> int:
        """0, or 7 where requests failed or more than 1 % of the pairs could not be read."""
        return EXIT_PARTIAL if self.counts.is_partial else EXIT_OK

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values for `--json`."""
        counts: dict[str, JsonValue] = {**self.counts.to_counts(), **(self.auto.to_counts() if self.auto else {})}
        return {
            "out": str(self.out),
            "run": str(self.run),
            "queries": self.num_queries,
            "excluded": self.num_excluded,
            "bad_lines": self.num_bad_lines,
            "without_text": self.num_without_text,
            "counts": counts,
            "first_error": self.first_error,
            "seconds": self.seconds,
        }


def rerank_files(candidates: Candidates, reranker: Reranker, out: Path, manifest: Manifest) -> Reranked:
    """Judge all candidates into `out/judgments.jsonl`, then write `out/run.trec` (`run.json` where an id
    has blanks) and `out/manifest.json`. In mode `auto`, `out/judgments-direct.jsonl` holds the direct judgments, and
    `judgments.jsonl` those with a reason.

    Killed at any moment, it continues where it was when called again. A local model's scores may then differ in
    their last digits from those of a job that was not killed, because other pairs share a batch.

    Raises:
        WhyrankError: see `judge_into` and `ranking.order`.
        GenerationError: every request failed; no run is written.
    """
    start = time.perf_counter()
    counts = JudgingCounts()
    auto_counts = AutoCounts() if reranker.auto else None
    arranging = _Arranging(candidates, reranker)
    total = None if reranker.auto else candidates.num_pairs
    with Progress(f"judging with {reranker.judge.generator.name}", total) as progress:
        watching = _Watching(reranker.judge, counts, progress, manifest, out)
        if reranker.auto is None or auto_counts is None:
            for judgment in judge_into(out / JUDGMENTS, reranker.judge, candidates.pairs(), counts):
                watching.see(judgment)
                arranging.add(judgment)
        else:
            _judge_in_waves(candidates, reranker.auto, watching, arranging, auto_counts)
    require_answers(counts.statuses["error"], counts.num_judgments, watching.first_error)
    lines = arranging.finish()
    # TREC's columns cannot hold an id with a blank in it; such a run is written as JSON.
    ids = chain(lines, (line.doc_id for ranked in lines.values() for line in ranked))
    has_blanks = any(name.split() != [name] for name in ids)
    run = out / ("run.json" if has_blanks else "run.trec")
    write_run(run, lines, tag=RUN_TAG)
    outcome = Reranked(
        out=out,
        run=run,
        num_queries=len(candidates.queries),
        counts=counts,
        num_excluded=candidates.num_excluded,
        num_bad_lines=candidates.num_bad_lines,
        num_without_text=candidates.num_without_text,
        first_error=watching.first_error,
        seconds=round(time.perf_counter() - start, 3),
        auto=auto_counts,
    )
    all_counts = {
        **counts.to_counts(),
        **(auto_counts.to_counts() if auto_counts else {}),
        "num_queries": outcome.num_queries,
        "num_excluded": outcome.num_excluded,
        "num_bad_lines": outcome.num_bad_lines,
        "num_without_text": outcome.num_without_text,
    }
    manifest.finished(start, counts=all_counts).write(out)
    return outcome


@dataclass(slots=True)
class _Watching:
    """What has to be done with every judgment, in whatever order they are made."""

    judge: Judge
    counts: JudgingCounts
    progress: Progress
    manifest: Manifest
    out: Path
    first_error: str | None = None
    _is_begun: bool = False
    _num_new: int = 0

    def see(self, judgment: Judgment) -> None:
        """Count it, and write the manifest with the first that goes into the file of the judge's own mode."""
        if not self._is_begun and judgment.mode == self.judge.mode:
            self._is_begun = True  # not earlier: a folder that is refused keeps the manifest of its own run
            self.manifest.write(self.out)
        self.first_error = self.first_error or judgment.error
        self.progress.advance(is_from_before=self.counts.num_new == self._num_new)
        self._num_new = self.counts.num_new


def _judge_in_waves(
    candidates: Candidates, auto: Auto, watching: _Watching, arranging: _Arranging, auto_counts: AutoCounts
) -> None:
    """Mode `auto`, chunk by chunk of the queries; both files are open all the while."""
    counts = watching.counts
    with (
        judging_into(watching.out / DIRECT_JUDGMENTS, counts) as ask_directly,
        judging_into(watching.out / JUDGMENTS, counts) as ask_for_reasons,
    ):

        def ask(judge: Judge, pairs: Sequence[tuple[Query, Document]]) -> Iterator[tuple[int, Judgment]]:
            places = {(query.query_id, document.doc_id): place for place, (query, document) in enumerate(pairs)}
            for judgment in (ask_directly if judge.mode == "direct" else ask_for_reasons)(judge, pairs):
                watching.see(judgment)
                yield places[judgment.query_id, judgment.doc_id], judgment

        for queries in in_chunks(candidates.queries):
            jobs = [(query, candidates.documents_of(query)) for query in queries]
            for number, judged in judge_in_waves(jobs, watching.judge, auto, ask):
                auto_counts.add(judged)
                arranging.settle(queries[number].query_id, judged.judgments)


class _Arranging:
    """Puts the candidates of each query in order as soon as all of them are judged, and then forgets the judgments."""

    def __init__(self, candidates: Candidates, reranker: Reranker) -> None:
        self._candidates = candidates
        self._reranker = reranker
        self._queries = {query.query_id: query for query in candidates.queries}
        self._under_way: dict[str, dict[str, Judgment]] = {}
        self._lines: dict[str, list[ScoredDocument]] = {}
        self._refused: dict[str, TooManyUnparsed] = {}

    def add(self, judgment: Judgment) -> None:
        """One more judgment, of any of the queries."""
        query_id = judgment.query_id
        judged = self._under_way.setdefault(query_id, {})
        judged[judgment.doc_id] = judgment
        if len(judged) == len(self._candidates.run[query_id]):
            self._arrange(query_id, self._under_way.pop(query_id))

    def settle(self, query_id: str, judgments: Mapping[str, Judgment]) -> None:
        """All judgments of a query at once, by doc_id."""
        self._arrange(query_id, judgments)

    def finish(self) -> Run:
        """The lines of every query that has any, in the order of the queries.

        Raises:
            TooManyUnparsed: see `ranking.order`; not raised before all is judged, so that nothing is asked twice.
        """
        for query_id in self._queries:
            if query_id not in self._lines and query_id not in self._refused:  # no candidate, or one of them twice
                self._arrange(query_id, self._under_way.pop(query_id, {}))
            if query_id in self._refused:
                raise self._refused[query_id]
        return {query_id: lines for query_id in self._queries if (lines := self._lines[query_id])}

    def _arrange(self, query_id: str, judgments: Mapping[str, Judgment]) -> None:
        try:
            self._lines[query_id] = _lines_of(self._queries[query_id], self._candidates, self._reranker, judgments)
        except TooManyUnparsed as refusal:
            self._refused[query_id] = refusal


def _lines_of(
    query: Query, candidates: Candidates, reranker: Reranker, judgments: Mapping[str, Judgment]
) -> list[ScoredDocument]:
    """The judged lines, and below them the others in first-stage order, each with a score of its own."""
    first = candidates.run[query.query_id]
    judged = reranker.arrange(query, candidates.documents, first, judgments).to_run() if first else []
    rank, lowest = len(judged), min((line.score for line in judged), default=0.0)
    tail = candidates.tails.get(query.query_id, ())
    return [*judged, *(replace(line, rank=rank + i, score=lowest - i) for i, line in enumerate(tail, start=1))]
