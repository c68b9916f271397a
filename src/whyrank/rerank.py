"""The main job: put documents in a better order, with the reasons.

from whyrank import Reranker

for result in Reranker.load().rank("Why do my leaves turn yellow?", documents, top_k=3):
    print(result.score, result.id, result.explanation)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Literal, get_args, overload

from whyrank.auto import Ask, in_chunks, judge_in_waves
from whyrank.documents import DocumentLike, read_documents
from whyrank.errors import InputError
from whyrank.generators import Generator, Sampling
from whyrank.generators.opening import ModelOptions, calibration_of, open_model
from whyrank.judging import Judge, check_samples
from whyrank.passages import LongDocuments, Passages, passages_of
from whyrank.ranking import Fuse, OnUnparsed, order, parse_fuse
from whyrank.records import Document, Judgment, Mode, Query, ScoredDocument, Status
from whyrank.template import Template
from whyrank.waves import Auto

__all__ = ["DocumentLike", "Ranked", "Ranking", "RankingMode", "Reranker"]

RankingMode = Literal["explain", "direct", "auto"]
"""Modes of judging, and `auto`: direct for all, with reasons where they can change the first places."""

AUTO_TOP_K = 10


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document in its new place.

    `score` is the model's expected label, `None` where no label could be read; `rank_score` orders the list.
    `passage` is the text that the model was shown, of a document judged by passages the winning one
    (`judgment.num_passages` says how many there were). Ranks start at 1. In mode `auto`, a document without an
    explanation has its direct score as `score`, and as `rank_score` the score that is to be expected with a reason.
    """

    id: str
    rank: int
    score: float | None
    rank_score: float
    label: str | None
    explanation: str
    status: Status
    passage: str
    first_stage_rank: int
    judgment: Judgment

    @property
    def is_explained(self) -> bool:
        """Whether the model was asked for a reason."""
        return self.judgment.mode == "explain"


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[Ranked]):
    """The documents of one query, best first."""

    query_id: str
    results: tuple[Ranked, ...]

    @overload
    def __getitem__(self, index: int) -> Ranked: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Ranked]: ...
    def __getitem__(self, index: int | slice) -> Ranked | Sequence[Ranked]:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    @property
    def num_unreadable(self) -> int:
        """Results without a label."""
        return sum(result.score is None for result in self.results)

    @property
    def num_explained(self) -> int:
        """Results for which the model was asked for a reason."""
        return sum(result.is_explained for result in self.results)

    def to_run(self) -> list[ScoredDocument]:
        """The order as lines of a run."""
        return [ScoredDocument(self.query_id, result.id, result.rank, result.rank_score) for result in self.results]


