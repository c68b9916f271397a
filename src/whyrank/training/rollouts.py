"""What rewards are given for: sampled answers about the candidates of a query, and what is known of the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from whyrank.records import Status

__all__ = ["Evidence", "EvidenceSource", "Rollout", "RolloutCandidate", "RolloutGroup"]

EvidenceSource = Literal["qrels", "link", "unlinked", "consensus"]
"""Where a belief about a label comes from: a person, an answer's link, the absence of one, or teachers."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A belief about a label: what it is worth on the template's scale, and a trust of at least 0.

    Trusts are weights of votes: evidence of trust 1 outweighs two pieces of trust .4 that say otherwise.
    """

    value: float
    trust: float
    source: EvidenceSource


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer.

    `label` was drawn from `probs`, the distribution over the scale in its order; `value` is what it is worth. `status`
    is that of a judgment: `forced` if the explanation hit its cap. `label`, `value` and `probs` are `None` where no
    label could be read. `num_tokens` counts the explanation.
    """

    explanation: str
    status: Status
    label: str | None
    value: float | None
    probs: tuple[float, ...] | None
    num_tokens: int

    @property
    def is_as_asked(self) -> bool:
        """Whether it ended by itself and has a label."""
        return self.status in ("ok", "low_mass")


@dataclass(frozen=True, slots=True)
class RolloutCandidate:
    """One document of a query: the passage that the model was shown, its samples, and what is known of its label."""

    doc_id: str
    passage: str
    rollouts: tuple[Rollout, ...]
    evidence: tuple[Evidence, ...] = ()

    @property
    def believed(self) -> float | None:
        """The mean of what the evidence says, weighted by trust; `None` without any trust."""
        total = sum(found.trust for found in self.evidence)
        return sum(found.trust * found.value for found in self.evidence) / total if total else None


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All samples about the candidates of one query. `values` are the worths of the labels, `max_tokens` the cap of the
    explanation."""

    query_id: str
    query: str
    candidates: tuple[RolloutCandidate, ...]
    values: tuple[float, ...]
    max_tokens: int

    @property
    def pairs(self) -> Iterator[tuple[RolloutCandidate, Rollout]]:
        """Every rollout with its candidate: candidate by candidate, sample by sample. Rewards come in this order."""
        return ((candidate, rollout) for candidate in self.candidates for rollout in candidate.rollouts)

    @property
    def num_rollouts(self) -> int:
        """How many numbers a reward has to give."""
        return sum(len(candidate.rollouts) for candidate in self.candidates)

    @property
    def span(self) -> float:
        """Distance between the best and the worst label."""
        return max(self.values) - min(self.values)

    def of_candidates(self, numbers: Sequence[float]) -> list[list[float]]:
        """One number per rollout, as one list per candidate."""
        source = iter(numbers)
        return [[next(source) for _ in candidate.rollouts] for candidate in self.candidates]
