"""Linear layers whose weights are laid out for the CPU once, when a model is loaded.

torch multiplies by weights as they come from the checkpoint, and rearranges them in every call. For the few rows of a
decoding step that costs about half as much as the product itself. oneDNN can keep its own arrangement instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whyrank.errors import UnsupportedModel

__all__ = ["PackedLinear", "pack"]

ROWS_EXPECTED = 32  # what the arrangement is chosen for; other numbers of rows are right, too
MAX_TIED_BYTES = 64 * 2**20  # a larger output matrix that is also the embedding is not copied


class PackedLinear(torch.nn.Module):
    """`torch.nn.Linear` with oneDNN's arrangement of the weights, in float32 or bfloat16."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_EXPECTED)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise UnsupportedModel("a model whose weights are laid out for ranking cannot be saved; copy its checkpoint")

    def forward(self, rows: Tensor) -> Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        found = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return cast(Tensor, found)


def pack(model: PreTrainedModel) -> int:
    """Replace a model's linear layers in place, and free their weights; returns how many were replaced.

    Left alone are layers on other devices or in other precisions, and an output matrix that is also the embedding and
    large.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    tied = model.get_input_embeddings().weight
    chosen = [(parent, name, linear) for parent, name, linear in _linears(model) if _is_worth_packing(linear, tied)]
    for parent, name, linear in chosen:
        setattr(parent, name, PackedLinear(linear))
    return len(chosen)


def _linears(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                yield parent, name, child


def _is_worth_packing(linear: torch.nn.Linear, tied: object) -> bool:
    weight = linear.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return weight is not tied or weight.numel() * weight.element_size() <= MAX_TIED_BYTES
