"""The almanac's own labels and explanations, as judgments that a student can learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from whyrank.almanac.collection import Collection
from whyrank.almanac.loading import load_knowledge
from whyrank.records import Judgment, SearchQueries
from whyrank.search_queries import PROMPT_VERSION, normalised
from whyrank.store import content_key
from whyrank.template import Template

__all__ = ["GOLD_NAME", "gold_judgments", "gold_search_queries", "with_shuffled_explanations"]

GOLD_NAME = "almanac-gold"


def gold_judgments(
    collection: Collection, template: Template, *, num_irrelevant: int | None = None, seed: int = 0
) -> Iterator[Judgment]:
    """One certain judgment per candidate pair, in candidate order.

    Args:
        collection: a split of the almanac.
        template: its scale must hold the labels 0, 1 and 2.
        num_irrelevant: keep only so many label-0 documents of each query, drawn at random; 19 of 24 candidates are
            irrelevant, and a student that sees them all learns to say 0.
        seed: fixes that draw.
    """
    rng = Random(seed)
    documents = {document.doc_id: document for document in collection.documents}
    scale = template.scale
    for query in collection.queries:
        candidates = collection.candidates[query.query_id]
        irrelevant = [doc_id for doc_id in candidates if collection.labels[query.query_id, doc_id] == 0]
        kept = set(
            irrelevant if num_irrelevant is None else rng.sample(irrelevant, min(num_irrelevant, len(irrelevant)))
        )
        for doc_id in candidates:
            relevance = collection.labels[query.query_id, doc_id]
            if relevance == 0 and doc_id not in kept:
                continue
            label = scale.label_of(float(relevance))
            text = documents[doc_id].full_text
            yield Judgment(
                key=content_key(template.version, GOLD_NAME, json.dumps("explain"), query.text, text),
                query_id=query.query_id,
                doc_id=doc_id,
                status="ok",
                mode="explain",
                label=label,
                score=float(relevance),
                probs=tuple(float(other == label) for other in scale.labels),
                label_mass=1.0,
                explanation=collection.explanations[query.query_id, doc_id],
                passage=(0, len(text)),
                is_document_cut=False,
                is_query_cut=False,
                num_prompt_tokens=0,
                num_completion_tokens=0,
                template=template.version,
                model=GOLD_NAME,
            )


def gold_search_queries(collection: Collection) -> Iterator[SearchQueries]:
    """What a person who knows would search for: a summary of each observation, the cause by its name, what
    handbooks say of it (in the phrasings that are not held out), and the things of the query's setting."""
    knowledge = load_knowledge()
    for query in collection.queries:
        facts = collection.query_facts[query.query_id]
        domain = knowledge.domain(facts.domain)
        mechanism = domain.mechanism(facts.mechanism)
        things = ", ".join(domain.setting(facts.setting).things)
        seen = [domain.observation(entry).summary for entry in facts.observations]
        yield SearchQueries(
            key=content_key(PROMPT_VERSION, GOLD_NAME, query.text),
            query_id=query.query_id,
            status="ok",
            queries=normalised([*seen, mechanism.name, *mechanism.shown(False), things]),
            is_query_cut=False,
            num_prompt_tokens=0,
            num_completion_tokens=0,
            prompt=PROMPT_VERSION,
            model=GOLD_NAME,
        )


def with_shuffled_explanations(judgments: Sequence[Judgment], *, seed: int = 0) -> Iterator[Judgment]:
    """The same pairs and labels, every explanation given to a pair drawn at random: the control that has as many
    tokens to write, and no reasons in them."""
    order = list(range(len(judgments)))
    Random(seed).shuffle(order)
    # Each takes from the next in a random circle, so that none keeps its own.
    giver = dict(zip(order, order[1:] + order[:1], strict=True))
    for number, judgment in enumerate(judgments):
        explanation = judgments[giver[number]].explanation
        yield replace(judgment, explanation=explanation, model=f"{judgment.model}-shuffled")
