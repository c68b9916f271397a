"""A teacher of the almanac that errs: always in the same way, and with a wrong reason for every wrong label.

Mistakes that are independent from pair to pair average out in a student; a real teacher's do not. So it is
decided once, by the seed, what this teacher is wrong about, and a pair's facts alone say whether that applies:

- `overlap`: certain observations, quoted from the query, convince it that the document is about the query's cause;
- `unquoted`: it does not recognise certain causes in a document that quotes nothing of the query;
- `confusion`: it reads certain mechanisms in documents as a sister, which shares an observation with them;
- `setting`: it reads certain settings in documents as another one of the domain.

It first reads the document (`confusion`, `setting`) and is then swayed by what is repeated (`overlap`, `unquoted`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from whyrank.almanac.collection import Collection
from whyrank.almanac.gold import gold_judgments
from whyrank.almanac.grammar import DocumentFacts, QueryFacts, reason
from whyrank.almanac.loading import load_knowledge
from whyrank.almanac.reasoning import Reasoning
from whyrank.almanac.schema import Domain, Knowledge, Mechanism, Setting
from whyrank.errors import InputError
from whyrank.records import Judgment
from whyrank.store import content_key
from whyrank.template import Template

__all__ = ["Belief", "Mistake", "Teacher", "TeacherConfig", "teacher_judgments"]

Mistake = Literal["overlap", "unquoted", "confusion", "setting"]


@dataclass(frozen=True, slots=True)
class TeacherConfig:
    """What the teacher is wrong about. Rates are expected shares of the knowledge's entries, not of pairs; 0 switches
    a mistake off, and a higher rate keeps what a lower one was wrong about. The defaults label about four of five
    training pairs as gold does.

    Raises:
        InputError: a rate lies outside [0, 1].
    """

    overlap: float = 0.9
    """Share of the observations whose quotation convinces, from 0 to 1."""

    unquoted: float = 0.2
    """Share of the mechanisms that go unrecognised where nothing is quoted, from 0 to 1."""

    confusion: float = 0.1
    """Share of the mechanisms that are read as their sister, from 0 to 1."""

    setting: float = 0.1
    """Share of the settings that are read as another one, from 0 to 1."""

    seed: int = 0
    """Chooses which observations, mechanisms and settings these are."""

    def __post_init__(self) -> None:
        for name in ("overlap", "unquoted", "confusion", "setting"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a rate from 0 to 1, found {getattr(self, name)!r}")

    @property
    def model_name(self) -> str:
        """What its judgments call it: another configuration has another name."""
        return f"almanac-teacher@{content_key(json.dumps(asdict(self), sort_keys=True))[:8]}"


@dataclass(frozen=True, slots=True)
class Belief:
    """What the teacher thinks of a pair, and the mistakes that led there. A mistake may leave the label right: one
    may undo another, and a document that is wrong anyway may be mistaken for another wrong one."""

    reasoning: Reasoning
    mistakes: tuple[Mistake, ...]


class Teacher:
    """Judges pairs by their facts; holds no state, so that neither order nor company of a pair matters.

    Args:
        config: what it is wrong about.
        knowledge: at least the domains of the pairs that it will be asked about.
    """

    def __init__(self, config: TeacherConfig, knowledge: Knowledge) -> None:
        self.config = config
        self.knowledge = knowledge

    def believe(self, query: QueryFacts, document: DocumentFacts) -> Belief:
        """What the teacher thinks of a document as an answer to a query.

        Raises:
            KeyError: the knowledge lacks one of the two domains.
        """
        belief = reason(query, document, self.knowledge)
        asked, written = self.knowledge.domain(query.domain), self.knowledge.domain(document.domain)
        mistakes: list[Mistake] = []
        if self._errs("confusion", written, document.mechanism):
            sister = self._sister(written, written.mechanism(document.mechanism))
            belief = replace(belief, document_cause=sister.name)
            mistakes.append("confusion")
        if self._errs("setting", written, document.setting):
            belief = replace(belief, document_setting=self._other_setting(written, document.setting).name)
            mistakes.append("setting")
        repeated = _repeated(query, document)
        if repeated is not None and not belief.is_same_cause and self._errs("overlap", asked, repeated):
            belief = replace(belief, document_cause=belief.query_cause)
            mistakes.append("overlap")
        if repeated is None and belief.is_same_cause and self._errs("unquoted", asked, query.mechanism):
            sister = self._sister(asked, asked.mechanism(query.mechanism))
            belief = replace(belief, document_cause=sister.name)
            mistakes.append("unquoted")
        return Belief(belief, tuple(mistakes))

    def _errs(self, mistake: Mistake, domain: Domain, entry_id: str) -> bool:
        rate: float = getattr(self.config, mistake)
        return self._chance(mistake, domain, entry_id) < rate

    def _sister(self, domain: Domain, mechanism: Mechanism) -> Mechanism:
        """One of the mechanisms that share an observation with this one, always the same."""
        seen = set(mechanism.observations)
        near = [other for other in domain.mechanisms if other.id != mechanism.id and seen & set(other.observations)]
        return min(near, key=lambda other: self._chance("sister", domain, mechanism.id, other.id))

    def _other_setting(self, domain: Domain, setting_id: str) -> Setting:
        others = [other for other in domain.settings if other.id != setting_id]
        return min(others, key=lambda other: self._chance("other", domain, setting_id, other.id))

    def _chance(self, what: str, domain: Domain, *ids: str) -> float:
        """A number in [0, 1) that depends on seed, domain and ids alone."""
        return int(content_key(str(self.config.seed), what, domain.name, *ids)[:8], 16) / 16**8


def _repeated(query: QueryFacts, document: DocumentFacts) -> str | None:
    """The query's observation that the document quotes in the query's words."""
    for observation, phrase in zip(query.observations, query.phrases, strict=False):  # handwritten: no phrases
        if phrase == document.quoted:
            return observation
    return None


def teacher_judgments(
    collection: Collection,
    template: Template,
    config: TeacherConfig,
    *,
    num_irrelevant: int | None = None,
    seed: int = 0,
) -> Iterator[Judgment]:
    """The teacher's judgments of the pairs that `gold_judgments` gives for the same arguments, in the same order.

    Args:
        collection: a split of the almanac.
        template: its scale must hold the labels 0, 1 and 2.
        config: what the teacher is wrong about.
        num_irrelevant: keep only so many documents of each query whose *gold* label is 0.
        seed: fixes that draw, and nothing about the mistakes.
    """
    domains = {facts.domain for facts in collection.query_facts.values()}
    domains |= {facts.domain for facts in collection.document_facts.values()}
    teacher = Teacher(config, load_knowledge(sorted(domains)))
    queries = {query.query_id: query.text for query in collection.queries}
    documents = {document.doc_id: document.full_text for document in collection.documents}
    scale = template.scale
    for gold in gold_judgments(collection, template, num_irrelevant=num_irrelevant, seed=seed):
        texts = queries[gold.query_id], documents[gold.doc_id]
        belief = teacher.believe(collection.query_facts[gold.query_id], collection.document_facts[gold.doc_id])
        label = scale.label_of(float(belief.reasoning.label))
        yield replace(
            gold,
            key=content_key(template.version, config.model_name, json.dumps("explain"), *texts),
            label=label,
            score=float(belief.reasoning.label),
            probs=tuple(float(other == label) for other in scale.labels),
            explanation=belief.reasoning.text,
            model=config.model_name,
        )
