"""Attention, with gradients, over a row in which many sequences share what they have in common.

The row holds segments side by side: a query's prompt once, then what follows it for every document, or a whole prompt
once and then every sample. A segment's tokens see those of its ancestors and, causally, their own. `attend_blocks` is
registered with transformers under `IMPLEMENTATION`, so that the architectures stay upstream. It needs no mask over the
whole row: segments of similar size form a block, padded only here and not in the linear layers, and are attended to in
one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf.attention import attention_by

__all__ = ["IMPLEMENTATION", "Block", "attend_blocks", "shared_attention"]

IMPLEMENTATION = "whyrank_shared"
PLAIN_DEVICES: tuple[str, ...] = ("cpu",)  # where single steps are faster than torch's fused attention


@dataclass(slots=True)
class Block:
    """Segments that are attended to together: the row's tokens `[start, end)`, one segment after the other.

    `slots` `(tokens,)` is the place of each of them in a table of `num_segments` times `num_own`. `context`
    `(chains, num_context)` are the row's places of what distinct ancestries hold, `chain_of` `(segments,)` which of
    them a segment has, `context_lengths` and `own_lengths` `(segments,)` how many tokens are real.
    """

    start: int
    end: int
    num_own: int
    slots: Tensor
    own_lengths: Tensor
    context: Tensor
    chain_of: Tensor
    context_lengths: Tensor
    _seen: dict[int | None, Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def num_segments(self) -> int:
        """How many segments there are."""
        return len(self.own_lengths)

    @property
    def is_used(self) -> bool:
        """Whether any layer has asked for it."""
        return bool(self._seen)

    def seen(self, window: int | None) -> Tensor:
        """`(segments, 1, own, context + own)`: whether a token sees a key; worked out once for all layers.

        A place of the table that holds no token sees everything, because a softmax over nothing is not a number;
        nobody reads it.
        """
        if window not in self._seen:
            own = torch.arange(self.num_own, device=self.slots.device)
            before = torch.arange(self.context.shape[1], device=self.slots.device)
            lengths = self.context_lengths[:, None, None]
            asking = lengths + own[:, None]  # positions of the asking tokens
            in_context = before.expand(len(lengths), self.num_own, -1)
            is_visible = in_context < lengths
            in_own = (own[None, :] <= own[:, None]).expand(len(lengths), -1, -1)
            if window is not None:
                is_visible = is_visible & (in_context > asking - window)
                in_own = in_own & (own[None, :] > own[:, None] - window)
            is_empty = (own >= self.own_lengths[:, None])[:, :, None]
            self._seen[window] = (torch.cat([is_visible, in_own], dim=2) | is_empty)[:, None]
        return self._seen[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The same as a number to add to scores: adding is cheaper than filling, and its gradient costs nothing."""
        if (window, dtype) not in self._biases:
            hidden = ~self.seen(window)
            self._biases[window, dtype] = hidden.to(dtype) * torch.finfo(dtype).min
        return self._biases[window, dtype]


class _Spread(torch.autograd.Function):
    """Rows to their slots in a table that is zero elsewhere. Every slot has one row at most, so that the gradient is a
    plain look-up; torch's own would add up."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots)
        table = rows.new_zeros((num_slots, *rows.shape[1:]))
        table[slots] = rows
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grads[0][slots], None, None


class _Collect(torch.autograd.Function):
    """The reverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = len(table)
        return table[slots]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        table = grads[0].new_zeros((ctx.num_slots, *grads[0].shape[1:]))
        table[slots] = grads[0]
        return table, None


