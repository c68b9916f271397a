"""Weights in another arrangement give the same products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf import linears
from whyrank.generators.hf.kernels import quantize_rows
from whyrank.generators.hf.linears import GatedMlp, Int8Linear, PackedLinear, is_available, pack

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
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=tolerance, rtol=tolerance)


def tiny_llama(is_tied: bool, activation: str = "silu") -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act=activation,
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


# ---- 8-bit weights -------------------------------------------------------------------------------------------------

with_int8 = pytest.mark.skipif(not is_available(int8=True), reason="this torch has no 8-bit products here")


def test_rows_keep_their_largest_value_and_are_off_by_half_a_step_at_most() -> None:
    rows = torch.randn(3, 5, 40) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    small, scales = quantize_rows(rows)
    assert small.dtype == torch.uint8
    assert set(torch.maximum(small.amax(dim=-1).int() - 128, 128 - small.amin(dim=-1).int()).flatten().tolist()) == {
        127
    }
    assert ((small.float() - 128) * scales - rows).abs().le(scales * 0.5001).all()


def test_rows_of_zeros_stay_zeros() -> None:
    small, scales = quantize_rows(torch.zeros(2, 4))
    assert ((small.float() - 128) * scales == 0).all()


@with_int8
@pytest.mark.parametrize("num_rows", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_8_bit_products_are_sums_of_integers(num_rows: int, has_bias: bool) -> None:
    linear = torch.nn.Linear(33, 17, bias=has_bias)
    rows = torch.randn(2, num_rows, 33)
    weight_scales = linear.weight.detach().abs().amax(dim=1) / 127
    weights = (linear.weight.detach() / weight_scales[:, None]).round().long()
    small, scales = quantize_rows(rows)
    expected = ((small.long() - 128) @ weights.t()).float() * scales * weight_scales
    expected = expected + linear.bias.detach() if has_bias else expected
    with torch.inference_mode():
        found = Int8Linear(linear)(rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@with_int8
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_an_8_bit_model_is_nearly_the_same_model(loaded: torch.dtype) -> None:
    model = tiny_llama(True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        torch.nn.Module.to(model, loaded)
        assert pack(model, int8=True) == 2 * 7 + 1
        after = model(input_ids=ids).logits
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()


# ---- fused MLPs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=with_int8)])
def test_an_mlp_is_fused_only_where_its_results_stay_the_same(activation: str, int8: bool) -> None:
    model = tiny_llama(True, activation)
    rows = torch.randn(1, 6, 32)
    mlp = model.model.layers[0].mlp
    with torch.inference_mode():
        before = mlp(rows)
        pack(model, int8=int8)
        after = model.model.layers[0].mlp(rows)
    assert isinstance(model.model.layers[0].mlp, GatedMlp) == (activation != "relu")
    torch.testing.assert_close(after, before, atol=(0.05 if int8 else 1e-5) * float(before.abs().max()), rtol=0)


@with_int8
def test_many_rows_go_through_an_8_bit_mlp_in_parts() -> None:
    """Rows do not depend on their company."""
    model = tiny_llama(True)
    pack(model, int8=True)
    mlp, rows = model.model.layers[0].mlp, torch.randn(1, 600, 32)
    with torch.inference_mode():
        found = mlp(rows)
        alone = torch.cat([mlp(part) for part in rows.split(77, dim=1)], dim=1)
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)


@with_int8
def test_a_gated_mlp_may_have_biases() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, mlp_bias=True)
    mlp = LlamaMLP(config)
    for name, parameter in mlp.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    rows = torch.randn(1, 300, 32)  # more than go through at once
    with torch.inference_mode():
        wanted = mlp(rows)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, name, Int8Linear(getattr(mlp, name)))
        found = GatedMlp(mlp, "swish")(rows)
    torch.testing.assert_close(found, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


def test_8_bit_products_are_offered_only_where_the_largest_ones_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that adds pairs of products in 16 bits loses what is over 32,767: 2 x 255 x 127 would be."""
    real = Int8Linear.forward

    def saturating(self: Int8Linear, rows: torch.Tensor) -> torch.Tensor:
        return real(self, rows) * 32767 / (2 * 255 * 127)

    monkeypatch.setattr(Int8Linear, "forward", saturating)
    linears._has_exact_int8.cache_clear()
    assert not is_available(int8=True)
    linears._has_exact_int8.cache_clear()
