"""Rewards that ask models, and rewards in other trainers' clothes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.test_rewards import group_of, rollout
from whyrank.errors import GenerationError, InputError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.judging import Judge
from whyrank.records import Document, Query
from whyrank.template import Template
from whyrank.training.model_rewards import ClassifierReward, JudgeReward, open_reward
from whyrank.training.reward_adapters import export_rows, read_answer, trl_reward
from whyrank.training.rewards import REWARDS, WeightedReward
from whyrank.training.rollouts import Evidence
from whyrank.training.tiny import tiny_tokenizer

ALMANAC = Template.load("almanac")
QUERIES = {"q": Query("q", "why brown"), "r": Query("r", "why flat")}
DOCUMENTS = {"a": Document("a", "dry air"), "b": Document("b", "cold dough", title="Bread")}
EVIDENCE: Mapping[tuple[str, str], tuple[Evidence, ...]] = {
    ("q", "a"): (Evidence(2.0, 1.0, "link"), Evidence(0.0, 1.0, "consensus")),
    ("q", "b"): (Evidence(0.0, 1.0, "unlinked"),),
    ("r", "b"): (),
}
TOKENS = ChatTokens(tiny_tokenizer(["why brown dry air Label: Explanation:"], 300))


def save_classifier(folder: Path, num_labels: int) -> torch.nn.Module:
    torch.manual_seed(2)
    shape: dict[str, Any] = {
        "num_labels": num_labels,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=300, pad_token_id=0, **shape)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    TOKENS.tokenizer.save_pretrained(folder)
    model.train(False)
    return model


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_classifier_rewards_with_its_probability(tmp_path: Path, num_labels: int) -> None:
    """Against each answer in a row of its own, without padding."""
    model = save_classifier(tmp_path, num_labels)
    group = group_of(([rollout(2, "Dry."), rollout(0, "Not at all so.")], ()), passage="dry air", query="why brown")
    found = open_reward(f"model:{tmp_path}")(group)
    for value, why, label in zip(found, ("Dry.", "Not at all so."), (2, 0), strict=True):
        ids = TOKENS.tokenizer("why brown\n\ndry air", f"Explanation: {why}\nLabel: {label}", return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=ids["input_ids"]).logits[0]
        expected = torch.sigmoid(logits[0]) if num_labels == 1 else torch.softmax(logits, 0)[2]
        assert value == pytest.approx(float(expected), abs=1e-5)
    small = replace(ClassifierReward.load(tmp_path), batch_size=1)
    assert small(group) == pytest.approx(found, abs=1e-5)


def test_a_missing_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a sequence classifier"):
        open_reward(f"model:{tmp_path}/none")
    assert open_reward("agreement") is REWARDS["agreement"]


def judge(*answers: tuple[str, str]) -> Judge:
    """A scripted judge on the scale 0 to 2: a label for each text it may be shown."""
    template = replace(ALMANAC, limits=replace(ALMANAC.limits, max_document_tokens=500))
    said = [ScriptedAnswer("why brown", text, label=label) for text, label in answers]
    return Judge(template, Scripted(said), "direct")


def test_a_judge_rewards_with_its_share_of_the_scale(caplog: pytest.LogCaptureFixture) -> None:
    """Labels 2 and 1 of 0 to 2 are 1 and 1/2; what it does not answer counts as their mean."""
    texts = [f"dry air\n\nExplanation: {why}\nLabel: 2" for why in ("One.", "Two.", "Three.")]
    group = group_of(
        ([rollout(2, why) for why in ("One.", "Two.", "Three.")], ()), passage="dry air", query="why brown"
    )
    assert JudgeReward(judge((texts[0], "2"), (texts[1], "1"), (texts[2], "0")))(group) == [1.0, 0.5, 0.0]
    assert JudgeReward(judge((texts[0], "2"), (texts[1], "1")))(group) == [1.0, 0.5, 0.75]
    assert "1 of 3 judgments could not be read" in caplog.text
    with pytest.raises(GenerationError, match="none of 3 judgments"):
        JudgeReward(judge(("other air", "2")))(group)


# ---- other trainers -----------------------------------------------------------------------------------------------


def test_answers_are_read_by_the_template() -> None:
    found = read_answer(" It is dry.\nLabel: 2", ALMANAC, 7)
    assert (found.explanation, found.label, found.value, found.num_tokens) == ("It is dry.", "2", 2.0, 7)
    assert read_answer(" It is dry.", ALMANAC, 3).status == "unparsed"


def test_trl_gets_the_same_rewards_in_its_own_order() -> None:
    """Two queries, mixed: agreement 1 for (q, a) with 2, .5 each way with evidence 2 and 0; -1 without label."""
    rows = list(export_rows(EVIDENCE, QUERIES, DOCUMENTS, ALMANAC, TOKENS, "trl"))
    assert [(row["query_id"], row["doc_id"]) for row in rows] == [("q", "a"), ("q", "b")]
    assert rows[0]["prompt"] == "<|begin|>Query: why brown\n\nDocument: dry air\nExplanation:"
    order = [1, 0, 0, 1]
    columns = {name: [rows[i][name] for i in order] for name in rows[0] if name != "prompt"}
    said = [" No.\nLabel: 0", " Yes.\nLabel: 1", " Yes.", [{"role": "assistant", "content": " No.\nLabel: 2"}]]
    reward = trl_reward([WeightedReward("agreement", REWARDS["agreement"], 2.0)], ALMANAC)
    found = reward([rows[i]["prompt"] for i in order], said, [[1, 2]] * 4, trainer_state=None, **columns)
    # (q, b) says 0: 2 * 1; (q, a) says 1: 2 * (.5 + .5); no label: -1; (q, b) says 2: 0.
    assert found == [2.0, 2.0, -1.0, 0.0]


def test_rows_for_other_trainers() -> None:
    """The belief is the mean of 2 and 0."""
    verl, _ = export_rows(EVIDENCE, QUERIES, DOCUMENTS, ALMANAC, TOKENS, "verl")
    assert verl["reward_model"] == {"style": "rule", "ground_truth": 1.0}
    assert verl["prompt"] == [
        {"role": "user", "content": "Query: why brown\n\nDocument: dry air"},
        {"role": "assistant", "content": "Explanation:"},
    ]
    assert verl["extra_info"]["evidence"][0] == {"value": 2.0, "trust": 1.0, "source": "link"}
    _, other = export_rows(EVIDENCE, QUERIES, DOCUMENTS, ALMANAC, TOKENS, "openrlhf")
    assert other["label"] == 0.0
    assert other["passage"] == "Bread\ncold dough"
    missing: dict[str, Any] = {"q": QUERIES["q"]}
    with pytest.raises(InputError, match=r"the pair \(q, a\)"):
        list(export_rows(EVIDENCE, missing, {}, ALMANAC, TOKENS, "verl"))
