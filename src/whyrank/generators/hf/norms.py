"""Norms of a model in one pass over memory each, where transformers' modules take five.

Architectures have norms of their own, which differ in what they multiply by (Gemma's is one more than the weight). So a
module is replaced only if it looks like one of them and gives the same rows.
"""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor

from whyrank.generators.hf.kernels import norm_rows

__all__ = ["RowNorm", "compile_norms"]

NUM_PROBED = 4  # rows that a replaced norm is tried with, once large and once small


class RowNorm(torch.nn.Module):
    """`gain * rows / sqrt(mean(rows**2) + epsilon)`, over the last dimension, in float32."""

    def __init__(self, gain: Tensor, epsilon: float) -> None:
        super().__init__()
        self._gain, self._epsilon = gain.contiguous(), epsilon

    def forward(self, rows: Tensor) -> Tensor:
        """`(…, features)` to the same shape."""
        return norm_rows(rows.float(), self._gain, self._epsilon)


def compile_norms(model: torch.nn.Module) -> int:
    """Replace a model's norms in place, on a CPU and with weights in float32; returns how many were replaced."""
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            norm = _compiled(child)
            if norm is not None:
                setattr(parent, name, norm)
                num_replaced += 1
    return num_replaced


def _compiled(module: torch.nn.Module) -> RowNorm | None:
    """The same norm, if it is one of those that can be."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or list(module.children()):
        return None
    if len(signature(module.forward).parameters) != 1:
        return None
    rows = torch.linspace(-2, 3, NUM_PROBED * len(weight)).view(NUM_PROBED, -1)
    rows = torch.cat([rows, rows * 1e-3])  # of small ones, epsilon is a part
    with torch.inference_mode():
        try:
            wanted = module(rows)
        except (TypeError, ValueError, RuntimeError):  # made for something else than rows
            return None
        if not isinstance(wanted, Tensor) or wanted.shape != rows.shape:
            return None
        for gain in (weight.detach(), 1 + weight.detach()):
            norm = RowNorm(gain, epsilon)
            if torch.allclose(norm(rows), wanted, rtol=1e-5, atol=1e-7):
                return norm
    return None
