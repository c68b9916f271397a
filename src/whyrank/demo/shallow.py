"""Shallow models on the same pairs: what the almanac yields to whoever neither reasons nor learns a representation.

Four kinds, all by scikit-learn, with fixed settings; their neighbours do no better on dev:

- `overlap`: gradient boosting on how much a query and a document have in common;
- `interaction`: logistic regression on every query word joined with every document word, which is a bilinear model
  of two bags of words. The almanac's law is additive in such products, so this one can learn much of it;
- `query` and `document`: logistic regression that sees one side only. They must stay at chance, or labels leak.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import Stemmer  # type: ignore[import-not-found]
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.ensemble import HistGradientBoostingClassifier  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression, SGDClassifier  # type: ignore[import-untyped]

from whyrank.almanac import NUM_CANDIDATES, Collection
from whyrank.almanac.gold import gold_judgments
from whyrank.demo.systems import Row, per_query
from whyrank.errors import InputError
from whyrank.records import Query
from whyrank.search import Bm25Config
from whyrank.template import Template

__all__ = ["KINDS", "Shallow", "ShallowKind", "overlap_features", "shallow_row", "shallow_scores", "training_pairs"]

ShallowKind = Literal["overlap", "interaction", "query", "document"]
KINDS: tuple[ShallowKind, ...] = get_args(ShallowKind)
PairIds = tuple[str, str]
NUM_LABELS = 3
TEMPLATE = "almanac"
NUM_HASH_BITS = 20  # about a million products; four million gave the same figures on dev
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: multiplicative hashing (Knuth 1998, 6.4)
WORD = re.compile("[a-z]{2,}")  # of two and more letters, as in `search`


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of a collection as row numbers into its texts; `places` is each document's place in its list, from 0."""

    queries: list[str]
    documents: list[str]
    query_rows: NDArray[np.int64]
    document_rows: NDArray[np.int64]
    places: NDArray[np.float64]

    @classmethod
    def of(cls, collection: Collection, pairs: Sequence[PairIds]) -> _Pairs:
        query_row = {query.query_id: row for row, query in enumerate(collection.queries)}
        document_row = {document.doc_id: row for row, document in enumerate(collection.documents)}
        place = {
            (query_id, doc_id): rank
            for query_id, doc_ids in collection.candidates.items()
            for rank, doc_id in enumerate(doc_ids)
        }
        return cls(
            [query.text.lower() for query in collection.queries],
            [document.full_text.lower() for document in collection.documents],
            np.array([query_row[query_id] for query_id, _ in pairs]),
            np.array([document_row[doc_id] for _, doc_id in pairs]),
            np.array([place[pair] for pair in pairs], dtype=np.float64),
        )


@dataclass(frozen=True, slots=True)
class Shallow:
    """A trained shallow model; the same arguments give the same one."""

    kind: ShallowKind
    words: CountVectorizer | None
    classifier: Any

    @classmethod
    def train(cls, kind: ShallowKind, collection: Collection, pairs: Sequence[PairIds], *, seed: int = 0) -> Shallow:
        """Learn the labels of `pairs`, which are candidates of `collection`.

        Raises:
            InputError: an unknown kind, or pairs that do not hold all three labels.
        """
        if kind not in KINDS:
            raise InputError(f"expected a kind among {', '.join(KINDS)}, found {kind!r}")
        labels = [collection.labels[pair] for pair in pairs]
        if len(set(labels)) < NUM_LABELS:
            raise InputError(f"expected training pairs of all {NUM_LABELS} labels, found {sorted(set(labels))}")
        words = _vocabulary(kind, _Pairs.of(collection, pairs))
        classifier = _classifier(kind, seed).fit(_features(kind, words, collection, pairs), labels)
        return cls(kind, words, classifier)

    def probabilities(self, collection: Collection, pairs: Sequence[PairIds]) -> NDArray[np.float64]:
        """The distribution over the labels 0, 1, 2 of each pair, of shape (number of pairs, 3)."""
        found = self.classifier.predict_proba(_features(self.kind, self.words, collection, pairs))
        return np.asarray(found, dtype=np.float64)


