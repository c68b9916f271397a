"""The scripts that record and show results: what they sum up, and when they measure again. Expected values by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from whyrank.demo.students import Plan
from whyrank.demo.systems import bootstrap_interval
from whyrank.training.config import DistillConfig
from whyrank.training.rollouts import Evidence

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """Scripts import each other by name, as they do when one of them is run."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def explaining(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the full table, with results in a folder of its own."""
    module = import_module("explaining_table")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_intervals_draw_runs_as_well_as_queries() -> None:
    """Every query of a run has the same value, so only drawing runs anew can move the mean; with three runs the mean of
    a resample is the lowest value with probability 1 / 27, more than 2.5 %."""
    assert bootstrap_interval([[0.2] * 5, [0.5] * 5, [0.8] * 5]) == pytest.approx((0.2, 0.8))
    assert bootstrap_interval([[0.5] * 5]) == (0.5, 0.5)


def test_gains_are_paired_by_query_and_seed(explaining: ModuleType) -> None:
    found = {
        "explain": {"test": [{"a": 1.0, "b": 0.5}, {"a": 0.9, "b": 0.6}]},
        "direct": {"test": [{"b": 0.1, "a": 0.4}, {"b": 0.3, "a": 0.2}]},
        "bm25": {"test": [{"a": 0.5, "b": 0.5}]},
    }
    gains = {gain["over"]: gain for gain in explaining._gains(found, ("test",))}
    assert list(gains) == ["direct", "bm25"]
    # (1 - .4 + .5 - .1 + .9 - .2 + .6 - .3) / 4, and (1 + .5 + .9 + .6) / 4 - .5
    assert gains["direct"]["nDCG@10"] == pytest.approx(0.5)
    assert gains["bm25"]["nDCG@10"] == pytest.approx(0.25)
    low, high = gains["bm25"]["interval"]
    assert low <= 0.25 <= high


def test_figures_are_measured_again_when_texts_or_settings_differ(explaining: ModuleType, tmp_path: Path) -> None:
    config = DistillConfig(num_steps=7, seed=2)
    plan = Plan("explain-2", tmp_path / "judgments.jsonl", config)
    assert not explaining._is_measured(plan, "texts")
    recorded: dict[str, Any] = {"identity": "texts", "config": json.loads(json.dumps(asdict(config)))}
    path = tmp_path / "explaining" / "explain-2.json"
    path.parent.mkdir()

    def record(**changes: Any) -> None:
        path.write_text(json.dumps({**recorded, **changes}))

    record()
    assert explaining._is_measured(plan, "texts")
    assert not explaining._is_measured(plan, "other texts")
    assert not explaining._is_measured(replace(plan, config=replace(config, num_steps=8)), "texts")
    del recorded["config"]["word_dropout"]  # a setting that did not exist yet then had its default value
    record()
    assert explaining._is_measured(plan, "texts")
    assert not explaining._is_measured(replace(plan, config=replace(config, word_dropout=0.1)), "texts")


