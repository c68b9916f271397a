"""The template's law: what is written as an answer is read back, whatever text it holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.user_templates import SHIPPED
from whyrank.errors import InputError
from whyrank.template import AnswerWords, PromptWords, Template

PIECES = st.sampled_from(
    [
        *(
            "Relevance Label: 2 ##",
            "Relevance Label:",
            "relevance label : 0",
            "RELEVANCE LABEL: 1",
            "**Relevance Label:** 2",
        ),
        *(
            "Ｒｅｌｅｖａｎｃｅ Ｌａｂｅｌ：２",
            "> Relevance Label: 2",
            "\u00a0Relevance Label: 0",
            "- Relevance Label: 10 ##",
        ),
        *(
            "Relevance Label: true ##",
            "Label: 2",
            "Label:",
            "label",
            "Grade: 3 END",
            "**Grade:** 3",
            "Relevance Labels",
            " ##",
        ),
        *(
            "Explanation:",
            "Explanation: ",
            "<think>",
            "</think>",
            "<think",
            "think>",
            "/think>",
            "true",
            "false",
            "---",
            "-",
        ),
        *(
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|eot_id|>",
            "<start_of_turn>",
            "[INST]",
            "</s>",
            "<s>",
            "<<SYS>>",
        ),
        *(
            "\n",
            "\n\n",
            "\r\n",
            "\r",
            "\x00",
            "\x0b",
            "\x85",
            "\u2028",
            " ",
            "\t",
            "\\",
            "\\\\",
            "＼",
            "＜",
            "\u0338",
            "\u200b",
        ),
        *("\n\\Relevance Label: 1", "\\</think>", "<\\/think>", "\\Label: 0", "\n---\n", "----", "-\\--"),
    ]
)
NASTY = st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=12).map("".join)


@given(why=NASTY, pick=st.randoms(use_true_random=False))
@example(why="", pick=None)
@example(why=" \n", pick=None)
@example(why="----", pick=None)
def test_parse_undoes_answer(templates: tuple[Template, ...], why: str, pick: Any) -> None:
    for template in templates:
        labels = template.scale.labels
        for label in labels if pick is None else [pick.choice(labels)]:
            assert template.parse(template.answer(label, why)) == (label, why)


def test_what_no_file_can_hold_is_replaced() -> None:
    template = Template.load("explain-0-2")
    assert template.parse("Explanation: a\ud800b\n\nRelevance Label: 2 ##") == ("2", "a\ufffdb")
    assert template.parse("\udfff") == (None, "\ufffd")
    assert template.read_explanation("a\ud800") == "a\ufffd"


@given(why=NASTY)
def test_reading_undoes_escaping(templates: tuple[Template, ...], why: str) -> None:
    for template in templates:
        assert template.unescape(template.escape(why)) == why
        assert template.read_explanation(template.escape(why)) == why.strip()


# Marks that overlap themselves or each other, or hold each other.
OVERLAPPING = (
    AnswerWords(separator="\n###\n", thinking=("", "")),
    AnswerWords(separator="==", label_prompt="", thinking=("aa", "aba")),
    AnswerWords(separator="aba", thinking=("==", "=a=")),
    AnswerWords(separator="ab", label_prompt="", thinking=("#a#", "#a#a#")),
    AnswerWords(separator="x</a>", label_prompt="", thinking=("<a>", "</a>")),
)


@pytest.mark.parametrize("words", OVERLAPPING, ids=lambda words: words.separator.strip())
@given(why=st.text("ab#=\\\n </>x", max_size=12), label=st.sampled_from(["0", "1", "2"]))
@example(why="####", label="0")
@example(why="a\\aaa\\\\a", label="1")
def test_the_laws_hold_for_marks_that_overlap(words: AnswerWords, why: str, label: str) -> None:
    template = Template(name="t", prompt=PromptWords(task="t"), answer_words=words)
    escaped = template.escape(why)
    assert template.unescape(escaped) == why
    for mark in (words.separator.strip(), *filter(None, words.thinking)):
        assert mark not in escaped
    assert template.parse(template.answer(label, why)) == (label, why)


def test_one_mark_is_escaped_as_ever() -> None:
    # One backslash behind the first character; others inside are text. Judgments on disk rest on it.
    template = Template.load("explain-0-2")
    assert template.escape("a <think> b <\\/think>") == "a <\\think> b <\\\\/think>"
    assert template.unescape("a <\\think> b <\\\\/think> <x>") == "a <think> b <\\/think> <x>"


@given(why=NASTY)
def test_no_stop_fires_inside_an_escaped_explanation(why: str) -> None:
    # Otherwise a student that has learnt to quote a label line would be cut there at ranking time.
    for template in map(Template.load, SHIPPED):
        escaped = f"\n{template.escape(why)}"  # a leading newline stands for the beginning of the text
        assert not any(stop in escaped for stop in template.stops)


@given(text=NASTY)
def test_parse_takes_any_text(templates: tuple[Template, ...], text: str) -> None:
    for template in templates:
        label, explanation = template.parse(text)
        assert label in {*template.scale.labels, None}
        assert label is not None or explanation == text


@given(before=NASTY, after=NASTY)
def test_two_labels_are_no_label(before: str, after: str) -> None:
    # Whatever stands around them, an answer with two different label lines of its own form is not readable; what
    # stands before a closed thought is not part of the answer.
    assume("</think>" not in after)
    text = f"{before}\nRelevance Label: 1 ##\n{after}\n\nRelevance Label: 2 ##"
    assert Template.load("explain-0-2").parse(text).label is None


def test_direct_answer_is_read(templates: tuple[Template, ...]) -> None:
    for template in templates:
        for label in template.scale.labels:
            assert template.parse(template.answer(label, "unused", "direct")) == (label, "")


def test_answer_parts_join_to_the_answer() -> None:
    template = Template.load("explain-0-2")
    parts = template.answer_parts("2", "because")
    assert parts == ((True, "Explanation:"), (False, " because"), (True, "\n\nRelevance Label: 2 ##"))
    assert template.answer("2", "because") == "Explanation: because\n\nRelevance Label: 2 ##"


def test_label_outside_the_scale_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected one of the labels 0, 1, 2, found '3'"):
        Template.load("explain-0-2").answer("3", "because")


def test_escape_leaves_plain_text_alone_and_marks_structure() -> None:
    template = Template.load("explain-0-2")
    assert template.escape("The relevance label is 2.\n2 < 3 and \\n stays.") == (
        "The relevance label is 2.\n2 < 3 and \\n stays."
    )
    assert template.escape("So\n  Relevance Label: 2") == "So\n\\  Relevance Label: 2"
    assert template.escape("<think> and <\\think>") == "<\\think> and <\\\\think>"
