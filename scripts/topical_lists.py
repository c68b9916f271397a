"""Candidate lists of the almanac that are mostly off the query's subject, as a first stage's often are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from whyrank.almanac import Collection
from whyrank.almanac.gold import gold_judgments
from whyrank.records import Judgment
from whyrank.template import Template

__all__ = ["mixed_judgments", "with_strangers"]


def with_strangers(collection: Collection, num_strangers: int, *, seed: int = 0) -> Collection:
    """The same queries, each with `num_strangers` more candidates: documents of other domains, label 0, drawn at random
    and shuffled in among its own 24."""
    rng = Random(seed)
    domain_of = {doc_id: facts.domain for doc_id, facts in collection.document_facts.items()}
    about = {doc_id: reasoning for (_, doc_id), reasoning in collection.reasons.items()}
    candidates, reasons = {}, dict(collection.reasons)
    for query in collection.queries:
        own = collection.candidates[query.query_id]
        domain = collection.query_facts[query.query_id].domain
        foreign = [doc_id for doc_id in about if domain_of[doc_id] != domain and doc_id not in own]
        strangers = rng.sample(foreign, num_strangers)
        asked = reasons[query.query_id, own[0]]
        for doc_id in strangers:
            told = about[doc_id]
            reasons[query.query_id, doc_id] = replace(
                asked, document_cause=told.document_cause, document_setting=told.document_setting
            )
        mixed = [*own, *strangers]
        rng.shuffle(mixed)
        candidates[query.query_id] = tuple(mixed)
    return replace(collection, candidates=candidates, reasons=reasons)


def mixed_judgments(
    own: Collection, mixed: Collection, template: Template, *, num_irrelevant: int, num_strangers: int
) -> Iterator[Judgment]:
    """What a student is taught: gold judgments of a query's own candidates, and of some strangers."""
    yield from gold_judgments(own, template, num_irrelevant=num_irrelevant)
    seen: dict[str, int] = {}
    for judgment in gold_judgments(mixed, template):
        if (judgment.query_id, judgment.doc_id) in own.reasons:
            continue
        seen[judgment.query_id] = seen.get(judgment.query_id, 0) + 1
        if seen[judgment.query_id] <= num_strangers:
            yield judgment
