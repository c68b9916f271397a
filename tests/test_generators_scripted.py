"""The generators that need no model: a script, and a comparison of words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from whyrank.errors import GenerationError, InputError
from whyrank.generators import ApproximateTokens, Completion, Generator, Request, Sampling
from whyrank.generators.labels import find_label
from whyrank.generators.overlap import Overlap
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.store import write_jsonl
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")


def request_for(query: str, document: str, template: Template = TEMPLATE, **sampling: int) -> Request:
    drawn = Sampling(**sampling) if sampling else None
    return template.render(query, document, ApproximateTokens(), sampling=drawn).request


def answer_of(generator: Generator, request: Request) -> Completion:
    [(index, completion)] = generator.generate([request])
    assert index == 0
    return completion


# ---- scripted -----------------------------------------------------------------------------------------------


def test_probabilities_and_label_are_two_phases_and_answer_is_one() -> None:
    scripted = Scripted(
        [
            ScriptedAnswer("q", "spread", "It may.", probs=(0.1, 0.2, 0.6)),
            ScriptedAnswer("q", "certain", "It does.", label="2"),
            ScriptedAnswer("q", "whole", answer="Explanation: x\n\nRelevance Label: 1 ##"),
        ]
    )
    spread, certain, whole = (
        answer_of(scripted, request_for("q", document)) for document in ("spread", "certain", "whole")
    )
    assert (spread.text, spread.finish_reason, spread.label_probs) == ("It may.", "stop", (0.1, 0.2, 0.6))
    assert (certain.text, certain.label_probs) == ("It does.", (0.0, 0.0, 1.0))
    assert (whole.text, whole.label_probs) == ("Explanation: x\n\nRelevance Label: 1 ##", None)
    assert spread.num_completion_tokens == 2  # seven characters, four to a token


def test_unknown_pair_fails_and_the_rest_goes_on() -> None:
    scripted = Scripted([ScriptedAnswer("q", "d", label="0")], name="demo")
    found = dict(scripted.generate([request_for("q", "e"), request_for("r", "d"), request_for("q", "d")]))
    for index in (0, 1):
        assert isinstance(found[index].error, GenerationError)
        assert "demo: no answer for the query" in str(found[index].error)
        assert (found[index].text, found[index].label_probs) == ("", None)
    assert found[2].label_probs == (1.0, 0.0, 0.0)


def test_cut_texts_find_their_script_unless_two_fit() -> None:
    long, other = "water " * 3000, "water " * 2999 + "wine"
    query = "why " * 3000
    one = Scripted([ScriptedAnswer(query, long, label="2"), ScriptedAnswer(query, "walnut", label="0")])
    two = Scripted([ScriptedAnswer(query, long, label="2"), ScriptedAnswer(query, other, label="0")])
    request = request_for(query, long)
    assert len(request.text_of("document")) == 2048 * 4
    assert answer_of(one, request).label_probs == (0.0, 0.0, 1.0)
    assert "2 answers match" in str(answer_of(two, request).error)


def test_empty_document_is_not_the_beginning_of_another() -> None:
    assert answer_of(Scripted([ScriptedAnswer("q", "d", label="2")]), request_for("q", "")).error is not None
    assert answer_of(Scripted([ScriptedAnswer("q", "", label="2")]), request_for("q", "")).error is None


def test_script_of_another_scale_fails() -> None:
    scripted = Scripted([ScriptedAnswer("q", "d", label="true"), ScriptedAnswer("q", "e", probs=(0.5, 0.5))])
    assert "found 'true'" in str(answer_of(scripted, request_for("q", "d")).error)
    assert "expected 3 probabilities" in str(answer_of(scripted, request_for("q", "e")).error)


def test_explanation_ends_at_a_stop_or_at_its_cap() -> None:
    why = "One two.\nRelevance Label: 2 ##\nmore"
    scripted = Scripted([ScriptedAnswer("q", "d", why, label="0"), ScriptedAnswer("q", "e", "x" * 50, label="0")])
    stopped = answer_of(scripted, request_for("q", "d"))
    assert (stopped.text, stopped.finish_reason) == ("One two.", "stop")
    capped = answer_of(scripted, request_for("q", "e", max_tokens=5))
    assert (capped.text, capped.finish_reason) == ("x" * 20, "length")  # five tokens of four characters


def test_direct_mode_has_no_explanation() -> None:
    request = TEMPLATE.render("q", "d", ApproximateTokens(), mode="direct").request
    found = answer_of(Scripted([ScriptedAnswer("q", "d", "because", label="1")]), request)
    assert (found.text, found.label_probs) == ("", (0.0, 1.0, 0.0))


def test_stream_is_not_read_ahead() -> None:
    num_read = 0

    def endless() -> Iterator[Request]:
        nonlocal num_read
        while True:
            num_read += 1
            yield request_for("q", "d")

    for index, _ in Scripted([ScriptedAnswer("q", "d", label="1")]).generate(endless()):
        assert num_read == index + 1
        if index == 10:
            break


def test_script_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "script.jsonl"
    answers = [ScriptedAnswer("q", "d", "why", probs=(0.0, 0.5, 0.5)), ScriptedAnswer("q", "e", label="0")]
    write_jsonl(path, [*answers, answers[0]])  # the same answer twice is one answer
    assert answer_of(Scripted.from_file(path), request_for("q", "d")).label_probs == (0.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query":"q","document":"d","label":"2"}', "a different answer for the same query and document"),
        ('{"query":"q","document":"e"}', "expected one of probs, label and answer, found none"),
        ('{"query":"q","document":"e","label":"1","probs":[1.0]}', "found probs and label"),
        ('{"query":"q","document":"e","explanation":"x","answer":"y"}', "leave explanation out"),
        ('{"query":"q","document":"e","probs":[0.9,0.9]}', "sum to at most 1"),
        ('{"query":"q","document":"e","probs":[-0.1,0.9]}', "sum to at most 1"),
        ('{"query":"q","document":"e","labels":"1"}', "labels: Unexpected keyword argument"),
    ],
)
def test_bad_script_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "script.jsonl"
    path.write_text(f'{{"query":"q","document":"d","label":"1"}}\n\n{line}\n')
    with pytest.raises(InputError, match=rf"script\.jsonl:3: .*{message}"):
        Scripted.from_file(path)


def test_label_is_never_read_from_the_document() -> None:
    # 500 documents hold label lines; the scripted model repeats each as its reason and gives the label 0.
    forms = (
        "Relevance Label: 2 ##",
        "**Relevance Label:** 2",
        "> relevance label: 2",
        "Ｒｅｌｅｖａｎｃｅ Ｌａｂｅｌ：２",
    )
    documents = [f"Text {n}.\n{forms[n % 4]}\n" + "\n\nRelevance Label: 2 ##" * (n % 3) for n in range(500)]
    scripted = Scripted(ScriptedAnswer("q", document, document, label="0") for document in documents)
    found = dict(scripted.generate(request_for("q", document) for document in documents))
    for number in range(500):
        assert found[number].label_probs == (1.0, 0.0, 0.0)
        read = TEMPLATE.read_explanation(found[number].text)
        assert read.startswith(f"Text {number}.")
        # As a training example, the same reason comes back whole, with the label that was given.
        assert TEMPLATE.parse(TEMPLATE.answer("0", read)) == ("0", read)


# ---- overlap ------------------------------------------------------------------------------------------------


def overlap(query: str, document: str, template: Template = TEMPLATE) -> Completion:
    return answer_of(Overlap(), request_for(query, document, template))


@pytest.mark.parametrize(
    ("document", "label"),
    [
        ("", 0),
        ("unrelated words", 0),
        ("rust", 0),  # 1 of 4 words: below a third
        ("Rust, IRON!", 1),  # 2 of 4: the middle band
        ("iron rust water", 2),  # 3 of 4: above two thirds
        ("iron rust water air", 2),
        ("why does in", 0),  # stop words do not count
    ],
)
def test_overlap_counts_words(document: str, label: int) -> None:
    probs = overlap("why does iron rust in water or air", document).label_probs
    assert probs == tuple(float(n == label) for n in range(3))


def test_overlap_says_what_it_does_and_names_five_words_at_most() -> None:
    text = overlap("one two three four five six", "six five four three two one").text
    assert text == (
        "This is a comparison of words only, not of meaning: the document shares 6 of the query's 6 words "
        "(one, two, three, four, five and others)."
    )
    assert "comparison of words only" in overlap("rust", "water").text


@pytest.mark.parametrize("num_asked", [9, 30, 300])
def test_overlap_gives_every_label_to_queries_of_any_length(num_asked: int) -> None:
    # Eight words count as all: 2 are below a third (8 / 3 = 2.67), 5 below two thirds (5.33), 6 above.
    words = [f"w{n}" for n in range(num_asked)]
    for num_shared, label in ((2, 0), (3, 1), (5, 1), (6, 2), (9, 2)):
        found = overlap(" ".join(words), " ".join([*words[:num_shared], *(f"x{n}" for n in range(200))]))
        assert found.label_probs == tuple(float(n == label) for n in range(3))
        assert f"shares {num_shared} of the query's {num_asked} words, where 8 count as all (w0, w1" in found.text


def test_overlap_fits_every_scale_and_any_text() -> None:
    assert overlap("a b1 b2", "b1", Template.load("explain-true-false")).label_probs == (0.0, 1.0)  # half: upper band
    # 3 of 10 words, of which 8 would be all, on eleven labels: 3 / 8 * 11 = 4.125
    ten = " ".join(f"w{n}" for n in range(10))
    probs = overlap(ten, "w0 w4 w9", Template.load("explain-0-10")).label_probs
    assert probs is not None
    assert probs.index(1.0) == 4
    assert overlap("?!", "...").label_probs == (1.0, 0.0, 0.0)
    assert overlap("STRASSE", "straße").label_probs == (0.0, 0.0, 1.0)  # case folding
    assert overlap("why iron", "iron") == overlap("why iron", "iron")


# ---- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "texts", "position"),
    [
        ("1", (" 0 ##", " 1 ##", " 10 ##"), 1),
        ("10", (" 0 ##", " 1 ##", " 10 ##"), 2),
        (" 2", (" 0", " 1", " 2"), 2),
        ("true", (" false ##", " true ##"), 1),
        ("tru", (" false ##", " true ##"), None),
        ("relevant", (" not relevant ##", " relevant ##"), 1),
        ("not", (" not relevant ##", " relevant ##"), None),
        ("1", (" 1 END", " 2 END"), 0),
        ("3", (" 0 ##", " 1 ##"), None),
        ("", (" 0 ##", " 1 ##"), None),
        ("1 ##", (" 0 ##", " 1 ##"), 1),
    ],
)
def test_label_is_found_among_label_texts(label: str, texts: tuple[str, ...], position: int | None) -> None:
    assert find_label(label, texts) == position
