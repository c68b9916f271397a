"""Training on sequences side by side, each shared beginning read once.

In distillation the documents of a query share instruction and query; in refinement the samples of a pair share the
whole prompt. `pack` lays such strands out in one row without padding, with what they share in common; `predict` runs a
model over the row and gives the logits of exactly those tokens that are scored. Losses and gradients are those of the
strands in rows of their own: a token has the position and sees the tokens that it would have and see there.

    batch = pack([Strand(prompt + one, weights, (len(prompt),)), Strand(prompt + other, weights, (len(prompt),))])
    loss = -(batch.weights * continuation_log_probs(model, batch)).sum() / batch.weights.sum()

A beginning that only one strand of the batch has costs nothing: splits are offers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from whyrank.errors import InputError
from whyrank.training.shared_attention import Block, shared_attention

__all__ = ["PackedBatch", "Prediction", "Strand", "continuation_log_probs", "pack", "predict"]

MAX_WASTE = 1.3  # a block's table may be so many times larger than what its segments need
MIN_SCORES = 1 << 14  # per head; below that, another block costs more than padding
MAX_SCORES = 1 << 20  # per head; more would not fit the caches, or the memory of a small GPU
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Strand:
    """One sequence of tokens, and which of them are scored.

    `weights` has one number per token: 0 where the token is only read (no logits are computed for it), else what its
    loss counts. `splits` are ascending places at which a shared beginning may end, such as the number of tokens before
    the document, or of the prompt.

    Raises:
        InputError: a weight for every token is missing, the first token is scored (nothing predicts it), or the splits
            do not rise within the strand.
    """

    ids: Tokens
    weights: tuple[float, ...]
    splits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids or len(self.weights) != len(self.ids):
            raise InputError(f"expected one weight per token, found {len(self.weights)} for {len(self.ids)} tokens")
        if self.weights[0]:
            raise InputError("expected weight 0 for a strand's first token, which nothing predicts")
        if list(self.splits) != sorted(set(self.splits)) or not all(0 <= s <= len(self.ids) for s in self.splits):
            raise InputError(f"expected rising splits between 0 and {len(self.ids)}, found {self.splits}")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A row of tokens, and where in it the scored tokens are predicted.

    `ids` and `positions` are `(1, tokens)`. Of the scored tokens, strand by strand in the order in which `pack` got
    them: `places` are where in the row each is predicted, `targets` its id, `weights` what it counts, `strand_of`
    which strand it belongs to; all `(scored,)`. `num_scored` has their number for every strand, for `Tensor.split`.
    `num_separate` is how many tokens rows of their own would have held.
    """

    ids: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]
    places: Tensor
    targets: Tensor
    weights: Tensor
    strand_of: Tensor
    num_scored: tuple[int, ...]
    num_separate: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return self.ids.shape[1]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says about the scored tokens of a batch, in the batch's order.

    `logits` `(scored, vocabulary)` in the model's own precision, `states` `(scored, hidden)`: the last hidden states
    that they were made of, for a value head.
    """

    logits: Tensor
    states: Tensor
    targets: Tensor

    @property
    def log_probs(self) -> Tensor:
        """`(scored,)`: natural logarithm of the probability of every scored token, float32."""
        return -cross_entropy(self.logits.float(), self.targets, reduction="none")


def continuation_log_probs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """`(scored,)`: natural logarithm of the probability of every scored token, float32, with gradient."""
    return predict(model, batch).log_probs


def predict(model: PreTrainedModel, batch: PackedBatch) -> Prediction:
    """Run a model once over a packed batch.

    Args:
        model: a causal language model; in training mode its dropout acts.
        batch: on the model's device.

    Raises:
        UnsupportedModel: the architecture computes attention in a way of its own.
    """
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = cast(torch.nn.Module, model.get_output_embeddings()).register_forward_pre_hook(keep)
    try:
        with shared_attention(model, batch.blocks):
            output = model(
                input_ids=batch.ids,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=batch.places,
                blocks=batch.blocks,
            )
    finally:
        hook.remove()
    return Prediction(cast(Tensor, output.logits)[0], seen[0][0], batch.targets)


# ---- laying out -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Segment:
    """Consecutive tokens that the same strands have; `start` is where they stand in these strands."""

    ids: Tokens
    start: int
    parent: _Segment | None
    at: int = -1  # place of the first token in the row
    ancestry: tuple[_Segment, ...] = field(default=())

    @property
    def places(self) -> range:
        """Where in the row its tokens lie."""
        return range(self.at, self.at + len(self.ids))

    @property
    def num_scores(self) -> int:
        """How many pairs of an asking token and a key it has; the half that causality forbids is counted."""
        return len(self.ids) * (self.start + len(self.ids))


def pack(strands: Sequence[Strand], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay strands out in one row.

    Args:
        strands: at least one.
        device: where the tensors are made.

    Raises:
        InputError: there are no strands, or none of their tokens is scored.
    """
    if not any(any(strand.weights) for strand in strands):
        raise InputError("expected strands with scored tokens, found none")
    leaves, segments = _segments(strands)
    groups = _grouped(segments)
    ordered = [segment for group in groups for segment in group]
    for segment, at in zip(ordered, accumulate((len(s.ids) for s in ordered), initial=0), strict=False):
        segment.at = at
    scored = [(number, place) for number, strand in enumerate(strands) for place, w in enumerate(strand.weights) if w]
    row_of = [_row_places(leaf) for leaf in leaves]

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    weights = [strands[number].weights[place] for number, place in scored]
    return PackedBatch(
        ids=numbers(token for segment in ordered for token in segment.ids)[None],
        positions=numbers(segment.start + i for segment in ordered for i in range(len(segment.ids)))[None],
        blocks=tuple(_block(group, device) for group in groups),
        places=numbers(row_of[number][place - 1] for number, place in scored),
        targets=numbers(strands[number].ids[place] for number, place in scored),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        strand_of=numbers(number for number, _ in scored),
        num_scored=tuple(sum(weight != 0 for weight in strand.weights) for strand in strands),
        num_separate=sum(len(strand.ids) for strand in strands),
    )


