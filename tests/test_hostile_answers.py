"""Answers as models and services really give them, each with the label that a careful reader would take from it.

The expected labels are written by hand, before and apart from the parser. The rule: what is not plainly a label
is no label.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from whyrank.template import Template

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "hostile_answers.jsonl").read_text(encoding="utf-8").splitlines()
]

SIZE = 100_000  # characters
WORST_CASES = {
    "short lines": "x\n" * (SIZE // 2),
    "empty lines": "\n" * SIZE,
    "label lines": "Relevance Label: 1\n" * (SIZE // 19),
    "marks after a label": ("Relevance Label: 2" + "#" * 180 + "x\n") * (SIZE // 200),
    "one line of marks": "#*_`> " * (SIZE // 6),
    "combining marks in the worst order": "a" + "\u0316\u0301" * (SIZE // 2),
    "combining marks, line by line": ("R" + "\u0316\u0301" * 98 + "\n") * (SIZE // 198),
    "one character that unfolds to eighteen": "\ufdfa" * SIZE,
    "opening tags": "<think>" * (SIZE // 7),
    "closing tags": "</think>" * (SIZE // 8),
    "backslashes": "\\" * SIZE,
    "tag of backslashes": "<" + "\\" * SIZE + "think>",
    "half tags": "<\\" * (SIZE // 2),
    "prompts": "Explanation: " * (SIZE // 13),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["reason"])
def test_label_is_what_a_careful_reader_takes(case: dict[str, Any]) -> None:
    found = Template.load(case["template"]).parse(case["answer"])
    assert found.label == case["label"], case["reason"]
    if "explanation" in case:
        assert found.explanation == case["explanation"]


@pytest.mark.parametrize("case", [case for case in CASES if case["label"] is None], ids=lambda case: case["reason"])
def test_unreadable_answer_is_kept_whole(case: dict[str, Any]) -> None:
    assert Template.load(case["template"]).parse(case["answer"]).explanation == case["answer"]


def test_corpus_is_large_and_names_each_answer_once() -> None:
    assert len(CASES) >= 70
    assert len({(case["template"], case["answer"]) for case in CASES}) == len(CASES)
    assert len({case["reason"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("ending", ["", "\n\nRelevance Label: 2 ##"], ids=["no label", "label"])
@pytest.mark.parametrize("name", WORST_CASES)
def test_work_is_bounded(name: str, ending: str) -> None:
    # Linear work takes 5 to 50 ms for 100,000 characters; anything quadratic takes far longer than a second.
    text = f"Explanation: {WORST_CASES[name]}{ending}"
    template = Template.load("explain-0-2")
    start = time.perf_counter()
    template.parse(text)
    template.unescape(template.escape(text))
    assert time.perf_counter() - start < 1.0


def test_random_bytes_never_raise_and_never_label() -> None:
    # 3,000 texts of random characters; a label line of 18 characters does not arise by chance.
    draw = random.Random(0)
    template = Template.load("explain-0-2")
    for _ in range(3000):
        text = "".join(chr(draw.choice((draw.randrange(0x250), draw.randrange(0x110000)))) for _ in range(40))
        assert template.parse(text).label is None
