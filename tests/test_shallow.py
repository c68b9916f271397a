"""The shallow models see what they say they see, and learn what can be learnt that way."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest

from whyrank.almanac import Collection, build
from whyrank.demo.shallow import (
    KINDS,
    Shallow,
    ShallowKind,
    overlap_features,
    shallow_row,
    shallow_scores,
    training_pairs,
)
from whyrank.demo.systems import random_row
from whyrank.errors import InputError
from whyrank.search import Bm25Config, Bm25Index

DOMAINS = ["bread"]


@pytest.fixture(scope="module")
def train() -> Collection:
    return build("train", 400, domains=DOMAINS)


@pytest.fixture(scope="module")
def test() -> Collection:
    return build("test", 36, domains=DOMAINS)


@pytest.fixture(scope="module")
def features(test: Collection) -> dict[str, np.ndarray]:
    return overlap_features(test, list(test.labels))


# ---- features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "stemmer"), [("words", "none"), ("stems", "english")])
def test_bm25_is_that_of_the_first_stage(
    test: Collection, features: dict[str, np.ndarray], level: str, stemmer: str
) -> None:
    index = Bm25Index.build(test.documents, Bm25Config(stemmer=stemmer, stop_words="none"))
    found = index.search(test.queries, top_k=len(test.documents))
    scores = {(line.query_id, line.doc_id): line.score for lines in found.values() for line in lines}
    expected = [scores.get(pair, 0.0) for pair in test.labels]
    assert features[f"{level}.bm25"] == pytest.approx(np.array(expected), rel=1e-4)  # bm25s counts in float32


def test_shares_are_those_of_sets(test: Collection, features: dict[str, np.ndarray]) -> None:
    """Counted anew, pair by pair, with sets."""
    texts = {entry.query_id: entry.text for entry in test.queries} | {d.doc_id: d.text for d in test.documents}
    words = {name: re.findall("[a-z][a-z]+", text.lower()) for name, text in texts.items()}
    for level in ("words", "neighbours"):
        terms = {name: set(found if level == "words" else pairwise(found)) for name, found in words.items()}
        rarity = {
            term: math.log(1 + (len(test.documents) - count + 0.5) / (count + 0.5))
            for term in set().union(*terms.values())
            for count in [sum(term in terms[document.doc_id] for document in test.documents)]
        }
        for row, (query_id, doc_id) in list(enumerate(test.labels))[::50]:
            asked, held = terms[query_id], terms[doc_id]
            both = asked & held
            expected = {
                "num_query": len(asked),
                "num_document": len(held),
                "num_shared": len(both),
                "share_of_query": len(both) / len(asked),
                "share_of_document": len(both) / len(held),
                "jaccard": len(both) / len(asked | held),
                "rarity": sum(rarity[term] for term in both),
                "rarity_of_query": sum(rarity[term] for term in both) / sum(rarity[term] for term in asked),
                "rarest": max((rarity[term] for term in both), default=0.0),
            }
            for name, value in expected.items():
                assert features[f"{level}.{name}"][row] == pytest.approx(value), name
            places = [place for place, word in enumerate(words[doc_id]) if word in words[query_id]]
            assert features["first_in_document"][row] == min(places, default=-1)


# ---- models --------------------------------------------------------------------------------------------------


def test_products_of_words_learn_what_their_overlap_cannot(train: Collection, test: Collection) -> None:
    """The law of the almanac is additive over pairs of a query's and a document's words, so a model of such products
    must rank far above chance (0.289), and a model of overlap near it."""
    chance = random_row(test, seed=0).ndcg
    assert shallow_row(train, test, "interaction").ndcg > chance + 0.3
    assert shallow_row(train, test, "overlap").ndcg < chance + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_distributions_and_belong_to_their_pair(
    train: Collection, test: Collection, kind: ShallowKind
) -> None:
    pairs = training_pairs(train)[:600]
    model = Shallow.train(kind, train, pairs, seed=3)
    asked = list(test.labels)
    found = model.probabilities(test, asked)
    assert found.shape == (len(asked), 3)
    assert found.min() >= 0
    assert found.sum(axis=1) == pytest.approx(np.ones(len(asked)))
    assert model.probabilities(test, asked[::-7]) == pytest.approx(found[::-7])
    again = Shallow.train(kind, train, pairs, seed=3)
    assert (again.probabilities(test, asked) == found).all()


@pytest.mark.parametrize("kind", ["query", "document"])
def test_one_side_gives_one_score(train: Collection, test: Collection, kind: ShallowKind) -> None:
    """Without the place in the list, the only thing that differs, all pairs with the same seen text would be equal."""
    scores = shallow_scores(train, test, kind)
    place = {(q, d): rank for q, doc_ids in test.candidates.items() for rank, d in enumerate(doc_ids)}
    seen: dict[tuple[str, int], set[float]] = {}
    for (query_id, doc_id), score in scores.items():
        side = query_id if kind == "query" else doc_id
        seen.setdefault((side, place[query_id, doc_id]), set()).add(round(score, 9))
    assert {len(values) for values in seen.values()} == {1}
    assert len({value for values in seen.values() for value in values}) > 100


def test_the_row_measures_the_scores(train: Collection, test: Collection) -> None:
    """nDCG@10 and accuracy worked out from the scores and the definition, apart from the package's evaluation."""
    scores = shallow_scores(train, test, "interaction", seed=1)
    values = []
    for query_id, doc_ids in test.candidates.items():
        best = sorted(doc_ids, key=lambda doc_id: -scores[query_id, doc_id])[:10]
        gains = [test.labels[query_id, doc_id] / math.log2(rank + 2) for rank, doc_id in enumerate(best)]
        ideal = [gain / math.log2(rank + 2) for rank, gain in enumerate([2, 2, 1, 1, 1])]
        values.append(sum(gains) / sum(ideal))
    row = shallow_row(train, test, "interaction", seed=1)
    assert row.system == "shallow-interaction"
    assert row.ndcg == pytest.approx(fmean(values))
    assert row.interval[0] < row.ndcg < row.interval[1]
    assert row.label_accuracy is not None
    assert row.label_accuracy > 19 / 24  # saying 0 of everything
    assert row.documents_per_second is not None


def test_training_pairs_are_those_of_the_students(train: Collection) -> None:
    """Per query two of label 2, three of label 1, and as many irrelevant ones as asked for."""
    pairs = training_pairs(train, num_irrelevant=5, seed=4)
    assert len(pairs) == 10 * len(train.queries)
    assert sum(train.labels[pair] == 0 for pair in pairs) == 5 * len(train.queries)
    assert training_pairs(train, num_irrelevant=5, seed=4) == pairs
    assert training_pairs(train, num_irrelevant=5, seed=5) != pairs
    assert training_pairs(train, num_irrelevant=None) == list(train.labels)


def test_what_cannot_be_trained_is_refused(train: Collection) -> None:
    with pytest.raises(InputError, match=r"expected a kind among overlap, .*, found 'deep'"):
        Shallow.train("deep", train, list(train.labels))  # type: ignore[arg-type]
    irrelevant = [pair for pair, label in train.labels.items() if label != 1]
    with pytest.raises(InputError, match=r"all 3 labels, found \[0, 2\]"):
        Shallow.train("query", train, irrelevant)
