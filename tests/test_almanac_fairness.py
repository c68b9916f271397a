"""The almanac cannot be gamed: not by word overlap, not by one side alone, not by length or position.

Chance levels are exact or worked out by hand; tolerances are several standard errors of the samples used here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from statistics import fmean

import bm25s  # type: ignore[import-untyped]
import numpy as np
import pytest

from whyrank.almanac import (
    NUM_CANDIDATES,
    QUOTE_PROBABILITY,
    REPEAT_PROBABILITY,
    Collection,
    Split,
    build,
    load_knowledge,
)
from whyrank.demo.shallow import Shallow, ShallowKind

DISCOUNTS = [1 / math.log2(rank + 1) for rank in range(1, 11)]
IDEAL = [2, 2, 1, 1, 1]
# Linearity of expectation: every rank holds a document of mean label (2·2 + 3·1) / 24.
RANDOM_NDCG = 7 / 24 * sum(DISCOUNTS) / sum(gain * discount for gain, discount in zip(IDEAL, DISCOUNTS, strict=False))


@pytest.fixture(scope="module", params=["train", "test"])
def collection(request: pytest.FixtureRequest) -> Collection:
    split: Split = request.param
    return build(split, 300, seed=11)


def ndcg_at_10(labels: Sequence[int]) -> float:
    found = sum(label * discount for label, discount in zip(labels, DISCOUNTS, strict=False))
    return found / sum(gain * discount for gain, discount in zip(IDEAL, DISCOUNTS, strict=False))


def tokens(texts: Iterable[str]) -> list[list[str]]:
    return [re.findall("[a-z]+", text.lower()) for text in texts]


def bm25_ndcg(collection: Collection, sign: int) -> float:
    """Mean nDCG@10 of the candidates in the order of sign × BM25 score; ties stay in candidate order."""
    retriever = bm25s.BM25()
    retriever.index(tokens(document.text for document in collection.documents), show_progress=False)
    row = {document.doc_id: index for index, document in enumerate(collection.documents)}
    values = []
    for query, words in zip(collection.queries, tokens(query.text for query in collection.queries), strict=True):
        scores = retriever.get_scores(words)
        order = sorted(collection.candidates[query.query_id], key=lambda doc_id: -sign * scores[row[doc_id]])
        values.append(ndcg_at_10([collection.labels[query.query_id, doc_id] for doc_id in order]))
    return fmean(values)


def test_candidate_order_is_random(collection: Collection) -> None:
    values = [
        ndcg_at_10([collection.labels[query_id, doc_id] for doc_id in doc_ids])
        for query_id, doc_ids in collection.candidates.items()
    ]
    assert fmean(values) == pytest.approx(RANDOM_NDCG, abs=0.04)  # standard error 0.01


@pytest.mark.parametrize("sign", [1, -1], ids=["bm25", "reversed"])
def test_word_overlap_ranks_no_better_than_chance(collection: Collection, sign: int) -> None:
    assert bm25_ndcg(collection, sign) <= RANDOM_NDCG + 0.10


@pytest.mark.parametrize("sign", [1, -1], ids=["bm25", "reversed"])
def test_word_overlap_says_nothing_within_one_domain(sign: int) -> None:
    assert bm25_ndcg(build("train", 300, domains=["houseplants"]), sign) <= RANDOM_NDCG + 0.10


def test_a_repeated_phrase_is_equally_likely_for_every_label(collection: Collection) -> None:
    for label in (0, 1, 2):
        pairs = [pair for pair, found in collection.labels.items() if found == label]
        share = fmean(collection.repeats_query(*pair) for pair in pairs)
        assert share == pytest.approx(REPEAT_PROBABILITY, abs=0.08), label  # at least 600 pairs: 4 standard errors


def test_whether_a_quote_fits_its_document_says_nothing(collection: Collection) -> None:
    """A reader of documents alone could compare the quote with the statement. It fits in half of all quotes,
    and comes from another domain equally often, whatever the label."""
    knowledge = load_knowledge()
    domain_of = {text: d.name for d in knowledge.domains for o in d.observations for text in o.phrasings}
    phrases_of = {
        (d.name, m.id): {text for entry in m.observations for text in d.observation(entry).phrasings}
        for d in knowledge.domains
        for m in d.mechanisms
    }
    share = REPEAT_PROBABILITY / (REPEAT_PROBABILITY + QUOTE_PROBABILITY)
    for label in (0, 1, 2):
        facts = [collection.document_facts[d] for (_, d), found in collection.labels.items() if found == label]
        quoting = [(entry, entry.quoted) for entry in facts if entry.quoted is not None]
        fits = fmean(quoted in phrases_of[entry.domain, entry.mechanism] for entry, quoted in quoting)
        elsewhere = fmean(domain_of[quoted] != entry.domain for entry, quoted in quoting)
        assert fits == pytest.approx(0.5, abs=0.1), label
        assert elsewhere == pytest.approx(share * 4 / 19, abs=0.04), label  # 4 of 19, when they repeat the query


def test_quotes_together_with_what_they_fit_say_little() -> None:
    """The best rule about quotes alone: one that repeats the query should fit its document, another should not. It
    needs to know what fits what, and even so it ranks little better than chance; without the repetitions, which do
    say something about the query, it stays within the bound of word overlap."""
    knowledge = load_knowledge()
    phrases_of = {
        (d.name, m.id): {text for entry in m.observations for text in d.observation(entry).phrasings}
        for d in knowledge.domains
        for m in d.mechanisms
    }
    collection = build("test", 300)

    def suspicion(query_id: str, doc_id: str, counts_repetition: bool) -> float:
        facts = collection.document_facts[doc_id]
        if facts.quoted is None:
            return 0.5
        fits = facts.quoted in phrases_of[facts.domain, facts.mechanism]
        if collection.repeats_query(query_id, doc_id):
            return float(not fits) if counts_repetition else 0.5
        return float(fits)

    for counts_repetition, bound in ((True, RANDOM_NDCG + 0.20), (False, RANDOM_NDCG + 0.10)):
        values = []
        for query_id, doc_ids in collection.candidates.items():
            order = sorted(doc_ids, key=lambda doc_id: suspicion(query_id, doc_id, counts_repetition))
            values.append(ndcg_at_10([collection.labels[query_id, doc_id] for doc_id in order]))
        assert RANDOM_NDCG - 0.02 < fmean(values) <= bound


# ---- one side alone --------------------------------------------------------------------------------------------


def balanced(collection: Collection) -> list[tuple[str, str]]:
    """(query_id, doc_id) of two candidates of each label of every query, drawn: the first two would tell by their
    place which label is rare."""
    chosen = []
    for query_id, doc_ids in collection.candidates.items():
        rng = Random(query_id)
        for label in (0, 1, 2):
            fitting = [doc_id for doc_id in doc_ids if collection.labels[query_id, doc_id] == label]
            chosen += [(query_id, doc_id) for doc_id in rng.sample(fitting, 2)]
    return chosen


def naive_bayes_accuracy(
    known: Sequence[tuple[list[str], int]], unknown: Sequence[tuple[list[str], int]], num_labels: int = 3
) -> float:
    """Multinomial naive Bayes with add-one smoothing and equal priors."""
    column = {word: index for index, word in enumerate(sorted({word for words, _ in known for word in words}))}
    counts = np.ones((num_labels, len(column)))
    for words, label in known:
        for word in words:
            counts[label, column[word]] += 1
    log_probabilities = np.log(counts / counts.sum(axis=1, keepdims=True))
    hits = 0
    for words, label in unknown:
        columns = [column[word] for word in words if word in column]
        hits += int(log_probabilities[:, columns].sum(axis=1).argmax() == label)
    return hits / len(unknown)


def with_pairs(words: list[str]) -> list[str]:
    return words + [f"{one} {other}" for one, other in pairwise(words)]


SIDES = pytest.mark.parametrize("side", ["query", "document"])


@SIDES
def test_one_side_alone_does_not_give_the_label(side: ShallowKind) -> None:
    def rows(seed: int) -> list[tuple[list[str], int]]:
        collection = build("train", 300, seed=seed)
        pairs = balanced(collection)
        seen = {query.query_id: query.text for query in collection.queries}
        seen |= {document.doc_id: document.text for document in collection.documents}
        texts = tokens(seen[query_id if side == "query" else doc_id] for query_id, doc_id in pairs)
        return [(with_pairs(words), collection.labels[pair]) for words, pair in zip(texts, pairs, strict=True)]

    assert naive_bayes_accuracy(rows(1), rows(2)) <= 0.40


def shallow_accuracy(model: Shallow, collection: Collection, pairs: list[tuple[str, str]]) -> float:
    said = model.probabilities(collection, pairs).argmax(axis=1)
    return fmean(int(label) == collection.labels[pair] for label, pair in zip(said, pairs, strict=True))


@SIDES
def test_one_side_with_length_and_place_does_not_give_the_label(side: ShallowKind) -> None:
    """Logistic regression on words, neighbouring words, length and place in the list; 1,200 and 1,800 test pairs, so
    that the standard error is 0.014 at most."""
    train = build("train", 300, seed=1)
    model = Shallow.train(side, train, balanced(train))
    for unknown in (build("train", 300, seed=2), build("dev", 200), build("test", 300)):
        assert shallow_accuracy(model, unknown, balanced(unknown)) <= 0.40, unknown.split


@SIDES
def test_one_side_would_give_a_label_that_is_written_there(side: ShallowKind) -> None:
    """The classifier above is able: every query is asked for one label only, which a word of its texts names."""

    def marked(seed: int) -> tuple[Collection, list[tuple[str, str]]]:
        collection = build("train", 150, seed=seed)
        label_of = {query.query_id: number % 3 for number, query in enumerate(collection.queries)}
        pairs = [pair for pair in balanced(collection) if collection.labels[pair] == label_of[pair[0]]]
        asked, held = ("alpha", "beta", "gamma"), ("delta", "epsilon", "zeta")  # words of one side each
        mark = {doc_id: held[collection.labels[query_id, doc_id]] for query_id, doc_id in pairs}
        queries = (replace(q, text=f"{q.text} {asked[label_of[q.query_id]]}") for q in collection.queries)
        documents = (replace(d, text=f"{d.text} {mark.get(d.doc_id, '')}") for d in collection.documents)
        return replace(collection, queries=tuple(queries), documents=tuple(documents)), pairs

    assert shallow_accuracy(Shallow.train(side, *marked(1)), *marked(2)) > 0.9


def test_naive_bayes_learns_what_can_be_learnt() -> None:
    """The classifier above is able: it reads the domain from a document's words."""
    names = {domain.name: index for index, domain in enumerate(load_knowledge().domains)}
    rows = {}
    for seed in (1, 2):
        collection = build("train", 40, seed=seed)
        texts = zip(tokens(document.text for document in collection.documents), collection.documents, strict=True)
        rows[seed] = [(words, names[collection.document_facts[entry.doc_id].domain]) for words, entry in texts]
    assert naive_bayes_accuracy(rows[1], rows[2], num_labels=len(names)) > 0.9