@dataclass(frozen=True, slots=True)
class Reranker:
    """A judge and the policies that turn its judgments into an order. With `auto`, the judge gives the reasons of mode
    `auto`, and its twin in mode `direct` the scores before them."""

    judge: Judge
    fuse: Fuse = Fuse()
    on_unparsed: OnUnparsed = "first_stage"
    auto: Auto | None = None

    def __post_init__(self) -> None:
        if self.auto is not None and self.judge.mode != "explain":
            raise InputError(
                f"mode auto asks for reasons itself: give it a judge in mode explain, not {self.judge.mode}"
            )
        if self.on_unparsed not in get_args(OnUnparsed):
            raise InputError(
                f"expected on_unparsed among {', '.join(get_args(OnUnparsed))}, found {self.on_unparsed!r}"
            )

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        template: str | Path | Template | None = None,
        mode: RankingMode = "explain",
        instruction: str | None = None,
        fuse: str = "none",
        on_unparsed: OnUnparsed = "first_stage",
        max_explanation_tokens: int | None = None,
        temperature: float = 0.0,
        num_samples: int = 1,
        long_documents: LongDocuments | Passages = "cut",
        auto_top_k: int | None = None,
        auto_tolerance: float | None = None,
        max_tokens_per_query: int | None = None,
        options: ModelOptions = ModelOptions(),
    ) -> Reranker:
        """Load a model by name.

        Args:
            model: a folder, a hub id, `endpoint:URL#MODEL`, `scripted:FILE` or `overlap`; `None` is the embedded
                demo model.
            template: name or TOML file; a checkpoint trained by whyrank brings its own.
            mode: `explain`, `direct` or `auto`.
            instruction: replaces the template's statement of what counts as relevant.
            fuse: `none`, `rrf`, `zscore:w` or `minmax:w`; w is the reranker's weight.
            on_unparsed: what a pair without a readable label does to the order.
            max_explanation_tokens: overrides the template's cap.
            temperature: how explanations are drawn; 0 is greedy.
            num_samples: judgments drawn for each pair; the score is their mean. More than 1 needs a temperature.
            long_documents: `cut` shows the model the beginning of a document over the template's cap; `passages`, or
                a `Passages` with settings, judges it by passages.
            auto_top_k: with `auto`, how many first places reasons have to settle; 10 by default.
            auto_tolerance: with `auto`, by how much a document must be able to exceed the last of these places to be
                worth a reason, in units of the scale; 0 by default.
            max_tokens_per_query: with `auto`, most tokens to be written for one query; by default as many as it takes.
            options: device, dtype, batch size, concurrency.

        Raises:
            InputError: mode `auto`, and the checkpoint has no calibration; or an option of `auto` in another mode.
            WhyrankError: see `open_model` and `Judge`.
        """
        passages = passages_of(long_documents)
        check_samples(num_samples, temperature)
        auto = None
        if mode == "auto":
            top_k = AUTO_TOP_K if auto_top_k is None else auto_top_k
            auto = Auto(calibration_of(model), top_k, max_tokens_per_query, auto_tolerance or 0.0)
        elif (auto_top_k, auto_tolerance, max_tokens_per_query) != (None, None, None):
            raise InputError(
                f"auto_top_k, auto_tolerance and max_tokens_per_query belong to mode auto, found mode {mode}"
            )
        judged: Mode = "explain" if mode == "auto" else mode
        asked = template if isinstance(template, Template) or template is None else Template.load(template)
        generator, settled = open_model(model, template=asked, mode=judged, options=options)
        if max_explanation_tokens is not None:
            limits = replace(settled.limits, max_explanation_tokens=max_explanation_tokens)
            settled = replace(settled, limits=limits)
        return cls.of(
            settled,
            generator,
            mode=judged,
            sampling=Sampling(temperature, settled.limits.max_explanation_tokens) if temperature else None,
            instruction=instruction,
            fuse=fuse,
            on_unparsed=on_unparsed,
            num_samples=num_samples,
            passages=passages,
            auto=auto,
        )

    @classmethod
    def of(
        cls,
        template: Template,
        generator: Generator,
        *,
        mode: Mode = "explain",
        sampling: Sampling | None = None,
        instruction: str | None = None,
        fuse: str = "none",
        on_unparsed: OnUnparsed = "first_stage",
        num_samples: int = 1,
        passages: Passages | None = None,
        auto: Auto | None = None,
    ) -> Reranker:
        """Build from a template and any generator; `auto` with its calibration makes it one of mode `auto`.

        Raises:
            InputError: mode `auto` with several samples or passages, whose scores its calibration says nothing about.
        """
        if auto is not None and (num_samples > 1 or passages is not None):
            raise InputError(
                "mode auto was calibrated on one judgment per document: leave samples and passages out, or explain all"
            )
        judge = Judge(template, generator, mode, sampling, instruction, num_samples, passages)
        return cls(judge, parse_fuse(fuse), on_unparsed, auto)

    @property
    def mode(self) -> RankingMode:
        """How it judges."""
        return "auto" if self.auto is not None else self.judge.mode

    def rank(
        self,
        query: str | Query,
        documents: Iterable[DocumentLike],
        *,
        top_k: int | None = None,
        first_stage_scores: Sequence[float] | None = None,
        fields: Mapping[str, str] | None = None,
        on_judgment: Callable[[Judgment], None] | None = None,
    ) -> Ranking:
        """Rank the documents of one query, best first.

        The order in which documents are given is the first-stage order: it breaks ties and fills gaps. Documents
        that the query excludes are left out.

        Args:
            query: text or record.
            documents: texts (their ids are "0", "1", …), mappings or records.
            top_k: return only this many; all are judged. In mode `auto`, these are the places that reasons settle.
            first_stage_scores: needed to fuse by zscore or minmax.
            fields: names of `doc_id`, `text` and `title` in mappings.
            on_judgment: called with each judgment as soon as it is made; in mode `auto` a document may have two.

        Raises:
            InputError: no documents, an id twice, or scores that are not one for each document.
        """
        asked = query if isinstance(query, Query) else Query("query", query)
        if not isinstance(asked.text, str) or not asked.text.strip():
            raise InputError(f"expected a query with text, found {asked.text!r}")
        if top_k is not None and top_k < 1:
            raise InputError(f"expected top_k of at least 1, found {top_k}")
        records = read_documents(documents, fields or {})
        if first_stage_scores is None and self.fuse.method in ("zscore", "minmax"):
            raise InputError(
                f"fuse={self.fuse} mixes in first-stage scores: pass first_stage_scores, or use rrf or none"
            )
        if first_stage_scores is None:
            first_stage_scores = [-float(index) for index in range(len(records))]
        if len(first_stage_scores) != len(records):
            raise InputError(
                f"expected {len(records)} first_stage_scores, one for each document, found {len(first_stage_scores)}"
            )
        candidates = [
            ScoredDocument(asked.query_id, document.doc_id, index + 1, float(score))
            for index, (document, score) in enumerate(zip(records, first_stage_scores, strict=True))
        ]
        _check_ids(asked, records, candidates)
        records, candidates = _without_excluded(asked, records, candidates)
        by_id = {document.doc_id: document for document in records}
        ask = _asking(on_judgment)
        if self.auto is None:
            judgments = {
                found.doc_id: found for _, found in ask(self.judge, [(asked, document) for document in records])
            }
        else:
            auto = replace(self.auto, top_k=top_k or self.auto.top_k)
            ((_, judged),) = judge_in_waves([(asked, records)], self.judge, auto, ask)
            judgments = dict(judged.judgments)
        ranking = self.arrange(asked, by_id, candidates, judgments)
        return replace(ranking, results=ranking.results[:top_k])

    def rank_many(
        self, jobs: Iterable[tuple[Query, Sequence[Document], Sequence[ScoredDocument]]]
    ) -> Iterator[Ranking]:
        """Rank many queries in one stream, so that batches fill across queries.

        Yields the rankings in the order of `jobs`, each as soon as it is complete. In mode `auto`, as many
        queries as `auto.NUM_QUERIES_TOGETHER` are read, judged in rounds and yielded together.

        Args:
            jobs: query, its documents, and the first-stage lines for the same documents.
        """
        if self.auto is not None:
            yield from self._rank_in_waves(jobs, self.auto)
            return
        waiting: dict[int, tuple[Query, dict[str, Document], Sequence[ScoredDocument], dict[str, Judgment]]] = {}
        owners: dict[int, int] = {}  # from the index of a pair to the number of its job

        def pairs() -> Iterator[tuple[Query, Document]]:
            index = 0
            for number, (query, documents, candidates) in enumerate(jobs):
                _check_ids(query, documents, candidates)
                kept, lines = _without_excluded(query, documents, candidates)
                waiting[number] = (query, {document.doc_id: document for document in kept}, lines, {})
                for document in kept:
                    owners[index] = number
                    index += 1
                    yield query, document

        next_number = 0
        # The empty round after the last judgment is for jobs without documents, which no judgment completes.
        for judged in chain(self.judge.judge(pairs()), [None]):
            if judged is not None:
                index, judgment = judged
                waiting[owners.pop(index)][3][judgment.doc_id] = judgment
            while next_number in waiting and len(waiting[next_number][3]) == len(waiting[next_number][1]):
                yield self.arrange(*waiting.pop(next_number))
                next_number += 1

    def _rank_in_waves(
        self, jobs: Iterable[tuple[Query, Sequence[Document], Sequence[ScoredDocument]]], auto: Auto
    ) -> Iterator[Ranking]:
        for chunk in in_chunks(jobs):
            kept = []
            for query, documents, candidates in chunk:
                _check_ids(query, documents, candidates)
                kept.append((query, *_without_excluded(query, documents, candidates)))
            asked = [(query, _in_first_stage_order(documents, lines)) for query, documents, lines in kept]
            judged = dict(judge_in_waves(asked, self.judge, auto, _asking(None)))
            for number, (query, documents, lines) in enumerate(kept):
                by_id = {document.doc_id: document for document in documents}
                yield self.arrange(query, by_id, lines, judged[number].judgments)

    def arrange(
        self,
        query: Query,
        documents: Mapping[str, Document],
        candidates: Sequence[ScoredDocument],
        judgments: Mapping[str, Judgment],
    ) -> Ranking:
        """Put judged candidates in order; `judgments` and `documents` are by doc_id.

        In mode `auto`, a direct score stands for the score that is to be expected with a reason.

        Raises:
            TooManyUnparsed: the policy is `error` and a label is missing.
        """
        comparable = {doc_id: self._comparable(judgment) for doc_id, judgment in judgments.items()}
        ordered = order(candidates, comparable, fuse=self.fuse, on_unparsed=self.on_unparsed)
        results = []
        for rank, (candidate, rank_score) in enumerate(ordered, start=1):
            judgment = judgments[candidate.doc_id]
            start, end = judgment.passage
            results.append(
                Ranked(
                    id=candidate.doc_id,
                    rank=rank,
                    score=judgment.score,
                    rank_score=rank_score,
                    label=judgment.label,
                    explanation=judgment.explanation,
                    status=judgment.status,
                    passage=documents[candidate.doc_id].full_text[start:end],
                    first_stage_rank=candidate.rank,
                    judgment=judgment,
                )
            )
        return Ranking(query.query_id, tuple(results))

    def _comparable(self, judgment: Judgment) -> Judgment:
        if self.auto is None or judgment.mode == "explain" or judgment.score is None:
            return judgment
        return replace(judgment, score=self.auto.calibration.expect(judgment.score))


