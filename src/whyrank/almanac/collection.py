"""Builds the almanac's collections: queries, their candidates, labels and gold explanations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import ClassVar

from pydantic import ConfigDict

from whyrank.almanac.grammar import (
    DocumentFacts,
    QueryFacts,
    document_text,
    draw_document,
    draw_query,
    pick,
    query_text,
    reason,
    shuffled,
)
from whyrank.almanac.loading import load_knowledge
from whyrank.almanac.reasoning import Reasoning
from whyrank.almanac.schema import Domain, Knowledge, Mechanism, Setting
from whyrank.almanac.splits import DrawnSplit, Split, combinations_of, drawn, split_of_text
from whyrank.errors import InputError
from whyrank.records import Document, Qrel, Query
from whyrank.store import atomic_path, content_key, write_jsonl

__all__ = ["NUM_CANDIDATES", "Collection", "GoldExplanation", "build", "document_of"]

NUM_RIGHT = 2  # label 2: right mechanism, right setting
NUM_OTHER_SETTING = 3  # label 1: right mechanism, another setting
NUM_NEAR = 7  # label 0: right setting, a mechanism that shares one of the two observations
NUM_SAME_DOMAIN = 8  # label 0: another mechanism of the domain
NUM_OTHER_DOMAIN = 4  # label 0: anything from another domain, or more of the same domain if there is no other
NUM_CANDIDATES = NUM_RIGHT + NUM_OTHER_SETTING + NUM_NEAR + NUM_SAME_DOMAIN + NUM_OTHER_DOMAIN
SHARE_ELSEWHERE = NUM_OTHER_DOMAIN / (NUM_NEAR + NUM_SAME_DOMAIN + NUM_OTHER_DOMAIN)
MAX_DRAWS = 10_000  # a text is drawn again until it is new and of the right split; more means too little knowledge


@dataclass(frozen=True, slots=True)
class GoldExplanation:
    """One line of `explanations.jsonl`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query_id: str
    doc_id: str
    label: int
    explanation: str
    is_held_out_phrasing: bool


@dataclass(frozen=True)  # no slots: labels and explanations are cached
class Collection:
    """A split of the almanac. Dicts keyed by (query_id, doc_id) hold every candidate pair, in candidate order.

    `candidates` are in random order. `held_out` names the queries whose phrasings, like their candidates'
    statements, occur in no training text; in the handwritten split these are all.
    """

    split: Split
    queries: tuple[Query, ...]
    documents: tuple[Document, ...]
    candidates: dict[str, tuple[str, ...]]
    reasons: dict[tuple[str, str], Reasoning]
    query_facts: dict[str, QueryFacts]
    document_facts: dict[str, DocumentFacts]
    held_out: frozenset[str]

    @cached_property
    def labels(self) -> dict[tuple[str, str], int]:
        """2, 1 or 0 for every candidate pair."""
        return {pair: reasoning.label for pair, reasoning in self.reasons.items()}

    @cached_property
    def explanations(self) -> dict[tuple[str, str], str]:
        """The gold explanation of every candidate pair."""
        return {pair: reasoning.text for pair, reasoning in self.reasons.items()}

    @cached_property
    def qrels(self) -> tuple[Qrel, ...]:
        """A relevance judgment for every candidate pair, zeros included."""
        return tuple(Qrel(*pair, relevance=reasoning.label) for pair, reasoning in self.reasons.items())

    def repeats_query(self, query_id: str, doc_id: str) -> bool:
        """Whether the document quotes one of the query's phrases word for word (which is never evidence)."""
        return self.document_facts[doc_id].quoted in self.query_facts[query_id].phrases

    def gold(self) -> Iterator[GoldExplanation]:
        """Label and explanation of every candidate pair, as they are written to disk."""
        for (query_id, doc_id), reasoning in self.reasons.items():
            yield GoldExplanation(query_id, doc_id, reasoning.label, reasoning.text, query_id in self.held_out)

    def write(self, directory: Path | str) -> None:
        """Write `queries.jsonl`, `corpus.jsonl`, `qrels.trec`, `candidates.trec` (a run in candidate order) and
        `explanations.jsonl`, each atomically."""
        folder = Path(directory)
        write_jsonl(folder / "queries.jsonl", self.queries)
        write_jsonl(folder / "corpus.jsonl", self.documents)
        write_jsonl(folder / "explanations.jsonl", self.gold())
        _write_lines(folder / "qrels.trec", (f"{q.query_id} 0 {q.doc_id} {q.relevance}" for q in self.qrels))
        _write_lines(folder / "candidates.trec", self._run_lines())

    def _run_lines(self) -> Iterator[str]:
        for query_id, doc_ids in self.candidates.items():
            for rank, doc_id in enumerate(doc_ids, start=1):
                yield f"{query_id} Q0 {doc_id} {rank} {len(doc_ids) - rank + 1} almanac"


def document_of(text: str) -> Document:
    """A text of the almanac; its id is taken from the text, and so says nothing about it."""
    return Document(content_key(text)[:12], text, source="almanac", licence="Apache-2.0")


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def build(split: Split, num_queries: int, seed: int = 0, domains: Sequence[str] | None = None) -> Collection:
    """Draw a collection of `num_queries` queries with `NUM_CANDIDATES` candidates each.

    The same arguments give the same bytes on every platform, and a larger collection begins with the smaller one.
    Queries go round the mechanisms, so that each is asked about equally often. In `test`, every second query uses
    held-out phrasings, and all its candidates held-out statements.

    Args:
        split: `train`, `dev` or `test`; no combination, query or document text is in two of them. The handwritten
            split is read, not drawn: see `load_handwritten`.
        num_queries: at least 1.
        seed: chooses among the texts of the split.
        domains: names of the domains to use; all by default.

    Raises:
        InputError: another split, an unknown domain, a number below 1, or more queries than the knowledge can tell.
    """
    split = drawn(split)
    if num_queries < 1:
        raise InputError(f"expected num_queries of at least 1, found {num_queries}")
    builder = _Builder(split, seed, load_knowledge(domains))
    for index in range(num_queries):
        builder.add_query(index)
    return builder.collection()


