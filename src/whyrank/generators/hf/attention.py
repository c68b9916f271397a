"""Attention over packed sequences that share what they have in common.

`attend` is registered with transformers under `IMPLEMENTATION`, so that the architectures stay upstream: they compute
queries, keys and values, and hand them over with the `Packing` (`packing.py`) that their caller gave to `model(...)`.

Sequences that write one token each are attended to together: their own keys in one batched product, and every shared
store once for all the sequences that it belongs to. The parts are put together by their log-sum-exp (Milakov &
Gimelshein 2018, arXiv 1805.02867), which is exact. In float32 on CPUs, a compiled loop does both (`kernels.py`).

In the last layer, only tokens whose logits are wanted ask; the others are there to be seen (`last_layer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf.kernels import attend_rows, is_compiled, write_rows
from whyrank.generators.hf.packing import Packing, Span, hidden

__all__ = ["IMPLEMENTATION", "attend", "attention_by", "check_replaceable", "packed_attention"]

IMPLEMENTATION = "whyrank"
QUERIES_AT_ONCE = 64  # of a prompt on a CPU: its first tokens need not be held against its last ones


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' `AttentionInterface`.

    Args:
        module: the attention layer; its `layer_idx` says which.
        query: `(1, heads, tokens, head size)`, rotated; `key` and `value` likewise with key/value heads.
        key: see `query`.
        value: see `query`.
        attention_mask: none is made for this implementation.
        packing: what the tokens are.
        scaling: factor of the scores.
        dropout: none at inference.
        sliding_window: how many tokens a token sees, itself included; all if `None`.
        softcap: scores are squeezed into (-softcap, softcap) by tanh (Gemma 2).
        s_aux: one more score per head that takes weight and gives no value (attention sinks).
        unused: what other implementations want to know.

    Returns:
        `(1, tokens, heads, head size)`, and no weights.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = query[0], key[0].to(query.dtype), value[0].to(query.dtype)  # under autocast they differ
    packing.pool.prepare(layer, keys, values)
    if packing.single:
        for pool, rows in zip(packing.pool.layers[layer], (keys, values), strict=True):
            new = rows[:, : len(packing.single)].transpose(0, 1)
            if is_compiled(queries):
                write_rows(pool, new, packing.slots, packing.ends - 1)
            else:
                pool[packing.slots, :, packing.ends - 1] = new
    for span in packing.several:
        place = slice(span.start, span.start + span.num_tokens)
        span.store.write(layer, span.at, keys[:, place], values[:, place], packing.pool.dtype)
    rule = _Rule(scaling, sliding_window, softcap, s_aux)
    out = queries.new_zeros((queries.shape[1], queries.shape[0], values.shape[2]))
    if packing.single:
        attend_single = _attend_single_compiled if is_compiled(queries) else _attend_single
        out[: len(packing.single)] = attend_single(queries, packing, layer, rule)
    for span in packing.several:
        num_asking = span.num_wanted if layer == packing.last_layer else span.num_tokens
        if num_asking:
            place = slice(span.start + span.num_tokens - num_asking, span.start + span.num_tokens)
            out[place] = _attend_several(queries[:, place], span, packing, layer, rule).transpose(0, 1)
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attend)


@contextmanager
def attention_by(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Have a model's layers compute attention so inside the block: they ask its config each time they run."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def packed_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Have a model's layers call `attend` inside the block; outside it, the model is what it was."""
    return attention_by(model, IMPLEMENTATION)


