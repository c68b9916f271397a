"""What a network says about drawn answers, against one row per question; and that engine and trainer agree."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens
from whyrank.records import Document, Query
from whyrank.template import Template
from whyrank.training.config import TinyConfig
from whyrank.training.drawing import draw
from whyrank.training.refine_config import RefineConfig
from whyrank.training.rollouts import Evidence
from whyrank.training.scoring import Episode, ValueHead, action_mask, score
from whyrank.training.tiny import tiny_model, tiny_tokenizer
from whyrank.training.updating import Learner

SHAPE = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=512)
ALMANAC = Template.load("almanac")
QUERY = Query("q", "my fern turns brown")
DOCUMENTS = [Document("air", "Leaves lose water to dry air."), Document("yeast", "Cold dough rises slowly.")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(["why does a fern turn brown Explanation: Label: 0 1 2 10 ##"], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    network = tiny_model(tokenizer, SHAPE, seed=5)
    network.train(False)
    return network


# Labels as on a scale of 0, 1 and 10 with a terminator: one is the beginning of another until it ends.
LABELS = ((7, 9), (8, 9), (8, 7, 9))
EPISODE = Episode((1, 20, 21, 22), (30, 31), True, (0.0, 0.0), (40, 41), LABELS, 2)


def next_log_probs(model: LlamaForCausalLM, ids: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """The whole distribution behind a text, from a row of its own."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature, dim=-1)


def label_log_probs(model: LlamaForCausalLM, episode: Episode) -> list[float]:
    """Every label by itself, token by token; then as a share of all of them."""
    asked = (*episode.prompt, *episode.explanation, *episode.label_prompt)
    sums = [
        math.fsum(float(next_log_probs(model, (*asked, *label[:i]))[label[i]]) for i in range(len(label)))
        for label in episode.labels
    ]
    total = math.log(math.fsum(map(math.exp, sums)))
    return [found - total for found in sums]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_scores_are_those_of_one_row_per_question(model: LlamaForCausalLM, temperature: float) -> None:
    """Three answers side by side: one ended by itself, one was capped, the end of one was spelled anew."""
    capped = replace(EPISODE, explanation=(33, 34, 35), has_end=False, log_probs=(0.0,) * 3, label=0)
    respelled = replace(EPISODE, explanation=(36, 37, 38, 39), log_probs=None, label=1)
    episodes = [EPISODE, capped, respelled]
    found = score(model, None, episodes, temperature)
    assert action_mask(episodes).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    for row, (episode, actions) in enumerate(zip(episodes, [(30, 31, 40), (33, 34, 35), ()], strict=True)):
        for place, token in enumerate(actions):
            seen = next_log_probs(model, (*episode.prompt, *actions[:place]), temperature)
            assert float(found.log_probs[row, place].detach()) == pytest.approx(float(seen[token]), abs=1e-5)
            unsure = -float((seen.exp() * seen).sum())
            assert float(found.entropies[row, place]) == pytest.approx(unsure, abs=1e-5)
        labels = label_log_probs(model, episode)
        assert found.labels[row].tolist() == pytest.approx(labels, abs=1e-5)
        assert float(found.log_probs[row, len(actions)].detach()) == pytest.approx(labels[episode.label], abs=1e-5)
        unsure = -sum(math.exp(p) * p for p in labels)
        assert float(found.entropies[row, len(actions)]) == pytest.approx(unsure, abs=1e-5)
    assert not found.log_probs[2, 1:].any()
    assert not found.values.any()


def test_single_token_labels_need_no_further_ways(model: LlamaForCausalLM) -> None:
    episode = replace(EPISODE, labels=((7,), (8,), (9,)))
    assert len(episode.strands) == 1
    assert len(EPISODE.strands) == 3  # behind (7), and behind (8) on to (8, 7)
    found = score(model, None, [episode], 1.0)
    assert found.labels[0].tolist() == pytest.approx(label_log_probs(model, episode), abs=1e-5)


