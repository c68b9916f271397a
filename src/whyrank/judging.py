"""From pairs to judgments: the one loop under labelling, reranking and serving.

A pair is rendered, generated and read; what could not be read stays visible as `unparsed` or `error` and never
becomes a number. `judge_into` keeps the judgments in a growing file and picks up where it was killed.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from whyrank.errors import GenerationError, InputError
from whyrank.generators import Completion, Generator, Sampling
from whyrank.records import JUDGED_STATUSES, Document, Judgment, Mode, Query, Status
from whyrank.store import JsonlAppender, content_key
from whyrank.template import Rendered, Template

__all__ = ["Judge", "JudgingCounts", "judge_into", "judging_into"]

log = logging.getLogger("whyrank")
MOST_UNPARSED = 0.01  # share of unreadable judgments up to which a job counts as done

LEAST_LABEL_MASS = 0.5  # below it the model was not answering the question; status `low_mass`


@dataclass(frozen=True, slots=True)
class Judge:
    """A template and a generator that judge pairs in one mode.

    `sampling` defaults to greedy with the template's explanation cap; `instruction` replaces the template's task.
    """

    template: Template
    generator: Generator
    mode: Mode = "explain"
    sampling: Sampling | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"expected mode among {', '.join(get_args(Mode))}, found {self.mode!r}")

    def key(self, query: Query, document: Document) -> str:
        """Content address of a judgment: everything that can change it, and nothing else."""
        drawn = self.sampling or Sampling(max_tokens=self.template.limits.max_explanation_tokens)
        how = json.dumps([self.mode, asdict(drawn), self.instruction], sort_keys=True)
        return content_key(self.template.version, self.generator.name, how, query.text, document.full_text)

    def judge(self, pairs: Iterable[tuple[Query, Document]]) -> Iterator[tuple[int, Judgment]]:
        """Yield `(index of the pair, judgment)` as soon as each is ready, in any order. `pairs` is read as a stream.

        At the end, a warning says how many queries were longer than the template's limit and had to be cut.

        Raises:
            GenerationError: the generator ended without answering every request.
        """
        under_way: dict[int, tuple[Query, Document, Rendered]] = {}

        def requests() -> Iterator[tuple[int, Rendered]]:
            for index, (query, document) in enumerate(pairs):
                rendered = self.template.render(
                    query.text,
                    document.full_text,
                    self.generator.tokens,
                    mode=self.mode,
                    sampling=self.sampling,
                    instruction=self.instruction,
                )
                under_way[index] = (query, document, rendered)
                yield index, rendered

        cut_queries: set[str] = set()
        for index, completion in self.generator.generate(rendered.request for _, rendered in requests()):
            query, document, rendered = under_way.pop(index)
            if rendered.is_query_cut:
                cut_queries.add(query.query_id)
            yield index, self._read(query, document, rendered, completion)
        if cut_queries:
            log.warning(
                "%d queries were cut to max_query_tokens (%d) of template %s",
                len(cut_queries),
                self.template.limits.max_query_tokens,
                self.template.version,
            )
        if under_way:
            raise GenerationError(f"{self.generator.name} gave no completion for {len(under_way)} of its requests")

    def _read(self, query: Query, document: Document, rendered: Rendered, completion: Completion) -> Judgment:
        blank = Judgment(
            key=self.key(query, document),
            query_id=query.query_id,
            doc_id=document.doc_id,
            status="error",
            mode=self.mode,
            label=None,
            score=None,
            probs=None,
            label_mass=None,
            explanation="",
            passage=rendered.passage,
            is_document_cut=rendered.is_document_cut,
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
class JudgingCounts:
    """What a judging job did. `num_known` judgments were found on disk, `num_new` were made now."""

    num_known: int = 0
    num_new: int = 0
    num_torn_bytes: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_queries_cut: int = 0
    num_documents_cut: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

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
        """Whether requests failed, or more than `MOST_UNPARSED` of the judgments could not be read."""
        return bool(self.statuses["error"]) or self.num_unreadable > MOST_UNPARSED * self.num_judgments

    def add(self, judgment: Judgment, *, is_new: bool) -> None:
        """Count one judgment; tokens only where they were spent now."""
        self.statuses[judgment.status] += 1
        self.num_queries_cut += judgment.is_query_cut
        self.num_documents_cut += judgment.is_document_cut
        if is_new:
            self.num_new += 1
            self.num_prompt_tokens += judgment.num_prompt_tokens
            self.num_completion_tokens += judgment.num_completion_tokens
        else:
            self.num_known += 1

    def to_counts(self) -> dict[str, int]:
        """Plain numbers for a manifest."""
        plain = {name: int(getattr(self, name)) for name in self.__slots__ if name != "statuses"}
        return {**plain, **{f"num_{status}": count for status, count in sorted(self.statuses.items())}}


def judge_into(
    path: Path, judge: Judge, pairs: Iterable[tuple[Query, Document]], counts: JudgingCounts
) -> Iterator[Judgment]:
    """Judge every pair that `path` does not hold yet, append each judgment as it comes, and yield all of them.

    Judgments already in the file come first. Failed ones (`error`) are dropped and tried again; a pair whose texts
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
    with JsonlAppender(path, Judgment) as appender, closing(_Ledger(appender)) as ledger:
        counts.num_torn_bytes += appender.num_torn_bytes
        yield partial(_judge_missing, ledger, counts)