def attend_blocks(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    blocks: tuple[Block, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: `(1, heads, tokens, head size)`, rotated; `key` and `value` likewise with key/value heads.
        key: see `query`.
        value: see `query`.
        attention_mask: none is made for this implementation.
        blocks: what the tokens are; together they cover the row.
        scaling: factor of the scores; one over the root of the head size if `None`.
        dropout: share of the weights that are left out.
        sliding_window: how many tokens a token sees, itself included; all if `None`.
        softcap: scores are squeezed into (-softcap, softcap) by tanh (Gemma 2).
        s_aux: one more score per head that takes weight and gives no value (attention sinks).
        unused: what other implementations want to know.

    Returns:
        `(1, tokens, heads, head size)`, and no weights.
    """
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, size)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = _Rule(factor, dropout, sliding_window, softcap, s_aux)
    out = [_attend_block(queries, keys, values, block, rule) for block in blocks]
    return torch.cat(out)[None] if len(out) > 1 else out[0][None], None


AttentionInterface.register(IMPLEMENTATION, attend_blocks)


@contextmanager
def shared_attention(model: PreTrainedModel, blocks: Sequence[Block]) -> Iterator[None]:
    """Have a model's layers call `attend_blocks` for a pass inside the block; outside it, the model is what it was.

    Raises:
        UnsupportedModel: its architecture computes attention in a way of its own, and never asked for the blocks.
    """
    with attention_by(model, IMPLEMENTATION):
        yield
    if not all(block.is_used for block in blocks):
        raise UnsupportedModel(
            f"{model.config.model_type} computes attention in a way of its own, which does not know shared beginnings; "
            "train it in separate rows"
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """How scores become weights in one layer."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def fused(self, queries: Tensor, keys: Tensor, values: Tensor, block: Block) -> Tensor:
        """torch's own attention, all `(segments, heads, tokens, size)`."""
        return scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=block.seen(self.window),
            dropout_p=self.dropout,
            scale=self.scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )

    def plain(self, queries: Tensor, keys: Tensor, values: Tensor, block: Block) -> Tensor:
        """The same in single steps, whose gradients are several times faster on CPUs than those of the fused ones."""
        num_segments, num_heads, num_own, size = queries.shape
        per_head = num_heads // keys.shape[1]
        asked = (queries * self.scaling).reshape(num_segments, keys.shape[1], per_head * num_own, size)
        scores = (asked @ keys.transpose(2, 3)).unflatten(2, (per_head, num_own))
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores + block.bias(self.window, scores.dtype)[:, None]
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).view(1, keys.shape[1], per_head, 1, 1)
            scores = torch.cat([scores, sinks.expand(num_segments, -1, -1, num_own, -1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)[..., : keys.shape[2]]
        if self.dropout:
            weights = drop(weights, self.dropout)
        found: Tensor = weights.flatten(2, 3) @ values
        return found.reshape(num_segments, num_heads, num_own, values.shape[3])


def _attend_block(queries: Tensor, keys: Tensor, values: Tensor, block: Block, rule: _Rule) -> Tensor:
    """`(tokens of the block, heads, size)`."""
    asked, own_keys, own_values = (_table(rows[block.start : block.end], block) for rows in (queries, keys, values))
    if block.context.shape[1]:
        own_keys, own_values = (
            torch.cat([_context(rows, block), own], dim=1) for rows, own in ((keys, own_keys), (values, own_values))
        )
    asked, own_keys, own_values = (tensor.transpose(1, 2) for tensor in (asked, own_keys, own_values))
    is_plain = queries.device.type in PLAIN_DEVICES or rule.softcap is not None or rule.sinks is not None
    attend = rule.plain if is_plain else rule.fused
    out = attend(asked, own_keys, own_values, block)
    collected = _Collect.apply(out.transpose(1, 2).flatten(0, 1), block.slots)  # type: ignore[no-untyped-call]
    return cast(Tensor, collected)


def _table(rows: Tensor, block: Block) -> Tensor:
    """`(segments, own, heads, size)`, zero where there is no token."""
    num_slots = block.num_segments * block.num_own
    table = cast(Tensor, _Spread.apply(rows, block.slots, num_slots))  # type: ignore[no-untyped-call]
    return table.view(block.num_segments, block.num_own, *rows.shape[1:])


def _context(rows: Tensor, block: Block) -> Tensor:
    """`(segments, context, heads, size)`: the ancestors' tokens; what stands behind the real ones is never seen."""
    chains = rows.index_select(0, block.context.flatten()).view(*block.context.shape, *rows.shape[1:])
    return chains.index_select(0, block.chain_of) if len(block.chain_of) > 1 else chains
