"""Attention over packed sequences by torch alone: everywhere but where `attention_loops.py` has a faster way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from whyrank.generators.hf.packing import Packing, Span, hidden

__all__ = ["Rule", "attend_several", "attend_single", "joined", "parts_seen"]

QUERIES_AT_ONCE = 64  # of a prompt on a CPU: its first tokens need not be held against its last ones


@dataclass(frozen=True, slots=True)
class Rule:
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


def attend_several(queries: Tensor, span: Span, packing: Packing, layer: int, rule: Rule) -> Tensor:
    """`(heads, tokens, size)` for the last tokens of one sequence, as many as there are queries."""
    keys, values = (joined(parts).to(queries.dtype) for parts in zip(*parts_seen(span, layer), strict=True))
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    mask = packing.causal_mask(span, num_queries, rule.window)
    at_once = QUERIES_AT_ONCE if queries.device.type == "cpu" else num_queries
    found = []
    for start in range(0, num_queries, at_once):
        end = min(start + at_once, num_queries)
        num_seen = num_keys - num_queries + end  # by the last of these queries
        part = queries[:, start:end], keys[:, :num_seen], values[:, :num_seen], mask[start:end, :num_seen]
        found.append(_attend_some(*part, rule))
    return joined(found)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`(heads, tokens, size)` one behind the other; copied only if there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def parts_seen(span: Span, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values up to a span's last token, `(key/value heads, tokens, size)`, store by store as they are kept."""
    parts = [(store.layers[layer], store.length) for store in span.context]
    parts.append((span.store.layers[layer], span.end))
    return [(keys[:, :length], values[:, :length]) for (keys, values), length in parts]


def _attend_some(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
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


def attend_single(queries: Tensor, packing: Packing, layer: int, rule: Rule) -> Tensor:
    """`(sequences, heads, size)` for sequences with one new token each."""
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
