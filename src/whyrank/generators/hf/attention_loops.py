"""Attention over packed sequences on a CPU where torch's own is slow: for single queries, and in bfloat16.

torch's fused attention is no faster in bfloat16 than in float32 on CPUs, its products are twice as fast. They round
scores, too. A key that is the same for all changes no weight; so the mean of some is taken from all, which keeps scores
small and their rounding with them (Zhang et al. 2024, SageAttention, arXiv 2410.02367).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whyrank.generators.hf.attention_products import Rule, joined, parts_seen
from whyrank.generators.hf.kernels import attend_rows, weigh_scores
from whyrank.generators.hf.packing import Packing, Span

__all__ = ["attend_several_narrow", "attend_single"]

# Of a prompt: its first tokens need not be held against its last ones, but every product has to be worth starting.
QUERIES_AT_ONCE = 256
KEYS_PER_SAMPLE = 16  # one of so many counts for the mean
# oneDNN keeps code for each size of product it has met, over half a megabyte, and is slow when it meets a new one.
QUERY_STEP, KEY_STEP = 64, 128
FEWEST_QUERIES = 32  # for fewer, filling up costs more than it gains


def attend_several_narrow(queries: Tensor, span: Span, layer: int, rule: Rule) -> Tensor:
    """`(heads, tokens, size)` in bfloat16, by a plain rule, for the last tokens of one sequence, as many as there are
    queries."""
    keys, values = (_in_a_row(parts, KEY_STEP) for parts in zip(*parts_seen(span, layer), strict=True))
    num_heads, num_queries, _ = queries.shape
    num_before = span.position + span.num_tokens - num_queries
    keys.sub_(keys[:, : num_before + num_queries : KEYS_PER_SAMPLE].mean(dim=1, keepdim=True))
    # (key/value heads, queries per head, tokens, size)
    asked = _in_a_row([queries], QUERY_STEP).unflatten(0, (keys.shape[0], -1))
    found = []
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        some = asked[:, :, start : start + QUERIES_AT_ONCE]
        num_asking = min(QUERIES_AT_ONCE, num_queries - start)
        num_seen = _rounded_up(num_before + start + num_asking, KEY_STEP)
        # Products with a piece of a larger tensor's keys take a fifth longer.
        scores = some.flatten(1, 2) @ keys[:, :num_seen].contiguous().transpose(1, 2)
        by_head = scores.view(num_heads, -1, num_seen)
        weigh_scores(by_head, num_before + start + 1, num_asking, window=rule.window, scaling=rule.scaling)
        found.append((scores @ values[:, :num_seen]).view(num_heads, -1, values.shape[2])[:, :num_asking])
        del scores, by_head  # or the next ones would be made beside them
    return joined(found)


def _in_a_row(parts: Sequence[Tensor], step: int) -> Tensor:
    """Parts `(heads, tokens, size)` one behind the other in bfloat16, and zeros up to a whole number of steps."""
    heads, _, size = parts[0].shape
    num_tokens = sum(part.shape[1] for part in parts)
    zeros = torch.zeros((heads, -num_tokens % step, size), dtype=torch.bfloat16)
    return torch.cat([*(part.bfloat16() for part in parts), zeros], dim=1)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def attend_single(queries: Tensor, packing: Packing, layer: int, rule: Rule) -> Tensor:
    """`(sequences, heads, size)` for sequences with one new token each."""
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
