"""The first stage: BM25 over a corpus, by bm25s.

Text is lower-cased, cut into words of two and more characters, cleared of bm25s's English stop words and stemmed with
PyStemmer's English (Porter 2) stemmer; both can be switched off or set to another language. The defaults of `k1` and
`b` are those of Anserini and of BRIGHT's own baseline. One thing differs from the latter: it weights the query's terms
by BM25 as well (saturation and inverse document frequency, squared in effect), which bm25s does not offer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import bm25s  # type: ignore[import-untyped]
import numpy as np
import Stemmer  # type: ignore[import-not-found]
from numpy.typing import NDArray

from whyrank.errors import InputError
from whyrank.records import Document, Query, ScoredDocument

__all__ = ["Bm25Config", "Bm25Index", "Bm25Method", "QueryWeighting"]

Bm25Method = Literal["lucene", "robertson", "atire", "bm25l", "bm25+"]
QueryWeighting = Literal["counts", "set"]
OFF = "none"


@dataclass(frozen=True, slots=True)
class Bm25Config:
    """How documents are indexed and queries weighted.

    Raises:
        InputError: a value is out of its range or unknown.
    """

    k1: float = 0.9
    """Saturation of a term's frequency, at least 0; larger values let repetition count for more."""

    b: float = 0.4
    """Strength of the normalisation by document length, from 0 (none) to 1 (full)."""

    method: Bm25Method = "lucene"
    """The variant of BM25: `lucene`, `robertson`, `atire`, `bm25l` or `bm25+`."""

    delta: float = 0.5
    """What a term's mere occurrence is worth in `bm25l` and `bm25+`; the others ignore it."""

    query_weighting: QueryWeighting = "counts"
    """`counts`: a query's term counts as often as it occurs, as in Lucene; `set`: once, however often."""

    stemmer: str = "english"
    """A PyStemmer algorithm, or `none`."""

    stop_words: str = "english"
    """One of bm25s's lists, or `none`."""

    def __post_init__(self) -> None:
        if not self.k1 >= 0:
            raise InputError(f"expected k1 of at least 0, found {self.k1}")
        if not 0 <= self.b <= 1:
            raise InputError(f"expected b from 0 to 1, found {self.b}")
        for name, choices in (
            ("method", get_args(Bm25Method)),
            ("query_weighting", get_args(QueryWeighting)),
            ("stemmer", (OFF, *Stemmer.algorithms())),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"expected {name} among {', '.join(choices)}, found {getattr(self, name)!r}")
        try:
            _tokenize([], self, as_ids=False)
        except ValueError as cause:
            raise InputError(
                f"expected stop_words to be a list of bm25s or {OFF}, found {self.stop_words!r}"
            ) from cause


def _tokenize(texts: Iterable[str], config: Bm25Config, *, as_ids: bool) -> Any:
    return bm25s.tokenize(
        texts,
        stopwords=None if config.stop_words == OFF else config.stop_words,
        stemmer=None if config.stemmer == OFF else Stemmer.Stemmer(config.stemmer),
        return_ids=as_ids,
        show_progress=False,
    )


class Bm25Index:
    """A corpus ready for searching; held in memory, texts left out.

    `num_empty_queries` counts the queries of all searches so far that share no term with the corpus (only stop
    words, for instance) and therefore found nothing.
    """

    def __init__(self, doc_ids: Sequence[str], retriever: Any, config: Bm25Config) -> None:
        self.doc_ids = doc_ids
        self.config = config
        self.num_empty_queries = 0
        self._retriever = retriever
        self._positions = {doc_id: position for position, doc_id in enumerate(doc_ids)}

    @classmethod
    def build(cls, documents: Iterable[Document], config: Bm25Config | None = None) -> Bm25Index:
        """Index the documents' titles and texts.

        Raises:
            InputError: there are no documents, no document holds a word, or an id comes twice.
        """
        config = config or Bm25Config()
        doc_ids: list[str] = []
        tokens = _tokenize(_texts(documents, doc_ids), config, as_ids=True)
        if not doc_ids:
            raise InputError("expected at least one document to index, found none")
        if not tokens.vocab:
            raise InputError(f"expected documents with words, found {len(doc_ids)} documents without any")
        if len(set(doc_ids)) != len(doc_ids):
            repeated = Counter(doc_ids).most_common(1)[0][0]
            raise InputError(f"expected every document id once, found {repeated!r} twice")
        # In order of their ids, so that a stable sort by score breaks ties by id.
        order = sorted(range(len(doc_ids)), key=doc_ids.__getitem__)
        retriever = bm25s.BM25(k1=config.k1, b=config.b, delta=config.delta, method=config.method, backend="numpy")
        retriever.index(([tokens.ids[i] for i in order], tokens.vocab), show_progress=False)
        return cls([doc_ids[i] for i in order], retriever, config)

    def search(self, queries: Iterable[Query], top_k: int = 100) -> dict[str, list[ScoredDocument]]:
        """The best `top_k` documents of each query, by score and then by document id.

        Only documents that share a term of positive weight with the query are returned, so that there may be fewer
        than `top_k`; a query that shares none with any document has an empty list. Excluded documents are never
        returned and take no places.

        Raises:
            InputError: `top_k` is not positive, or a query id comes twice.
        """
        if top_k < 1:
            raise InputError(f"expected top_k of at least 1, found {top_k}")
        run: dict[str, list[ScoredDocument]] = {}
        for query in queries:
            if query.query_id in run:
                raise InputError(f"expected every query id once, found {query.query_id!r} twice")
            run[query.query_id] = self._search_one(query, top_k)
        return run

    def _search_one(self, query: Query, top_k: int) -> list[ScoredDocument]:
        token_ids = self._token_ids(query.text)
        if not token_ids:
            self.num_empty_queries += 1
            return []
        scores = self._retriever.get_scores_from_ids(token_ids)
        # bm25l and bm25+ give every document a constant for each term it lacks; a match is what lies above it.
        constants = self._retriever.nonoccurrence_array
        unmatched = np.float32(0) if constants is None else constants[token_ids].sum()
        is_candidate = scores > unmatched
        excluded = (self._positions.get(doc_id) for doc_id in query.excluded_doc_ids)
        is_candidate[[position for position in excluded if position is not None]] = False
        best = _best(scores, np.flatnonzero(is_candidate), top_k)
        return [
            ScoredDocument(query.query_id, self.doc_ids[position], rank, float(scores[position]))
            for rank, position in enumerate(best, start=1)
        ]

    def _token_ids(self, text: str) -> list[int]:
        words: list[str] = _tokenize([text], self.config, as_ids=False)[0]
        if self.config.query_weighting == "set":
            words = list(dict.fromkeys(words))
        vocabulary: dict[str, int] = self._retriever.vocab_dict
        return [vocabulary[word] for word in words if word in vocabulary]


def _texts(documents: Iterable[Document], doc_ids: list[str]) -> Iterator[str]:
    """Stream the texts and note the ids, so that the corpus is never held as text."""
    for document in documents:
        doc_ids.append(document.doc_id)
        yield document.full_text


def _best(scores: NDArray[np.float32], candidates: NDArray[np.intp], top_k: int) -> NDArray[np.intp]:
    """The positions of the highest scores, best first; equal scores keep the order of `candidates`."""
    if len(candidates) > top_k:
        threshold = np.partition(scores[candidates], len(candidates) - top_k)[len(candidates) - top_k]
        candidates = candidates[scores[candidates] >= threshold]  # all that tie for the last place, too
    return candidates[np.argsort(-scores[candidates], kind="stable")][:top_k]
