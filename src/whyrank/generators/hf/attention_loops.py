"""Attention over packed sequences on a CPU where torch's own is slow: for single queries, and in bfloat16.

torch's fused attention is no faster in bfloat16 than in float32 on CPUs, its products are twice as fast. They round
scores, too. A key that is the same for all changes no weight; so the mean of some is taken from all, which keeps scores
small and their rounding with them (Zhang et al. 2024, SageAttention, arXiv 2410.02367).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from whyrank.generators.hf.attention_products import Rule, seen_by
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
    """`(heads, tokens, size)` for the last tokens of one sequence, as many as there are queries, by a plain rule."""
    keys, values = (tensor.bfloat16() for tensor in seen_by(span, layer))
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    keys = _filled_up(keys - keys[:, ::KEYS_PER_SAMPLE].mean(dim=1, keepdim=True), KEY_STEP)
    values = _filled_up(values, KEY_STEP)
    # (key/value heads, queries per head, tokens, size)
    asked = queries.bfloat16().unflatten(0, (keys.shape[0], -1))
    found = []
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        some = _filled_up(asked[:, :, start : start + QUERIES_AT_ONCE], QUERY_STEP)
        places = start + np.arange(some.shape[2])
        ends = np.where(places < num_queries, num_keys - num_queries + 1 + places, 1)  # what fills up sees one key
        starts = np.zeros_like(ends) if rule.window is None else np.maximum(ends - rule.window, 0)
        num_seen = _rounded_up(int(ends.max()), KEY_STEP)
        starts, ends = np.tile(starts, some.shape[1]), np.tile(ends, some.shape[1])
        scores = some.flatten(1, 2) @ keys[:, :num_seen].contiguous().transpose(1, 2)
        weigh_scores(scores, starts, ends, scaling=rule.scaling)
        found.append((scores @ values[:, :num_seen]).unflatten(1, some.shape[1:3]).flatten(0, 1))
        del scores  # or the next ones would be made beside them
    return torch.cat(found, dim=1)[:, :num_queries].to(queries.dtype)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _filled_up(rows: Tensor, step: int) -> Tensor:
    """`(…, tokens, size)` with as many tokens as steps have, zeros behind the others."""
    return pad(rows, (0, 0, 0, -rows.shape[-2] % step))


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