def _asking(on_judgment: Callable[[Judgment], None] | None) -> Ask:
    """Judges pairs one stream at a time, and keeps nothing on disk."""

    def ask(judge: Judge, pairs: Sequence[tuple[Query, Document]]) -> Iterator[tuple[int, Judgment]]:
        for index, judgment in judge.judge(pairs):
            if on_judgment:
                on_judgment(judgment)
            yield index, judgment

    return ask


def _in_first_stage_order(documents: Sequence[Document], candidates: Sequence[ScoredDocument]) -> list[Document]:
    by_id = {document.doc_id: document for document in documents}
    return [by_id[line.doc_id] for line in sorted(candidates, key=lambda line: (line.rank, line.doc_id))]


def _check_ids(
    query: Query,
    documents: Sequence[Document],
    candidates: Sequence[ScoredDocument],
) -> None:
    known = {document.doc_id for document in documents}
    if len(known) < len(documents):
        ids = sorted(document.doc_id for document in documents)
        twice = next(doc_id for doc_id, group in groupby(ids) if len(list(group)) > 1)
        raise InputError(f"query {query.query_id}: document id {twice!r} is there twice; ids must be different")
    if {candidate.doc_id for candidate in candidates} != known:
        raise InputError(f"query {query.query_id}: candidates and documents must have the same ids")
    strange = next((line for line in candidates if not math.isfinite(line.score)), None)
    if strange is not None:
        raise InputError(f"query {query.query_id}: expected finite first-stage scores, found {strange.score}")


def _without_excluded(
    query: Query, documents: Sequence[Document], candidates: Sequence[ScoredDocument]
) -> tuple[list[Document], list[ScoredDocument]]:
    banned = set(query.excluded_doc_ids)
    return (
        [document for document in documents if document.doc_id not in banned],
        [candidate for candidate in candidates if candidate.doc_id not in banned],
    )
