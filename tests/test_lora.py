"""Adapters: they start as nothing, are trained alone, and come back from disk as what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.checkpoints import FAMILIES, Family, save_checkpoint
from whyrank.errors import InputError
from whyrank.generators.hf.adapters import read_adapter
from whyrank.generators.hf.load import load_model
from whyrank.training.config import AdapterConfig
from whyrank.training.lora import add_adapter, has_adapter, save_adapter, trainable_parameters, without_adapter
from whyrank.training.packing import Strand, continuation_log_probs, pack

pytest.importorskip("peft")
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 30, 7, 12, 90, 41]])
LORA = AdapterConfig(rank=4)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
        return found


def train_a_little(model: PreTrainedModel) -> None:
    """One large step of plain gradient descent on everything that is trainable, twice: B is zero before the first."""
    for _ in range(2):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=IDS, use_cache=False).logits[0, :-1], IDS[0, 1:])
        loss.backward()
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_starts_as_nothing_and_is_trained_alone(family: Family, tmp_path: Path) -> None:
    model = load_model(save_checkpoint(family, tmp_path / "base"), CPU, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untouched = logits(model)
    assert not has_adapter(model)
    add_adapter(model, LORA, seed=0)
    assert has_adapter(model)
    assert torch.equal(logits(model), untouched)
    # By hand: 2 layers of 7 matrices, each with two factors; embeddings and output have none.
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == 2 * 7 * 2
    assert all(".lora_" in name for name in names)
    train_a_little(model)
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (logits(model) - untouched).abs().max() > 1e-2
    with without_adapter(model):
        assert torch.equal(logits(model), untouched)
    assert (logits(model) - untouched).abs().max() > 1e-2


def test_the_seed_fixes_an_adapter(tmp_path: Path) -> None:
    base = save_checkpoint("llama", tmp_path / "base")

    def drawn(seed: int) -> list[torch.Tensor]:
        model = load_model(base, CPU, torch.float32)
        add_adapter(model, LORA, seed)
        return [value for name, value in trainable_parameters(model) if "lora_A" in name]

    assert all(torch.equal(one, other) for one, other in zip(drawn(3), drawn(3), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(drawn(3), drawn(4), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_comes_back_merged(family: Family, tmp_path: Path) -> None:
    model = load_model(save_checkpoint(family, tmp_path / "base"), CPU, torch.float32)
    add_adapter(model, LORA, seed=0)
    train_a_little(model)
    save_adapter(tmp_path / "adapter", model, LORA)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    again = load_model(tmp_path / "adapter", CPU, torch.float32)
    assert not has_adapter(again)
    assert not [name for name, _ in again.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load_model(tmp_path / "whole", CPU, torch.float32)), logits(again))
    # A second adapter on top of the first: the base of the base is found, too.
    add_adapter(again, LORA, seed=1)
    train_a_little(again)
    save_adapter(tmp_path / "second", again, LORA)
    torch.testing.assert_close(
        logits(load_model(tmp_path / "second", CPU, torch.float32)), logits(again), rtol=1e-4, atol=1e-4
    )


def test_alpha_over_rank_scales_the_change(tmp_path: Path) -> None:
    """From the definition: W + alpha / rank * B A, here with alpha 6 and rank 4."""
    model = load_model(save_checkpoint("llama", tmp_path / "base"), CPU, torch.float32)
    plain = model.get_submodule("model.layers.0.mlp.up_proj").weight.clone()  # type: ignore[operator]
    config = AdapterConfig(rank=4, alpha=6, targets=("up_proj",))
    add_adapter(model, config, seed=0)
    train_a_little(model)
    factors = dict(trainable_parameters(model))
    assert len(factors) == 2 * 2
    stem = "model.layers.0.mlp.up_proj"
    a, b = (factors[f"{stem}.lora_{which}.default.weight"].detach() for which in "AB")
    save_adapter(tmp_path / "adapter", model, config)
    merged = load_model(tmp_path / "adapter", CPU, torch.float32).get_submodule(stem).weight
    torch.testing.assert_close(merged, plain + 6 / 4 * (b @ a))
    assert (b @ a).abs().max() > 1e-3


def test_a_quantised_base_is_rounded_alike_when_it_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_checkpoint("llama", tmp_path / "base")
    config = AdapterConfig(rank=4, quantize="4bit")
    model = load_model(base, CPU, torch.float32, quantize="4bit")
    whole = logits(load_model(base, CPU, torch.float32))
    assert (logits(model) - whole).abs().max() > 1e-2  # it is rounded
    add_adapter(model, config, seed=0)
    train_a_little(model)
    save_adapter(tmp_path / "adapter", model, config)
    again = load_model(tmp_path / "adapter", CPU, torch.float32)
    assert type(again.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_strands_train_an_adapter_as_separate_rows_do(family: Family, tmp_path: Path) -> None:
    model = load_model(save_checkpoint(family, tmp_path / "base"), CPU, torch.float32)
    add_adapter(model, LORA, seed=0)
    train_a_little(model)
    query = tuple(range(5, 45))
    strands = [
        Strand((*query, *more), (0.0,) * (len(query) + 2) + (1.0,) * (len(more) - 2), (len(query),))
        for more in ((50, 51, 52, 53), (60, 61, 62), (70, 71, 72, 73, 74))
    ]

    def gradients(parts: list[list[Strand]]) -> list[torch.Tensor]:
        model.zero_grad()
        for part in parts:
            continuation_log_probs(model, pack(part)).sum().backward()
        return [parameter.grad.clone() for _, parameter in trainable_parameters(model) if parameter.grad is not None]

    together, apart = gradients([strands]), gradients([[strand] for strand in strands])
    assert len(together) == len(apart) == 28
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = load_model(save_checkpoint("llama", tmp_path / "base"), CPU, torch.float32)
    with pytest.raises(InputError, match="expected a model with an adapter, found one without"), without_adapter(model):
        pass
    with pytest.raises(InputError, match="no adapter can be put on llama"):
        add_adapter(model, AdapterConfig(rank=4, targets=("nowhere",)), seed=0)
    with pytest.raises(InputError, match="give a lora_rank above 0"):
        AdapterConfig(quantize="4bit")
    with pytest.raises(InputError, match="rank and alpha of at least 0, found -1"):
        AdapterConfig(rank=-1)


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    assert read_adapter(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config.json: expected base_model_name_or_path .* found None"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (tmp_path / "quantize.json").write_text(json.dumps({"quantize": "2bit"}))
    with pytest.raises(InputError, match="expected quantize none or 4bit, found '2bit'"):
        read_adapter(tmp_path)