def test_the_label_prompt_carries_no_loss(model: LlamaForCausalLM) -> None:
    """Besides prompt and label prompt everything read is an action: 2 tokens, the end, the label."""
    assert [strand.weights for strand in replace(EPISODE, labels=((7,), (8,))).strands] == [
        (0, 0, 0, 0, 1, 1, 1, 0, 1),
    ]
    assert EPISODE.num_free == 3
    assert replace(EPISODE, has_end=False).num_free == 2
    assert replace(EPISODE, log_probs=None).num_free == 0


def test_company_order_and_parts_change_no_gradient(model: LlamaForCausalLM) -> None:
    others = [replace(EPISODE, explanation=(50 + i,) * (1 + i), log_probs=(0.0,) * (1 + i)) for i in range(3)]
    episodes = [EPISODE, *others]

    def gradient(parts: list[list[Episode]]) -> Tensor:
        model.zero_grad()
        for part in parts:
            (score(model, None, part, 1.0).log_probs.sum() / 10).backward()
        flat = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return flat

    whole = gradient([episodes])
    assert float(whole.norm()) > 0.1
    torch.testing.assert_close(gradient([[episode] for episode in episodes]), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient([episodes[::-1]]), whole, rtol=1e-4, atol=1e-5)


def test_values_are_of_the_state_before_each_action(model: LlamaForCausalLM) -> None:
    """Against the hidden states of one row; and no gradient of a value reaches the network."""
    head = ValueHead(SHAPE.hidden_size)
    assert not score(model, head, [EPISODE], 1.0).values.any()
    torch.manual_seed(1)
    torch.nn.init.normal_(head.outer.weight)
    found = score(model, head, [EPISODE], 1.0)
    row = (*EPISODE.prompt, *EPISODE.explanation, *EPISODE.label_prompt)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
        # Before 30, 31 and the end stand places 3, 4 and 5; before the label the last of the label prompt.
        expected = head(states[[3, 4, 5, 7]])
    torch.testing.assert_close(found.values[0].detach(), expected, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    found.values.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert head.outer.weight.grad is not None


# ---- drawing --------------------------------------------------------------------------------------------------


def generator_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int = 8) -> HfGenerator:
    return HfGenerator("student", model, ChatTokens(tokenizer), batch_size)


def test_engine_and_trainer_agree(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The log-probabilities with which the engine drew, and its label distribution, are the trainer's."""
    generator = generator_of(model, tokenizer)
    known = {("q", "air"): (Evidence(2.0, 1.0, "link"),)}
    drawn = draw(generator, ALMANAC, [(QUERY, DOCUMENTS)], known, num_samples=3, temperature=1.3, seed="s")
    assert [candidate.doc_id for candidate in drawn.groups[0].candidates] == ["air", "yeast"]
    assert drawn.groups[0].candidates[0].evidence == known["q", "air"]
    assert drawn.groups[0].num_rollouts == len(drawn.episodes) == 6
    scores = score(model, None, drawn.episodes, 1.3)
    num_compared = 0
    for row, (episode, (_, rollout)) in enumerate(zip(drawn.episodes, drawn.groups[0].pairs, strict=True)):
        if episode.log_probs is not None:
            trainer = scores.log_probs[row, : len(episode.log_probs)].tolist()
            assert trainer == pytest.approx(episode.log_probs, abs=1e-4)
            num_compared += len(trainer)
        assert rollout.probs == pytest.approx(scores.labels[row].exp().tolist(), abs=1e-4)
        assert rollout.label == ALMANAC.scale.labels[episode.label]
        assert rollout.num_tokens == len(episode.explanation)
    assert num_compared > 100
    # An untrained network rambles to the cap of 64 tokens.
    assert {rollout.status for _, rollout in drawn.groups[0].pairs} == {"forced"}


def test_draws_depend_on_seed_and_pair_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def explanations(documents: list[Document], seed: str, batch_size: int) -> dict[str, tuple[str, ...]]:
        generator = generator_of(model, tokenizer, batch_size)
        drawn = draw(generator, ALMANAC, [(QUERY, documents)], {}, num_samples=2, temperature=1.0, seed=seed)
        return {c.doc_id: tuple(r.explanation for r in c.rollouts) for c in drawn.groups[0].candidates}

    both = explanations(DOCUMENTS, "s", 8)
    assert explanations(DOCUMENTS[1:], "s", 1)["yeast"] == both["yeast"]
    assert len({text for texts in both.values() for text in texts}) == 4
    assert explanations(DOCUMENTS, "t", 8) != both


def test_labels_are_drawn_from_their_distribution(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """300 draws behind explanations of at most two tokens: the share of every label within four standard errors."""
    brief = replace(ALMANAC, limits=replace(ALMANAC.limits, max_explanation_tokens=2))
    generator = generator_of(model, tokenizer, 64)
    drawn = draw(generator, brief, [(QUERY, DOCUMENTS[:1])], {}, num_samples=300, temperature=1.0, seed="s")
    rollouts = drawn.groups[0].candidates[0].rollouts
    for place, label in enumerate(brief.scale.labels):
        expected = sum(rollout.probs[place] for rollout in rollouts if rollout.probs) / 300
        found = sum(rollout.label == label for rollout in rollouts) / 300
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 300))


