"""The demo's figures, and a very small demo from data to report."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest

from whyrank.almanac import build
from whyrank.demo.config import DemoConfig
from whyrank.demo.recorded import read_recorded
from whyrank.demo.run import run_demo
from whyrank.demo.systems import bootstrap_interval, candidates_of, random_row


def test_an_interval_of_equal_values_has_no_width() -> None:
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_an_interval_lies_around_the_mean_and_within_the_values() -> None:
    low, high = bootstrap_interval([0.0, 0.2, 0.4, 1.0])
    assert 0.0 <= low < 0.4 < high <= 1.0


def test_chance_by_hand() -> None:
    """The expectation of a random order, with 2, 3 and 19 documents of label 2, 1 and 0 among 24, is 0.289: the sum of
    the discounts of ten ranks (4.5436) times the mean gain (7 / 24), divided by the best value (2 + 2 / log2(3) +
    1 / log2(4) + 1 / log2(5) + 1 / log2(6) = 4.5796)."""
    collection = build("test", 12, domains=["bread"])
    assert random_row(collection, seed=0).ndcg == pytest.approx(4.5436 * (7 / 24) / 4.5796, abs=0.02)


def test_candidates_keep_their_own_order() -> None:
    collection = build("test", 2, domains=["bread"])
    candidates = candidates_of(collection)
    for query in collection.queries:
        lines = candidates.run[query.query_id]
        assert tuple(line.doc_id for line in lines) == collection.candidates[query.query_id]
        assert [line.rank for line in lines] == list(range(1, 25))


def test_what_the_demo_shows_as_recorded_is_what_was_recorded() -> None:
    kept = json.loads((Path(__file__).parent.parent / "results" / "refining.json").read_text(encoding="utf-8"))
    shown = read_recorded()
    usual = {row["system"]: row["nDCG@10"] for row in kept["rows"] if row["teacher_noise"] == "default"}
    assert {row.system: row.ndcg for row in shown.rows} == {
        "teacher": usual["teacher"],
        "distilled": usual["distilled"],
        "refined (ppo)": usual["ppo"],
        "refined (grpo)": usual["grpo"],
    }
    assert (shown.command, shown.date) == (kept["command"], kept["date"])


@pytest.mark.slow
def test_a_very_small_demo(tmp_path: Path) -> None:
    config = DemoConfig(domains=("bread",), num_steps=2, num_train_queries=8, num_queries=4, num_shipped_queries=3)
    outcome = run_demo(tmp_path, config)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written == outcome.to_json()
    assert [row["system"] for row in written["rows"]] == ["random", "bm25", "direct", "explain", "shipped"]
    assert [row["system"] for row in written["full_test_set"]] == ["random", "bm25", "shipped"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "recorded on" in page
    assert [row["system"] for row in written["recorded"]][:2] == ["teacher", "distilled"]
    assert all(example.query in unescape(page) for example in outcome.examples)
    assert outcome.examples[-1].ndcg == min(outcome.rows[-1].per_query.values())
    for name in ("explain/run.trec", "explain/judgments.jsonl", "direct/run.trec", "shipped/run.trec", "manifest.json"):
        assert (tmp_path / name).is_file()
    again = run_demo(tmp_path, config)  # nothing is trained or judged twice
    assert [row.ndcg for row in again.rows] == [row.ndcg for row in outcome.rows]