def _segments(strands: Sequence[Strand]) -> tuple[list[_Segment], list[_Segment]]:
    """The last segment of every strand, and all segments."""
    users = Counter(strand.ids[:split] for strand in strands for split in strand.splits)
    shared: dict[Tokens, _Segment] = {}
    leaves: list[_Segment] = []
    for strand in strands:
        # Strands with the same ids keep an end of their own each, so that every strand has its last segment.
        splits = [split for split in strand.splits if 0 < split < len(strand.ids)]
        counts = [*(users[strand.ids[:split]] for split in splits), 1]
        parent, start = None, 0
        for number, split in enumerate(splits):
            if counts[number] > counts[number + 1]:  # else whoever shares it shares the longer one, too
                known = shared.setdefault(strand.ids[:split], _Segment(strand.ids[start:split], start, parent))
                parent, start = known, split
        leaves.append(_Segment(strand.ids[start:], start, parent))
    everything = [*shared.values(), *leaves]
    for segment in everything:  # parents come before their children
        if segment.parent is not None:
            segment.ancestry = (*segment.parent.ancestry, segment.parent)
    return leaves, everything


def _row_places(leaf: _Segment) -> list[int]:
    """Where in the row the tokens of a strand lie, in the strand's order."""
    return [place for segment in (*leaf.ancestry, leaf) for place in segment.places]


def _grouped(segments: Iterable[_Segment]) -> list[list[_Segment]]:
    """Segments of similar size together, so that tables are neither many nor mostly empty."""
    groups: list[list[_Segment]] = []
    needed = 0
    for segment in sorted(segments, key=lambda s: (len(s.ids), s.start)):
        if groups:
            candidate = [*groups[-1], segment]
            own = len(segment.ids)  # the longest, because of the order
            size = len(candidate) * own * (own + max(found.start for found in candidate))
            is_tight = size <= MAX_WASTE * (needed + segment.num_scores)
            if size <= MAX_SCORES and (is_tight or size <= MIN_SCORES):
                groups[-1], needed = candidate, needed + segment.num_scores
                continue
        groups.append([segment])
        needed = segment.num_scores
    return groups


def _block(group: Sequence[_Segment], device: torch.device | str) -> Block:
    """Tables of places for segments that lie one after the other in the row."""
    num_own = max(len(segment.ids) for segment in group)
    num_context = max(segment.start for segment in group)
    slots = [number * num_own + i for number, segment in enumerate(group) for i in range(len(segment.ids))]
    chains: dict[int, int] = {}
    context: list[list[int]] = []
    chain_of: list[int] = []
    for segment in group:
        if id(segment.parent) not in chains:
            chains[id(segment.parent)] = len(context)
            places = [place for ancestor in segment.ancestry for place in ancestor.places]
            context.append(places + [0] * (num_context - len(places)))
        chain_of.append(chains[id(segment.parent)])

    def numbers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Block(
        start=group[0].at,
        end=group[-1].at + len(group[-1].ids),
        num_own=num_own,
        slots=numbers(slots),
        own_lengths=numbers([len(segment.ids) for segment in group]),
        context=torch.tensor(context, dtype=torch.long, device=device).view(len(context), num_context),
        chain_of=numbers(chain_of),
        context_lengths=numbers([segment.start for segment in group]),
    )