def _judge_missing(
    ledger: _Ledger, counts: JudgingCounts, judge: Judge, pairs: Iterable[tuple[Query, Document]]
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


def _drain(reused: deque[tuple[str, str]], ledger: _Ledger, counts: JudgingCounts) -> Iterator[Judgment]:
    while reused:
        judgment = ledger.read(reused.popleft())
        counts.add(judgment, is_new=False)
        yield judgment


class _Ledger:
    """Which pairs have come, and where in the growing file the judgments lie.

    Kept in a temporary database of SQLite's, which grows on disk and goes with the process: a dictionary over a million
    pairs takes hundreds of megabytes.
    """

    def __init__(self, appender: JsonlAppender[Judgment]) -> None:
        self._appender = appender
        self._has_failed = False
        self._tables = sqlite3.connect("", isolation_level=None)
        self._tables.execute("PRAGMA journal_mode = OFF")
        self._tables.execute("CREATE TABLE came (ids TEXT PRIMARY KEY, key TEXT) WITHOUT ROWID")
        self._tables.execute("CREATE TABLE held (ids TEXT PRIMARY KEY, key TEXT, place INTEGER) WITHOUT ROWID")
        self._tables.execute("CREATE INDEX by_key ON held (key)")
        self._read_places()

    def close(self) -> None:
        """Give the temporary database back."""
        self._tables.close()

    def is_first(self, ids: tuple[str, str], key: str) -> bool:
        """Note that a pair has come; whether it had not before.

        Raises:
            InputError: it had, with other texts.
        """
        before = self._one("SELECT key FROM came WHERE ids = ?", content_key(*ids))
        if before is None:
            self._tables.execute("INSERT INTO came VALUES (?, ?)", (content_key(*ids), key))
        elif before != key:
            raise InputError(f"the pair {ids} comes twice, with different texts")
        return before is None

    def holds(self, ids: tuple[str, str], key: str) -> bool:
        """Whether the file holds a judgment of the pair.

        Raises:
            InputError: it holds one that was made differently.
        """
        found = self._one("SELECT key FROM held WHERE ids = ?", content_key(*ids))
        if found is not None and found != key:
            here = self.read(ids)
            raise InputError(
                f"{self._appender.path} holds a judgment of ({here.query_id}, {here.doc_id}) by {here.model} with "
                f"{here.template} in mode {here.mode}, made from another text, model, template, mode, sampling or "
                "instruction; choose another output folder"
            )
        return found is not None

    def copy(self, ids: tuple[str, str], key: str) -> bool:
        """Append the judgment of another pair with the same texts under these ids; whether there is one."""
        place = self._one("SELECT place FROM held WHERE key = ? ORDER BY place DESC LIMIT 1", key)
        if place is not None:
            query_id, doc_id = ids
            self.append(replace(self._appender.record_at(place), query_id=query_id, doc_id=doc_id))
        return place is not None

    def append(self, judgment: Judgment) -> None:
        """Append to the file; the first time, failed judgments are dropped from it."""
        if self._has_failed:  # only now: a job that is refused must leave the file as it is
            self._appender.rewrite(kept for kept in self._appender.existing() if kept.status != "error")
            self._read_places()
        self._add(judgment, self._appender.append(judgment))

    def read(self, ids: tuple[str, str]) -> Judgment:
        """The judgment of a pair, from the file."""
        return self._appender.record_at(self._one("SELECT place FROM held WHERE ids = ?", content_key(*ids)))

    def _read_places(self) -> None:
        self._has_failed = False
        self._tables.execute("DELETE FROM held")
        for place, judgment in self._appender.existing_places():
            if judgment.status == "error":
                self._has_failed = True
            else:
                self._add(judgment, place)

    def _add(self, judgment: Judgment, place: int) -> None:
        ids = content_key(judgment.query_id, judgment.doc_id)
        self._tables.execute("INSERT OR REPLACE INTO held VALUES (?, ?, ?)", (ids, judgment.key, place))

    def _one(self, question: str, value: str) -> Any:
        found = self._tables.execute(question, (value,)).fetchone()
        return None if found is None else found[0]
