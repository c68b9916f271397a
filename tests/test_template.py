"""Templates of users, rendering, scales and identity."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.user_templates import RULED, SHIPPED, THINKING, from_toml
from whyrank.errors import InputError
from whyrank.generators import ApproximateTokens, Sampling
from whyrank.template import AnswerWords, Limits, PromptWords, Scale, Template, cut_end


@dataclass(frozen=True)
class Words:
    """One token per run of characters that are not white space: easy to count by hand."""

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S+", text)]


# ---- templates of users -------------------------------------------------------------------------------------


def test_thinking_template_reads_what_follows_the_thought(tmp_path: Path) -> None:
    template = from_toml(THINKING, tmp_path)
    assert template.stops == ("</think>",)
    assert template.label_prompt("explain") == "\n</think>"
    assert template.label_texts == (" false", " true")
    assert template.answer("true", "Same lake.") == "<think> Same lake.\n</think> true"
    assert template.parse("<think>\nThe query asks for a lake. It is one.\n</think> true") == (
        "true",
        "The query asks for a lake. It is one.",
    )
    assert template.parse("Okay, a lake.</think>\n\nfalse\n") == ("false", "Okay, a lake.")


@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nIs it true or false? It is\ntrue",  # cut off within the thought
        "<think>one</think> false <think>two</think> true",  # two answers
        "<think> one\n</think> false\n</think> true",  # the same in the template's own form
        "<think>one</think> true, I think",
        "<think>one</think>",
        "It is true",
    ],
)
def test_thinking_template_does_not_guess(tmp_path: Path, answer: str) -> None:
    assert from_toml(THINKING, tmp_path).parse(answer) == (None, answer)


def test_thought_that_is_cut_off_has_no_label_line(tmp_path: Path) -> None:
    template = from_toml(THINKING.replace('label_prompt = ""', 'label_prompt = "\\nVerdict:"'), tmp_path)
    assert template.parse("<think>It says\nVerdict: true").label is None
    assert template.parse("<think>It says so</think>\nVerdict: true") == ("true", "It says so")


def test_template_without_thinking_tags_takes_them_as_text(tmp_path: Path) -> None:
    template = from_toml(RULED + 'thinking = ["", ""]\n', tmp_path)
    template = replace(template, answer_words=replace(template.answer_words, separator="\n"))
    assert template.escape("<think>") == "<think>"
    assert template.parse(template.answer("2", "a <think> b")) == ("2", "a <think> b")
    assert template.parse("a <think> b\nGrade: 2") == ("2", "a <think> b")


def test_terminator_word_and_marked_prompt_are_read_loosely(tmp_path: Path) -> None:
    template = from_toml(RULED, tmp_path)
    assert template.parse("Some reason.\n---\nGrade: 10") == ("10", "Some reason.")
    assert template.parse("Some reason.\n---\n**Grade:** 10 END") == ("10", "Some reason.")
    assert template.parse("Some reason.\n---\nGrade: 1 0 END").label is None


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        from_toml(text, tmp_path)
    return str(caught.value)


def test_unknown_keys_are_refused_by_file_and_name(tmp_path: Path) -> None:
    assert "mine.toml: template key 'lables'" in refused(tmp_path, THINKING.replace("labels =", "lables ="))
    assert "mine.toml: template key 'prompt.ask'" in refused(tmp_path, THINKING.replace("task =", "ask ="))
    assert "mine.toml: template key 'answer_words.stop'" in refused(tmp_path, THINKING + 'stop = "x"\n')


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('["false", "true"]', '["true"]', "1 label words need as many values"),
        ('["false", "true"]', '["True", "true"]', "two different labels"),
        ('["false", "true"]', '["false ", "true"]', "without space around it"),
        ('["false", "true"]', '["no", "not"]', "give a terminator"),
        ('["false", "true"]', '"0-10"', "give a terminator"),  # " 10" begins with " 1"
        ('["false", "true"]', '"0-5"', "expected labels to be one of"),
        ('["false", "true"]', '["false", "true"]\nvalues = [0.0, nan]', "finite values"),
        ('["false", "true"]', '["false", "true"]\nvalues = [0.0]', "need as many values"),
        ('separator = "\\n</think>"', 'separator = "\\n"', "must say where the label begins"),
        ('separator = "\\n</think>"', "separator = '\\n'", "cannot hold a backslash"),
        ('label_prompt = ""', 'label_prompt = "=>"', "expected words in label_prompt"),
        ('terminator = ""', 'terminator = ""\nthinking = ["<think>", ""]', "both thinking tags or none"),
        ('separator = "\\n</think>"', 'separator = "#"', "at least two characters to be told from text, found #, </"),
        ('terminator = ""', 'terminator = ""\nthinking = ["aa", "a"]', "at least two characters"),
        # The text "[/t" and the separator would be the tag "[/t]".
        (
            'separator = "\\n</think>"',
            'separator = "]]"\nthinking = ["[t]", "[/t]"]',
            "text and separator together could spell",
        ),
        ("name =", "name", "expected TOML"),
    ],
)
def test_template_that_could_not_be_read_back_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert THINKING.count(before) == 1
    found = refused(tmp_path, THINKING.replace(before, after))
    assert "mine.toml" in found
    assert message in found


def test_missing_template_names_what_there_is() -> None:
    with pytest.raises(
        InputError, match=r"no template 'explain-0-3': give a TOML file or one of almanac, explain-0-10,"
    ):
        Template.load("explain-0-3")


# ---- rendering ----------------------------------------------------------------------------------------------


def text_of(template: Template, query: str, document: str, **options: Any) -> str:
    request = template.render(query, document, Words(), **options).request
    return "".join(segment.text for segment in request.segments)


def test_render_puts_the_document_last_and_the_query_before_it() -> None:
    template = Template(name="t", prompt=PromptWords(task="Judge.", explain_format="Explain.", system="Be brief."))
    request = template.render("why rust", "iron and water", Words()).request
    assert [(segment.role, segment.kind, segment.text) for segment in request.segments] == [
        ("system", "instruction", "Be brief."),
        ("user", "instruction", "Judge.\n\nExplain.\n\nQuery:\n"),
        ("user", "query", "why rust"),
        ("user", "instruction", "\n\nDocument:\n"),
        ("user", "document", "iron and water"),
        ("assistant", "structure", "Explanation:"),
    ]
    assert request.labels == (" 0 ##", " 1 ##", " 2 ##")
    assert request.label_prompt == "\n\nRelevance Label:"
    assert request.stops == ("\nRelevance Label:",)
    assert request.sampling == Sampling(temperature=0.0, max_tokens=256, seed=0)


@given(query=st.text(max_size=30), first=st.text(max_size=60), second=st.text(max_size=60))
def test_candidates_of_a_query_share_all_but_the_document(query: str, first: str, second: str) -> None:
    template = Template.load("explain-0-2")
    one, two = (template.render(query, text, Words()).request.segments for text in (first, second))
    assert one[:3] == two[:3]
    assert [(segment.role, segment.kind) for segment in one] == [(segment.role, segment.kind) for segment in two]


@given(num_query=st.integers(0, 9), num_document=st.integers(0, 9), spaces=st.integers(1, 3))
def test_cuts_are_counted_in_the_tokens_given(num_query: int, num_document: int, spaces: int) -> None:
    template = replace(Template.load("explain-0-2"), limits=Limits(max_query_tokens=4, max_document_tokens=6))
    query, document = (" " * spaces).join(["qq"] * num_query), (" " * spaces).join(["dd"] * num_document)
    rendered = template.render(query, document, Words())
    # n tokens of 2 characters with `spaces` between them take 2n + (n - 1) * spaces characters.
    kept = min(num_document, 6)
    length = 2 * kept + max(kept - 1, 0) * spaces
    assert rendered.passage == (0, length)
    assert rendered.request.text_of("document") == document[:length]
    assert rendered.request.text_of("query").split() == ["qq"] * min(num_query, 4)
    assert rendered.is_document_cut == (num_document > 6)
    assert rendered.is_query_cut == (num_query > 4)


def test_instruction_is_never_cut_and_can_be_replaced() -> None:
    template = replace(Template.load("explain-0-2"), limits=Limits(max_query_tokens=1, max_document_tokens=1))
    assert template.prompt.task in text_of(template, "q r", "d e")
    replaced = text_of(template, "q r", "d e", instruction="Only legal texts help.")
    assert template.prompt.task not in replaced
    assert replaced.startswith(
        f"Only legal texts help.\n\n{template.prompt.explain_format}\n\nQuery:\nq\n\nDocument:\nd"
    )


def test_huge_document_is_cut_before_it_is_measured() -> None:
    measured: list[int] = []

    class Counting(Words):
        def offsets(self, text: str) -> Sequence[tuple[int, int]]:
            measured.append(len(text))
            return super().offsets(text)

    rendered = Template.load("explain-0-2").render("q", "x" * 5_000_000, Counting())
    assert rendered.is_document_cut
    assert max(measured) <= 32 * 2048


def test_direct_mode_asks_for_the_label_alone() -> None:
    template = Template.load("explain-0-2")
    request = template.render("q", "d", Words(), mode="direct").request
    assert request.is_direct
    assert request.label_prompt == "Relevance Label:"
    assert request.segments[-1].kind == "document"
    assert template.prompt.direct_format in request.segments[0].text
    assert template.prompt.explain_format not in request.segments[0].text


def test_empty_words_leave_no_blank_lines() -> None:
    assert text_of(Template.load("almanac"), "frost", "buds") == "Query: frost\n\nDocument: budsExplanation:"


# ---- scale and identity -------------------------------------------------------------------------------------


def test_scales() -> None:
    assert Template.load("explain-0-2").scale == Scale(("0", "1", "2"), (0.0, 1.0, 2.0))
    assert len(Template.load("explain-0-10").scale.labels) == 11
    assert Template.load("explain-0-100").scale.labels[78] == "78"
    words = Template.load("explain-true-false").scale
    assert words.expected((0.25, 0.75)) == 0.75  # the probability of true
    assert words.label_of(1.0) == "true"
    # 0.5 * 0 + 0.25 * 1 + 0.25 * 2
    assert Template.load("explain-0-2").scale.expected((0.5, 0.25, 0.25)) == 0.75
    with pytest.raises(InputError, match=r"found 0\.5"):
        words.label_of(0.5)


def test_ten_is_not_one() -> None:
    template = Template.load("explain-0-10")
    assert template.parse(template.answer("10", "x")).label == "10"
    assert template.parse(template.answer("1", "x")).label == "1"
    texts = template.label_texts
    assert not any(long.startswith(short) for short in texts for long in texts if short != long)


def changes() -> list[dict[str, Any]]:
    answer, prompt, limits = AnswerWords(), PromptWords(task="t"), Limits()
    return [
        {"name": "other"},
        {"labels": "0-10"},
        {"labels": ("no", "yes")},
        {"labels": ("no", "yes"), "values": (0.0, 2.0)},
        {"chat_options": {"enable_thinking": False}},
        *({"prompt": replace(prompt, **{key: "zzz"})} for key in prompt.__dataclass_fields__),
        {"answer_words": replace(answer, explanation_prompt="zzz")},
        {"answer_words": replace(answer, separator="zzz")},
        {"answer_words": replace(answer, label_prompt="zzz")},
        {"answer_words": replace(answer, terminator="zzz")},
        {"answer_words": replace(answer, thinking=("<t>", "</t>"))},
        *({"limits": replace(limits, **{key: 7})} for key in limits.__dataclass_fields__),
    ]


def test_version_changes_with_every_field() -> None:
    base = Template(name="t", prompt=PromptWords(task="t"))
    versions = [base.version, *(replace(base, **change).version for change in changes())]
    assert len(set(versions)) == len(versions)
    assert re.fullmatch(r"t@[0-9a-f]{8}", base.version)
    assert Template(name="t", prompt=PromptWords(task="t")).version == base.version


def test_asks_like_ignores_limits_and_name_only() -> None:
    base = Template(name="t", prompt=PromptWords(task="t"))
    assert base.asks_like(replace(base, name="u", limits=Limits(max_document_tokens=9)))
    assert not base.asks_like(replace(base, labels="0-10"))
    assert not base.asks_like(replace(base, prompt=PromptWords(task="u")))


def test_dict_survives_json(templates: tuple[Template, ...]) -> None:
    for template in templates:
        data = json.loads(json.dumps(template.to_dict()))
        again = Template.from_dict(data, where="checkpoint")
        assert again == template
        assert again.version == template.version


def test_every_shipped_format_shows_its_own_answer_shape() -> None:
    # What the chat model is told to write must be what `parse` reads.
    for name in SHIPPED[:-1]:
        template = Template.load(name)
        for form in (template.prompt.explain_format, template.prompt.direct_format):
            shown = form.rstrip().splitlines()[-1]
            label = template.scale.labels[-1]
            filled = re.sub(r"<[^>]*>", label, shown)
            assert filled == f"{template.answer_words.label_prompt} {label}{template.answer_words.terminator}"
            assert template.parse(filled).label == label


def test_limits_of_the_almanac_are_small() -> None:
    assert Template.load("almanac").limits == Limits(96, 96, 64)
    assert len(ApproximateTokens().offsets("x" * 9)) == 3  # 4 + 4 + 1 characters


# ---- what a small change would break ------------------------------------------------------------------------


def plain(**changes: Any) -> Template:
    words = {name: changes.pop(name) for name in ("separator", "thinking", "label_prompt") if name in changes}
    return Template("plain", PromptWords("Judge."), answer_words=AnswerWords(**words), **changes)


def test_a_scale_takes_a_probability_for_each_label() -> None:
    scale = plain().scale
    assert scale.value("2") == 2.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        scale.expected((0.5, 0.5))


def test_a_label_is_one_line() -> None:
    with pytest.raises(ValueError, match="one line without space around it"):
        plain(labels=("no", "y\nes"))


@pytest.mark.parametrize(("thinking", "separator"), [(("<<", "oo"), "oo"), (("<<", "yX"), "yX")])
def test_a_closing_tag_may_be_the_separator_whatever_its_letters(thinking: tuple[str, str], separator: str) -> None:
    template = plain(thinking=thinking, separator=separator)
    assert template.parse(template.answer("1", "why")) == ("1", "why")


@pytest.mark.parametrize("separator", ["/think>\n", "<think>", "\n--<think>--"])
def test_text_and_separator_must_not_spell_a_thinking_tag(separator: str) -> None:
    with pytest.raises(ValueError, match="could spell one of"):
        plain(separator=separator)


def test_what_a_template_says_of_itself_is_told_once() -> None:
    with pytest.raises(InputError) as caught:
        Template.from_dict({"name": "t", "prompt": {"task": "x"}, "labels": "0-7"}, where="file.toml")
    assert str(caught.value).startswith("file.toml: template 't': expected labels to be one of")


def test_a_template_as_plain_values_is_what_json_holds() -> None:
    data = plain(labels=("no", "yes")).to_dict()
    assert data == json.loads(json.dumps(data))


def test_a_request_carries_what_the_template_says() -> None:
    template = plain(limits=Limits(max_explanation_tokens=7), chat_options={"enable_thinking": False})
    request = template.render("q", "d", ApproximateTokens()).request
    assert request.sampling == Sampling(max_tokens=7)
    assert request.chat_options == {"enable_thinking": False}
    assert template.answer_parts("1", "", "direct") == ((True, "Relevance Label: 1 ##"),)


def test_an_exact_answer_after_a_thought_keeps_its_white_space() -> None:
    template = plain()
    assert template.parse("<think>hm</think>\n\n" + template.answer("1", " padded ")) == ("1", " padded ")


def test_the_same_label_said_twice_is_that_label() -> None:
    template = plain()
    twice = "Explanation:  so\nRelevance Label: 1\nit is \n\nRelevance Label: 1 ##"
    assert template.parse(twice) == ("1", " so\nRelevance Label: 1\nit is ")
    assert template.parse("So\nRelevance Label: 1\nit is\nRelevance Label: 1").label == "1"


def test_a_text_that_just_fits_is_not_cut() -> None:
    assert cut_end("one two ", 2, Words()) == len("one two ")
    assert cut_end("one two three", 2, Words()) == len("one two")
    assert cut_end("one", 0, Words()) == 0
