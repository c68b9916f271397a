"""Mode `auto` carried out: from Python, over many queries, and on disk. Expected values by hand."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from whyrank import Reranker
from whyrank.auto import in_chunks, judge_in_waves
from whyrank.calibration import Calibration
from whyrank.errors import GenerationError, InputError, TooManyUnparsed
from whyrank.generators import ApproximateTokens, Completion, Request
from whyrank.judging import Judge
from whyrank.records import Document, Judgment, Query, ScoredDocument
from whyrank.stages import EXIT_OK
from whyrank.stages.rerank import Candidates, rerank_files
from whyrank.store import Manifest, read_jsonl
from whyrank.template import Template
from whyrank.waves import Auto

TEMPLATE = Template.load("explain-0-2")
TEMPLATE = replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_explanation_tokens=12))
# A reason lifts a direct score below 1 to at most 1. On average it takes away half.
STEPS = Calibration((0.0, 2.0), (0.0, 1.0), (1.0, 2.0), (1.0, 2.0), 0.9, 10, "two minds")
AUTO = Auto(STEPS, top_k=2)
WHY = "for this reason it is so"  # 24 characters, 6 tokens
SCORES = {"a": (1.1, 0.4), "b": (0.3, 0.2), "c": (0.9, 0.6), "d": (1.2, 1.3), "e": (0.8, 0.5)}
QUERY = Query("q", "why is it so")


class TwoMinds:
    """Knows documents by their first letter, and of each the score without and with a reason: score s is probability
    s / 2 of label 2, the rest of label 0. Reads four requests ahead and answers them backwards; fails where it has no
    score."""

    name = "two minds"
    tokens = ApproximateTokens()

    def __init__(self, scores: Mapping[str, tuple[float | None, float | None]] = SCORES) -> None:
        self.scores = scores
        self.streams: list[str] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        source = enumerate(requests)
        self.streams.append("")
        while window := list(itertools.islice(source, 4)):
            for index, request in reversed(window):
                name = request.text_of("document")[0]
                self.streams[-1] += name
                score = self.scores[name][not request.is_direct]
                yield index, self.complete(request, score)

    def complete(self, request: Request, score: float | None) -> Completion:
        if score is None:
            return Completion.failed(GenerationError("no"))
        probs = (1 - score / 2, 0.0, score / 2)
        if request.is_direct:
            return Completion("", "stop", probs)
        return Completion(WHY, "stop", probs, num_completion_tokens=6)


def documents(names: str = "abcde") -> list[Document]:
    return [Document(name, f"{name} is a document") for name in names]


def reranker(generator: TwoMinds, auto: Auto = AUTO, **more: str) -> Reranker:
    return Reranker.of(TEMPLATE, generator, auto=auto, **more)  # type: ignore[arg-type]


def test_one_query() -> None:
    """The waves are those of test_waves.py: d and a, then c, e and b one by one. All have a reason in the end."""
    minds = TwoMinds()
    seen: list[Judgment] = []
    ranking = reranker(minds).rank("why is it so", documents(), on_judgment=seen.append)
    assert [sorted(stream) for stream in minds.streams] == [list("abcde"), ["a", "d"], ["c"], ["e"], ["b"]]
    assert "".join(found.id for found in ranking) == "dceab"
    assert [found.score for found in ranking] == pytest.approx([1.3, 0.6, 0.5, 0.4, 0.2])
    assert len(seen) == 10
    assert ranking.num_explained == 5


def test_documents_without_a_reason_are_placed_by_what_is_to_be_expected() -> None:
    """d (1.3) and a (1.1) settle two places. The direct scores .9, .8 and .3 are worth half of that."""
    ranking = reranker(TwoMinds({**SCORES, "a": (1.1, 1.1)})).rank(QUERY, documents())
    assert [(found.id, found.is_explained, found.explanation) for found in ranking] == [
        ("d", True, WHY),
        ("a", True, WHY),
        ("c", False, ""),
        ("e", False, ""),
        ("b", False, ""),
    ]
    assert [found.rank_score for found in ranking] == pytest.approx([1.3, 1.1, 0.45, 0.4, 0.15])
    assert [found.score for found in ranking] == pytest.approx([1.3, 1.1, 0.9, 0.8, 0.3])
    assert [found.judgment.mode for found in ranking] == ["explain", "explain", "direct", "direct", "direct"]
    assert ranking.num_explained == 2


def test_top_k_of_a_call_are_the_places_to_be_settled() -> None:
    ranking = reranker(TwoMinds()).rank(QUERY, documents(), top_k=1)
    assert [(found.id, found.is_explained) for found in ranking] == [("d", True)]
    minds = TwoMinds()
    reranker(minds).rank(QUERY, documents(), top_k=1)
    # d first; its 1.3 is below the 2.0 that a can reach, and above the 1.0 of the others.
    assert [sorted(stream) for stream in minds.streams] == [list("abcde"), ["d"], ["a"]]


def test_a_budget() -> None:
    """24 tokens: two reasons of at most 12; they take 6 each. Then 12 are left: one more; then 6, which are too few."""
    minds = TwoMinds()
    ranking = reranker(minds, replace(AUTO, max_tokens_per_query=24)).rank(QUERY, documents())
    assert [sorted(stream) for stream in minds.streams[1:]] == [["a", "d"], ["c"]]
    assert ranking.num_explained == 3
    # d 1.3, c .6, a .4 with a reason; e .8 / 2 and b .3 / 2 without. a stood before e.
    assert [found.id for found in ranking] == ["d", "c", "a", "e", "b"]


def test_failed_answers() -> None:
    """b has no direct score and is asked at once; d has no score with a reason and holds no place."""
    scores = {"a": (1.1, 1.1), "b": (None, 1.2), "c": (0.5, 0.5), "d": (1.2, None)}
    minds = TwoMinds(scores)
    ranking = reranker(minds).rank(QUERY, documents("abcd"))
    assert [sorted(stream) for stream in minds.streams[1:]] == [["b", "d"], ["a"]]
    # d takes the place of its nearest judged neighbour in first-stage order, c: .5 / 2.
    assert [(found.id, found.score) for found in ranking] == [
        ("b", pytest.approx(1.2)),
        ("a", pytest.approx(1.1)),
        ("c", pytest.approx(0.5)),
        ("d", None),
    ]
    assert [found.rank_score for found in ranking][2:] == pytest.approx([0.25, 0.25])
    with pytest.raises(TooManyUnparsed):
        reranker(TwoMinds(scores), on_unparsed="error").rank(QUERY, documents("abcd"))


def line_up(names: str, query_id: str = "q") -> list[ScoredDocument]:
    return [ScoredDocument(query_id, name, rank, -float(rank)) for rank, name in enumerate(names, start=1)]


def test_many_queries_go_together_round_by_round() -> None:
    minds = TwoMinds()
    jobs = [
        (Query("q1", "why"), documents("abcde"), line_up("abcde", "q1")),
        (Query("q2", "why", ("e",)), documents("edb"), line_up("edb", "q2")),
        (Query("q3", "why"), documents(""), []),
        (Query("q4", "why"), documents("ca"), line_up("ac", "q4")),
    ]
    rankings = list(reranker(minds).rank_many(jobs))
    assert [(ranking.query_id, "".join(found.id for found in ranking)) for ranking in rankings] == [
        ("q1", "dceab"),
        ("q2", "db"),
        ("q3", ""),
        ("q4", "ca"),
    ]
    # One stream per round: all direct scores, the first wave of every query, and so on.
    assert [sorted(stream) for stream in minds.streams] == [
        sorted("abcde" + "db" + "ca"),
        sorted("da" + "db" + "ac"),
        ["c"],
        ["e"],
        ["b"],
    ]
    alone = [reranker(TwoMinds()).rank(jobs[0][0], jobs[0][1]), reranker(TwoMinds()).rank(jobs[1][0], jobs[1][1])]
    assert [ranking.results for ranking in rankings[:2]] == [ranking.results for ranking in alone]


def test_what_came_of_a_query() -> None:
    judge = Judge(TEMPLATE, TwoMinds())
    jobs = [(QUERY, documents())]
    short = replace(AUTO, max_tokens_per_query=17)  # one reason of at most 12, which takes 6; 11 are too few
    ((number, judged),) = judge_in_waves(jobs, judge, short, lambda judge, pairs: judge.judge(pairs))
    assert number == 0
    assert (judged.num_explained, judged.num_waves, judged.num_tokens, judged.is_cut_short) == (1, 1, 6, True)
    assert [judgment.mode for judgment in judged.judgments.values()].count("explain") == 1


def test_chunks() -> None:
    assert list(in_chunks(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(in_chunks([], 2)) == []


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(InputError, match="give it a judge in mode explain, not direct"):
        Reranker.of(TEMPLATE, TwoMinds(), mode="direct", auto=AUTO)
    with pytest.raises(InputError, match="belong to mode auto, found mode explain"):
        Reranker.load("overlap", max_tokens_per_query=5)
    with pytest.raises(InputError, match="auto rests on a calibration, and overlap has no whyrank"):
        Reranker.load("overlap", mode="auto")
    with pytest.raises(InputError, match=r"expected a folder with a checkpoint at \./nowhere, found nothing"):
        Reranker.load("./nowhere", mode="auto")


# ---- on disk --------------------------------------------------------------------------------------------------


def candidates() -> Candidates:
    """Three queries; the second names a document twice, the third has none."""
    run = {"q1": line_up("abcde", "q1"), "q2": line_up("dabd", "q2"), "q3": []}
    texts = {document.doc_id: document for document in documents()}
    queries = tuple(Query(query_id, f"why {query_id}") for query_id in run)
    return Candidates(queries, texts, run, num_excluded=0, num_bad_lines=0)


def judged(path: Path) -> list[tuple[str, str, str]]:
    return [(found.query_id, found.doc_id, found.mode) for found in read_jsonl(path, Judgment)]


def test_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    minds = TwoMinds({**SCORES, "b": (0.3, 0.7)})
    with caplog.at_level(logging.WARNING):
        done = rerank_files(candidates(), reranker(minds), tmp_path, Manifest("rerank", {}))
    # q1: d and a, then c .6, e .5, and b .7, which is the second after all. q2: d and a, then b, which can reach 1.
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [line[0] + line[2] for line in lines] == ["q1d", "q1b", "q1c", "q1e", "q1a", "q2d", "q2d", "q2b", "q2a"]
    direct, explained = judged(tmp_path / "judgments-direct.jsonl"), judged(tmp_path / "judgments.jsonl")
    assert sorted(direct) == sorted([("q1", name, "direct") for name in "abcde"] + [("q2", n, "direct") for n in "dab"])
    assert sorted(explained) == sorted(
        [("q1", name, "explain") for name in "abcde"] + [("q2", n, "explain") for n in "dab"]
    )
    assert done.exit_code == EXIT_OK
    assert not caplog.records
    counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
    assert (counts["num_new"], counts["num_explained"], counts["num_tokens"]) == (16, 8, 48)
    assert (counts["most_tokens_per_query"], counts["num_cut_short"], counts["most_waves"]) == (30, 0, 4)
    printed = done.to_json()["counts"]
    assert isinstance(printed, dict)
    assert printed.items() <= counts.items()
    assert printed["num_explained"] == 8


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rerank_files(candidates(), reranker(TwoMinds()), whole, Manifest("rerank", {}))
    rerank_files(candidates(), reranker(TwoMinds()), broken, Manifest("rerank", {}))
    (broken / "run.trec").unlink()
    for name, num_kept in (("judgments-direct.jsonl", 8), ("judgments.jsonl", 3)):
        lines = (broken / name).read_bytes().splitlines(keepends=True)
        (broken / name).write_bytes(b"".join(lines[:num_kept]) + lines[-1][:20])
    minds = TwoMinds()
    done = rerank_files(candidates(), reranker(minds), broken, Manifest("rerank", {}))
    assert minds.streams[0] == ""  # no direct score is asked for again
    assert (done.counts.num_known, done.counts.num_new) == (11, 5)
    assert done.counts.num_torn_bytes == 40
    assert (broken / "run.trec").read_bytes() == (whole / "run.trec").read_bytes()
    for name in ("judgments-direct.jsonl", "judgments.jsonl"):
        assert sorted((broken / name).read_bytes().splitlines()) == sorted((whole / name).read_bytes().splitlines())
    assert done.auto is not None
    assert (done.auto.num_explained, done.auto.num_tokens) == (8, 48)


def test_modes_share_judgments_and_a_refused_folder_keeps_its_manifest(tmp_path: Path) -> None:
    rerank_files(candidates(), Reranker.of(TEMPLATE, TwoMinds()), tmp_path, Manifest("rerank", {"mode": "explain"}))
    minds = TwoMinds()
    done = rerank_files(candidates(), reranker(minds), tmp_path, Manifest("rerank", {"mode": "auto"}))
    assert "".join(minds.streams[1:]) == ""  # every reason was there
    assert done.counts.num_new == 8
    other = tmp_path / "direct"
    rerank_files(candidates(), Reranker.of(TEMPLATE, TwoMinds(), mode="direct"), other, Manifest("rerank", {}))
    before = (other / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="choose another output folder"):
        rerank_files(candidates(), reranker(TwoMinds()), other, Manifest("rerank", {}))
    assert (other / "manifest.json").read_bytes() == before
