"""From judgments to an order: what a missing judgment means, and how the first stage is mixed in.

Pure functions. `score` is the model's alone; what comes out here is `rank_score`, which orders the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from whyrank.errors import InputError, TooManyUnparsed
from whyrank.records import Judgment, ScoredDocument

__all__ = ["Fuse", "OnUnparsed", "order", "parse_fuse"]

OnUnparsed = Literal["first_stage", "last", "error"]
"""What a pair without a score does to the ranking: take its place from the nearest judged first-stage neighbours,
go to the end, or stop."""

FuseMethod = Literal["none", "zscore", "minmax", "rrf"]
RRF_CONSTANT = 60  # Cormack, Clarke & Buettcher, SIGIR 2009


@dataclass(frozen=True, slots=True)
class Fuse:
    """How the first stage is mixed in; `weight` is the reranker's share (0 to 1) where the method has one."""

    method: FuseMethod = "none"
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.method}:{self.weight:g}" if self.method in ("zscore", "minmax") else self.method


def parse_fuse(text: str) -> Fuse:
    """Read `none`, `rrf`, `zscore:w` or `minmax:w`.

    Raises:
        InputError: it is none of these, or w is not between 0 and 1.
    """
    method, _, weight = text.partition(":")
    wrong = InputError(f"--fuse: expected none, rrf, zscore:w or minmax:w with w from 0 to 1, found {text!r}")
    if method not in get_args(FuseMethod) or bool(weight) != (method in ("zscore", "minmax")):
        raise wrong
    try:
        share = float(weight or 1.0)
    except ValueError as cause:
        raise wrong from cause
    if not 0.0 <= share <= 1.0:
        raise wrong
    return Fuse(method, share)  # type: ignore[arg-type]  # narrowed by the check above


def order(
    candidates: Sequence[ScoredDocument],
    judgments: Mapping[str, Judgment],
    *,
    fuse: Fuse = Fuse(),
    on_unparsed: OnUnparsed = "first_stage",
) -> list[tuple[ScoredDocument, float]]:
    """Candidates of one query with their `rank_score`, best first.

    Ties are broken by first-stage rank, then by doc_id. A candidate without a judgment counts as unparsed.

    Raises:
        TooManyUnparsed: `on_unparsed` is `error` and a candidate has no score.
    """
    ranked = sorted(candidates, key=lambda candidate: (candidate.rank, candidate.doc_id))
    scores = [_score_of(judgments.get(candidate.doc_id)) for candidate in ranked]
    unread = [candidate.doc_id for candidate, score in zip(ranked, scores, strict=True) if score is None]
    if unread and on_unparsed == "error":
        raise TooManyUnparsed(
            f"query {ranked[0].query_id}: no readable judgment for {len(unread)} of {len(ranked)} documents, the first "
            f"being {unread[0]}; see their status in judgments.jsonl, or choose --on-unparsed first_stage or last"
        )
    if on_unparsed == "first_stage":
        placed, ending = list(zip(ranked, impute(scores), strict=True)), []
    else:
        pairs = list(zip(ranked, scores, strict=True))
        placed = [(candidate, score) for candidate, score in pairs if score is not None]
        ending = [candidate for candidate, score in pairs if score is None]
    fused = _fuse(placed, fuse)
    best_first = sorted(fused, key=lambda entry: (-entry[1], entry[0].rank, entry[0].doc_id))
    lowest = min((score for _, score in fused), default=0.0)
    return best_first + [(candidate, lowest - 1.0) for candidate in ending]


def _score_of(judgment: Judgment | None) -> float | None:
    return None if judgment is None else judgment.score


def impute(scores: Sequence[float | None]) -> list[float]:
    """Fill each gap with the mean of the nearest known scores before and after it (one of them at the ends).

    All gaps become 0 if nothing is known. `scores` are in first-stage order.
    """
    known = [index for index, score in enumerate(scores) if score is not None]
    filled: list[float] = []
    for index, score in enumerate(scores):
        if score is not None:
            filled.append(score)
            continue
        before = [scores[i] for i in known if i < index][-1:]
        after = [scores[i] for i in known if i > index][:1]
        neighbours = [value for value in before + after if value is not None]
        filled.append(sum(neighbours) / len(neighbours) if neighbours else 0.0)
    return filled


def _fuse(placed: Sequence[tuple[ScoredDocument, float]], fuse: Fuse) -> list[tuple[ScoredDocument, float]]:
    if fuse.method == "none" or not placed:
        return list(placed)
    candidates = [candidate for candidate, _ in placed]
    model = np.array([score for _, score in placed], dtype=np.float64)
    first = np.array([candidate.score for candidate in candidates], dtype=np.float64)
    if fuse.method == "rrf":
        by_model = sorted(range(len(placed)), key=lambda i: (-model[i], candidates[i].rank, candidates[i].doc_id))
        place = {index: rank for rank, index in enumerate(by_model, start=1)}
        mixed = [1 / (RRF_CONSTANT + place[i]) + 1 / (RRF_CONSTANT + i + 1) for i in range(len(placed))]
        return list(zip(candidates, mixed, strict=True))
    scale = _zscore if fuse.method == "zscore" else _minmax
    fused = fuse.weight * scale(model) + (1.0 - fuse.weight) * scale(first)
    return list(zip(candidates, fused.tolist(), strict=True))


def _zscore(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0 and standard deviation 1 over the list; all zeros if the values are equal."""
    spread = values.std()
    # The mean of equal values may be off by a rounding error, and their deviation then above 0.
    is_flat = spread == 0 or bool(np.all(values == values[0]))
    return np.zeros_like(values) if is_flat else (values - values.mean()) / spread


def _minmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 to 1 over the list; all zeros if the values are equal."""
    width = values.max() - values.min()
    return (values - values.min()) / width if width > 0 else np.zeros_like(values)