def test_an_unfinished_table_is_summed_up_from_the_seeds_that_are_there(explaining: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "explaining"
    folder.mkdir()
    for seed in (0, 2):
        (folder / f"direct-{seed}.json").write_text(json.dumps({"seed": seed}))
    assert [run["seed"] for run in explaining._runs("direct")] == [0, 2]


def test_tables_show_what_is_recorded(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    figure = {"nDCG@10": 0.5, "interval": [0.4, 0.6]}
    made = {"command": "make results", "commit": "0123456789", "date": "2026-01-02"}
    row = {"system": "direct", "seeds": [0.5, 0.25], "num_tokens": 1_500_000, "last_loss": 0.257}
    slices = dict.fromkeys(("test", "known_phrasings", "held_out_phrasings", "handwritten"), figure)
    gains = [{"over": "direct", "test_set": name, **figure} for name in ("test", "handwritten")]
    recorded = {**made, "rows": [{**row, **slices}], "gains": gains}
    (tmp_path / "explaining.json").write_text(json.dumps(recorded))
    shown = tables.explaining("table", "")
    cells = " | ".join(["0.500 [0.400, 0.600]"] * 4)
    assert f"| direct | {cells} | 0.500 0.250 | 1.5 M | 0.257 |" in shown
    assert shown.endswith("\n`make results`, commit 0123456, 2026-01-02.\n")
    assert "| direct | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in tables.explaining("gains", "")


def test_speed_in_short_is_held_against_the_best_plain_batches(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    speeds = [
        ("W", "whyrank", 4.5, 2.67),
        ("W", "generate-1", 0.8, 0.5),
        ("W", "generate-8", 1.7, 1.0),
        ("S", "whyrank", 7.5, 2.07),
        ("S", "generate-1", 3.6, 1.0),
    ]
    rows = [
        {"workload": workload, "model": "m", "dtype": "float32", "system": system, "ratio": ratio}
        | {"documents_per_second": speed, "roofline": 0.5, "peak_rss_mb": 900.0}
        for workload, system, speed, ratio in speeds
    ]
    made = {"command": "c", "commit": "0123456789", "date": "2026-01-02", "cpu": "P", "num_threads": 1, "rows": rows}
    (tmp_path / "fast.json").write_text(json.dumps(made))
    shown = tables.speed("fast short", "").splitlines()
    assert shown[2:4] == [
        "| explain and label | float32 | 4.5 | 1.7 | 2.7 |",
        "| label only | float32 | 7.5 | 3.6 | 2.1 |",
    ]
    assert len(tables.speed("fast", "").splitlines()) == 2 + len(rows) + 2


def test_the_picture_of_speeds_is_that_of_the_recorded_figures(scripts: None, tmp_path: Path) -> None:
    """Versions of matplotlib draw differently; the figures' digest inside is the same."""
    drawing = import_module("draw_speed")
    drawing.main(tmp_path / "again.svg")
    name = drawing.digest(drawing.recorded_rows())
    assert name in (tmp_path / "again.svg").read_text()
    assert name in drawing.PICTURE.read_text(), "run scripts/draw_speed.py"


@pytest.fixture
def refining(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the table about refinement, with results in a folder of its own."""
    module = import_module("refining_table")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "refining").mkdir()
    return module


def keep(job: Any, per_query: dict[str, float], **changes: Any) -> None:
    figures = {"nDCG@10": sum(per_query.values()) / len(per_query), "label_accuracy": 0.5, "per_query": per_query}
    job.result.write_text(json.dumps({"settings": job.settings, **figures, **changes}))


def test_refined_students_are_compared_with_the_teacher_of_their_seed(refining: ModuleType) -> None:
    def job(system: str, seed: int) -> Any:
        return refining.Job(system, "default", seed)

    keep(job("teacher", 0), {"a": 0.5, "b": 0.3})
    keep(job("teacher", 1), {"b": 0.9, "a": 0.1})
    keep(job("ppo", 1), {"a": 0.2, "b": 1.0}, tokens_per_document=34.0)
    rows, gains = refining.summary()
    assert [(row["system"], row["seeds"]) for row in rows] == [("teacher", [0.4, 0.5]), ("ppo", [0.6])]
    assert [row["tokens_per_document"] for row in rows] == [None, 34.0]
    (gain,) = gains  # the parent of seed 1 is not measured
    assert (gain["over"], gain["runs"]) == ("teacher", 1)
    assert gain["nDCG@10"] == pytest.approx((0.2 - 0.1 + 1.0 - 0.9) / 2)


def test_a_row_is_measured_again_when_its_settings_differ(refining: ModuleType) -> None:
    job = refining.Job("ppo", "default", 0)
    assert not job.is_measured
    keep(job, {"a": 1.0})
    assert job.is_measured
    settings = job.settings
    del settings["refine"]["length_price"]  # a setting that did not exist yet then had its default value
    keep(job, {"a": 1.0}, settings=settings)
    assert job.is_measured
    settings["refine"]["temperature"] = 0.9
    keep(job, {"a": 1.0}, settings=settings)
    assert not job.is_measured


def test_evidence_becomes_the_nearest_label(refining: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links say 2 with trust 1, their absence 0 with trust 1, the teacher has trust 1/2: a link against a teacher's 0
    is 4/3, which is nearest to 1; no link against a teacher's 2 is 2/3, nearest to 1; against a 1 it is 1/3."""
    world = refining.World.__new__(refining.World)
    beliefs = {
        ("q", "linked"): (Evidence(2.0, 1.0, "link"), Evidence(0.0, 0.5, "consensus")),
        ("q", "praised"): (Evidence(0.0, 1.0, "unlinked"), Evidence(2.0, 0.5, "consensus")),
        ("q", "near"): (Evidence(0.0, 1.0, "unlinked"), Evidence(1.0, 0.5, "consensus")),
    }
    monkeypatch.setattr(refining.World, "evidence", beliefs)
    assert [world.label_by_evidence(pair) for pair in beliefs] == ["1", "1", "0"]
