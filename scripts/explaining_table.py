"""Does explaining help a small model? The full table, on all domains of the almanac.

    python scripts/explaining_table.py [WORK_FOLDER]

Five kinds of students with the same network, gold labels and training pairs, three seeds each, against chance, BM25 and
shallow baselines. Every student's figures are written to results/explaining/ as soon as it is measured; students whose
figures are there, made with the same settings, are not trained again. results/explaining.json sums them up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from provenance import RESULTS, ROOT, provenance, write_result

from whyrank.almanac import Collection, build, load_handwritten
from whyrank.almanac.gold import gold_judgments, with_shuffled_explanations
from whyrank.demo.config import RECIPE
from whyrank.demo.shallow import ShallowKind, shallow_row
from whyrank.demo.students import Plan, steps_for_same_compute, train_students
from whyrank.demo.systems import MEASURE, Row, bm25_row, bootstrap_interval, random_row, student_row
from whyrank.generators.hf import HfGenerator
from whyrank.records import Mode
from whyrank.rerank import Reranker
from whyrank.store import read_json, write_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig, TinyConfig
from whyrank.training.distill import Distilled

TEMPLATE = Template.load("almanac")
SEEDS = (0, 1, 2)
NUM_TRAIN_QUERIES, NUM_IRRELEVANT, NUM_TEST_QUERIES = 6000, 5, 144
SECONDS_PER_STEP = 0.7  # only for saying beforehand how long it takes: one core, measured once
BASE = replace(RECIPE, num_steps=1000, tiny=TinyConfig(vocab_size=4096))
SHALLOW: tuple[ShallowKind, ...] = ("overlap", "interaction")
DIRECT = ("direct", "direct-same-compute", "label-then-explain")  # no reasons before the label


def main(work: Path) -> None:
    """Train what is missing, measure it, and sum up."""
    start = time.perf_counter()
    data = work / "train"
    tests = {"test": build("test", NUM_TEST_QUERIES), "handwritten": load_handwritten()}
    train = _write_training_data(data)
    plans = _plans(data)
    missing = [plan for plan in plans if not _is_measured(plan)]
    _announce(missing, len(plans))

    def measure(plan: Plan, student: Distilled) -> None:
        figures = _figures(plan, student, work / plan.name, tests)
        write_result(RESULTS / "explaining" / f"{plan.name}.json", figures)
        sys.stdout.write(f"{plan.name}: nDCG@10 {figures['rows']['test'][MEASURE]:.3f}\n")
        sys.stdout.flush()

    if missing:
        train_students(missing, data, work, TEMPLATE, on_trained=measure)
    rows = [*_baselines(train, tests), *_summaries(tests)]
    write_result(
        RESULTS / "explaining.json", {**provenance("make results"), "rows": rows, "gain": _gain(tests["test"])}
    )
    sys.stdout.write(f"{RESULTS / 'explaining.json'} ({time.perf_counter() - start:.0f} s)\n")


def _write_training_data(data: Path) -> Collection:
    train = build("train", NUM_TRAIN_QUERIES)
    train.write(data)
    gold = list(gold_judgments(train, TEMPLATE, num_irrelevant=NUM_IRRELEVANT))
    write_jsonl(data / "judgments.jsonl", gold)
    write_jsonl(data / "shuffled.jsonl", with_shuffled_explanations(gold))
    return train


def _plans(data: Path) -> list[Plan]:
    """All students, one seed after the other, so that an interrupted run leaves whole rows."""
    gold = data / "judgments.jsonl"
    direct = replace(BASE, modes=("direct",))
    longer = replace(direct, num_steps=steps_for_same_compute(gold, data, TEMPLATE, BASE))
    kinds: list[tuple[str, Path, DistillConfig]] = [
        ("explain", gold, BASE),
        ("direct-same-compute", gold, longer),
        ("label-then-explain", gold, replace(direct, is_label_first=True)),
        ("direct", gold, direct),
        ("shuffled", data / "shuffled.jsonl", BASE),
    ]
    return [
        Plan(f"{kind}-{seed}", judgments, replace(config, seed=seed))
        for seed in SEEDS
        for kind, judgments, config in kinds
    ]


def _announce(missing: Sequence[Plan], num_plans: int) -> None:
    """How much there is to do, before it is done."""
    num_workers = min(os.cpu_count() or 1, max(1, len(missing)))
    minutes = sum(plan.config.num_steps for plan in missing) * SECONDS_PER_STEP / num_workers / 60
    sys.stdout.write(
        f"{num_plans - len(missing)} of {num_plans} students are measured; the other {len(missing)} take about "
        f"{minutes:.0f} minutes, {num_workers} at a time, and can be interrupted\n"
    )
    sys.stdout.flush()


def _is_measured(plan: Plan) -> bool:
    """Whether figures made with the same settings are there; a setting that came later had its default value."""
    path = RESULTS / "explaining" / f"{plan.name}.json"
    if not path.is_file():
        return False
    return {**_as_json(asdict(DistillConfig())), **read_json(path)["config"]} == _as_json(asdict(plan.config))


def _figures(plan: Plan, student: Distilled, folder: Path, tests: Mapping[str, Collection]) -> dict[str, Any]:
    mode: Mode = plan.config.modes[0]
    generator = HfGenerator.load(student.checkpoint, device="cpu", dtype="float32", batch_size=48, name=plan.name)
    reranker = Reranker.of(TEMPLATE, generator, mode=mode)
    rows = {name: student_row(test, reranker, plan.name, folder / name) for name, test in tests.items()}
    return {
        **provenance("make results"),
        "config": asdict(plan.config),
        "num_examples": student.num_examples,
        "num_parameters": student.num_parameters,
        "num_tokens": sum(step.num_tokens for step in student.history),
        "seconds": round(student.history[-1].seconds, 1),
        "rows": {name: {**row.to_json(), "per_query": dict(row.per_query)} for name, row in rows.items()},
    }


# ---- summing up ------------------------------------------------------------------------------------------------


def _baselines(train: Collection, tests: Mapping[str, Collection]) -> Iterator[dict[str, Any]]:
    rows: dict[str, dict[str, Row]] = {}
    for name, test in tests.items():
        found = [random_row(test, seed=0), bm25_row(test), *(shallow_row(train, test, kind) for kind in SHALLOW)]
        for row in found:
            rows.setdefault(row.system, {})[name] = row
    for system, by_test in rows.items():
        per_query = {name: dict(row.per_query) for name, row in by_test.items()}
        yield {"system": system, "num_seeds": 1, **_slices(tests["test"], per_query)}


def _summaries(tests: Mapping[str, Collection]) -> Iterator[dict[str, Any]]:
    for kind in ("direct", "direct-same-compute", "label-then-explain", "shuffled", "explain"):
        runs = _runs(kind)
        per_query = {name: _mean_by_query([run["rows"][name]["per_query"] for run in runs]) for name in tests}
        yield {
            "system": kind,
            "num_seeds": len(runs),
            "seeds": [run["rows"]["test"][MEASURE] for run in runs],
            "label_accuracy": fmean(run["rows"]["test"]["label_accuracy"] for run in runs),
            "tokens_per_document": fmean(run["rows"]["test"]["tokens_per_document"] for run in runs),
            "training_tokens": fmean(run["num_tokens"] for run in runs),
            "training_seconds": fmean(run["seconds"] for run in runs),
            **_slices(tests["test"], per_query),
        }


def _slices(test: Collection, per_query: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """nDCG@10 with its interval on the whole test split, on its two halves, and on the handwritten test."""
    values = {
        "test": list(per_query["test"].values()),
        "known_phrasings": [value for key, value in per_query["test"].items() if key not in test.held_out],
        "held_out_phrasings": [value for key, value in per_query["test"].items() if key in test.held_out],
        "handwritten": list(per_query["handwritten"].values()),
    }
    return {name: {MEASURE: fmean(found), "interval": bootstrap_interval(found)} for name, found in values.items()}


def _gain(test: Collection) -> dict[str, Any]:
    """What explaining adds to the best student that does not, query by query."""
    means = {kind: _mean_by_query([run["rows"]["test"]["per_query"] for run in _runs(kind)]) for kind in DIRECT}
    best = max(DIRECT, key=lambda kind: fmean(means[kind].values()))
    explain = _mean_by_query([run["rows"]["test"]["per_query"] for run in _runs("explain")])
    differences = [explain[query.query_id] - means[best][query.query_id] for query in test.queries]
    return {"over": best, MEASURE: fmean(differences), "interval": bootstrap_interval(differences)}


def _runs(kind: str) -> list[dict[str, Any]]:
    return [read_json(RESULTS / "explaining" / f"{kind}-{seed}.json") for seed in SEEDS]


def _mean_by_query(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {query_id: float(np.mean([run[query_id] for run in runs])) for query_id in runs[0]}


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "explaining")
