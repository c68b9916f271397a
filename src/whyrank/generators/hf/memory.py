"""How many answers fit into a memory budget, counted before the memory is taken.

The budget is for what comes on top of the weights: keys and values, and what a pass needs while it runs. Every answer
is counted with the longest sequence that its slot may have to hold, so the budget also covers the worst case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from whyrank.errors import GenerationError
from whyrank.generators.hf.attention_loops import QUERIES_AT_ONCE

__all__ = ["LABEL_ROWS", "TAKEN_BY_LIBRARIES", "Footprint"]

LOGITS_COPIES = 3
LABEL_ROWS = 4  # of next-token scores in one pass for each slot; a template with more labels takes several passes
# What libraries take for themselves once passes run, however large: code that oneDNN makes and numba loads, torch's own
# buffers; 42 to 67 MiB were measured (docs/log.md).
TAKEN_BY_LIBRARIES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model needs on top of its weights, in bytes.

    `cached_token` is for the keys and values of one token in all layers, `pass_token` for the activations of a token
    while a pass runs, `logits_row` for next-token scores at one place, `attended` for a token of a prompt and one
    that it might attend to: what is added to their score, in layers with a window and in those without. `scored` is for
    a token that many attend to at once: scores that are made of keys in bfloat16, and at most two copies of the key and
    value.
    """

    cached_token: int
    pass_token: int
    logits_row: int
    attended: int
    scored: int

    @classmethod
    def of(cls, model: PreTrainedModel, kept: torch.dtype | None = None) -> Self:
        """Counted from the model's shape; activations have the widest precision that its weights have, and so have keys
        and values, unless they are `kept` otherwise."""
        config = model.config.get_text_config(decoder=True)
        shape: Mapping[str, Any] = config.to_dict()
        # Where keys and values are kept otherwise, weights are laid out anew: they are no parameters any more, and what
        # passes between them is float32.
        widths = [parameter.element_size() for parameter in model.parameters() if parameter.is_floating_point()]
        size = 4 if kept else max(widths)
        num_heads = shape["num_attention_heads"]
        head_size = shape.get("head_dim") or shape["hidden_size"] // num_heads
        key_values = 2 * (shape.get("num_key_value_heads") or num_heads) * head_size
        wide = max(shape.get("intermediate_size") or 0, 4 * shape["hidden_size"])
        return cls(
            cached_token=key_values * shape["num_hidden_layers"] * (kept.itemsize if kept else size),
            # gate and product of an MLP; queries, keys and values with temporaries of their rotation, and the output
            # of attention; the residual stream with its norms. The allocator keeps some of it between layers.
            pass_token=(2 * wide + 5 * (num_heads * head_size + key_values) + 6 * shape["hidden_size"]) * size,
            logits_row=LOGITS_COPIES * shape["vocab_size"] * 4,
            attended=4 * (1 if shape.get("sliding_window") is None else 2) + 1,  # and whether it does, for a moment
            scored=2 * (QUERIES_AT_ONCE * num_heads + 2 * key_values) if kept == torch.bfloat16 else 0,
        )

    def num_slots(
        self, budget: int, *, capacity: int, num_shared: int, num_pass_tokens: int, num_label_rows: int, most: int
    ) -> int:
        """How many answers can be written at once.

        Args:
            budget: bytes.
            capacity: tokens that a slot holds, the longest prompt without its shared beginning among them.
            num_shared: tokens of the longest shared beginning; each of two queries at once has one.
            num_pass_tokens: the most prompt tokens in one pass, shared beginnings included.
            num_label_rows: the most places of one answer's label trie that are read; one answer is always let in.
            most: upper bound of the result.

        Raises:
            GenerationError: not even one answer fits.
        """
        attended = (num_pass_tokens * self.attended + self.scored) * (capacity + num_shared)
        passing = num_pass_tokens * self.pass_token + attended
        row = self.logits_row + self.pass_token + self.attended * (capacity + num_shared)
        fixed = TAKEN_BY_LIBRARIES + passing + 2 * num_shared * self.cached_token + num_label_rows * row
        slot = capacity * self.cached_token + LABEL_ROWS * row
        found = (budget - fixed) // slot
        if found < 1:
            raise GenerationError(
                f"--memory {budget / 2**20:.0f} MiB is too little for one answer of {capacity + num_shared} tokens, "
                f"which takes {math.ceil((fixed + slot) / 2**20)} MiB on top of the weights; give at least that, or "
                "lower max_document_tokens"
            )
        return min(found, most)
