"""Strands in one row: the same losses and gradients as in rows of their own, for every architecture that is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from whyrank.errors import InputError, UnsupportedModel
from whyrank.training.packing import PackedBatch, Strand, continuation_log_probs, pack, predict
from whyrank.training.recomputing import recompute_layers
from whyrank.training.steps import separate_log_probs as padded_log_probs

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
SLIDING = ["sliding_attention", "full_attention"]


def gemma2() -> PreTrainedModel:
    """With scores and logits squeezed by tanh."""
    config = Gemma2Config(**SHAPE, head_dim=8, sliding_window=12, query_pre_attn_scalar=8, layer_types=SLIDING)
    return Gemma2ForCausalLM(config)


def gemma3() -> PreTrainedModel:
    """A window of 12 tokens is shorter than the beginnings below, and reaches over their ends."""
    config = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=12, query_pre_attn_scalar=8, layer_types=SLIDING)
    return Gemma3ForCausalLM(config)


def gpt2() -> PreTrainedModel:
    """Learned positions."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt2": gpt2,
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    torch.nn.Module.train(model, False)  # no dropout
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def strands_of(seed: int = 0) -> list[Strand]:
    """Three queries; documents of many lengths behind each; for some documents several samples; one strand alone.

    As splits are offers, there are also some that nobody shares. Weights differ, and are 0 in between.
    """
    rng = Random(seed)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(rng.randrange(97) for _ in range(num))

    strands = [Strand(ids(9), (0.0,) * 5 + (1.0,) * 4)]
    for num_query in (17, 3, 25):
        query = ids(num_query)
        for num_samples in (1, 3, 2):
            prompt = query + ids(rng.randrange(1, 30))
            for _ in range(num_samples):
                answer = ids(rng.randrange(2, 20))
                weights = (0.0,) * len(prompt) + tuple(rng.choice((0.0, 1.0, 0.5)) for _ in answer[1:]) + (2.0,)
                strands.append(Strand(prompt + answer, weights, (num_query, len(prompt))))
    rng.shuffle(strands)
    return strands


