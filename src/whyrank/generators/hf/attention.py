"""Attention over packed sequences that share what they have in common.

One forward pass holds the new tokens of many sequences side by side in a single row, without padding. Keys and values
of each sequence lie in a chain of stores: what it shares with others (instruction and query, or a whole prompt), then
its own. `attend` is registered with transformers under `IMPLEMENTATION`, so that the architectures stay upstream: they
compute queries, keys and values, and hand them over with the `Packing` that their caller gave to `model(...)`.

Sequences that write one token each are attended to together: their own keys in one batched product, and every shared
store once for all the sequences that it belongs to. The parts are put together by their log-sum-exp (Milakov &
Gimelshein 2018, arXiv 1805.02867), which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from whyrank.errors import UnsupportedModel

__all__ = ["IMPLEMENTATION", "Packing", "Pool", "Span", "Store", "attend", "check_replaceable", "packed_attention"]

IMPLEMENTATION = "whyrank"
BLOCK_ROWS = 8


@dataclass(slots=True)
class Store:
    """Keys and values of consecutive tokens: per layer two tensors `(key/value heads, capacity, head size)`, of which
    the first `length` tokens are filled, or will be by the pass that is being packed."""

    capacity: int
    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def write(self, layer: int, at: int, keys: Tensor, values: Tensor) -> None:
        """Put tokens, `(heads, tokens, head size)`, at a place; memory is taken by the first write to a layer."""
        if layer not in self.layers:
            shape = (keys.shape[0], self.capacity)
            self.layers[layer] = (keys.new_zeros((*shape, keys.shape[2])), values.new_zeros((*shape, values.shape[2])))
        own_keys, own_values = self.layers[layer]
        own_keys[:, at : at + keys.shape[1]] = keys
        own_values[:, at : at + keys.shape[1]] = values


@dataclass(slots=True)
class Pool:
    """Stores of one capacity in common tensors `(slots, heads, capacity, head size)` per layer, so that sequences
    that write one token each can be attended to at once. Sequences in use lie in the first slots."""

    num_slots: int
    capacity: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)

    def take(self) -> Store:
        """The next free slot, as an empty store."""
        self.stores.append(Store(self.capacity))
        return self.stores[-1]

    def give_back(self, store: Store) -> None:
        """Free a slot; the last sequence moves into it."""
        slot, last = self.slot_of(store), self.stores.pop()
        if last is store:
            return
        for layer, (keys, values) in self.layers.items():
            keys[slot, :, : last.length] = keys[len(self.stores), :, : last.length]
            values[slot, :, : last.length] = values[len(self.stores), :, : last.length]
            last.layers[layer] = (keys[slot], values[slot])
        self.stores[slot] = last

    def slot_of(self, store: Store) -> int:
        """Where the store lies."""
        return next(slot for slot, found in enumerate(self.stores) if found is store)

    def prepare(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take memory for a layer before its first write, and show every store its part of it."""
        if layer not in self.layers:
            shape = (self.num_slots, keys.shape[0], self.capacity)
            self.layers[layer] = (keys.new_zeros((*shape, keys.shape[2])), values.new_zeros((*shape, values.shape[2])))
        all_keys, all_values = self.layers[layer]
        for slot, store in enumerate(self.stores):
            if layer not in store.layers:
                store.layers[layer] = (all_keys[slot], all_values[slot])


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of a packed row that belong to one sequence: `num_tokens` from `start` on in the row go to
    `store`, from `at` on; they see what stands before them there, and all of `context`."""

    start: int
    num_tokens: int
    store: Store
    at: int
    context: tuple[Store, ...]

    @property
    def end(self) -> int:
        """Behind the last of them in the store."""
        return self.at + self.num_tokens

    @property
    def position(self) -> int:
        """Where the first of them stands in its sequence, from 0."""
        return sum(store.length for store in self.context) + self.at


@dataclass(frozen=True)  # no slots: what every layer asks for is worked out once
class Packing:
    """What the tokens of one packed forward pass are.

    `single` are spans of one token whose stores lie in the pool; they come first in the row. Among `several`, one may
    fill the store that is the context of another.
    """

    pool: Pool
    single: Sequence[Span]
    several: Sequence[Span]
    device: torch.device
    _blocks: dict[int | None, list[tuple[slice, int, Tensor]]] = field(default_factory=dict, init=False)

    @cached_property
    def slots(self) -> Tensor:
        """Where in the pool the single spans' stores lie."""
        return self._numbers([self.pool.slot_of(span.store) for span in self.single])

    @cached_property
    def ends(self) -> Tensor:
        """How many tokens the single spans' stores hold, the new one included."""
        return self._numbers([span.end for span in self.single])

    @cached_property
    def positions(self) -> Tensor:
        """Where the single spans' tokens stand in their sequences."""
        return self._numbers([span.position for span in self.single])

    @cached_property
    def num_rows(self) -> int:
        """How many of the pool's slots the single spans reach over."""
        return int(self.slots.max()) + 1

    def blocks(self, window: int | None) -> list[tuple[slice, int, Tensor]]:
        """Neighbouring slots that are attended to at once, the most tokens that a store among them holds, and what is
        hidden of these, `(slots, 1, 1, tokens)`. Stores of neighbours are about equally long; on a CPU a few at a time
        leave little padding, elsewhere one product for all is faster."""
        if window not in self._blocks:
            ends = torch.ones(self.num_rows, dtype=torch.long, device=self.device)
            ends[self.slots] = self.ends
            size = BLOCK_ROWS if self.device.type == "cpu" else self.num_rows
            self._blocks[window] = found = []
            for start in range(0, self.num_rows, size):
                block = ends[start : start + size, None]
                num_keys = int(block.max())
                places = torch.arange(num_keys, device=self.device)
                seen = (places < block) if window is None else (places < block) & (places >= block - window)
                found.append((slice(start, start + len(block)), num_keys, _hidden(seen)[:, None, None, :]))
        return self._blocks[window]

    @cached_property
    def shared(self) -> list[tuple[Store, Tensor, int]]:
        """Every store that is context of single spans, the numbers of these, and the position of its first token."""
        found: dict[int, tuple[Store, list[int], int]] = {}
        for number, span in enumerate(self.single):
            offset = 0
            for store in span.context:
                found.setdefault(id(store), (store, [], offset))[1].append(number)
                offset += store.length
        return [(store, self._numbers(members), offset) for store, members, offset in found.values()]

    def _numbers(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


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
        num_single = len(packing.single)
        pool_keys, pool_values = packing.pool.layers[layer]
        pool_keys[packing.slots, :, packing.ends - 1] = keys[:, :num_single].transpose(0, 1)
        pool_values[packing.slots, :, packing.ends - 1] = values[:, :num_single].transpose(0, 1)
    for span in packing.several:
        place = slice(span.start, span.start + span.num_tokens)
        span.store.write(layer, span.at, keys[:, place], values[:, place])
    rule = _Rule(scaling, sliding_window, softcap, s_aux)
    out = queries.new_zeros((queries.shape[1], queries.shape[0], values.shape[2]))
    if packing.single:
        out[: len(packing.single)] = _attend_single(queries, packing, layer, rule)
    for span in packing.several:
        place = slice(span.start, span.start + span.num_tokens)
        out[place] = _attend_several(queries[:, place], span, layer, rule).transpose(0, 1)
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attend)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have a model's layers call `attend` inside the block; outside it, the model is what it was."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = usual


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

    def part(self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention to some of the keys.

        Args:
            queries: `(rows, heads, queries, size)`.
            keys: `(rows, heads, keys, size)`; `values` likewise.
            values: see `keys`.
            hidden: what is added to the scores, 0 or very little; broadcasts to `(rows, heads, queries, keys)`.

        Returns:
            Output `(rows, heads, queries, size)` and log-sum-exp `(rows, heads, queries)`, float32.
        """
        if self.softcap is None and queries.device.type == "cpu":  # torch's fused attention, and its log-sum-exp
            out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, attn_mask=hidden, scale=self.scaling
            )
            return out, total
        scores = (queries @ keys.transpose(-1, -2)).float() * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if hidden is not None:
            scores = scores + hidden
        total = scores.logsumexp(dim=-1)
        return (scores - total[..., None]).exp().to(values.dtype) @ values, total

    def with_sinks(self, out: Tensor, total: Tensor, heads_at: int) -> Tensor:
        """Take from every head the weight that its sink attracts; `heads_at` is the dimension of the heads."""
        if self.sinks is None:
            return out
        shape = [1] * total.dim()
        shape[heads_at] = -1
        return out * torch.sigmoid(total - self.sinks.float().view(shape))[..., None].to(out.dtype)


def _attend_several(queries: Tensor, span: Span, layer: int, rule: _Rule) -> Tensor:
    """`(heads, tokens, size)` for the consecutive tokens of one sequence."""
    parts = [tuple(tensor[:, : store.length] for tensor in store.layers[layer]) for store in span.context]
    parts.append(tuple(tensor[:, : span.end] for tensor in span.store.layers[layer]))
    keys, values = (
        torch.cat([part[which] for part in parts], dim=1) if len(parts) > 1 else parts[0][which] for which in (0, 1)
    )
    num_keys = keys.shape[1]
    places = torch.arange(num_keys, device=keys.device)
    own = places[num_keys - span.num_tokens :, None]
    seen = places <= own
    if rule.window is not None:
        seen &= places > own - rule.window
    num_groups = queries.shape[0] // keys.shape[0]
    if rule.is_plain:
        is_whole = num_keys == span.num_tokens and (rule.window is None or num_keys <= rule.window)
        return scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            attn_mask=None if is_whole else seen,
            is_causal=is_whole,
            scale=rule.scaling,
            enable_gqa=num_groups > 1,
        )[0]
    repeated = [tensor.repeat_interleave(num_groups, dim=0)[None] for tensor in (keys, values)]
    out, total = rule.part(queries[None], repeated[0], repeated[1], _hidden(seen))
    return rule.with_sinks(out[0], total[0], heads_at=0)


def _attend_single(queries: Tensor, packing: Packing, layer: int, rule: _Rule) -> Tensor:
    """`(sequences, heads, size)` for sequences with one new token each."""
    keys, values = packing.pool.layers[layer]
    slots, num_rows = packing.slots, packing.num_rows
    # (sequences, key/value heads, queries per head, size)
    asked = queries[:, : len(packing.single)].transpose(0, 1).unflatten(1, (keys.shape[1], -1))
    in_slots = asked.new_zeros((num_rows, *asked.shape[1:]))
    in_slots[slots] = asked
    parts = [
        rule.part(in_slots[rows], keys[rows, :, :num_keys], values[rows, :, :num_keys], hidden)
        for rows, num_keys, hidden in packing.blocks(rule.window)
    ]
    out, total = (torch.cat(found)[slots] for found in zip(*parts, strict=True))
    for store, rows, offset in packing.shared:
        shared_keys, shared_values = (tensor[None, :, : store.length] for tensor in store.layers[layer])
        hidden = None
        if rule.window is not None:
            places = offset + torch.arange(store.length, device=keys.device)
            seen = places > packing.positions[rows, None] - rule.window
            hidden = _hidden(seen.repeat_interleave(asked.shape[2], dim=0))
        # All sequences that share the store, as one matrix of queries per head.
        matrix = asked[rows].transpose(0, 1).flatten(1, 2)[None]
        more, more_total = (part[0] for part in rule.part(matrix, shared_keys, shared_values, hidden))
        more = more.unflatten(1, (len(rows), -1)).transpose(0, 1)
        more_total = more_total.unflatten(1, (len(rows), -1)).transpose(0, 1)
        both = torch.logaddexp(total[rows], more_total)
        weight, more_weight = ((part - both).exp()[..., None] for part in (total[rows], more_total))
        out[rows] = (out[rows] * weight + more * more_weight).to(out.dtype)
        total[rows] = both
    return rule.with_sinks(out.flatten(1, 2), total.flatten(1, 2), heads_at=1)


def _hidden(seen: Tensor) -> Tensor:
    """What to add to scores, so that those that are not seen take no weight."""
    hidden = torch.zeros(seen.shape, device=seen.device)
    return hidden.masked_fill_(~seen, torch.finfo(hidden.dtype).min)