class _Builder:
    """Collects queries and documents; a text that comes twice is one document."""

    def __init__(self, split: DrawnSplit, seed: int, knowledge: Knowledge) -> None:
        self.split = split
        self.seed = seed
        self.knowledge = knowledge
        causes = [(domain, mechanism) for domain in knowledge.domains for mechanism in domain.mechanisms]
        self.causes = shuffled(Random(f"{split}/{seed}/causes"), causes)
        self.queries: dict[str, Query] = {}  # by text
        self.documents: dict[str, Document] = {}  # by text
        self.candidates: dict[str, tuple[str, ...]] = {}
        self.reasons: dict[tuple[str, str], Reasoning] = {}
        self.query_facts: dict[str, QueryFacts] = {}
        self.document_facts: dict[str, DocumentFacts] = {}

    def add_query(self, index: int) -> None:
        rng = Random(f"{self.split}/{self.seed}/{index}")
        turn, place = divmod(index, len(self.causes))
        domain, mechanism = self.causes[place]
        is_held_out = self.split == "test" and (turn + place) % 2 == 1
        query, facts = self._draw_query(rng, f"{self.split}-{index:05d}", domain, mechanism, is_held_out)
        self.query_facts[query.query_id] = facts
        chosen: dict[str, str] = {}  # doc_id by text: a query has no candidate twice
        for target in self._targets(rng, facts, domain, mechanism):
            document = self._draw_document(rng, facts, target, chosen)
            chosen[document.text] = document.doc_id
        doc_ids = tuple(shuffled(rng, list(chosen.values())))
        self.candidates[query.query_id] = doc_ids
        for doc_id in doc_ids:
            gold = reason(facts, self.document_facts[doc_id], self.knowledge)
            self.reasons[query.query_id, doc_id] = gold

    def _draw_query(
        self, rng: Random, query_id: str, domain: Domain, mechanism: Mechanism, is_held_out: bool
    ) -> tuple[Query, QueryFacts]:
        for _ in range(MAX_DRAWS):
            pair, setting = pick(rng, combinations_of(self.split, domain, mechanism))
            facts = draw_query(rng, domain, mechanism, pair, setting, is_held_out_phrasing=is_held_out)
            text = query_text(rng, facts, domain, self.knowledge.common)
            if text not in self.queries:
                self.queries[text] = Query(query_id, text)
                return self.queries[text], facts
        raise InputError(
            f"{domain.name}.toml: {mechanism.id!r}: expected a new query within {MAX_DRAWS} draws; "
            "ask for fewer queries"
        )

    def _targets(
        self, rng: Random, query: QueryFacts, domain: Domain, mechanism: Mechanism
    ) -> Iterator[tuple[Domain, Mechanism, Setting]]:
        """Domain, mechanism and setting of every candidate, relevant ones first."""
        right = domain.setting(query.setting)
        others = [setting for setting in domain.settings if setting.id != right.id]
        near = shuffled(rng, [m for m in domain.mechanisms if len(set(query.observations) & set(m.observations)) == 1])
        wrong = [m for m in domain.mechanisms if m.id != mechanism.id]
        for _ in range(NUM_RIGHT):
            yield domain, mechanism, right
        for _ in range(NUM_OTHER_SETTING):
            yield domain, mechanism, pick(rng, others)
        for place in range(NUM_NEAR):
            yield domain, near[place % len(near)], right
        elsewhere = [entry for entry in self.knowledge.domains if entry.name != domain.name]
        num_far = NUM_OTHER_DOMAIN if elsewhere else 0
        for _ in range(NUM_SAME_DOMAIN + NUM_OTHER_DOMAIN - num_far):
            cause = pick(rng, wrong)
            yield domain, cause, pick(rng, others if cause in near else domain.settings)
        for _ in range(num_far):
            other = pick(rng, elsewhere)
            yield other, pick(rng, other.mechanisms), pick(rng, other.settings)

    def _draw_document(
        self, rng: Random, query: QueryFacts, target: tuple[Domain, Mechanism, Setting], chosen: dict[str, str]
    ) -> Document:
        domain, mechanism, setting = target
        share = SHARE_ELSEWHERE if len(self.knowledge.domains) > 1 else 0.0
        for _ in range(MAX_DRAWS):
            facts = draw_document(rng, self.knowledge, domain, mechanism, setting, query, share_elsewhere=share)
            text = document_text(rng, facts, domain, self.knowledge.common)
            if text not in chosen and split_of_text(text) == self.split:
                return self._keep(text, facts)
        raise InputError(
            f"{domain.name}.toml: {mechanism.id!r}: expected a new document within {MAX_DRAWS} draws; "
            "add statements or things"
        )

    def _keep(self, text: str, facts: DocumentFacts) -> Document:
        if text not in self.documents:
            document = document_of(text)
            self.documents[text] = document
            self.document_facts[document.doc_id] = facts
        return self.documents[text]

    def collection(self) -> Collection:
        """What was drawn so far."""
        held_out = (query_id for query_id, facts in self.query_facts.items() if facts.is_held_out_phrasing)
        return Collection(
            split=self.split,
            queries=tuple(self.queries.values()),
            documents=tuple(self.documents.values()),
            candidates=self.candidates,
            reasons=self.reasons,
            query_facts=self.query_facts,
            document_facts=self.document_facts,
            held_out=frozenset(held_out),
        )
