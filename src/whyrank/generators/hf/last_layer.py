"""The last layer's work, for those tokens alone whose logits are wanted.

Behind the last layer nobody sees a token any more: of prompts, only the last token's result is used. Keys and values of
the others are needed, what the layer makes of them afterwards is not. That is most of the layer, one of eight in a
small model. Attention leaves it out by itself (`Span.num_wanted`); this is for modules that treat every token alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["LastLayer"]


@dataclass(frozen=True, slots=True)
class LastLayer:
    """Which layer is the last, and what in it can be asked for some tokens only: the MLP and attention's output.

    Models that name these otherwise do all of the work; an MLP that returns more than a tensor does all of its own.
    """

    index: int | None
    modules: tuple[torch.nn.Module, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Found by the names that transformers' decoders have."""
        layers = getattr(model.base_model, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList):
            return cls(None, ())
        layer = layers[-1]
        index = getattr(getattr(layer, "self_attn", None), "layer_idx", None)
        mlp = getattr(layer, "mlp", None)
        output = getattr(getattr(layer, "self_attn", None), "o_proj", None)
        if index is None or not isinstance(mlp, torch.nn.Module) or not isinstance(output, torch.nn.Module):
            return cls(None, ())
        with torch.inference_mode():
            row = torch.zeros(1, 1, model.config.get_text_config(decoder=True).hidden_size)
            is_plain = isinstance(mlp(row.to(model.device, model.dtype)), Tensor)
        return cls(index, (mlp, output) if is_plain else (output,))

    @contextmanager
    def only_at(self, places: Tensor) -> Iterator[None]:
        """Inside the block these modules work for the tokens at `places` of a pass; for others their result is 0."""

        num_tokens = 0

        def take(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal num_tokens
            num_tokens = given[0].shape[1]
            return given[0][:, places], *given[1:]

        def put(module: torch.nn.Module, given: tuple[Any, ...], found: Tensor) -> Tensor:
            whole = found.new_zeros((1, num_tokens, found.shape[2]))
            whole[:, places] = found
            return whole

        with ExitStack() as hooks:
            for module in self.modules:
                hooks.callback(module.register_forward_pre_hook(take).remove)
                hooks.callback(module.register_forward_hook(put).remove)
            yield
