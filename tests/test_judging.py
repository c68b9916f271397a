"""Judging: what each kind of answer becomes, what a key depends on, and that a growing file loses nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from whyrank.errors import GenerationError, InputError
from whyrank.generators import ApproximateTokens, Completion, Request, Sampling, TextTokens
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.records import Document, Judgment, Query
from whyrank.store import read_jsonl
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")
QUERY = Query("q1", "Why do leaves turn yellow?")
DOCUMENT = Document("d1", "Too little light.", title="Plants")


@dataclass
class Canned:
    """Answers by the text of the document; a window of requests is answered backwards to be out of order."""

    answer: Callable[[str], Completion]
    name: str = "canned"
    window: int = 1
    asked: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> TextTokens:
        return ApproximateTokens()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        waiting: list[tuple[int, Request]] = []
        for numbered in enumerate(requests):
            self.asked.append(numbered[1].text_of("document"))
            waiting.append(numbered)
            while len(waiting) == self.window:
                yield from self._answer(waiting)
        yield from self._answer(waiting)

    def _answer(self, waiting: list[tuple[int, Request]]) -> Iterator[tuple[int, Completion]]:
        while waiting:
            index, request = waiting.pop()
            yield index, self.answer(request.text_of("document"))


def judged(completion: Completion, template: Template = TEMPLATE) -> Judgment:
    ((_, judgment),) = Judge(template, Canned(lambda _: completion)).judge([(QUERY, DOCUMENT)])
    return judgment


# ---- what an answer is worth --------------------------------------------------------------------------------


def test_distribution_by_hand() -> None:
    # Mass .1 + .2 + .1 = .4, normalised .25, .5, .25, expected label 0 * .25 + 1 * .5 + 2 * .25 = 1.
    found = judged(Completion(" because ", "stop", label_probs=(0.1, 0.2, 0.1)))
    assert found.probs == pytest.approx((0.25, 0.5, 0.25))
    assert found.score == pytest.approx(1.0)
    assert found.label_mass == pytest.approx(0.4)
    assert (found.status, found.label, found.explanation) == ("low_mass", "1", "because")


def test_first_of_equally_likely_labels() -> None:
    found = judged(Completion("", "stop", label_probs=(0.2, 0.4, 0.4)))
    assert (found.label, found.status) == ("1", "ok")
    assert found.score == pytest.approx(1.2)


def test_words_as_labels_score_the_probability_of_the_second() -> None:
    words = replace(TEMPLATE, labels=("false", "true"))
    found = judged(Completion("", "stop", label_probs=(0.24, 0.56)), words)
    assert found.label == "true"
    assert (found.score, found.label_mass) == pytest.approx((0.7, 0.8))


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        (Completion("why", "stop", label_probs=(0.2, 0.2, 0.1)), "ok"),  # mass .5 is enough
        (Completion("why", "length", label_probs=(0.2, 0.2, 0.1)), "forced"),
        (Completion("why", "stop", label_probs=(0.2, 0.2, 0.0999)), "low_mass"),
        (Completion("why", "length", label_probs=(0.2, 0.2, 0.0999)), "low_mass"),
        (Completion("Explanation: it fits.\n\nRelevance Label: 2 ##", "stop"), "ok"),
        (Completion("why", "stop", label_probs=(0.0, 0.0, 0.0)), "unparsed"),
        (Completion("It may well be relevant, I would say 2 or so.", "stop"), "unparsed"),
        (Completion("", "stop"), "unparsed"),
        # Cut by length, the label on the last line may be part of the reasoning.
        (Completion("Explanation: it fits.\n\nRelevance Label: 2 ##", "length"), "unparsed"),
        (Completion.failed(GenerationError("no route")), "error"),
        (Completion("why", "stop", label_probs=(0.5, math.nan, 0.1)), "error"),
        (Completion("why", "stop", label_probs=(math.inf, -math.inf, 0.1)), "error"),
        (Completion("why", "stop", label_probs=(0.5, -0.1, 0.1)), "error"),
    ],
)
def test_status_from_its_cause(completion: Completion, status: str) -> None:
    found = judged(completion)
    assert found.status == status
    has_nothing = status in ("unparsed", "error")
    assert (found.label is None, found.score is None, found.probs is None) == (
        has_nothing,
        has_nothing,
        completion.label_probs is None or has_nothing,
    )
    assert (found.error is not None) == (status == "error")
    assert found.unreadable == (completion.text if status == "unparsed" else None)
    assert found.explanation in ("", "why", "it fits.")


def test_whole_answer_is_worth_its_label() -> None:
    found = judged(Completion("Explanation: it fits.\n\nRelevance Label: 2 ##", "stop", num_completion_tokens=9))
    assert (found.label, found.score, found.explanation) == ("2", 2.0, "it fits.")
    assert (found.probs, found.label_mass, found.num_completion_tokens) == (None, None, 9)


def test_an_exception_keeps_its_kind_and_words() -> None:
    assert judged(Completion.failed(TimeoutError("after 3 s"))).error == "TimeoutError: after 3 s"


def test_cuts_and_passage_are_kept() -> None:
    # Four characters per token: two tokens of the document ("Plants\nT", 8 of 24 characters), one of the query.
    short = replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_document_tokens=2, max_query_tokens=1))
    found = judged(Completion("", "stop", label_probs=(1.0, 0.0, 0.0)), short)
    assert (found.passage, found.is_document_cut, found.is_query_cut) == ((0, 8), True, True)
    whole = judged(Completion("", "stop", label_probs=(1.0, 0.0, 0.0)))
    assert (whole.passage, whole.is_document_cut, whole.is_query_cut) == ((0, 24), False, False)


# ---- the key ------------------------------------------------------------------------------------------------


def sure(_: str) -> Completion:
    return Completion("because", "stop", label_probs=(0.0, 0.0, 1.0))


def test_key_changes_with_everything_that_can_change_the_judgment_and_nothing_else() -> None:
    judge = Judge(TEMPLATE, Canned(sure))
    base = judge.key(QUERY, DOCUMENT)
    others = [
        Judge(replace(TEMPLATE, labels="0-10"), Canned(sure)).key(QUERY, DOCUMENT),
        Judge(replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_document_tokens=5)), Canned(sure)).key(
            QUERY, DOCUMENT
        ),
        Judge(TEMPLATE, Canned(sure, name="other")).key(QUERY, DOCUMENT),
        replace(judge, mode="direct").key(QUERY, DOCUMENT),
        replace(judge, instruction="").key(QUERY, DOCUMENT),
        replace(judge, instruction="Judge.").key(QUERY, DOCUMENT),
        replace(judge, sampling=Sampling(temperature=0.5)).key(QUERY, DOCUMENT),
        replace(judge, sampling=Sampling(seed=1)).key(QUERY, DOCUMENT),
        replace(judge, sampling=Sampling(max_tokens=9)).key(QUERY, DOCUMENT),
        judge.key(replace(QUERY, text="why do leaves turn yellow?"), DOCUMENT),
        judge.key(QUERY, replace(DOCUMENT, text="Too little water.")),
        judge.key(QUERY, replace(DOCUMENT, title="")),
    ]
    assert len({base, *others}) == 1 + len(others)
    same = [
        Judge(TEMPLATE, Canned(sure, window=7)).key(QUERY, DOCUMENT),
        # The default sampling is greedy with the template's cap of 256 tokens.
        replace(judge, sampling=Sampling(max_tokens=256)).key(QUERY, DOCUMENT),
        judge.key(Query("other", QUERY.text, ("x",)), DOCUMENT),
        judge.key(QUERY, Document("other", DOCUMENT.full_text, source="web", licence="CC0")),
    ]
    assert set(same) == {base}


# ---- streams ------------------------------------------------------------------------------------------------


def pairs(*texts: str) -> list[tuple[Query, Document]]:
    """One document per text; ids and texts differ, so that neither can stand in for the other."""
    return [(QUERY, Document(f"d{index}", text)) for index, text in enumerate(texts)]


def label_in_text(text: str) -> Completion:
    """The document's last character is its label, or the reason why there is none."""
    if text[-1] in "012":
        return Completion(f"says {text}", "stop", label_probs=tuple(float(text[-1] == label) for label in "012"))
    return Completion(text, "stop") if text[-1] == "?" else Completion.failed(GenerationError("asked for"))


