"""Runs: written and read back, cut, and free of ties."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrank.datasets import (
    read_qrels,
    read_run,
    without_excluded,
    write_json_run,
    write_run,
    write_trec_qrels,
    write_trec_run,
)
from whyrank.datasets.runs import strictly_decreasing
from whyrank.errors import InputError
from whyrank.records import Qrel, ScoredDocument

# A file whose first character is one of <, [ and { is taken for markup or JSON.
IDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Z", "C"), exclude_characters="<[{"), min_size=1, max_size=8
)
# Few distinct values among them, so that ties are frequent; and the edges of single precision.
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-12, -3e38, 3e38, 1e-45, 5e-324]),
    st.floats(-3e38, 3e38, allow_nan=False),
)
RUNS = st.dictionaries(IDS, st.dictionaries(IDS, SCORES, min_size=1, max_size=6), min_size=1, max_size=4)


def make_run(scores: dict[str, dict[str, float]]) -> dict[str, list[ScoredDocument]]:
    ordered = {query_id: sorted(found.items(), key=lambda item: -item[1]) for query_id, found in scores.items()}
    return {
        query_id: [ScoredDocument(query_id, doc_id, rank, score) for rank, (doc_id, score) in enumerate(found, start=1)]
        for query_id, found in ordered.items()
    }


def order(run: dict[str, list[ScoredDocument]]) -> dict[str, list[tuple[str, int]]]:
    return {query_id: [(scored.doc_id, scored.rank) for scored in found] for query_id, found in run.items()}


@settings(max_examples=100, deadline=None)
@given(scores=RUNS)
@pytest.mark.parametrize("name", ["run.txt", "run.txt.gz", "run.json"])
def test_a_run_keeps_its_order_through_a_file(
    name: str, scores: dict[str, dict[str, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make_run(scores)
    path = tmp_path_factory.getbasetemp() / name
    assert write_run(path, run, "tag") == sum(map(len, run.values()))
    back = read_run(path)
    assert order(back) == order(run)
    for query_id, documents in run.items():
        single = np.array([scored.score for scored in documents], dtype=np.float32)
        if np.all(np.diff(single.astype(np.float64)) < 0):  # nothing to untie: not a bit may change
            assert back[query_id] == documents
    again = path.with_name(f"again.{name}")
    write_run(again, back, "tag")
    opener = gzip.decompress if name.endswith(".gz") else bytes
    assert opener(again.read_bytes()) == opener(path.read_bytes())


@settings(max_examples=200, deadline=None)
@given(scores=st.lists(SCORES, max_size=12))
def test_scores_decrease_in_single_precision_and_hardly_move(scores: list[float]) -> None:
    scores = sorted(scores, reverse=True)
    written = strictly_decreasing(scores)
    single = np.array(written, dtype=np.float32)
    assert np.all(single[1:] < single[:-1])
    for position, (before, after) in enumerate(zip(scores, written, strict=True)):
        assert after <= before
        # At most one step of single precision (relative 2^-23) per predecessor, or 1e-30 around 0.
        largest = max(map(abs, scores[: position + 1]))
        assert before - after <= position * max(largest * 2**-22, 2e-30)


def test_ties_by_hand() -> None:
    # Single precision has steps of 2^-23 above 1 and of 2^-24 below it.
    assert strictly_decreasing([1.0, 1.0, 1.0, 0.5]) == [1.0, 1 - 2**-24, 1 - 2**-23, 0.5]
    assert strictly_decreasing([1.0 + 1e-12, 1.0]) == [1.0 + 1e-12, 1 - 2**-24]
    assert strictly_decreasing([0.0, 0.0]) == [0.0, -1e-30]
    assert strictly_decreasing([3.25, 0.1, -7.0]) == [3.25, 0.1, -7.0]
    assert strictly_decreasing([]) == []


@pytest.mark.parametrize("scores", [[float("nan")], [float("inf")], [1.0, float("-inf")], [1e39], [1.0, 2.0]])
def test_scores_that_are_refused(scores: list[float]) -> None:
    with pytest.raises(InputError, match=r"expected finite scores|expected scores that decrease"):
        strictly_decreasing(scores)


def test_what_a_run_file_looks_like(tmp_path: Path) -> None:
    run = make_run({"q1": {"d1": 0.1, "d2": 12.5}, "q2": {"d1": -1e-7}})
    assert write_trec_run(tmp_path / "run.txt", run, "me") == 3
    assert (tmp_path / "run.txt").read_text() == "q1 Q0 d2 1 12.5 me\nq1 Q0 d1 2 0.1 me\nq2 Q0 d1 1 -1e-07 me\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]


def test_white_space_cannot_be_written_in_columns(tmp_path: Path) -> None:
    run = make_run({"q": {"Memory Management.txt": 1.0}})
    with pytest.raises(InputError, match=r"document id without white space.*'Memory Management.txt'.*ends in \.json"):
        write_trec_run(tmp_path / "run.txt", run, "tag")
    with pytest.raises(InputError, match=r"tag without white space.*'my tag'"):
        write_trec_run(tmp_path / "run.txt", make_run({"q": {"d": 1.0}}), "my tag")
    with pytest.raises(InputError, match="query id without white space"):
        write_trec_run(tmp_path / "run.txt", make_run({"": {"d": 1.0}}), "tag")
    with pytest.raises(InputError, match="document id without white space"):
        write_trec_qrels(tmp_path / "qrels.txt", [Qrel("q", "a b", 1)])
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left
    assert write_json_run(tmp_path / "run.json", run) == 1
    assert read_run(tmp_path / "run.json") == run


def test_qrels_round_trip(tmp_path: Path) -> None:
    qrels = [Qrel("q1", "d1", 3), Qrel("q1", "d2", 0), Qrel("q2", "d1", -1)]
    assert write_trec_qrels(tmp_path / "qrels.gz", qrels) == 3
    assert read_qrels(tmp_path / "qrels.gz") == qrels


def test_without_excluded() -> None:
    run = make_run({"q1": {"a": 3.0, "b": 2.0, "c": 1.0}, "q2": {"a": 1.0}, "q3": {"a": 1.0}})
    kept, num_dropped = without_excluded(run, {"q1": {"a", "z"}, "q2": {"a"}, "q9": {"a"}})
    assert num_dropped == 2
    assert kept == {
        "q1": [ScoredDocument("q1", "b", 1, 2.0), ScoredDocument("q1", "c", 2, 1.0)],
        "q2": [],
        "q3": [ScoredDocument("q3", "a", 1, 1.0)],
    }
    assert run["q1"][0].doc_id == "a"  # what was given stays as it was
