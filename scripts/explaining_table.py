"""Does explaining help a small model? The full table, on all domains of the almanac.

    python scripts/explaining_table.py [WORK_FOLDER]              train what is missing, measure, sum up
    python scripts/explaining_table.py --sum-up [WORK_FOLDER]     sum up what has been measured so far

Five kinds of students with the same network, gold labels and training pairs, three seeds each, against chance, BM25 and
shallow baselines. Every student's figures are written to results/explaining/ as soon as it is measured; students whose
figures are there, made with the same settings, are not trained again. results/explaining.json sums them up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import RESULTS, ROOT, provenance, write_result

from whyrank.almanac import Collection, build, load_handwritten
from whyrank.almanac.gold import gold_judgments, with_shuffled_explanations
from whyrank.demo.config import RECIPE
from whyrank.demo.shallow import ShallowKind, shallow_row
from whyrank.demo.students import Plan, steps_for_same_compute, train_students
from whyrank.demo.systems import MEASURE, bm25_row, bootstrap_interval, loaded, random_row, student_row
from whyrank.records import Mode
from whyrank.rerank import Reranker
from whyrank.store import content_key, read_json, sha256_file, write_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig, TinyConfig
from whyrank.training.distill import Distilled

TEMPLATE = Template.load("almanac")
SEEDS = (0, 1, 2)
NUM_TRAIN_QUERIES, NUM_IRRELEVANT, NUM_TEST_QUERIES = 6000, 5, 144
SECONDS_PER_STEP = 0.7  # only for saying beforehand how long it takes: one core, measured once
BASE = replace(RECIPE, num_steps=900, tiny=TinyConfig(vocab_size=4096))
SHALLOW: tuple[ShallowKind, ...] = ("overlap", "interaction")
KINDS = ("direct", "direct-same-compute", "label-then-explain", "shuffled", "explain")
Runs = dict[str, list[dict[str, float]]]  # nDCG@10 by test set, run and query


def main(work: Path, *, is_summary: bool) -> None:
    """Train what is missing (unless only the summary is wanted), measure it, and sum up."""
    start = time.perf_counter()
    data = work / "train"
    # The recipe was chosen by looking at other queries of the test split (seed 0) and at dev.
    tests = {"test": build("test", NUM_TEST_QUERIES, seed=1), "handwritten": load_handwritten()}
    train = _write_training_data(data)
    identity = _identity(data, tests)
    plans = _plans(data)
    missing = [plan for plan in plans if not _is_measured(plan, identity)]
    _announce(missing, len(plans))

    def measure(plan: Plan, student: Distilled) -> None:
        figures = {"identity": identity, **_figures(plan, student, work / plan.name, tests)}
        write_result(RESULTS / "explaining" / f"{plan.name}.json", figures)
        sys.stdout.write(f"{plan.name}: nDCG@10 {figures['rows']['test'][MEASURE]:.3f}\n")
        sys.stdout.flush()

    if missing and not is_summary:
        train_students(missing, data, work, TEMPLATE, on_trained=measure)
    found = {**_baselines(train, tests), **_students(tests)}
    rows = [_summary(system, runs, tests["test"]) for system, runs in found.items()]
    gains = _gains(found, tuple(tests))
    write_result(RESULTS / "explaining.json", {**provenance("make results"), "rows": rows, "gains": gains})
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


def _identity(data: Path, tests: Mapping[str, Collection]) -> str:
    """A digest of everything that students learn from and are measured on, except their own settings."""
    digests = [sha256_file(data / name) for name in ("judgments.jsonl", "shuffled.jsonl")]
    texts = [repr((test.queries, test.documents, test.candidates, test.labels)) for test in tests.values()]
    return content_key(TEMPLATE.version, *digests, *texts)


def _is_measured(plan: Plan, identity: str) -> bool:
    """Whether figures are there of the same texts and settings; a setting that came later had its default value."""
    path = RESULTS / "explaining" / f"{plan.name}.json"
    if not path.is_file():
        return False
    recorded = read_json(path)
    settings = {**_as_json(asdict(DistillConfig())), **recorded["config"]}
    return bool(recorded["identity"] == identity and settings == _as_json(asdict(plan.config)))


def _figures(plan: Plan, student: Distilled, folder: Path, tests: Mapping[str, Collection]) -> dict[str, Any]:
    mode: Mode = plan.config.modes[0]
    reranker = Reranker.of(TEMPLATE, loaded(student.checkpoint), mode=mode)
    rows = {name: student_row(test, reranker, plan.name, folder / name) for name, test in tests.items()}
    return {
        **provenance("make results"),
        "config": asdict(plan.config),
        "num_examples": student.num_examples,
        "num_parameters": student.num_parameters,
        "num_tokens": sum(step.num_tokens for step in student.history),
        "seconds": round(student.history[-1].seconds, 1),
        "last_loss": fmean(step.loss for step in student.history[-50:]),
        "rows": {name: {**row.to_json(), "per_query": dict(row.per_query)} for name, row in rows.items()},
    }


# ---- summing up ------------------------------------------------------------------------------------------------


def _baselines(train: Collection, tests: Mapping[str, Collection]) -> dict[str, Runs]:
    """The systems that are not students, by name; one run each."""
    found: dict[str, Runs] = {}
    for name, test in tests.items():
        rows = [random_row(test, seed=0), bm25_row(test), *(shallow_row(train, test, kind) for kind in SHALLOW)]
        for row in rows:
            found.setdefault(row.system, {})[name] = [dict(row.per_query)]
    return found


def _students(tests: Mapping[str, Collection]) -> dict[str, Runs]:
    """Every kind of student; one run per seed."""
    return {kind: {name: [run["rows"][name]["per_query"] for run in _runs(kind)] for name in tests} for kind in KINDS}


def _summary(system: str, runs: Runs, test: Collection) -> dict[str, Any]:
    """nDCG@10 with its interval on the whole test split, on its two halves, and on the handwritten test; and for
    students what they cost."""
    known = [query.query_id for query in test.queries if query.query_id not in test.held_out]
    slices = {
        "test": _matrix(runs["test"]),
        "known_phrasings": _matrix(runs["test"], known),
        "held_out_phrasings": _matrix(runs["test"], sorted(test.held_out)),
        "handwritten": _matrix(runs["handwritten"]),
    }
    summary: dict[str, Any] = {"system": system, "num_runs": len(runs["test"])}
    for name, found in slices.items():
        summary[name] = {MEASURE: float(found.mean()), "interval": bootstrap_interval(found)}
    if system in KINDS:
        recorded = _runs(system)
        summary["seeds"] = [run["rows"]["test"][MEASURE] for run in recorded]
        for key in ("label_accuracy", "tokens_per_document"):
            summary[key] = fmean(run["rows"]["test"][key] for run in recorded)
        for key in ("num_tokens", "seconds", "last_loss"):
            summary[key] = fmean(run[key] for run in recorded)
    return summary


def _gains(found: Mapping[str, Runs], test_sets: Sequence[str]) -> list[dict[str, Any]]:
    """What explaining adds to every other system, query by query."""
    gains = []
    for system, runs in found.items():
        for name in test_sets if system != "explain" else ():
            explain, other = _matrix(found["explain"][name]), _matrix(runs[name])
            differences = explain - (other if other.shape == explain.shape else other.mean(axis=0))
            interval = bootstrap_interval(differences)
            gains.append({"over": system, "test_set": name, MEASURE: float(differences.mean()), "interval": interval})
    return gains


def _matrix(runs: Sequence[Mapping[str, float]], query_ids: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Figures as `(runs, queries)`."""
    return np.array([[run[query_id] for query_id in query_ids or sorted(runs[0])] for run in runs], dtype=np.float64)


def _runs(kind: str) -> list[dict[str, Any]]:
    """The recorded figures of a kind; an interrupted script has not come to every seed."""
    paths = (RESULTS / "explaining" / f"{kind}-{seed}.json" for seed in SEEDS)
    return [read_json(path) for path in paths if path.is_file()]


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Does explaining help a small model?")
    parser.add_argument("work", nargs="?", type=Path, default=ROOT / "out" / "explaining", help="data and checkpoints")
    parser.add_argument("--sum-up", action="store_true", help="train nothing: sum up what has been measured so far")
    chosen = parser.parse_args()
    main(chosen.work, is_summary=chosen.sum_up)