def check_replaceable(model: PreTrainedModel) -> None:
    """Refuse a model whose attention cannot be replaced.

    Raises:
        UnsupportedModel: its architecture computes attention in a way of its own.
    """
    usual = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModel(
            f"{model.config.model_type} computes attention in a way of its own, which whyrank's engine cannot replace"
        )
    model.set_attn_implementation(usual or "eager")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How scores become weights in one layer."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own fused attention follows it."""
        return self.softcap is None and self.sinks is None

    def part(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention to some of the keys.

        Args:
            queries: `(rows, heads, queries, size)`.
            keys: `(rows, heads, keys, size)`; `values` likewise.
            values: see `keys`.
            mask: what is added to the scores, 0 or very little; broadcasts to `(rows, heads, queries, keys)`.

        Returns:
            Output `(rows, heads, queries, size)`, and log-sum-exp `(rows, heads, queries)` in float32.
        """
        scores = (queries @ keys.transpose(-1, -2)).float() * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask
        total = scores.logsumexp(dim=-1)
        return (scores - total[..., None]).exp().to(values.dtype) @ values, total

    def with_sinks(self, out: Tensor, total: Tensor, heads_at: int) -> Tensor:
        """Take from every head the weight that its sink attracts; `heads_at` is the dimension of the heads."""
        if self.sinks is None:
            return out
        shape = [1] * total.dim()
        shape[heads_at] = -1
        return out * torch.sigmoid(total - self.sinks.float().view(shape))[..., None].to(out.dtype)


def _attend_several(queries: Tensor, span: Span, packing: Packing, layer: int, rule: _Rule) -> Tensor:
    """`(heads, tokens, size)` for the last tokens of one sequence, as many as there are queries."""
    parts = [tuple(tensor[:, : store.length] for tensor in store.layers[layer]) for store in span.context]
    parts.append(tuple(tensor[:, : span.end] for tensor in span.store.layers[layer]))
    keys, values = (
        (torch.cat([part[which] for part in parts], dim=1) if len(parts) > 1 else parts[0][which]).to(queries.dtype)
        for which in (0, 1)
    )
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    mask = packing.causal_mask(num_keys, num_queries, rule.window)
    at_once = QUERIES_AT_ONCE if queries.device.type == "cpu" else num_queries
    found = []
    for start in range(0, num_queries, at_once):
        end = min(start + at_once, num_queries)
        num_seen = num_keys - num_queries + end  # by the last of these queries
        part = queries[:, start:end], keys[:, :num_seen], values[:, :num_seen], mask[start:end, :num_seen]
        found.append(_attend_some(*part, rule))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _attend_some(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: _Rule) -> Tensor:
    """`(heads, queries, size)`: torch's fused attention where it follows the rule."""
    num_groups = queries.shape[0] // keys.shape[0]
    if rule.is_plain:
        return scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            attn_mask=mask.to(queries.dtype),
            scale=rule.scaling,
            enable_gqa=num_groups > 1,
        )[0]
    repeated = [tensor.repeat_interleave(num_groups, dim=0)[None] for tensor in (keys, values)]
    out, total = rule.part(queries[None], repeated[0], repeated[1], mask)
    return rule.with_sinks(out[0], total[0], heads_at=0)


def _attend_single_compiled(queries: Tensor, packing: Packing, layer: int, rule: _Rule) -> Tensor:
    """`(sequences, heads, size)` for sequences with one new token each, in float32 on a CPU."""
    keys, values = packing.pool.layers[layer]
    # (sequences, key/value heads, queries per head, size)
    asked = queries[:, : len(packing.single)].transpose(0, 1).unflatten(1, (keys.shape[1], -1)).contiguous()
    out = asked.new_zeros((*asked.shape[:3], values.shape[3]))
    total = asked.new_full(asked.shape[:3], -torch.inf)
    shared, own = packing.seen(rule.window)
    for store, seen in shared:
        some_keys, some_values = (tensor[None] for tensor in store.layers[layer])
        attend_rows(asked, some_keys, some_values, seen, out, total, scaling=rule.scaling, softcap=rule.softcap)
    attend_rows(asked, keys, values, own, out, total, scaling=rule.scaling, softcap=rule.softcap)
    return rule.with_sinks(out.flatten(1, 2), total.flatten(1, 2), heads_at=1)


def _attend_single(queries: Tensor, packing: Packing, layer: int, rule: _Rule) -> Tensor:
    """The same on other devices and in other precisions."""
    keys, values = packing.pool.layers[layer]
    slots, num_rows = packing.slots, packing.num_rows
    asked = queries[:, : len(packing.single)].transpose(0, 1).unflatten(1, (keys.shape[1], -1))
    in_slots = asked.new_zeros((num_rows, *asked.shape[1:]))
    in_slots[slots] = asked
    mask = packing.mask(rule.window)
    num_keys = mask.shape[-1]
    out, total = rule.part(in_slots, keys[:num_rows, :, :num_keys], values[:num_rows, :, :num_keys], mask)
    out, total = out[slots], total[slots]
    for store, rows, offset in packing.shared:
        shared_keys, shared_values = (tensor[None, :, : store.length] for tensor in store.layers[layer])
        out_of_window = None
        if rule.window is not None:
            places = offset + torch.arange(store.length, device=keys.device)
            seen = places > packing.positions[rows, None] - rule.window
            out_of_window = hidden(seen.repeat_interleave(asked.shape[2], dim=0))
        # All sequences that share the store, as one matrix of queries per head.
        matrix = asked[rows].transpose(0, 1).flatten(1, 2)[None]
        more, more_total = (part[0] for part in rule.part(matrix, shared_keys, shared_values, out_of_window))
        more = more.unflatten(1, (len(rows), -1)).transpose(0, 1)
        more_total = more_total.unflatten(1, (len(rows), -1)).transpose(0, 1)
        both = torch.logaddexp(total[rows], more_total)
        weight, more_weight = ((part - both).exp()[..., None] for part in (total[rows], more_total))
        out[rows] = (out[rows] * weight + more * more_weight).to(out.dtype)
        total[rows] = both
    return rule.with_sinks(out.flatten(1, 2), total.flatten(1, 2), heads_at=1)
