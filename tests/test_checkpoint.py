"""The card of a checkpoint: what goes in comes out, and what does not belong together is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import save_checkpoint
from whyrank import Reranker
from whyrank.checkpoint import CARD_NAME, Card, read_card, write_card
from whyrank.errors import InputError, TemplateMismatch
from whyrank.generators.hf import HfGenerator
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")
TOKENS = {" 0 ##": (5, 6), " 1 ##": (7, 6), " 2 ##": (8, 6)}
CARD = Card(TEMPLATE, ("explain", "direct"), TOKENS, training={"steps": 3, "on": ["a", "ü"]})


@pytest.mark.parametrize("name", ["explain-0-2", "explain-0-100", "explain-true-false", "almanac"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    card = replace(CARD, template=Template.load(name))
    write_card(tmp_path, card)
    assert read_card(tmp_path / CARD_NAME) == card
    write_card(tmp_path, Card(card.template))
    assert read_card(tmp_path / CARD_NAME) == Card(card.template)


def test_what_belongs_together_is_accepted() -> None:
    longer = replace(TEMPLATE, name="mine", limits=replace(TEMPLATE.limits, max_explanation_tokens=9))
    CARD.check(mode="explain", template=None, label_tokens=TOKENS)
    CARD.check(mode="direct", template=longer, label_tokens=TOKENS)
    replace(CARD, label_tokens={}).check(mode="explain", template=None, label_tokens=TOKENS)


@pytest.mark.parametrize(
    "other",
    [
        replace(TEMPLATE, prompt=replace(TEMPLATE.prompt, task="Judge.")),
        replace(TEMPLATE, labels="0-10"),
        replace(TEMPLATE, labels=("no", "yes")),
        replace(TEMPLATE, answer_words=replace(TEMPLATE.answer_words, separator="\n---\n")),
        replace(TEMPLATE, chat_options={"enable_thinking": False}),
    ],
    ids=["task", "scale", "words", "separator", "chat options"],
)
def test_another_template_is_refused(other: Template) -> None:
    with pytest.raises(TemplateMismatch, match=r"was trained with template explain-0-2@\w+, not explain-0-2@\w+"):
        CARD.check(mode="explain", template=other, label_tokens=TOKENS)


def test_a_mode_that_was_not_trained_is_refused() -> None:
    with pytest.raises(TemplateMismatch, match="trained for --mode explain, not for direct"):
        replace(CARD, modes=("explain",)).check(mode="direct", template=None, label_tokens=TOKENS)


def test_other_label_tokens_are_refused() -> None:
    with pytest.raises(TemplateMismatch, match="restore the tokenizer"):
        CARD.check(mode="explain", template=None, label_tokens={**TOKENS, " 2 ##": (8, 9)})


def change(path: Path, *names: str, to: Any) -> None:
    """Edit one value of the card by hand."""
    data = json.loads(path.read_text())
    inner = data
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = to
    path.write_text(json.dumps(data))


def test_an_edited_template_is_refused(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    change(tmp_path / CARD_NAME, "template", "prompt", "query_heading", to="Question:\n")
    with pytest.raises(InputError, match="a checkpoint's template must not be edited"):
        read_card(tmp_path / CARD_NAME)


def test_a_newer_card_is_refused(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    change(tmp_path / CARD_NAME, "format", to=2)
    with pytest.raises(InputError, match=r"whyrank\.json: expected a whyrank card of format 1, found 2; update"):
        read_card(tmp_path / CARD_NAME)


@pytest.mark.parametrize("content", ["[]", "{}", '"card"', '{"format": 1}', "not json", '{"format": 1, "template": 5}'])
def test_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / CARD_NAME).write_text(content)
    with pytest.raises(InputError, match=r"whyrank\.json"):
        read_card(tmp_path / CARD_NAME)


@pytest.mark.parametrize("name", ["modes", "label_tokens", "training", "template_version", "template"])
def test_a_damaged_card_is_refused(tmp_path: Path, name: str) -> None:
    write_card(tmp_path, CARD)
    data = json.loads((tmp_path / CARD_NAME).read_text())
    del data[name]
    (tmp_path / CARD_NAME).write_text(json.dumps(data))
    with pytest.raises(InputError, match="expected a whole whyrank card") as caught:
        read_card(tmp_path / CARD_NAME)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_card_is_checked_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model")
    spelled = HfGenerator.load(folder, device="cpu").tokens.label_tokens(TEMPLATE)
    short = replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_explanation_tokens=5))
    write_card(folder, Card(short, ("direct",), spelled))
    assert Reranker.load(folder, mode="direct").judge.template == short
    assert Reranker.load(folder, mode="direct", template=TEMPLATE).judge.template == TEMPLATE
    with pytest.raises(TemplateMismatch, match="not for explain"):
        Reranker.load(folder)
    with pytest.raises(TemplateMismatch, match="leave --template out"):
        Reranker.load(folder, mode="direct", template="explain-0-10")
    write_card(folder, Card(short, ("direct",), {**spelled, " 2 ##": (1,)}))
    with pytest.raises(TemplateMismatch, match="spells the labels"):
        Reranker.load(folder, mode="direct")