def training_pairs(collection: Collection, num_irrelevant: int | None = 5, seed: int = 0) -> list[PairIds]:
    """The pairs that students are trained on: those of `gold_judgments` with the same arguments."""
    judgments = gold_judgments(collection, Template.load(TEMPLATE), num_irrelevant=num_irrelevant, seed=seed)
    return [(judgment.query_id, judgment.doc_id) for judgment in judgments]


def shallow_scores(
    train: Collection, test: Collection, kind: ShallowKind, *, num_irrelevant: int | None = 5, seed: int = 0
) -> dict[PairIds, float]:
    """The expected label, in [0, 2], of every candidate pair of `test`, by (query_id, doc_id)."""
    model = Shallow.train(kind, train, training_pairs(train, num_irrelevant, seed), seed=seed)
    pairs = list(test.labels)
    return dict(zip(pairs, _expected(model.probabilities(test, pairs)), strict=True))


def shallow_row(
    train: Collection, test: Collection, kind: ShallowKind, *, num_irrelevant: int | None = 5, seed: int = 0
) -> Row:
    """The model's figures on `test`; its speed is that of ranking, without training."""
    model = Shallow.train(kind, train, training_pairs(train, num_irrelevant, seed), seed=seed)
    start = time.perf_counter()
    pairs = list(test.labels)
    probabilities = model.probabilities(test, pairs)
    seconds = time.perf_counter() - start
    scores = dict(zip(pairs, _expected(probabilities), strict=True))

    def ranked(query: Query) -> list[str]:
        return sorted(test.candidates[query.query_id], key=lambda doc_id: -scores[query.query_id, doc_id])

    return Row(
        f"shallow-{kind}",
        per_query(test, ranked),
        label_accuracy=float(np.mean(probabilities.argmax(axis=1) == np.array(list(test.labels.values())))),
        documents_per_second=len(pairs) / seconds,
    )


def _expected(probabilities: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in probabilities @ np.arange(NUM_LABELS, dtype=np.float64)]


# ---- models --------------------------------------------------------------------------------------------------


def _classifier(kind: ShallowKind, seed: int) -> Any:
    if kind == "overlap":
        return HistGradientBoostingClassifier(max_iter=200, early_stopping=False, random_state=seed)
    if kind == "interaction":  # stochastic, because a million weights per label are slow to update all at once
        return SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=20, tol=None, random_state=seed)
    return LogisticRegression(max_iter=1000, class_weight="balanced")


def _vocabulary(kind: ShallowKind, seen: _Pairs) -> CountVectorizer | None:
    """The words (for one side, neighbouring words too) that the training texts hold; later texts add none."""
    if kind == "overlap":
        return None
    texts = {"query": seen.queries, "document": seen.documents}.get(kind, seen.queries + seen.documents)
    longest = 1 if kind == "interaction" else 2
    return CountVectorizer(binary=True, token_pattern=WORD.pattern, ngram_range=(1, longest)).fit(texts)


def _features(
    kind: ShallowKind, words: CountVectorizer | None, collection: Collection, pairs: Sequence[PairIds]
) -> Any:
    if words is None:
        return np.column_stack(list(overlap_features(collection, pairs).values()))
    seen = _Pairs.of(collection, pairs)
    if kind == "interaction":
        return _products(words.transform(seen.queries), words.transform(seen.documents), seen)
    texts, rows = (seen.queries, seen.query_rows) if kind == "query" else (seen.documents, seen.document_rows)
    lengths = np.array([len(WORD.findall(text)) for text in texts], dtype=np.float64)[rows]
    shape = np.column_stack([lengths / 50, seen.places / NUM_CANDIDATES])  # about as large as a word's 1
    return sparse.hstack([words.transform(texts)[rows], sparse.csr_matrix(shape)], format="csr")


def _products(queries: Any, documents: Any, seen: _Pairs) -> Any:
    """Every word of the query joined with every word of the document, hashed; each row has length 1."""
    num_words = np.uint64(queries.shape[1])
    query_words = [row.astype(np.uint64) * num_words for row in np.split(queries.indices, queries.indptr[1:-1])]
    document_words = [row.astype(np.uint64) for row in np.split(documents.indices, documents.indptr[1:-1])]
    shift = np.uint64(64 - NUM_HASH_BITS)
    columns = [
        ((np.add.outer(query_words[query], document_words[document]).ravel() * SPREAD) >> shift).astype(np.int32)
        for query, document in zip(seen.query_rows, seen.document_rows, strict=True)
    ]
    sizes = np.array([len(row) for row in columns])
    values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return sparse.csr_matrix((values, np.concatenate(columns), ends), shape=(len(columns), 1 << NUM_HASH_BITS))