def test_length_and_position_say_nothing(collection: Collection) -> None:
    """Areas under the ROC curve of `relevant` by document length and by place in the list; one half is chance."""
    length = {document.doc_id: len(document.text) for document in collection.documents}
    for is_relevant in ({1, 2}, {2}):
        by_length, by_place = [], []
        for query_id, doc_ids in collection.candidates.items():
            hits = [doc_id for doc_id in doc_ids if collection.labels[query_id, doc_id] in is_relevant]
            misses = [doc_id for doc_id in doc_ids if doc_id not in hits]
            by_length += [(length[h] > length[m]) + 0.5 * (length[h] == length[m]) for h in hits for m in misses]
            by_place += [doc_ids.index(h) > doc_ids.index(m) for h in hits for m in misses]
        assert fmean(by_length) == pytest.approx(0.5, abs=0.05)
        assert fmean(by_place) == pytest.approx(0.5, abs=0.05)


def test_every_label_stands_at_every_place(collection: Collection) -> None:
    for label in (1, 2):
        places = Counter(
            place
            for query_id, doc_ids in collection.candidates.items()
            for place, doc_id in enumerate(doc_ids)
            if collection.labels[query_id, doc_id] == label
        )
        expected = sum(places.values()) / NUM_CANDIDATES
        # chi-square with 23 degrees of freedom: 1 in 10,000 lies above 54
        assert sum((places[place] - expected) ** 2 / expected for place in range(NUM_CANDIDATES)) < 54
