"""One pair, several requests: what is asked, what a plain pair keeps, and that nothing is lost on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.fake_endpoint import FakeEndpoint, Reply
from tests.test_kill import assert_same_result, finish, judgments, kill_when, num_lines, start
from whyrank.combining import sample_seed
from whyrank.datasets import write_run
from whyrank.errors import GenerationError, InputError
from whyrank.generators import ApproximateTokens, Completion, Request, Sampling, TextTokens
from whyrank.generators.overlap import Overlap
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.passages import Passages, windows
from whyrank.records import Document, Judgment, Query, ScoredDocument
from whyrank.store import content_key, read_jsonl, to_json, write_jsonl
from whyrank.template import Template

WHOLE = Template.load("explain-0-2")
TEMPLATE = replace(WHOLE, limits=replace(WHOLE.limits, max_document_tokens=6))  # 24 characters
DRAWN = Sampling(temperature=0.7, max_tokens=50, seed=3)
SEEDS = [sample_seed(3, number) for number in range(4)]
QUERY = Query("q1", "where is the key")
LONG = Document("long", "It rained all day. The key is here. Nobody knows why. Bye.")
FIRST, SECOND, THIRD = "It rained all day. ", "The key is here. ", "Nobody knows why. Bye."
SHORT = Document("short", "The key is here.")


@dataclass
class Drawing:
    """Answers by the document's text and the seed, `window` requests at once and backwards."""

    answer: Callable[[str, int], Completion]
    window: int = 1
    name: str = "drawing"
    asked: list[Request] = field(default_factory=list)

    @property
    def tokens(self) -> TextTokens:
        return ApproximateTokens()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        waiting: list[tuple[int, Request]] = []
        for numbered in enumerate(requests):
            self.asked.append(numbered[1])
            waiting.append(numbered)
            while len(waiting) == self.window:
                yield from self._answer(waiting)
        yield from self._answer(waiting)

    def _answer(self, waiting: list[tuple[int, Request]]) -> Iterator[tuple[int, Completion]]:
        while waiting:
            index, request = waiting.pop()
            yield index, self.answer(request.text_of("document"), request.sampling.seed)


def sure(label: int, why: str = "") -> Completion:
    probs = tuple(float(label == other) for other in range(3))
    return Completion(why, "stop", label_probs=probs, num_prompt_tokens=7, num_completion_tokens=2)


def by_text_and_seed(text: str, seed: int) -> Completion:
    """A label that texts and seeds scatter; the same for the same."""
    label = int(content_key(text, str(seed))[:4], 16) % 3
    return sure(label, f"{text[:4]}{seed}")


# ---- what stays as it was -------------------------------------------------------------------------------------

PLAIN_FIELDS = [
    "key",
    "query_id",
    "doc_id",
    "status",
    "mode",
    "label",
    "score",
    "probs",
    "label_mass",
    "explanation",
    "passage",
    "is_document_cut",
    "is_query_cut",
    "num_prompt_tokens",
    "num_completion_tokens",
    "template",
    "model",
    "unreadable",
    "error",
]


@pytest.mark.parametrize(
    "judge",
    [
        Judge(WHOLE, Overlap()),
        Judge(WHOLE, Overlap(), num_samples=1, passages=Passages("mean-top-2", 3)),  # the document fits
    ],
)
def test_a_plain_pair_is_judged_and_written_as_ever(judge: Judge) -> None:
    """Key and line by hand, as they were before there were samples and passages."""
    ((_, judgment),) = judge.judge([(QUERY, SHORT)])
    how = '["explain", {"max_tokens": 256, "seed": 0, "temperature": 0.0}, null]'
    assert judgment.key == content_key(WHOLE.version, "overlap", how, QUERY.text, SHORT.text)
    line = json.loads(to_json(judgment))
    assert list(line) == PLAIN_FIELDS
    assert (judgment.num_samples, judgment.num_passages, judgment.num_unreadable, judgment.num_answers) == (1, 1, 0, 1)