def test_answers_out_of_order_find_their_pairs() -> None:
    judge = Judge(TEMPLATE, Canned(label_in_text, window=3))
    found = [judgment for _, judgment in judge.judge(pairs("a0", "b1", "c2", "d1", "e0"))]
    assert [(judgment.doc_id, judgment.label) for judgment in found] == [
        ("d2", "2"),
        ("d1", "1"),
        ("d0", "0"),
        ("d4", "0"),
        ("d3", "1"),
    ]
    assert all(judgment.explanation.endswith(str(judgment.label)) for judgment in found)


def test_pairs_are_read_no_further_than_the_generator_reads() -> None:
    read: list[int] = []

    def endless() -> Iterator[tuple[Query, Document]]:
        while True:
            read.append(len(read))
            yield QUERY, Document(f"d{len(read)}", f"text {len(read) % 3}")

    judgments = Judge(TEMPLATE, Canned(label_in_text, window=4)).judge(endless())
    assert read == []
    for expected in (4, 4, 4, 4, 8):
        next(judgments)
        assert len(read) == expected


class Forgetful(Canned):
    """Drops every second request."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        return (numbered for numbered in super().generate(requests) if numbered[0] % 2 == 0)


def test_a_generator_that_loses_requests_is_found_out() -> None:
    judgments = Judge(TEMPLATE, Forgetful(sure)).judge(pairs("a", "b", "c", "d"))
    assert [next(judgments)[1].doc_id, next(judgments)[1].doc_id] == ["d0", "d2"]
    with pytest.raises(GenerationError, match="canned gave no completion for 2 of its requests"):
        next(judgments)


# ---- the growing file ---------------------------------------------------------------------------------------


def run_into(
    path: Path, asked: Iterable[tuple[Query, Document]], generator: Canned
) -> tuple[list[Judgment], JudgingCounts]:
    counts = JudgingCounts()
    return list(judge_into(path, Judge(TEMPLATE, generator), asked, counts)), counts


def test_known_pairs_are_not_judged_again(tmp_path: Path) -> None:
    path, texts = tmp_path / "judgments.jsonl", ["a0", "b1", "c2", "d0"]
    first, _ = run_into(path, pairs(*texts[:2]), Canned(label_in_text))
    generator = Canned(label_in_text)
    both, counts = run_into(path, pairs(*texts), generator)
    assert generator.asked == ["c2", "d0"]
    assert both[:2] == first
    assert list(read_jsonl(path, Judgment)) == both
    assert (counts.num_known, counts.num_new, counts.num_judgments) == (2, 2, 4)
    assert counts.statuses == {"ok": 4}
    third, counts = run_into(path, pairs(*texts), Canned(label_in_text))
    assert third == both
    assert (counts.num_known, counts.num_new, counts.num_completion_tokens) == (4, 0, 0)


def test_failures_are_tried_again_and_unreadable_answers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    _, counts = run_into(path, pairs("a0", "b!", "c?", "d!"), Canned(label_in_text))
    assert counts.statuses == {"ok": 1, "error": 2, "unparsed": 1}
    assert counts.is_partial
    generator = Canned(sure)
    _, counts = run_into(path, pairs("a0", "b!", "c?", "d!"), generator)
    assert generator.asked == ["b!", "d!"]
    assert counts.statuses == {"ok": 3, "unparsed": 1}
    assert sorted(judgment.doc_id for judgment in read_jsonl(path, Judgment)) == ["d0", "d1", "d2", "d3"]


def test_equal_texts_under_other_ids_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    (first,), _ = run_into(path, pairs("a2"), Canned(label_in_text))
    twin = (replace(QUERY, query_id="q9"), Document("d9", "a2"))
    generator = Canned(label_in_text)
    found, counts = run_into(path, [twin], generator)
    assert generator.asked == []
    assert found == [replace(first, query_id="q9", doc_id="d9")]
    assert list(read_jsonl(path, Judgment)) == [first, *found]
    assert counts.num_new == 0


def test_a_pair_that_comes_twice_is_judged_once(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    found, counts = run_into(path, pairs("a1", "b2") + pairs("a1"), Canned(label_in_text, window=8))
    assert sorted(judgment.doc_id for judgment in found) == ["d0", "d1"]
    assert (counts.num_new, len(list(read_jsonl(path, Judgment)))) == (2, 2)
    with pytest.raises(InputError, match=r"'d0'\) comes twice, with different texts"):
        run_into(tmp_path / "other.jsonl", pairs("a1") + pairs("a2"), Canned(label_in_text))


@pytest.mark.parametrize(
    "other",
    [
        Judge(TEMPLATE, Canned(label_in_text, name="other")),
        Judge(TEMPLATE, Canned(label_in_text), mode="direct"),
        Judge(replace(TEMPLATE, labels="0-10"), Canned(label_in_text)),
        Judge(TEMPLATE, Canned(label_in_text), instruction="Judge."),
    ],
    ids=["model", "mode", "template", "instruction"],
)
def test_judgments_made_differently_are_refused(tmp_path: Path, other: Judge) -> None:
    path = tmp_path / "judgments.jsonl"
    run_into(path, pairs("a0", "b1"), Canned(label_in_text))
    before = path.read_bytes()
    with pytest.raises(InputError, match="made from another text, model, template, mode"):
        list(judge_into(path, other, pairs("a0", "b1"), JudgingCounts()))
    assert path.read_bytes() == before


def test_a_changed_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    run_into(path, pairs("a0"), Canned(label_in_text))
    with pytest.raises(InputError, match="choose another output folder"):
        run_into(path, pairs("a1"), Canned(label_in_text))


def test_torn_line_is_counted_and_judged_again(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    run_into(path, pairs("a0", "b1"), Canned(label_in_text))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    last = whole.splitlines(keepends=True)[1]
    generator = Canned(label_in_text)
    _, counts = run_into(path, pairs("a0", "b1"), generator)
    assert (generator.asked, counts.num_torn_bytes, path.read_bytes()) == (["b1"], len(last) - 7, whole)


def test_every_judgment_is_on_disk_before_it_is_yielded(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    judge = Judge(TEMPLATE, Canned(label_in_text))
    for num_yielded, judgment in enumerate(judge_into(path, judge, pairs("a0", "b1", "c2"), JudgingCounts()), start=1):
        lines = path.read_text().splitlines()
        assert len(lines) == num_yielded
        assert json.loads(lines[-1])["doc_id"] == judgment.doc_id


@pytest.mark.parametrize(("num_unreadable", "is_partial"), [(1, False), (2, True)])
def test_one_unreadable_answer_in_a_hundred_is_allowed(tmp_path: Path, num_unreadable: int, is_partial: bool) -> None:
    texts = [f"{index} ?" if index < num_unreadable else f"{index} 1" for index in range(100)]
    _, counts = run_into(tmp_path / "judgments.jsonl", pairs(*texts), Canned(label_in_text))
    assert counts.num_unreadable == num_unreadable
    assert counts.is_partial == is_partial
    assert counts.to_counts()["num_unparsed"] == num_unreadable