def separate_log_probs(model: PreTrainedModel, strands: Sequence[Strand]) -> list[torch.Tensor]:
    """By definition: one row per strand, transformers' own attention, softmax over the vocabulary, in float32."""
    model.set_attn_implementation("eager")
    found = []
    for strand in strands:
        logits = model(input_ids=torch.tensor([strand.ids]), use_cache=False).logits[0]
        every = torch.log_softmax(logits, dim=-1)
        scored = [place for place, weight in enumerate(strand.weights) if weight]
        found.append(torch.stack([every[place - 1, strand.ids[place]] for place in scored]))
    return found


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted_mean(batch: PackedBatch, log_probs: torch.Tensor) -> torch.Tensor:
    return -(batch.weights * log_probs).sum() / batch.weights.sum()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probs_and_gradients_are_those_of_separate_rows(name: str, seed: int) -> None:
    model, strands = model_of(name), strands_of(seed)
    batch = pack(strands)
    expected = separate_log_probs(model, strands)
    weights = [torch.tensor([weight for weight in strand.weights if weight]) for strand in strands]
    whole = -torch.cat([w * p for w, p in zip(weights, expected, strict=True)]).sum() / torch.cat(weights).sum()
    expected_gradients = gradients(model, whole)
    found = continuation_log_probs(model, batch)
    assert model.config._attn_implementation == "eager"
    for one, other in zip(found.split(batch.num_scored), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    found_gradients = gradients(model, weighted_mean(batch, found))
    assert set(found_gradients) == set(expected_gradients)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_torchs_fused_attention_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU is another function than what runs on a CPU; here it is made to run on the CPU."""
    model, strands = model_of(name), strands_of()
    expected = gradients(model, weighted_mean(pack(strands), continuation_log_probs(model, pack(strands))))
    monkeypatch.setattr("whyrank.training.shared_attention.PLAIN_DEVICES", ())
    found = gradients(model, weighted_mean(pack(strands), continuation_log_probs(model, pack(strands))))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


def test_shared_beginnings_are_read_once() -> None:
    """By hand: 4 tokens of the query, 2 + 3 of the two prompts, of which the first has two samples of 2 and 1."""
    query, one, other = (1, 2, 3, 4), (5, 6), (7, 8, 9)
    strands = [
        Strand((*query, *one, 10, 11), (0.0,) * 6 + (1.0, 1.0), (4, 6)),
        Strand((*query, *one, 12), (0.0,) * 6 + (1.0,), (4, 6)),
        Strand((*query, *other, 13), (0.0,) * 7 + (1.0,), (4, 7)),
    ]
    batch = pack(strands)
    assert (batch.num_tokens, batch.num_separate) == (4 + 2 + 3 + 2 + 1 + 1, 8 + 7 + 8)
    # What follows `one` is predicted at one place for both samples, that of 6; the other answer token at that of 10.
    row = batch.ids[0].tolist()
    assert [row[place] for place in batch.places.tolist()] == [6, 10, 6, 9]
    assert batch.targets.tolist() == [10, 11, 12, 13]
    assert batch.strand_of.tolist() == [0, 0, 1, 2]
    assert sorted(zip(row, batch.positions[0].tolist(), strict=True)) == [
        *zip(query, range(4), strict=True),
        *[(5, 4), (6, 5), (7, 4), (8, 5), (9, 6), (10, 6), (11, 7), (12, 6), (13, 7)],
    ]


def test_equal_strands_are_scored_each() -> None:
    """Two samples may be the same to the last token; both count."""
    strand = Strand((1, 2, 3, 4), (0.0, 0.0, 1.0, 1.0), (2,))
    batch = pack([strand, strand])
    assert (batch.num_tokens, batch.num_scored) == (2 + 2 + 2, (2, 2))
    found = continuation_log_probs(model_of("llama"), batch)
    torch.testing.assert_close(found[:2], found[2:])


def test_the_order_of_strands_changes_nothing_but_the_order() -> None:
    model, strands = model_of("llama"), strands_of()
    forward, back = pack(strands), pack(strands[::-1])
    assert forward.num_tokens == back.num_tokens
    one = continuation_log_probs(model, forward).split(forward.num_scored)
    other = continuation_log_probs(model, back).split(back.num_scored)
    for found, expected in zip(one, other[::-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_states_are_what_the_logits_are_made_of() -> None:
    model = model_of("llama")
    found = predict(model, pack(strands_of()))
    head: Any = model.get_output_embeddings()
    torch.testing.assert_close(head(found.states), found.logits)


def test_a_strands_gradient_does_not_reach_its_neighbours_tokens() -> None:
    """The embedding of a token that only one sample has must not be moved by the loss of the other."""
    model = model_of("qwen3")
    mine = Strand((1, 2, 3, 50, 51), (0.0, 0.0, 0.0, 1.0, 1.0), (3,))
    other = Strand((1, 2, 3, 60, 61, 62), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0), (3,))
    batch = pack([mine, other])
    log_probs = continuation_log_probs(model, batch)
    read = gradients(model, log_probs[batch.strand_of == 0].sum())["model.embed_tokens.weight"]
    assert read[[1, 2, 3, 50]].abs().sum(dim=1).min() > 0
    assert read[[60, 61, 62]].abs().max() == 0


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(UnsupportedModel, match="bloom computes attention in a way of its own"):
        continuation_log_probs(model, pack(strands_of()))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InputError, match="one weight per token, found 1 for 2 tokens"):
        Strand((1, 2), (0.0,))
    with pytest.raises(InputError, match="weight 0 for a strand's first token"):
        Strand((1, 2), (1.0, 1.0))
    with pytest.raises(InputError, match="rising splits between 0 and 2"):
        Strand((1, 2), (0.0, 1.0), (2, 1))
    with pytest.raises(InputError, match="strands with scored tokens, found none"):
        pack([Strand((1, 2), (0.0, 0.0))])


# ---- layers that are computed again ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_computing_layers_again_changes_no_gradient(name: str, is_packed: bool) -> None:
    """In training mode, so that what dropout leaves out (GPT-2 has it) is left out again."""
    model, strands = model_of(name).train(), strands_of()
    batch, usual = pack(strands), model.config._attn_implementation

    def read() -> torch.Tensor:
        torch.manual_seed(1)
        return continuation_log_probs(model, batch) if is_packed else padded_log_probs(model, strands)

    expected = read()
    expected_gradients = gradients(model, weighted_mean(batch, expected))
    recompute_layers(model)
    found = read()
    assert torch.equal(found, expected)
    found_gradients = gradients(model, weighted_mean(batch, found))
    assert set(found_gradients) == set(expected_gradients)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-5, atol=1e-7, msg=parameter)
    assert model.config._attn_implementation == usual


def num_kept(model: PreTrainedModel, batch: PackedBatch) -> int:
    """Numbers that stay in memory for the backward pass, weights aside."""
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = continuation_log_probs(model, batch).sum()
    assert loss.requires_grad
    return sum(kept.values())


def test_of_a_layer_that_is_computed_again_only_its_input_is_kept() -> None:
    """Two more layers keep two more rows of hidden states, where they kept twenty times as much."""
    batch, sizes = pack(strands_of()), {}
    for num_layers in (2, 4):
        for is_again in (False, True):
            model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": num_layers}))
            if is_again:
                recompute_layers(model)
            sizes[num_layers, is_again] = num_kept(model, batch)
    states = batch.num_tokens * SHAPE["hidden_size"]
    assert sizes[4, True] - sizes[2, True] == 2 * states
    assert sizes[4, False] - sizes[2, False] > 2 * 20 * states


def test_a_model_whose_layers_cannot_be_computed_again_is_refused() -> None:
    model = model_of("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModel, match="leave --recompute out"):
        recompute_layers(model)