def test_a_cut_document_is_written_as_ever_and_so_is_one_that_cannot_be_read() -> None:
    ((_, cut),) = Judge(TEMPLATE, Overlap()).judge([(QUERY, LONG)])
    assert (cut.passage, cut.is_document_cut) == ((0, 24), True)
    ((_, unread),) = Judge(TEMPLATE, Drawing(lambda *_: Completion("?", "stop"))).judge([(QUERY, LONG)])
    assert (unread.status, unread.num_unreadable, unread.num_unread_answers) == ("unparsed", 0, 1)
    assert list(json.loads(to_json(cut))) == list(json.loads(to_json(unread))) == PLAIN_FIELDS


def test_the_key_tells_samples_and_passages_only_where_they_matter() -> None:
    plain = Judge(TEMPLATE, Overlap(), sampling=DRAWN)
    keys = [plain.key(QUERY, LONG)]
    others = [replace(plain, num_samples=2), replace(plain, num_samples=3)]
    others += [replace(plain, passages=found) for found in (Passages(), Passages("mean-top-2"), Passages("max", 2))]
    others += [replace(plain, passages=Passages(num_overlap_sentences=0)), replace(others[0], passages=Passages())]
    keys += [judge.key(QUERY, LONG) for judge in others]
    assert len(set(keys)) == 8
    assert {judge.key(QUERY, SHORT) for judge in others if judge.num_samples == 1} == {plain.key(QUERY, SHORT)}
    assert len({judge.key(QUERY, SHORT) for judge in others}) == 3


# ---- samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_samples_of_pairs_by_hand(window: int) -> None:
    """The labels of four samples: 0, 2, 2, 1 and for the other document 0, 0, 0, unreadable."""
    labels = {"a": (0, 2, 2, 1), "b": (0, 0, 0, None)}

    def answer(text: str, seed: int) -> Completion:
        label = labels[text][SEEDS.index(seed)]
        return Completion("?", "stop") if label is None else sure(label, f"{text}{SEEDS.index(seed)}")

    generator = Drawing(answer, window)
    judge = Judge(WHOLE, generator, sampling=DRAWN, num_samples=4)
    found = dict(judge.judge([(QUERY, Document("d1", "a")), (QUERY, Document("d2", "b"))]))
    # (0 + 2 + 2 + 1) / 4 = 1.25, nearest to which is the last sample's 1.
    assert (found[0].doc_id, found[0].score, found[0].label, found[0].explanation) == ("d1", 1.25, "2", "a3")
    assert found[0].probs == (0.25, 0.25, 0.5)
    assert (found[0].num_prompt_tokens, found[0].num_completion_tokens) == (28, 8)
    assert (found[1].doc_id, found[1].score, found[1].explanation, found[1].status) == ("d2", 0.0, "b0", "ok")
    assert [(one.num_samples, one.num_unreadable) for _, one in sorted(found.items())] == [(4, 0), (4, 1)]
    # A pair's samples are asked side by side, and differ in their seeds alone.
    assert [request.text_of("document") for request in generator.asked] == ["a"] * 4 + ["b"] * 4
    assert [request.sampling for request in generator.asked] == [replace(DRAWN, seed=seed) for seed in SEEDS] * 2
    assert len({request.segments for request in generator.asked}) == 2


def test_one_of_n_samples_is_the_single_judgment() -> None:
    single, three = Drawing(by_text_and_seed), Drawing(by_text_and_seed)
    list(Judge(WHOLE, single, sampling=DRAWN).judge([(QUERY, SHORT)]))
    list(Judge(WHOLE, three, sampling=DRAWN, num_samples=3).judge([(QUERY, SHORT)]))
    assert three.asked[:1] == single.asked