# ---- a round of one step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rwl"])
def test_a_single_step_finds_out_itself_what_the_policy_said(
    model: LlamaForCausalLM, algorithm: Literal["grpo", "rwl"]
) -> None:
    """No pass beforehand, the same weights afterwards as with one: the step begins with the policy that drew."""
    capped = replace(EPISODE, explanation=(33, 34, 35, 36, 37), has_end=False, log_probs=(0.0,) * 5, label=0)
    other = replace(EPISODE, prompt=(1, 23, 24), label=1)
    episodes, rewards = [EPISODE, capped, other, replace(other, label=2)], [1.0, 0.0, 0.25, 0.75]
    options: dict[str, Any] = {"num_samples": 2, "num_epochs": 1, "minibatch_size": 2, "microbatch_size": 1}
    config = RefineConfig(algorithm=algorithm, device="cpu", **options)
    trained = []
    for is_known in (False, True):
        learner = Learner(copy.deepcopy(model), config)
        expected = score(model, None, episodes, config.temperature)
        lesson = learner.prepare(episodes, rewards, 0.02)
        assert lesson.old is None
        if is_known:
            lesson = replace(lesson, old=expected)
        more: dict[str, Any] = {"coefficient": 0.02, "is_value_only": False, "replay": list, "rng": Random(0)}
        updated = learner.update(lesson, rate=1e-3, **more)
        for name in ("log_probs", "entropies", "labels"):
            torch.testing.assert_close(getattr(updated.old, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        assert updated.num_updates == 1
        assert updated.step_kl == pytest.approx(0.0, abs=1e-6)
        trained.append(torch.cat([found.detach().flatten() for found in learner.parameters]))
    before = torch.cat([found.detach().flatten() for found in model.parameters()])
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=2e-5)
    assert float((trained[0] - before).abs().max()) > 5e-4


@pytest.mark.parametrize("changed", [{"algorithm": "ppo"}, {"num_epochs": 2}, {"minibatch_size": 1}])
def test_of_several_steps_the_first_must_not_move_what_the_policy_said(
    model: LlamaForCausalLM, changed: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"algorithm": "grpo", "num_samples": 2, "num_epochs": 1, "minibatch_size": 2, **changed}
    learner = Learner(copy.deepcopy(model), RefineConfig(device="cpu", **options))
    episodes = [EPISODE, replace(EPISODE, label=0), EPISODE, replace(EPISODE, label=1)]
    lesson = learner.prepare(episodes, [1.0, 0.0, 0.5, 0.25], 0.02)
    assert lesson.old is not None
    expected = score(model, None, episodes, 1.0).log_probs
    torch.testing.assert_close(lesson.old.log_probs, expected, rtol=1e-4, atol=1e-5)
