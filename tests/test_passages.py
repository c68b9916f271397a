"""Passages: where sentences end, that windows lose nothing and fit, and which of them are judged."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import FAMILIES, save_checkpoint
from whyrank.errors import InputError
from whyrank.generators import ApproximateTokens, TextTokens
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_tokenizer
from whyrank.mining.html_text import plain_text
from whyrank.passages import Passages, choose, passages_of, windows
from whyrank.sentences import sentences
from whyrank.template import cut_end

LETTERS = ApproximateTokens(1)  # every character is a token, so that sizes can be counted by eye
ODD = "aB1.?!…。 \n\t\"')-é漢\U0001f642"  # what decides about sentences, and characters of one to four bytes


# ---- sentences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        ["It rains. ", "It pours! ", "Why? ", "Nobody knows… ", "Go."],
        ['He said "no." ', "(She did not.) ", "Then they left."],
        ["Dr. Smith met J. Doe et al. Later that day, i.e. at 5 p.m. on May 3.5, they left. ", "The end."],
        ["See Fig. 3 and the U.S. Army at example.org for 3.14 examples. ", "Done."],
        ['"Why?" she asked. no capital after it. ', "End."],
        ["1. Mix it.\n", "2. Bake it. ", "It was 1998. ", "Then came 1999."],
        ["A heading\n\n", "Its text goes on\nin the next line. ", "And on.\n \n  ", "apart"],
        ["他来了。", "她走了！”", "好吗？"],
        ["वह आया। ", "वह गया।"],
        ["."],
        [" \n\n "],
    ],
    ids=lambda parts: parts[0][:12],
)
def test_sentences_by_hand(parts: list[str]) -> None:
    text = "".join(parts)
    assert [text[start:end] for start, end in sentences(text)] == parts


@given(st.text(alphabet=ODD, min_size=1))
def test_sentences_leave_nothing_out(text: str) -> None:
    found = sentences(text)
    assert "".join(text[start:end] for start, end in found) == text
    assert all(start < end for start, end in found)


# ---- windows --------------------------------------------------------------------------------------------------

SHORT = "A! B! C! D! E! F! G! H!"  # eight sentences; three characters each, the last has two


@pytest.mark.parametrize(
    ("text", "max_tokens", "num_overlap", "spans"),
    [
        (SHORT, 23, 1, [(0, 23)]),
        (SHORT, 12, 0, [(0, 12), (12, 23)]),
        (SHORT, 12, 1, [(0, 12), (9, 21), (18, 23)]),  # 3 characters are a quarter of 12
        (SHORT, 12, 2, [(0, 12), (9, 21), (18, 23)]),  # 6 are more than that
        (SHORT, 11, 1, [(0, 9), (9, 18), (18, 23)]),  # and so are 3 of 11
        (SHORT, 22, 2, [(0, 21), (18, 23)]),  # a quarter is 5.5: one sentence
        ("One. A longer sentence. Two.", 20, 1, [(0, 5), (5, 24), (24, 28)]),
        ("aaa bbb ccc ddd", 6, 1, [(0, 4), (4, 8), (8, 12), (12, 15)]),  # "aaa bb" ends behind its blank
        ("aaaa bbbbbbbbbb", 8, 1, [(0, 5), (5, 13), (13, 15)]),
        ("a bbbbbbbbbbbbb", 8, 1, [(0, 8), (8, 15)]),  # its blank lies in the first half
        ("abcdefghij", 4, 1, [(0, 4), (4, 8), (8, 10)]),
        ("", 4, 1, [(0, 0)]),
    ],
)
def test_windows_by_hand(text: str, max_tokens: int, num_overlap: int, spans: list[tuple[int, int]]) -> None:
    assert windows(text, max_tokens, LETTERS, num_overlap_sentences=num_overlap) == spans


def check(text: str, max_tokens: int, tokens: TextTokens, num_overlap: int) -> None:
    found = windows(text, max_tokens, tokens, num_overlap_sentences=num_overlap)
    assert found[0][0] == 0
    assert found[-1][1] == len(text)
    for (start, end), (next_start, next_end) in pairwise(found):
        assert start < next_start <= end < next_end
        num_repeated = len(tokens.offsets(text[next_start:end]))
        # Together, sentences may weigh a little more than apart, but not so much as another sentence.
        assert num_repeated <= max_tokens / 4 + 2
        if num_overlap == 0:
            assert next_start == end
    if len(found) > 1:  # what the template takes for whole may be over by the last character's tokens
        assert all(len(tokens.offsets(text[start:end])) <= max_tokens for start, end in found)
    assert (len(found) == 1) == (cut_end(text, max_tokens, tokens) == len(text))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=ODD), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2))
def test_windows_cover_all_and_fit(text: str, max_tokens: int, per_token: int, num_overlap: int) -> None:
    check(text, max_tokens, ApproximateTokens(per_token), num_overlap)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[ChatTokens]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return [ChatTokens(load_tokenizer(save_checkpoint(family, folder / family))) for family in FAMILIES]


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=ODD + "quick fox", max_size=300), max_tokens=st.integers(8, 60))
def test_windows_fit_by_the_tokens_of_models(tokenizers: list[ChatTokens], text: str, max_tokens: int) -> None:
    """From 8 tokens on; one character alone may be four."""
    for tokens in tokenizers:
        check(text, max_tokens, tokens, 1)


def test_windows_of_real_pages(shared_data: Path, tokenizers: list[ChatTokens]) -> None:
    pages = json.loads((shared_data / "web-pages" / "pages.json").read_text())
    num_windows = 0
    for entry in list(pages.values())[:40]:
        page = plain_text((shared_data / "web-pages" / "pages" / entry["file"]).read_text(errors="replace"))
        check(page.text, 2048, tokenizers[0], 1)
        check(page.text, 200, ApproximateTokens(), 2)
        num_windows += len(windows(page.text, 200, ApproximateTokens()))
    assert num_windows > 400  # of 40 pages with 9,000 characters on average, 800 to a window


class HeavierTogether:
    """A token per character, and one more wherever a sentence follows another in the same text."""

    def offsets(self, text: str) -> list[tuple[int, int]]:
        joints = [place for place in range(1, len(text)) if text[place - 2 : place] == "! "]
        return sorted([*((place, place + 1) for place in range(len(text))), *((place, place) for place in joints)])


def test_sentences_that_weigh_more_together_still_fit() -> None:
    # Three sentences weigh 9 apart and 11 together; four 12 and 15. The last has two characters.
    found = windows(SHORT, 12, HeavierTogether(), num_overlap_sentences=0)
    assert found == [(0, 9), (9, 18), (18, 23)]


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_windows_need_room(max_tokens: int) -> None:
    with pytest.raises(InputError, match="at least 1 to make passages of, found"):
        windows("text", max_tokens, LETTERS)


# ---- which are judged -----------------------------------------------------------------------------------------

PAGE = "intro words here. tea and milk. the rain in spain. milk and sugar and milk. a plain ending."
SPANS = sentences("Intro words here. Tea and milk. The rain in spain. Milk and sugar and milk. A plain ending.")


@pytest.mark.parametrize(
    ("query", "max_passages", "kept"),
    [
        ("milk", 5, [0, 1, 2, 3, 4]),
        ("milk", 3, [0, 1, 3]),
        ("milk", 2, [0, 3]),  # milk comes twice in it
        ("milk", 1, [0]),
        ("raining", 2, [0, 2]),  # the stem is the same
        ("raining", 3, [0, 1, 2]),  # the earliest fill up
        ("intro", 2, [0, 1]),  # the first is kept anyway
        ("nothing known", 2, [0, 1]),
        ("the of and", 2, [0, 1]),  # stop words only
    ],
)
def test_the_first_and_those_with_the_words_of_the_query(query: str, max_passages: int, kept: list[int]) -> None:
    assert choose(query, PAGE, SPANS, max_passages) == [SPANS[number] for number in kept]


def test_of_passages_without_words_the_first_are_kept() -> None:
    assert choose("milk", "! ! ! !", [(0, 2), (2, 4), (4, 7)], 2) == [(0, 2), (2, 4)]


# ---- settings -------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="a passage score among max, mean-top-2, found 'sum'"):
        Passages(score="sum")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_passages of at least 1, found 0"):
        Passages(max_passages=0)
    with pytest.raises(InputError, match="num_overlap_sentences of at least 0, found -1"):
        Passages(num_overlap_sentences=-1)
    with pytest.raises(InputError, match="long_documents among cut, passages, or a Passages, found 'chunk'"):
        passages_of("chunk")  # type: ignore[arg-type]
    assert passages_of("cut") is None
    assert passages_of("passages") == Passages()
    assert passages_of(Passages("mean-top-2", 3)) == Passages("mean-top-2", 3)