# ---- what query and document have in common ------------------------------------------------------------------


def overlap_features(collection: Collection, pairs: Sequence[PairIds]) -> dict[str, NDArray[np.float64]]:
    """Columns by name, each with one value per pair: `<level>.<feature>` for words, stems and pairs of neighbouring
    words; where the first shared word stands in either text (in words from 0; -1 if none is shared); and the
    document's place in its list, from 0.
    """
    seen = _Pairs.of(collection, pairs)
    stemmer = Stemmer.Stemmer("english")
    words = [[WORD.findall(text) for text in texts] for texts in (seen.queries, seen.documents)]
    stems = [[stemmer.stemWords(text) for text in texts] for texts in words]
    neighbours = [[[f"{one} {other}" for one, other in pairwise(text)] for text in texts] for texts in words]
    columns = {
        f"{level}.{name}": column
        for level, (queries, documents) in {"words": words, "stems": stems, "neighbours": neighbours}.items()
        for name, column in _shared(queries, documents, seen).items()
    }
    rows = list(zip(seen.query_rows, seen.document_rows, strict=True))
    columns["first_in_query"] = np.array([_first_shared(words[0][q], words[1][d]) for q, d in rows])
    columns["first_in_document"] = np.array([_first_shared(words[1][d], words[0][q]) for q, d in rows])
    columns["place"] = seen.places
    return columns


def _shared(queries: list[list[str]], documents: list[list[str]], seen: _Pairs) -> dict[str, NDArray[np.float64]]:
    """Number, shares, rarity and BM25 score of the terms that both sides hold, each term counted once.

    Rarity is the inverse document frequency among the collection's documents; BM25 is that of `search`.
    """
    counter = CountVectorizer(analyzer=list, dtype=np.float64).fit([*queries, *documents])
    asked, held = counter.transform(queries), counter.transform(documents)
    frequency = np.diff(held.tocsc().indptr)
    rarity = np.log1p((held.shape[0] - frequency + 0.5) / (frequency + 0.5))
    query_sets, document_sets = _binary(asked), _binary(held)
    rows, columns = seen.query_rows, seen.document_rows
    both = query_sets[rows].multiply(document_sets[columns]).tocsr()
    num_query, num_document = _sums(query_sets)[rows], _sums(document_sets)[columns]
    num_shared, rare = _sums(both), both @ rarity
    return {
        "num_query": num_query,
        "num_document": num_document,
        "num_shared": num_shared,
        "share_of_query": num_shared / np.maximum(num_query, 1),
        "share_of_document": num_shared / np.maximum(num_document, 1),
        "jaccard": num_shared / np.maximum(num_query + num_document - num_shared, 1),
        "rarity": rare,
        "rarity_of_query": rare / np.maximum((query_sets @ rarity)[rows], 1e-9),
        "rarest": both.multiply(rarity).max(axis=1).toarray().ravel(),
        "bm25": _sums(asked[rows].multiply(_bm25_weights(held, rarity)[columns])),
    }


def _bm25_weights(counts: Any, rarity: NDArray[np.float64]) -> Any:
    """The weight of every term in every document, Lucene's variant."""
    config = Bm25Config()
    lengths = _sums(counts)
    norm = config.k1 * (1 - config.b + config.b * lengths / max(lengths.mean(), 1e-9))
    weights = counts.copy()
    weights.data = counts.data / (counts.data + np.repeat(norm, np.diff(counts.indptr)))
    return weights.multiply(rarity).tocsr()


def _first_shared(words: list[str], others: list[str]) -> float:
    known = set(others)
    return next((float(place) for place, word in enumerate(words) if word in known), -1.0)


def _binary(counts: Any) -> Any:
    found = counts.copy()
    found.data = np.ones_like(found.data)
    return found


def _sums(matrix: Any) -> NDArray[np.float64]:
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
