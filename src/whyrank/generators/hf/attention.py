"""Attention over packed sequences that share what they have in common.

`attend` is registered with transformers under `IMPLEMENTATION`, so that the architectures stay upstream: they compute
queries, keys and values, and hand them over with the `Packing` (`packing.py`) that their caller gave to `model(...)`.

Sequences that write one token each are attended to together: their own keys in one batched product, and every shared
store once for all the sequences that it belongs to. The parts are put together by their log-sum-exp (Milakov &
Gimelshein 2018, arXiv 1805.02867), which is exact. On CPUs other ways are faster (`attention_loops.py`).

In the last layer, only tokens whose logits are wanted ask; the others are there to be seen (`last_layer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf import attention_loops, attention_products
from whyrank.generators.hf.attention_products import Rule
from whyrank.generators.hf.compiling import is_compiled, multiplies_bfloat16
from whyrank.generators.hf.kernels import write_rows
from whyrank.generators.hf.packing import Packing

__all__ = ["IMPLEMENTATION", "attend", "attention_by", "check_replaceable", "packed_attention"]

IMPLEMENTATION = "whyrank"


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
    rule = Rule(scaling, sliding_window, softcap, s_aux)
    out = queries.new_zeros((queries.shape[1], queries.shape[0], values.shape[2]))
    if packing.single:
        attend_single = attention_loops.attend_single if is_compiled(queries) else attention_products.attend_single
        out[: len(packing.single)] = attend_single(queries, packing, layer, rule)
    is_narrow = is_compiled(queries) and packing.pool.dtype == torch.bfloat16 and multiplies_bfloat16()
    for span in packing.several:
        num_asking = span.num_wanted if layer == packing.last_layer else span.num_tokens
        if num_asking:
            place = slice(span.start + span.num_tokens - num_asking, span.start + span.num_tokens)
            if is_narrow and rule.is_plain and not span.nodes and num_asking >= attention_loops.FEWEST_QUERIES:
                found = attention_loops.attend_several_narrow(queries[:, place], span, layer, rule)
            else:
                found = attention_products.attend_several(queries[:, place], span, packing, layer, rule)
            out[place] = found.transpose(0, 1)
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
