"""Weights in another arrangement give the same products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf import linears
from whyrank.generators.hf.linears import PackedLinear, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def inference() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_rows", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_products(num_rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(33, 17, bias=has_bias, dtype=dtype)
    rows = torch.randn(2, num_rows, 33, dtype=dtype)
    with torch.inference_mode():
        expected, found = linear(rows), PackedLinear(linear)(rows)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def tiny_llama(is_tied: bool) -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(shape)
    model.train(False)
    return model


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_packed_model_is_the_same_model(is_tied: bool) -> None:
    model = tiny_llama(is_tied)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        assert pack(model) == 2 * 7 + 1
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())


def test_a_packed_model_is_never_saved_without_its_weights(tmp_path: Path) -> None:
    model = tiny_llama(True)
    pack(model)
    with pytest.raises(UnsupportedModel, match="cannot be saved; copy its checkpoint"):
        model.save_pretrained(tmp_path)


def test_a_large_tied_output_matrix_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "MAX_TIED_BYTES", 50 * 32 * 4 - 1)
    tied, untied = tiny_llama(True), tiny_llama(False)
    assert pack(tied) == 2 * 7
    assert type(tied.lm_head) is torch.nn.Linear
    assert pack(untied) == 2 * 7 + 1