@pytest.mark.parametrize(
    ("num_samples", "temperature", "complaint"),
    [
        (0, 0.7, "num_samples of at least 1, found 0"),
        (2, 0.0, "2 samples drawn at temperature 0 would all be the same: give a temperature above 0, such as 0.7"),
        (1, -0.5, "a temperature of at least 0, found -0.5"),
        (1, float("nan"), "a temperature of at least 0, found nan"),
    ],
)
def test_draws_that_make_no_sense_are_refused(num_samples: int, temperature: float, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Judge(WHOLE, Overlap(), sampling=Sampling(temperature), num_samples=num_samples)


def test_samples_without_a_sampling_are_refused() -> None:
    with pytest.raises(InputError, match="give a temperature"):
        Judge(WHOLE, Overlap(), num_samples=2)


def test_direct_mode_is_sampled_only_where_an_answer_is_drawn() -> None:
    judge = Judge(WHOLE, Drawing(by_text_and_seed), mode="direct", sampling=DRAWN, num_samples=2)
    with pytest.raises(InputError, match=r"drawing gives the whole label distribution at once in mode direct"):
        list(judge.judge([(QUERY, SHORT)]))
    drawn = Drawing(lambda _, seed: Completion(f"Relevance Label: {2 if seed == 3 else 1} ##", "stop"))
    ((_, found),) = replace(judge, generator=drawn).judge([(QUERY, SHORT)])
    assert (found.score, found.probs, found.num_samples) == (1.5, None, 2)


# ---- passages -------------------------------------------------------------------------------------------------


def scripted(**scores: tuple[float, float, float] | str) -> Scripted:
    texts = {"first": FIRST, "second": SECOND, "third": THIRD}
    return Scripted(
        ScriptedAnswer(QUERY.text, texts[name], answer=found)
        if isinstance(found, str)
        else ScriptedAnswer(QUERY.text, texts[name], explanation=f"the {name}", probs=found)
        for name, found in scores.items()
    )


THREE = {"first": (0.75, 0.25, 0.0), "second": (0.0, 0.5, 0.5), "third": (0.25, 0.25, 0.5)}


def test_windows_of_the_example() -> None:
    spans = windows(LONG.text, 6, ApproximateTokens())
    assert [LONG.text[start:end] for start, end in spans] == [FIRST, SECOND, THIRD]


def test_the_best_passage_is_returned_with_its_place() -> None:
    # Scores .25, 1.5 and 1.25.
    ((_, found),) = Judge(TEMPLATE, scripted(**THREE), passages=Passages()).judge([(QUERY, LONG)])
    assert (found.score, found.label, found.explanation, found.probs) == (1.5, "1", "the second", (0.0, 0.5, 0.5))
    assert LONG.text[slice(*found.passage)] == SECOND
    assert (found.num_passages, found.is_document_cut, found.num_unreadable, found.status) == (3, False, 0, "ok")
    assert json.loads(to_json(found))["num_passages"] == 3


def test_the_two_best_are_averaged() -> None:
    ((_, found),) = Judge(TEMPLATE, scripted(**THREE), passages=Passages("mean-top-2")).judge([(QUERY, LONG)])
    # (1.5 + 1.25) / 2, and (0 + .25) / 2, (.5 + .25) / 2, (.5 + .5) / 2.
    assert (found.score, found.probs, found.label) == (1.375, (0.125, 0.375, 0.5), "2")
    assert (found.explanation, LONG.text[slice(*found.passage)]) == ("the second", SECOND)


def test_max_passages_leaves_the_document_cut() -> None:
    # "key" stands in the second passage; the script knows no third, so asking for it would fail.
    known = scripted(first=THREE["first"], second=THREE["second"])
    ((_, found),) = Judge(TEMPLATE, known, passages=Passages(max_passages=2)).judge([(QUERY, LONG)])
    assert (found.score, found.num_passages, found.is_document_cut, found.error) == (1.5, 2, True, None)
    ((_, found),) = Judge(TEMPLATE, known, passages=Passages(max_passages=1)).judge([(QUERY, LONG)])
    assert (found.score, found.passage, found.num_passages, found.is_document_cut) == (0.25, (0, 19), 1, True)


def test_passages_that_cannot_be_read_are_counted() -> None:
    partly = scripted(second="It may be relevant.", third=THREE["third"])  # nothing about the first: it fails
    ((_, found),) = Judge(TEMPLATE, partly, passages=Passages()).judge([(QUERY, LONG)])
    assert (found.score, found.explanation, found.status) == (1.25, "the third", "ok")
    assert (found.num_passages, found.num_unreadable) == (3, 2)
    assert str(found.error).startswith("GenerationError: scripted: no answer for the query")


def test_samples_of_passages_are_asked_passage_by_passage() -> None:
    generator = Drawing(by_text_and_seed, window=5)
    judge = Judge(TEMPLATE, generator, sampling=DRAWN, num_samples=4, passages=Passages())
    ((_, found),) = judge.judge([(QUERY, LONG)])
    asked = [(request.text_of("document"), request.sampling.seed) for request in generator.asked]
    assert asked == [(text, seed) for text in (FIRST, SECOND, THIRD) for seed in SEEDS]
    means = {
        text: sum(float((by_text_and_seed(text, seed).label_probs or ()).index(1.0)) for seed in SEEDS) / 4
        for text in (FIRST, SECOND, THIRD)
    }
    best = max(means, key=lambda text: means[text])
    assert (found.score, LONG.text[slice(*found.passage)]) == (means[best], best)
    assert (found.num_samples, found.num_passages, found.num_answers) == (4, 3, 12)
    assert (found.num_prompt_tokens, found.num_completion_tokens) == (84, 24)


# ---- the growing file -----------------------------------------------------------------------------------------

PAIRS = [(Query(f"q{i}", f"where is key {i}"), replace(LONG, doc_id=f"d{j}", text=f"{j}{LONG.text}")) for i in (1, 2)
         for j in (1, 2, 3)]  # fmt: skip


class Outage(Exception):
    """Ends the job from outside, as a kill does."""


@pytest.mark.parametrize("num_answers", [0, 1, 11, 12, 13, 30, 71])
@pytest.mark.parametrize("window", [1, 7])
def test_a_job_that_ends_within_a_pair_is_resumed_to_the_same_file(
    tmp_path: Path, num_answers: int, window: int
) -> None:
    """Six pairs of three passages with four samples, 72 answers in all; judgments are in no file before their last."""
    num_given = 0

    def until_outage(text: str, seed: int) -> Completion:
        nonlocal num_given
        if num_given == num_answers:
            raise Outage
        num_given += 1
        return by_text_and_seed(text, seed)

    def judge(generator: Drawing) -> Judge:
        return Judge(TEMPLATE, generator, sampling=DRAWN, num_samples=4, passages=Passages())

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = list(judge_into(whole, judge(Drawing(by_text_and_seed)), PAIRS, JudgingCounts()))
    assert len(expected) == 6
    with pytest.raises(Outage):
        list(judge_into(part, judge(Drawing(until_outage, window)), PAIRS, JudgingCounts()))
    kept = list(read_jsonl(part, Judgment))
    assert kept == expected[: len(kept)]
    assert num_answers - window < 12 * len(kept) + 12
    counts, again = JudgingCounts(), Drawing(by_text_and_seed)
    list(judge_into(part, judge(again), PAIRS, counts))
    assert part.read_bytes() == whole.read_bytes()
    assert len(again.asked) == 12 * (6 - len(kept))
    assert (counts.num_known, counts.num_new) == (len(kept), 6 - len(kept))
    assert counts.to_counts() | {"num_answers": 72, "num_passages": 18, "num_by_passages": 6} == counts.to_counts()


def test_a_pair_with_a_failed_request_counts_and_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    is_busy = True

    def busy(text: str, seed: int) -> Completion:
        if is_busy and text.startswith("2It") and seed == SEEDS[1]:
            return Completion.failed(GenerationError("busy"))
        return by_text_and_seed(text, seed)

    generator = Drawing(busy)
    judge = Judge(TEMPLATE, generator, sampling=DRAWN, num_samples=4, passages=Passages())
    counts = JudgingCounts()
    found = list(judge_into(path, judge, PAIRS[:3], counts))
    assert [one.error for one in found] == [None, "GenerationError: busy", None]
    assert counts.statuses == {"ok": 3}
    assert (counts.num_failed, counts.num_unread_answers, counts.num_answers, counts.is_partial) == (1, 1, 36, True)
    is_busy = False
    generator.asked.clear()
    counts = JudgingCounts()
    again = list(judge_into(path, judge, PAIRS[:3], counts))
    assert {request.text_of("document")[0] for request in generator.asked} == {"2", "T", "N"}
    assert len(generator.asked) == 12
    assert [one.error for one in again] == [None] * 3
    assert not counts.is_partial
    assert len(list(read_jsonl(path, Judgment))) == 3


def test_more_than_one_in_a_hundred_unreadable_answers_make_a_job_partial() -> None:
    ((_, base),) = Judge(TEMPLATE, Overlap(), passages=Passages()).judge([(QUERY, LONG)])
    for num_unreadable, is_partial in ((2, False), (3, True)):
        counts = JudgingCounts()
        counts.add(replace(base, num_samples=80, num_passages=3, num_unreadable=num_unreadable), is_new=True)
        assert counts.is_partial == is_partial  # of 240 answers


def graded(document: str, attempt: int) -> Reply:
    """Always the same label for a text, after a moment."""
    label = sum(map(ord, document)) % 3
    return Reply(text=f"Explanation: it says {document[:9]}.\n\nRelevance Label: {label} ##", delay=0.01)


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """Long documents of three passages, short ones of one, two samples each; killed once in the middle."""
    documents = [
        Document(f"d{i}", " ".join(f"Sentence {j} of {i} says little." for j in range(700 if i % 3 == 0 else 5)))
        for i in range(12)
    ]
    write_jsonl(tmp_path / "docs.jsonl", documents)
    write_jsonl(tmp_path / "queries.jsonl", [QUERY])
    lines = [ScoredDocument(QUERY.query_id, one.doc_id, rank, -float(rank)) for rank, one in enumerate(documents, 1)]
    write_run(tmp_path / "run.trec", {QUERY.query_id: lines}, "first")
    files = {"--run": "run.trec", "--corpus": "docs.jsonl", "--queries": "queries.jsonl"}
    with FakeEndpoint(graded) as endpoint:
        words = ["rerank", *(word for flag, name in files.items() for word in (flag, str(tmp_path / name)))]
        words += ["--model", f"endpoint:{endpoint.url}#grader", "--concurrency", "2"]
        words += ["--samples", "2", "--temperature", "0.7", "--long-documents", "passages"]
        whole, out = tmp_path / "whole", tmp_path / "out"
        finish(*words, "-o", str(whole))
        num_requests = len(endpoint.seen)
        assert num_requests == 2 * (4 * 3 + 8)
        seeds = {seen.payload["seed"] for seen in endpoint.seen}
        assert seeds == {0, sample_seed(0, 1)}
        assert {seen.payload["temperature"] for seen in endpoint.seen} == {0.7}
        assert kill_when(start(*words, "-o", str(out)), lambda: num_lines(out) >= 4)
        finish(*words, "-o", str(out))
        assert_same_result(out, whole, 12)
        # Asked twice at most: what was under way, and the answers of the pair that had begun.
        assert len(endpoint.seen) - 2 * num_requests <= 2 + 5
    found, expected = ({one.doc_id: one for one in judgments(folder)} for folder in (out, whole))
    assert found == expected
    assert {one.num_passages for one in found.values()} == {1, 3}
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["num_answers"], counts["num_by_passages"], counts["num_passages"]) == (num_requests, 4, 12)
