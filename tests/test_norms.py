"""Compiled norms give the same rows as the architectures' own, and what is no such norm is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from whyrank.generators.hf.norms import RowNorm, compile_norms

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def replaced(norm: torch.nn.Module) -> torch.nn.Module:
    parent = torch.nn.Sequential(norm)
    assert compile_norms(parent) == isinstance(parent[0], RowNorm)
    return parent[0]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm])
def test_a_compiled_norm_is_the_same_norm(kind: type[torch.nn.Module]) -> None:
    """Gemma multiplies by one more than its weight."""
    norm = kind(24)
    torch.nn.init.normal_(norm.get_parameter("weight"))
    rows = torch.randn(2, 3, 24) * 5
    with torch.inference_mode():
        found = replaced(norm)
        assert isinstance(found, RowNorm)
        torch.testing.assert_close(found(rows), norm(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "num_norms"),
    [
        (LlamaForCausalLM(LlamaConfig(**SHAPE)), 2 * 2 + 1),
        (Qwen3ForCausalLM(Qwen3Config(**SHAPE)), 2 * 4 + 1),  # of queries and keys, too
        (Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE)), 2 * 6 + 1),  # and behind attention and MLP
    ],
    ids=["llama", "qwen3", "gemma3"],
)
def test_every_norm_of_a_model_is_compiled(model: PreTrainedModel, num_norms: int) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    model.train(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        assert compile_norms(model) == num_norms
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)


class _Centred(torch.nn.Module):
    """Has all that a norm has, and takes the mean away first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        centred = rows - rows.mean(dim=-1, keepdim=True)
        return self.weight * centred / (centred.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class _Outside(torch.nn.Module):
    """Adds epsilon to the root, not below it: another norm, as small rows tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight * rows / (rows.square().mean(dim=-1, keepdim=True).sqrt() + self.eps)


class _Gated(LlamaRMSNorm):
    """The same as Llama's as long as nobody passes a gate."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = super().forward(hidden_states)
        return found if gate is None else found * gate


@pytest.mark.parametrize(
    "other",
    [
        _Centred(),
        _Outside(),
        _Gated(8),
        torch.nn.LayerNorm(8),
        torch.nn.BatchNorm2d(8).eval(),
        torch.nn.Linear(8, 8),
        LlamaRMSNorm(8).to(torch.bfloat16),
    ],
    ids=["centred", "epsilon outside", "gated", "layer norm", "for images", "linear", "in bfloat16"],
)
def test_what_is_something_else_is_left_alone(other: torch.nn.Module) -> None:
    with torch.inference_mode():
        assert replaced(other) is other
