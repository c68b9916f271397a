"""Writes queries and documents from the almanac's knowledge.

Pure functions of their arguments and a `random.Random`, of which only `random()` is used: its sequence is the only
one that Python guarantees across versions and platforms, so the texts are the same bytes everywhere.

Repetition. A document may quote a lay phrase, and whether it does, and which, must not give its label away:

- with probability `REPEAT_PROBABILITY` it is one of the query's two phrases, whatever the label, so that word
  overlap says nothing about the label;
- with probability `QUOTE_PROBABILITY` it is another phrase, drawn so that a quote fits the document's own mechanism in
  half of all cases, whatever the label: a reader of the document alone learns nothing from whether they fit;
- otherwise the document ends in a sentence without a quote.

A query's own phrase always fits a relevant document's mechanism, so the other phrases must fit relevant documents a
little less often than others. That trace is the smaller the rarer repetition is, which is why it is rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from whyrank.almanac.reasoning import Reasoning
from whyrank.almanac.schema import Common, Domain, Knowledge, Mechanism, Setting

__all__ = [
    "REPEAT_PROBABILITY",
    "DocumentFacts",
    "QueryFacts",
    "document_text",
    "draw_document",
    "draw_query",
    "pick",
    "query_text",
    "reason",
    "shuffled",
]

T = TypeVar("T")
REPEAT_PROBABILITY, QUOTE_PROBABILITY = 0.15, 0.65
SHARE_IN_ONE_BREATH = 0.2  # of queries whose place and trouble are one sentence
SHARES_OF_MORE = (0.5, 0.2, 0.05)  # of documents with at least one, two, three sentences more than the two


@dataclass(frozen=True, slots=True)
class QueryFacts:
    """What a query says: ids of the knowledge, and the words it takes from there. `observations` are in the text's
    order. A query that a person wrote takes no words: `phrases` and `thing` are empty."""

    domain: str
    mechanism: str
    setting: str
    observations: tuple[str, str]
    phrases: tuple[str, ...]
    thing: str
    is_held_out_phrasing: bool


@dataclass(frozen=True, slots=True)
class DocumentFacts:
    """What a document says. `quoted` is the lay phrase it quotes, and `None` if it quotes none; a quote is not
    evidence. Ids are those of the document's own `domain`; the quote may come from another. A document that a person
    wrote takes no words from the knowledge: `statement` and `thing` are empty, and nothing is quoted."""

    domain: str
    mechanism: str
    setting: str
    statement: str
    thing: str
    quoted: str | None


def pick(rng: Random, items: Sequence[T]) -> T:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


# ---- queries -------------------------------------------------------------------------------------------------


def draw_query(
    rng: Random,
    domain: Domain,
    mechanism: Mechanism,
    pair: tuple[str, str],
    setting: Setting,
    *,
    is_held_out_phrasing: bool,
) -> QueryFacts:
    """The facts of a query: the two observations in random order, a phrasing for each, and a thing."""
    first, second = shuffled(rng, pair)
    phrases = [pick(rng, domain.observation(entry).shown(is_held_out_phrasing)) for entry in (first, second)]
    return QueryFacts(
        domain=domain.name,
        mechanism=mechanism.id,
        setting=setting.id,
        observations=(first, second),
        phrases=tuple(phrases),
        thing=pick(rng, setting.things),
        is_held_out_phrasing=is_held_out_phrasing,
    )


def query_text(rng: Random, facts: QueryFacts, domain: Domain, common: Common) -> str:
    """A forum post of one to four sentences: place and trouble in either order or in one breath; an opening before
    them and a detail that does not matter after them come in half of the posts each."""
    place = pick(rng, domain.query_frames).format(thing=facts.thing)
    trouble = pick(rng, common.connections).format(first=facts.phrases[0], second=facts.phrases[1])
    order = rng.random()
    if order < SHARE_IN_ONE_BREATH:
        body = [f"{trouble.removesuffix('.')}, and {_continued(place)}"]
    else:
        body = [place, trouble] if order < (1 + SHARE_IN_ONE_BREATH) / 2 else [trouble, place]
    if rng.random() < 0.5:
        body = [pick(rng, common.openings), *body]
    if rng.random() < 0.5:
        body = [*body, pick(rng, common.details)]
    return " ".join(_begun(sentence) for sentence in body)


def _begun(sentence: str) -> str:
    """With a capital letter, whatever it begins with."""
    return sentence[0].upper() + sentence[1:]


def _continued(sentence: str) -> str:
    """Fit to stand after `and`."""
    return sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]


# ---- documents -----------------------------------------------------------------------------------------------


def draw_document(
    rng: Random,
    knowledge: Knowledge,
    domain: Domain,
    mechanism: Mechanism,
    setting: Setting,
    query: QueryFacts,
    *,
    share_elsewhere: float,
) -> DocumentFacts:
    """The facts of a candidate for `query`; its thing is never the query's own.

    Args:
        rng: the source of chance.
        knowledge: the domains that quotes may come from.
        domain: the document's domain; `mechanism` and `setting` are of this domain.
        mechanism: what the document explains.
        setting: what it is written for.
        query: the query it is a candidate for.
        share_elsewhere: the share of other domains among this query's candidates of label 0, in [0, 1].
    """
    is_held_out = query.is_held_out_phrasing
    statement = pick(rng, mechanism.shown(is_held_out))
    thing = pick(rng, [thing for thing in setting.things if thing != query.thing])
    chance = rng.random()
    quoted = None
    if chance < REPEAT_PROBABILITY:
        quoted = pick(rng, query.phrases)
    elif chance < REPEAT_PROBABILITY + QUOTE_PROBABILITY:
        quoted = _other_phrase(rng, knowledge, domain, mechanism, query, share_elsewhere)
    return DocumentFacts(domain.name, mechanism.id, setting.id, statement, thing, quoted)


def _other_phrase(
    rng: Random,
    knowledge: Knowledge,
    domain: Domain,
    mechanism: Mechanism,
    query: QueryFacts,
    share_elsewhere: float,
) -> str:
    """A phrase that is not the query's.

    The query's own phrase fits this mechanism with probability `num_fitting / 2`; the other phrase fits so often that
    all quotes together do in half of the cases. Candidates of other domains quote the query's phrase from elsewhere;
    relevant ones quote a phrase from elsewhere as often.
    """
    num_fitting = sum(entry in mechanism.observations for entry in query.observations if domain.name == query.domain)
    odds = REPEAT_PROBABILITY / QUOTE_PROBABILITY
    if rng.random() < (1 + odds * (1 - num_fitting)) / 2:
        choice = [entry for entry in domain.observations if entry.id in mechanism.observations]
    elif num_fitting == 2 and rng.random() < share_elsewhere * odds * 2 / (1 + odds):
        other = pick(rng, [entry for entry in knowledge.domains if entry.name != domain.name])
        choice = list(other.observations)
    else:
        choice = [entry for entry in domain.observations if entry.id not in mechanism.observations]
    asked = query.observations if domain.name == query.domain else ()
    return pick(rng, pick(rng, [o for o in choice if o.id not in asked]).shown(query.is_held_out_phrasing))


def document_text(rng: Random, facts: DocumentFacts, domain: Domain, common: Common) -> str:
    """An entry of a handbook, of two to five sentences: for whom and the statement, a quote or a closing sentence, and
    up to three more sentences around them that say nothing; how many does not depend on the facts."""
    place = pick(rng, domain.document_frames).format(thing=facts.thing)
    fillers = shuffled(rng, common.closers)
    chance = rng.random()
    num_more = sum(chance < share for share in SHARES_OF_MORE)
    ending = fillers.pop() if facts.quoted is None else pick(rng, common.quotes).format(phrase=facts.quoted)
    before = [fillers.pop() for _ in range(num_more) if rng.random() < 0.5]
    after = [fillers.pop() for _ in range(num_more - len(before))]
    return " ".join([*before, f"{place} {facts.statement}.", ending, *after])


def reason(query: QueryFacts, document: DocumentFacts, knowledge: Knowledge) -> Reasoning:
    """The gold chain of reasons for a pair."""
    asked, written = knowledge.domain(query.domain), knowledge.domain(document.domain)
    return Reasoning(
        first=asked.observation(query.observations[0]).summary,
        second=asked.observation(query.observations[1]).summary,
        query_cause=asked.mechanism(query.mechanism).name,
        document_cause=written.mechanism(document.mechanism).name,
        query_setting=asked.setting(query.setting).name,
        document_setting=written.setting(document.setting).name,
    )
