"""However many pairs are judged, memory holds the judgments of those that are being worked on."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from whyrank.errors import TooManyUnparsed
from whyrank.generators import Completion, Request
from whyrank.generators.overlap import Overlap
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.records import Document, Judgment, Query, ScoredDocument
from whyrank.rerank import Reranker
from whyrank.stages.rerank import Candidates, rerank_files
from whyrank.store import Manifest, read_jsonl, write_jsonl
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")
NUM_QUERIES, NUM_CANDIDATES, READ_AHEAD = 40, 10, 15
NUM_PAIRS = NUM_QUERIES * NUM_CANDIDATES
QUERIES = tuple(Query(f"q{i}", f"does word{i} occur with common") for i in range(NUM_QUERIES))
DOCUMENTS = {f"d{i}": Document(f"d{i}", f"word{i} and {'common' if i % 3 else 'rare'}") for i in range(NUM_CANDIDATES)}


class Watching(Overlap):
    """Reads `READ_AHEAD` requests ahead and answers them backwards; notes how many judgments are alive."""

    def __init__(self) -> None:
        self.num_alive: list[int] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        numbered = enumerate(requests)
        while window := list(itertools.islice(numbered, READ_AHEAD)):
            self.num_alive.append(num_alive())
            for index, request in reversed(window):
                ((_, completion),) = super().generate([request])
                yield index, completion


def num_alive() -> int:
    # Not isinstance, which asks every object for its class: some of torch's answer with a warning.
    return sum(type(thing) is Judgment for thing in gc.get_objects())


def candidates(num_queries: int = NUM_QUERIES) -> Candidates:
    run = {
        query.query_id: [
            ScoredDocument(query.query_id, doc_id, rank, -float(rank)) for rank, doc_id in enumerate(DOCUMENTS, 1)
        ]
        for query in QUERIES[:num_queries]
    }
    return Candidates(QUERIES[:num_queries], DOCUMENTS, run, num_excluded=0, num_bad_lines=0)


def test_a_run_holds_the_judgments_of_the_queries_under_way(tmp_path: Path) -> None:
    watching = Watching()
    rerank_files(candidates(), Reranker.of(TEMPLATE, watching), tmp_path, Manifest("rerank", {}))
    assert len(watching.num_alive) == -(-NUM_PAIRS // READ_AHEAD)
    # Answered backwards in windows of one and a half queries, at most one query is begun and not done, besides the
    # judgment in hand and the one that the generator's caller still names.
    assert max(watching.num_alive) <= NUM_CANDIDATES + 2
    # The same lines as from all judgments at once: label, and the first stage where labels are equal.
    judged = {(j.query_id, j.doc_id): j for j in read_jsonl(tmp_path / "judgments.jsonl", Judgment)}
    assert len(judged) == NUM_PAIRS
    expected = [
        (query.query_id, doc_id)
        for query in QUERIES
        for doc_id in sorted(DOCUMENTS, key=lambda doc_id: -float(judged[query.query_id, doc_id].label or "nan"))
    ]
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [(line[0], line[2]) for line in lines] == expected
    assert {j.label for j in judged.values()} == {"0", "1", "2"}


@pytest.mark.parametrize("first_status", ["ok", "error"], ids=["whole", "first-one-failed"])
def test_what_is_known_is_read_one_by_one(tmp_path: Path, first_status: str) -> None:
    path = tmp_path / "judgments.jsonl"
    judge = Judge(TEMPLATE, Overlap())
    write_jsonl(path, (judgment for _, judgment in judge.judge(candidates().pairs())))
    first, *others = read_jsonl(path, Judgment)
    if first_status == "error":
        failed = replace(first, status="error", label=None, score=None, probs=None, label_mass=None, error="busy")
        write_jsonl(path, [failed, *others])
    expected = {(judgment.query_id, judgment.doc_id): judgment.label for judgment in [first, *others]}
    del first, others
    counts, found, most = JudgingCounts(), {}, 0
    for judgment in judge_into(path, judge, candidates().pairs(), counts):
        found[judgment.query_id, judgment.doc_id] = judgment.label
        most = max(most, num_alive()) if len(found) % 20 == 0 else most
    assert found == expected
    assert counts.num_new == (first_status == "error")
    assert 0 < most <= len(expected) / 10  # a new one, the one read after it, and those that loops still name
    assert sorted((j.query_id, j.doc_id) for j in read_jsonl(path, Judgment)) == sorted(expected)


class Silent(Overlap):
    """Answers what cannot be read, from the third query on."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        for index, completion in super().generate(requests):
            yield index, completion if index < 2 * NUM_CANDIDATES else Completion("perhaps", "stop")


def test_a_refusal_waits_until_all_is_judged_and_names_the_first_query(tmp_path: Path) -> None:
    reranker = Reranker.of(TEMPLATE, Silent(), on_unparsed="error")
    with pytest.raises(TooManyUnparsed, match="query q2: no readable judgment for 10 of 10 documents"):
        rerank_files(candidates(4), reranker, tmp_path, Manifest("rerank", {}))
    assert len(list(read_jsonl(tmp_path / "judgments.jsonl", Judgment))) == 4 * NUM_CANDIDATES
    assert not (tmp_path / "run.trec").exists()


def test_a_query_without_candidates_and_a_candidate_that_comes_twice(tmp_path: Path) -> None:
    some = candidates(3)
    twice = [*some.run["q1"], replace(some.run["q1"][0], rank=11, score=-11.0)]
    run = {"q0": [], "q1": twice, "q2": some.run["q2"]}
    done = rerank_files(replace(some, run=run), Reranker.of(TEMPLATE, Overlap()), tmp_path, Manifest("rerank", {}))
    assert done.counts.num_new == 2 * NUM_CANDIDATES
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [line[0] for line in lines] == ["q1"] * 11 + ["q2"] * 10
