"""From pairs to judgments: the one loop under labelling, reranking and serving.

A pair is rendered, generated and read; what could not be read stays visible as `unparsed` or `error` and never
becomes a number. One pair may take several requests, for samples and for passages, whose answers are combined.
`judge_into` keeps the judgments in a growing file and picks up where it was killed.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

from whyrank.combining import LEAST_LABEL_MASS, best_passage, mean_of_samples, sample_seed
from whyrank.errors import GenerationError, InputError
from whyrank.generators import Completion, Generator, Request, Sampling
from whyrank.ledger import Ledger
from whyrank.passages import Passages, choose, windows
from whyrank.records import JUDGED_STATUSES, Document, Judgment, Mode, Query, Status
from whyrank.store import JsonlAppender, content_key
from whyrank.template import Rendered, Template, cut_end

__all__ = ["Judge", "JudgingCounts", "check_samples", "judge_into", "judging_into"]

log = logging.getLogger("whyrank")
OF_COMBINED = ("num_answers", "num_unread_answers", "num_by_passages", "num_passages", "num_failed")
MOST_UNPARSED = 0.01  # share of unreadable judgments up to which a job counts as done


def check_samples(num_samples: int, temperature: float) -> None:
    """Find out before a model is loaded whether its judgments can be drawn so.

    Raises:
        InputError: a value is out of its range, or several samples would all be the same.
    """
    if num_samples < 1:
        raise InputError(f"expected num_samples of at least 1, found {num_samples}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"expected a temperature of at least 0, found {temperature}")
    if num_samples > 1 and temperature == 0:
        raise InputError(
            f"{num_samples} samples drawn at temperature 0 would all be the same: give a temperature above 0, such as "
            "0.7"
        )


@dataclass(frozen=True, slots=True)
class Judge:
    """A template and a generator that judge pairs in one mode.

    `sampling` defaults to greedy with the template's explanation cap; `instruction` replaces the template's task. With
    `num_samples` above 1 a judgment is the mean of so many drawn ones (`combining.mean_of_samples`); with `passages`
    a document over the template's cap is judged by passages instead of being cut (`combining.best_passage`).

    Raises:
        InputError: an unknown mode, or a `num_samples` that is not positive or goes without a temperature.
    """

    template: Template
    generator: Generator
    mode: Mode = "explain"
    sampling: Sampling | None = None
    instruction: str | None = None
    num_samples: int = 1
    passages: Passages | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"expected mode among {', '.join(get_args(Mode))}, found {self.mode!r}")
        check_samples(self.num_samples, self.sampling.temperature if self.sampling else 0.0)

    def key(self, query: Query, document: Document) -> str:
        """Content address of a judgment: everything that can change it, and nothing else."""
        drawn = self.sampling or Sampling(max_tokens=self.template.limits.max_explanation_tokens)
        how: list[Any] = [self.mode, asdict(drawn), self.instruction]
        if self.num_samples > 1:
            how.append({"num_samples": self.num_samples})
        if self.passages and self._is_long(document):
            how.append({"passages": asdict(self.passages)})
        made = json.dumps(how, sort_keys=True)
        return content_key(self.template.version, self.generator.name, made, query.text, document.full_text)

    def _is_long(self, document: Document) -> bool:
        text = document.full_text
        return cut_end(text, self.template.limits.max_document_tokens, self.generator.tokens) < len(text)

    def judge(self, pairs: Iterable[tuple[Query, Document]]) -> Iterator[tuple[int, Judgment]]:
        """Yield `(index of the pair, judgment)` as soon as each is ready, in any order. `pairs` is read as a stream.

        At the end, a warning says how many queries were longer than the template's limit and had to be cut.

        Raises:
            GenerationError: the generator ended without answering every request.
        """
        under_way: dict[int, tuple[_Asked, int, int]] = {}  # by request: the pair, the passage and the sample

        def requests() -> Iterator[Request]:
            number = 0
            for index, (query, document) in enumerate(pairs):
                asked = self._ask(index, query, document)
                # Samples of a passage side by side: some backends read what they have in common once.
                for passage, sample in product(range(len(asked.passages)), range(self.num_samples)):
                    under_way[number] = (asked, passage, sample)
                    number += 1
                    yield _drawn(asked.passages[passage].request, sample)

        cut_queries: set[str] = set()
        for number, completion in self.generator.generate(requests()):
            asked, passage, sample = under_way.pop(number)
            if asked.passages[passage].is_query_cut:
                cut_queries.add(asked.query.query_id)
            asked.answers[passage, sample] = self._read(asked, asked.passages[passage], completion)
            if len(asked.answers) == len(asked.passages) * self.num_samples:
                yield asked.index, self._combine(asked)
        if cut_queries:
            log.warning(
                "%d queries were cut to max_query_tokens (%d) of template %s",
                len(cut_queries),
                self.template.limits.max_query_tokens,
                self.template.version,
            )
        if under_way:
            raise GenerationError(f"{self.generator.name} gave no completion for {len(under_way)} of its requests")

    def _ask(self, index: int, query: Query, document: Document) -> _Asked:
        text, tokens = document.full_text, self.generator.tokens
        spans = kept = [(0, len(text))]
        if self.passages:
            num_overlap = self.passages.num_overlap_sentences
            most = self.template.limits.max_document_tokens
            spans = windows(text, most, tokens, num_overlap_sentences=num_overlap)
            kept = choose(query.text, text, spans, self.passages.max_passages)
        rendered = [
            self.template.render(
                query.text,
                text[start:end],
                tokens,
                mode=self.mode,
                sampling=self.sampling,
                instruction=self.instruction,
            )
            for start, end in kept
        ]
        shown = tuple(
            replace(found, passage=(start, start + found.passage[1]))
            for (start, _), found in zip(kept, rendered, strict=True)
        )
        is_cut = len(kept) < len(spans) or any(found.is_document_cut for found in shown)
        return _Asked(index, query, document, self.key(query, document), shown, is_cut)

    def _combine(self, asked: _Asked) -> Judgment:
        answers, asked.answers = asked.answers, {}  # they go with this call, not with the next pair
        scale = self.template.scale
        passages = [
            mean_of_samples([answers[passage, sample] for sample in range(self.num_samples)], scale)
            for passage in range(len(asked.passages))
        ]
        return best_passage(passages, self.passages.num_best if self.passages else 1, scale)

    def _read(self, asked: _Asked, rendered: Rendered, completion: Completion) -> Judgment:
        if self.num_samples > 1 and self.mode == "direct" and completion.label_probs is not None:
            raise InputError(
                f"{self.generator.name} gives the whole label distribution at once in mode direct, and all "
                f"{self.num_samples} samples would be the same: leave num_samples out, or choose mode explain"
            )
        blank = Judgment(
            key=asked.key,
            query_id=asked.query.query_id,
            doc_id=asked.document.doc_id,
            status="error",
            mode=self.mode,
            label=None,
            score=None,
            probs=None,
            label_mass=None,
            explanation="",
            passage=rendered.passage,
            is_document_cut=asked.is_document_cut,
            is_query_cut=rendered.is_query_cut,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_completion_tokens=completion.num_completion_tokens,
            template=self.template.version,
            model=self.generator.name,
        )
        if completion.error is not None:
            return replace(blank, error=f"{type(completion.error).__name__}: {completion.error}")
        if completion.label_probs is not None:
            return self._read_distribution(blank, completion, completion.label_probs)
        return self._read_answer(blank, completion)

    def _read_distribution(self, blank: Judgment, completion: Completion, probs: tuple[float, ...]) -> Judgment:
        if not all(math.isfinite(p) and p >= 0 for p in probs):
            return replace(blank, error=f"GenerationError: the label probabilities are not numbers: {probs}")
        mass = math.fsum(probs)
        if mass == 0.0:
            return replace(blank, status="unparsed", unreadable=completion.text, label_mass=0.0)
        scale = self.template.scale
        normalised = tuple(p / mass for p in probs)
        cut_status: Status = "forced" if completion.finish_reason == "length" else "ok"
        return replace(
            blank,
            status="low_mass" if mass < LEAST_LABEL_MASS else cut_status,
            label=scale.labels[max(range(len(normalised)), key=normalised.__getitem__)],
            score=scale.expected(normalised),
            probs=normalised,
            label_mass=mass,
            explanation=self.template.read_explanation(completion.text),
        )

    def _read_answer(self, blank: Judgment, completion: Completion) -> Judgment:
        answer = self.template.parse(completion.text)
        if answer.label is None or completion.finish_reason != "stop":
            return replace(blank, status="unparsed", unreadable=completion.text)
        score = self.template.scale.value(answer.label)
        return replace(blank, status="ok", label=answer.label, score=score, explanation=answer.explanation)


@dataclass(slots=True)
class _Asked:
    """A pair on its way: what is shown of it, and the answers that have come, by passage and sample."""

    index: int
    query: Query
    document: Document
    key: str
    passages: tuple[Rendered, ...]
    is_document_cut: bool
    answers: dict[tuple[int, int], Judgment] = field(default_factory=dict)


def _drawn(request: Request, number: int) -> Request:
    """The request for one sample, counted from 0."""
    if number == 0:
        return request
    seed = sample_seed(request.sampling.seed, number)
    return replace(request, sampling=replace(request.sampling, seed=seed))


@dataclass(slots=True)
class JudgingCounts:
    """What a judging job did. `num_known` judgments were found on disk, `num_new` were made now.

    `num_answers` counts the requests behind the judgments; it and `num_unread_answers` differ from the numbers of
    judgments where samples or passages were combined. `num_failed` counts the judgments of which a request failed.
    """

    num_known: int = 0
    num_new: int = 0
    num_torn_bytes: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_queries_cut: int = 0
    num_documents_cut: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    num_answers: int = 0
    num_unread_answers: int = 0
    num_by_passages: int = 0
    num_passages: int = 0
    num_failed: int = 0

    @property
    def num_judgments(self) -> int:
        """All judgments that the finished file holds for the job."""
        return self.num_known + self.num_new

    @property
    def num_unreadable(self) -> int:
        """Judgments without a label."""
        return sum(count for status, count in self.statuses.items() if status not in JUDGED_STATUSES)

    @property
    def is_partial(self) -> bool:
        """Whether requests failed, or more than `MOST_UNPARSED` of the judgments or answers could not be read."""
        return (
            bool(self.num_failed)
            or self.num_unreadable > MOST_UNPARSED * self.num_judgments
            or self.num_unread_answers > MOST_UNPARSED * self.num_answers
        )

    def add(self, judgment: Judgment, *, is_new: bool) -> None:
        """Count one judgment; tokens only where they were spent now."""
        self.statuses[judgment.status] += 1
        self.num_queries_cut += judgment.is_query_cut
        self.num_documents_cut += judgment.is_document_cut
        self.num_answers += judgment.num_answers
        self.num_unread_answers += judgment.num_unread_answers
        self.num_failed += judgment.error is not None
        if judgment.num_passages > 1:
            self.num_by_passages += 1
            self.num_passages += judgment.num_passages
        if is_new:
            self.num_new += 1
            self.num_prompt_tokens += judgment.num_prompt_tokens
            self.num_completion_tokens += judgment.num_completion_tokens
        else:
            self.num_known += 1

    def to_counts(self) -> dict[str, int]:
        """Plain numbers for a manifest; those of combined answers only where there are any."""
        left_out = {"statuses", *(() if self.num_answers > self.num_judgments else OF_COMBINED)}
        plain = {name: int(getattr(self, name)) for name in self.__slots__ if name not in left_out}
        return {**plain, **{f"num_{status}": count for status, count in sorted(self.statuses.items())}}


def judge_into(
    path: Path, judge: Judge, pairs: Iterable[tuple[Query, Document]], counts: JudgingCounts
) -> Iterator[Judgment]:
    """Judge every pair that `path` does not hold yet, append each judgment as it comes, and yield all of them.

    Judgments already in the file come first. Those with failed requests are dropped and tried again; a pair whose texts
    have been judged under other ids by the time its turn comes is copied, not computed; a pair that comes twice is
    judged and yielded once. After a kill nothing is lost and nothing doubled. Judgments are read and written one by
    one: memory holds those that the generator is at work on, however many pairs there are.

    Raises:
        InputError: another process is writing the file, it holds something else than judgments, or it holds a
            judgment of one of the pairs that was made differently; a pair comes twice with different texts.
    """
    with judging_into(path, counts) as judge_missing:
        yield from judge_missing(judge, pairs)


@contextmanager
def judging_into(
    path: Path, counts: JudgingCounts
) -> Iterator[Callable[[Judge, Iterable[tuple[Query, Document]]], Iterator[Judgment]]]:
    """Open a growing file for several streams of pairs, one after the other, where a later one depends on what came of
    those before it. Gives a function of judge and pairs that does with each stream what `judge_into` does with its one.

    Raises:
        InputError: see `judge_into`.
    """
    with JsonlAppender(path, Judgment) as appender, closing(Ledger(appender)) as ledger:
        counts.num_torn_bytes += appender.num_torn_bytes
        yield partial(_judge_missing, ledger, counts)


def _judge_missing(
    ledger: Ledger, counts: JudgingCounts, judge: Judge, pairs: Iterable[tuple[Query, Document]]
) -> Iterator[Judgment]:
    reused: deque[tuple[str, str]] = deque()

    def missing() -> Iterator[tuple[Query, Document]]:
        for query, document in pairs:
            ids, key = (query.query_id, document.doc_id), judge.key(query, document)
            if not ledger.is_first(ids, key):
                continue
            if ledger.holds(ids, key) or ledger.copy(ids, key):
                reused.append(ids)
            else:
                yield query, document

    for _, judgment in judge.judge(missing()):
        yield from _drain(reused, ledger, counts)
        ledger.append(judgment)
        counts.add(judgment, is_new=True)
        yield judgment
    yield from _drain(reused, ledger, counts)


def _drain(reused: deque[tuple[str, str]], ledger: Ledger, counts: JudgingCounts) -> Iterator[Judgment]:
    while reused:
        judgment = ledger.read(reused.popleft())
        counts.add(judgment, is_new=False)
        yield judgment
