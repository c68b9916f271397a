"""Simulated answer links, like those in the wild: few relevant documents are linked, and some links lead astray.

For each pair a number is drawn from its two texts and the seed, so that a query's links depend on its own candidates
alone: not on their order, nor on the rest of the collection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from whyrank.almanac.collection import Collection
from whyrank.errors import InputError
from whyrank.records import Pair
from whyrank.store import content_key

__all__ = ["LinkRates", "LinksConfig", "answer_links", "measure_links"]


@dataclass(frozen=True, slots=True)
class LinksConfig:
    """How much of the truth the links tell. The defaults link about a third of the relevant documents.

    Raises:
        InputError: a value lies outside its range.
    """

    right: float = 0.5
    """Probability that a document of label 2 is linked, from 0 to 1."""

    other_setting: float = 0.2
    """Probability that a document of label 1 is linked, from 0 to 1."""

    astray: float = 0.1
    """Expected share of links that lead to a document of label 0, from 0 to 0.5."""

    def __post_init__(self) -> None:
        for name, most in (("right", 1), ("other_setting", 1), ("astray", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name}: expected a number from 0 to {most}, found {getattr(self, name)!r}")


def answer_links(collection: Collection, config: LinksConfig, seed: int = 0) -> Iterator[Pair]:
    """The pairs of each query as `whyrank mine` writes them: the linked ones, then all other candidates as negatives.

    As there, a negative may well be relevant, the evidence of a negative is its rank without linked documents, and a
    query without any link has no pairs.

    Raises:
        InputError: a query has too few irrelevant candidates for as many links astray.
    """
    queries = {query.query_id: query.text for query in collection.queries}
    documents = {document.doc_id: document.full_text for document in collection.documents}
    for query_id, doc_ids in collection.candidates.items():
        probability = _probabilities(collection, query_id, config)
        linked = [
            doc_id
            for doc_id in doc_ids
            if _chance(seed, queries[query_id], documents[doc_id]) < probability[collection.labels[query_id, doc_id]]
        ]
        if not linked:
            continue
        for doc_id in linked:
            yield Pair(query_id, doc_id, "linked", f"almanac/q/{query_id} simulated answer")
        others = (doc_id for doc_id in doc_ids if doc_id not in linked)
        for rank, doc_id in enumerate(others, start=1):
            yield Pair(query_id, doc_id, "negative", f"first-stage rank {rank}")


def _probabilities(collection: Collection, query_id: str, config: LinksConfig) -> tuple[float, float, float]:
    """The probability of a link by label. Links astray are as many as the expected number of the others demands."""
    counts = Counter(collection.labels[query_id, doc_id] for doc_id in collection.candidates[query_id])
    num_true = counts[2] * config.right + counts[1] * config.other_setting
    num_astray = num_true * config.astray / (1 - config.astray)
    if num_astray > counts[0]:
        raise InputError(
            f"{query_id}: expected at least {num_astray:.1f} irrelevant candidates for the links astray, "
            f"found {counts[0]}; lower astray"
        )
    return (num_astray / counts[0] if counts[0] else 0.0, config.other_setting, config.right)


def _chance(seed: int, query_text: str, document_text: str) -> float:
    """A number in [0, 1) that depends on seed and texts alone."""
    return int(content_key("link", str(seed), query_text, document_text)[:8], 16) / 16**8


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What links tell of a collection. Shares are `None` where there is nothing to take a share of."""

    num_queries: int
    num_queries_without_link: int
    num_links: int
    share_of_right_linked: float | None
    share_of_other_setting_linked: float | None
    share_astray: float | None


def measure_links(collection: Collection, pairs: Iterable[Pair]) -> LinkRates:
    """Compare links with the gold labels of the whole collection, queries without a link included.

    Raises:
        InputError: a linked pair is no candidate pair of the collection.
    """
    linked = {(pair.query_id, pair.doc_id) for pair in pairs if pair.relation == "linked"}
    unknown = linked - collection.labels.keys()
    if unknown:
        raise InputError(f"expected links between candidates of the collection, found {min(unknown)}")
    by_label = Counter(collection.labels[pair] for pair in linked)
    total = Counter(collection.labels.values())
    return LinkRates(
        num_queries=len(collection.queries),
        num_queries_without_link=len(collection.queries) - len({query_id for query_id, _ in linked}),
        num_links=len(linked),
        share_of_right_linked=_share(by_label[2], total[2]),
        share_of_other_setting_linked=_share(by_label[1], total[1]),
        share_astray=_share(by_label[0], len(linked)),
    )


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
