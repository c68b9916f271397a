"""Mode `auto`, carried out: direct scores for all candidates, then reasons in waves (`waves.py`).

A wave depends on the one before it, and a generator reads its requests ahead: it cannot be fed what depends on its own
answers. So the queries of a job go together, round by round: one stream of direct judgments, one with the first wave of
every query, one with the second of those that need it, and so on. Batches fill across queries; they run dry once at the
end of each round, which is why many queries together are faster than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from whyrank.generators import Sampling
from whyrank.judging import Judge
from whyrank.records import Document, Judgment, Query
from whyrank.waves import Auto, Waves

__all__ = ["NUM_QUERIES_TOGETHER", "Ask", "AutoCounts", "JudgedInWaves", "in_chunks", "judge_in_waves"]

NUM_QUERIES_TOGETHER = 128  # bounds what memory holds: direct judgments and reasons of so many queries
Ask = Callable[[Judge, Sequence[tuple[Query, Document]]], Iterator[tuple[int, Judgment]]]
"""Judges pairs: yields every one's index and judgment, in any order."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JudgedInWaves:
    """What came of one query. `judgments` are by doc_id: that with a reason where one was asked for, else the direct
    one. `num_tokens` were written for it, direct answers included; `is_cut_short` tells that the budget ended it before
    its first places were settled."""

    judgments: Mapping[str, Judgment]
    num_explained: int
    num_waves: int
    num_tokens: int
    is_cut_short: bool


@dataclass(slots=True)
class AutoCounts:
    """What mode `auto` did for a whole job, whether now or in an earlier run: numbers of documents that got a reason,
    of queries that the budget cut short, of waves that a query took at most, and of tokens, in all and for one query
    at most."""

    num_explained: int = 0
    num_cut_short: int = 0
    most_waves: int = 0
    num_tokens: int = 0
    most_tokens_per_query: int = 0

    def add(self, judged: JudgedInWaves) -> None:
        """Count one query."""
        self.num_explained += judged.num_explained
        self.num_cut_short += judged.is_cut_short
        self.most_waves = max(self.most_waves, judged.num_waves)
        self.num_tokens += judged.num_tokens
        self.most_tokens_per_query = max(self.most_tokens_per_query, judged.num_tokens)

    def to_counts(self) -> dict[str, int]:
        """Plain numbers for a manifest."""
        return {name: int(getattr(self, name)) for name in self.__slots__}


def judge_in_waves(
    jobs: Sequence[tuple[Query, Sequence[Document]]], judge: Judge, auto: Auto, ask: Ask
) -> Iterator[tuple[int, JudgedInWaves]]:
    """Yield `(number of the job, what came of it)` as soon as its first places are settled or its budget is spent.

    Args:
        jobs: queries with their documents in first-stage order, no document twice for a query.
        judge: asks for reasons; the same in mode `direct` gives the direct scores.
        auto: the settings.
        ask: judges pairs, with `judge` or with its direct twin.
    """
    found: list[dict[str, Judgment]] = [{} for _ in jobs]
    pairs = [(number, query, document) for number, (query, documents) in enumerate(jobs) for document in documents]
    for index, judgment in ask(replace(judge, mode="direct"), [pair[1:] for pair in pairs]):
        found[pairs[index][0]][judgment.doc_id] = judgment
    limit = _most_tokens_per_reason(judge)
    settling: dict[int, tuple[Waves, Iterator[list[int]]]] = {}
    for number, (_, documents) in enumerate(jobs):
        direct = [found[number][document.doc_id] for document in documents]
        num_tokens = sum(judgment.num_completion_tokens for judgment in direct)
        scores = [judgment.score for judgment in direct]
        waves = Waves(scores, auto, tokens_per_reason=limit, num_tokens=num_tokens)
        settling[number] = (waves, iter(waves))
    while settling:
        asked: list[tuple[int, int]] = []  # of each pair, its job and its place there
        for number, (waves, coming) in list(settling.items()):
            wave = next(coming, None)
            if wave is None:
                del settling[number]
                yield number, _outcome(found[number], waves)
            else:
                asked += [(number, place) for place in wave]
        for index, judgment in ask(judge, [(jobs[n][0], jobs[n][1][place]) for n, place in asked]) if asked else ():
            number, place = asked[index]
            found[number][judgment.doc_id] = judgment
            settling[number][0].add(place, judgment.score, judgment.num_completion_tokens)


def _most_tokens_per_reason(judge: Judge) -> int:
    return (judge.sampling or Sampling(max_tokens=judge.template.limits.max_explanation_tokens)).max_tokens


def _outcome(judgments: Mapping[str, Judgment], waves: Waves) -> JudgedInWaves:
    return JudgedInWaves(judgments, waves.num_explained, waves.num_waves, waves.num_tokens, waves.is_cut_short)


def in_chunks(items: Iterable[T], size: int = NUM_QUERIES_TOGETHER) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter; read only when asked for."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk
