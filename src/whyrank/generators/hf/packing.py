"""What the tokens of a packed pass are, and where keys and values of their sequences lie.

One forward pass holds the new tokens of many sequences side by side in a single row, without padding. Keys and values
of each sequence lie in a chain of stores: what it shares with others (instruction and query, or a whole prompt), then
its own, which is a slot of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from whyrank.generators.hf.compiling import Numbers, is_compiled
from whyrank.generators.hf.kernels import Seen

__all__ = ["Packing", "Pool", "Span", "Store", "hidden"]


@dataclass(slots=True)
class Store:
    """Keys and values of consecutive tokens: per layer two tensors `(key/value heads, capacity, head size)`, of which
    the first `length` tokens are filled, or will be by the pass that is being packed."""

    capacity: int
    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def write(self, layer: int, at: int, keys: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> None:
        """Put tokens, `(heads, tokens, head size)`, at a place; memory is taken by the first write to a layer."""
        if layer not in self.layers:
            self.layers[layer] = _memory(keys, values, dtype, keys.shape[0], self.capacity)
        own_keys, own_values = self.layers[layer]
        own_keys[:, at : at + keys.shape[1]] = keys
        own_values[:, at : at + keys.shape[1]] = values


@dataclass(slots=True)
class Pool:
    """Stores of one capacity in common tensors `(slots, heads, capacity, head size)` per layer, so that sequences
    that write one token each can be attended to at once. Sequences in use lie in the first slots. Keys and values are
    kept as `dtype`, or as they come."""

    num_slots: int
    capacity: int
    dtype: torch.dtype | None = None
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
            self.layers[layer] = _memory(keys, values, self.dtype, self.num_slots, keys.shape[0], self.capacity)
            if not is_compiled(keys):  # what has not been written will be hidden by what is added to its scores
                for tensor in self.layers[layer]:
                    tensor.zero_()
        all_keys, all_values = self.layers[layer]
        for slot, store in enumerate(self.stores):
            if layer not in store.layers:
                store.layers[layer] = (all_keys[slot], all_values[slot])


def _memory(keys: Tensor, values: Tensor, dtype: torch.dtype | None, *shape: int) -> tuple[Tensor, Tensor]:
    """For so many keys and values like these."""
    return (
        keys.new_empty((*shape, keys.shape[-1]), dtype=dtype or keys.dtype),
        values.new_empty((*shape, values.shape[-1]), dtype=dtype or values.dtype),
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of a packed row that belong to one sequence: `num_tokens` from `start` on in the row go to
    `store`, from `at` on; they see what stands before them there, and all of `context`. Logits are wanted of the last
    `num_wanted` of them.

    If they have `nodes` of a trie (from its root, one for each, ancestors first), tokens stand side by side instead of
    one behind the other: each sees its ancestors only, and all of `context`. They are alone in `store` then.
    """

    start: int
    num_tokens: int
    store: Store
    at: int
    context: tuple[Store, ...]
    num_wanted: int
    nodes: tuple[tuple[int, ...], ...] = ()

    @property
    def end(self) -> int:
        """Behind the last of them in the store."""
        return self.at + self.num_tokens

    @property
    def position(self) -> int:
        """Where the first of them stands in its sequence, from 0."""
        return sum(store.length for store in self.context) + self.at

    @property
    def positions(self) -> list[int]:
        """Where each of them stands in its sequence."""
        offsets = [len(node) - 1 for node in self.nodes] if self.nodes else range(self.num_tokens)
        return [self.position + offset for offset in offsets]


@dataclass(frozen=True)  # no slots: what every layer asks for is worked out once
class Packing:
    """What the tokens of one packed forward pass are.

    `single` are spans of one token whose stores lie in the pool; they come first in the row. Among `several`, one may
    fill the store that is the context of another. `last_layer` is the layer behind which only wanted tokens count;
    all count behind all layers if it is `None`.
    """

    pool: Pool
    single: Sequence[Span]
    several: Sequence[Span]
    device: torch.device
    last_layer: int | None = None
    _masks: dict[object, Tensor] = field(default_factory=dict, init=False)
    _seen: dict[int | None, tuple[list[tuple[Store, Seen]], Seen]] = field(default_factory=dict, init=False)

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

    def seen(self, window: int | None) -> tuple[list[tuple[Store, Seen]], Seen]:
        """What the single spans see, as `attend_rows` takes it: of every shared store, and of the pool."""
        if window not in self._seen:
            places, ends = self.positions.numpy(), self.ends.numpy()

            def by(members: Numbers, slots: Numbers, ends: Numbers, offset: int | Numbers) -> Seen:
                starts = np.zeros_like(ends) if window is None else places[members] + 1 - window - offset
                return Seen(members, slots, np.clip(starts, 0, ends), ends)

            shared = [
                (store, by(found.numpy(), 0 * found.numpy(), np.full(len(found), store.length), offset))
                for store, found, offset in self.shared
            ]
            own = by(np.arange(len(ends)), self.slots.numpy(), ends, places - (ends - 1))
            self._seen[window] = shared, own
        return self._seen[window]

    def mask(self, window: int | None) -> Tensor:
        """What is hidden of the pool from each slot, `(slots, 1, 1, tokens)`, as something to add to scores."""
        if (found := self._masks.get(window)) is None:
            ends = torch.ones(self.num_rows, dtype=torch.long, device=self.device)
            ends[self.slots] = self.ends
            places = torch.arange(int(ends.max()), device=self.device)
            seen = places < ends[:, None]
            if window is not None:
                seen &= places >= ends[:, None] - window
            self._masks[window] = found = hidden(seen)[:, None, None, :]
        return found

    def causal_mask(self, span: Span, num_queries: int, window: int | None) -> Tensor:
        """What of its keys is hidden from each of a span's last tokens, `(queries, keys)`, as something to add."""
        key = (span.position, span.num_tokens, num_queries, span.nodes, window)
        if key not in self._masks:
            places = torch.arange(span.position + span.num_tokens, device=self.device)
            if span.nodes:
                places[span.position :] = self._numbers(span.positions)
            own = places[len(places) - num_queries :, None]
            seen = places <= own
            if window is not None:
                seen &= places > own - window
            if span.nodes:
                seen[:, span.position :] &= _ancestors(span.nodes).to(self.device)[-num_queries:]
            self._masks[key] = hidden(seen)
        return self._masks[key]

    def _numbers(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


@lru_cache
def _ancestors(nodes: tuple[tuple[int, ...], ...]) -> Tensor:
    """Which nodes of a trie, columns, are ancestors of which, rows, or the same."""
    return torch.tensor([[node[: len(other)] == other for other in nodes] for node in nodes])


def hidden(seen: Tensor) -> Tensor:
    """What to add to scores, so that those that are not seen take no weight."""
    added = torch.zeros(seen.shape, device=seen.device)
    return added.masked_fill_(~seen, torch.finfo(added.dtype).min)
