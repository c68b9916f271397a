"""What mode `auto` saves and what it costs; writes results/auto-tradeoff.json and docs/images/auto-tradeoff.svg.

    python scripts/auto_tradeoff.py [WORK_FOLDER] [--json]

Every pair is judged once in both modes; then the waves of `auto` are run on these judgments for several budgets. Two
cases: the shipped model on the almanac's own lists, in which every candidate is near the query's subject; and a student
of three domains on lists in which most candidates are off the subject, as a first stage's often are. The student is
trained here, in about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from provenance import RESULTS, ROOT, provenance, write_result
from topical_lists import mixed_judgments, with_strangers

from whyrank.almanac import Collection, build
from whyrank.auto import JudgedInWaves, judge_in_waves
from whyrank.checkpoint import CARD_NAME, read_card
from whyrank.demo.config import RECIPE
from whyrank.demo.systems import MEASURE, bootstrap_interval, candidates_of, loaded, per_query
from whyrank.generators.opening import EMBEDDED_MODEL
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.records import Document, Judgment, Mode, Query
from whyrank.rerank import Reranker
from whyrank.stages.calibrate import calibrate_files
from whyrank.store import Manifest
from whyrank.template import Template
from whyrank.training.config import DistillConfig
from whyrank.training.distill import distill
from whyrank.waves import Auto

TEMPLATE = Template.load("almanac")
DOMAINS = ("houseplants", "bicycle", "bread")
NUM_STRANGERS = 72  # with the 24 of the almanac, lists of 96
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # budgets, as shares of what explaining all takes
TOP_KS = (1, 3, 5, 10)
TOLERANCES = (0.0, 0.25)
MODES: tuple[Mode, ...] = ("direct", "explain")
Found = Mapping[Mode, Mapping[tuple[str, str], Judgment]]


@dataclass(frozen=True, slots=True)
class Case:
    """A calibrated checkpoint and the lists that it ranks."""

    name: str
    model: Path
    test: Collection


def main(work: Path, *, as_json: bool) -> None:
    """Measure both cases, write the figures, and draw them."""
    own = Case("on subject", EMBEDDED_MODEL, build("test", 144, seed=1))
    cases = [_measure(own, work), _measure(_off_subject(work), work)]
    result = {**provenance("python scripts/auto_tradeoff.py"), "cases": cases}
    write_result(RESULTS / "auto-tradeoff.json", result)
    _draw(cases, ROOT / "docs" / "images" / "auto-tradeoff.svg")
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    for case in cases:
        sys.stdout.write(
            f"{case['name']}: direct {case['direct'][MEASURE]:.3f}, explain {case['explain'][MEASURE]:.3f}"
        )
        sys.stdout.write(f" with {case['explain']['tokens']:.0f} tokens per query\n")
        for row in case["rows"]:
            low, high = row["loss_interval"]
            sys.stdout.write(
                f"  top {row['top_k']:<3}tolerance {row['tolerance']:<5}budget {row['budget']!s:<6}"
                f"{row['tokens']:>8.0f} tokens{row[MEASURE]:>8.3f}"
                f"   loss {row['loss']:+.3f} [{low:+.3f}, {high:+.3f}]\n"
            )


# ---- the second case ------------------------------------------------------------------------------------------


def _off_subject(work: Path) -> Case:
    """A student that was taught to tell subjects apart, calibrated on the dev split."""
    student = work / "student"
    _teach(work, student)
    dev = with_strangers(build("dev", 48, domains=DOMAINS), NUM_STRANGERS)
    if read_card(student / CARD_NAME).calibration is None:
        judge = Judge(TEMPLATE, loaded(student))
        calibrate_files(candidates_of(dev), judge, student, work / "calibration", Manifest("calibrate", {}))
    return Case("mostly off subject", student, with_strangers(build("test", 72, 1, DOMAINS), NUM_STRANGERS))


def _teach(work: Path, student: Path) -> None:
    """First labels alone: beside the many tokens of explanations, those of labels take long to learn. Then both modes,
    with more of the irrelevant documents that are near the subject."""
    if (student / CARD_NAME).is_file():
        return
    own = build("train", 2500, domains=DOMAINS)
    mixed = with_strangers(own, 5)
    queries = {query.query_id: query for query in mixed.queries}
    documents = {document.doc_id: document for document in mixed.documents}

    def learn(out: Path, num_irrelevant: int, config: DistillConfig) -> None:
        taught = list(mixed_judgments(own, mixed, TEMPLATE, num_irrelevant=num_irrelevant, num_strangers=5))
        distill(taught, queries, documents, TEMPLATE, out, replace(config, num_threads=1, save_every=100))

    first = work / "direct-first"
    learn(first, 1, replace(RECIPE, model=str(EMBEDDED_MODEL), modes=("direct",), num_steps=500))
    learn(student, 5, replace(RECIPE, model=str(first), modes=("explain", "direct"), num_steps=400))


# ---- measuring ------------------------------------------------------------------------------------------------


def _measure(case: Case, work: Path) -> dict[str, Any]:
    judge = Judge(TEMPLATE, loaded(case.model))
    calibration = read_card(case.model / CARD_NAME).calibration
    if calibration is None:
        raise SystemExit(f"{case.model} has no calibration: run whyrank calibrate first")
    found = _judged(case.test, judge, work / case.name.replace(" ", "-"))
    whole = {
        mode: _values(case.test, Reranker(replace(judge, mode=mode)), _by_query(case.test, found[mode]))
        for mode in MODES
    }
    tokens = _per_query(case.test, {ids: j.num_completion_tokens for ids, j in found["explain"].items()})
    budgets = [round(share * fmean(tokens)) for share in SHARES]
    settings = [Auto(calibration, 10, budget) for budget in budgets]
    settings += [Auto(calibration, top_k, tolerance=tolerance) for top_k in TOP_KS for tolerance in TOLERANCES]
    rows = [_simulate(case.test, judge, auto, found, whole["explain"]) for auto in settings]
    num_candidates = {len(doc_ids) for doc_ids in case.test.candidates.values()}
    return {
        "name": case.name,
        "num_queries": len(case.test.queries),
        "num_candidates": max(num_candidates),
        "calibration": calibration.to_dict(),
        "direct": {**_figure(whole["direct"]), "tokens": 0.0},
        "explain": {**_figure(whole["explain"]), "tokens": fmean(tokens)},
        "rows": rows,
    }


def _judged(test: Collection, judge: Judge, out: Path) -> Found:
    """Every pair in both modes."""
    found: dict[Mode, dict[tuple[str, str], Judgment]] = {}
    for mode in MODES:
        path = out / f"judgments-{mode}.jsonl"
        made = judge_into(path, replace(judge, mode=mode), candidates_of(test).pairs(), JudgingCounts())
        found[mode] = {(judgment.query_id, judgment.doc_id): judgment for judgment in made}
    return found


def _simulate(
    test: Collection, judge: Judge, auto: Auto, found: Found, explained: Mapping[str, float]
) -> dict[str, Any]:
    """Mode `auto` as it would have run: the same code, with judgments that are there instead of a model."""

    def ask(asking: Judge, pairs: Sequence[tuple[Query, Document]]) -> Iterator[tuple[int, Judgment]]:
        for index, (query, document) in enumerate(pairs):
            yield index, found[asking.mode][query.query_id, document.doc_id]

    documents = {document.doc_id: document for document in test.documents}
    run = candidates_of(test).run
    jobs = [(query, [documents[line.doc_id] for line in run[query.query_id]]) for query in test.queries]
    judged: dict[str, JudgedInWaves] = {}
    for number, outcome in judge_in_waves(jobs, judge, auto, ask):
        judged[jobs[number][0].query_id] = outcome
    values = _values(test, Reranker(judge, auto=auto), {query_id: o.judgments for query_id, o in judged.items()})
    losses = [explained[query_id] - value for query_id, value in values.items()]
    return {
        "top_k": auto.top_k,
        "budget": auto.max_tokens_per_query,
        "tolerance": auto.tolerance,
        "tokens": fmean(outcome.num_tokens for outcome in judged.values()),
        "most_tokens": max(outcome.num_tokens for outcome in judged.values()),
        "explained": fmean(outcome.num_explained for outcome in judged.values()),
        "cut_short": fmean(outcome.is_cut_short for outcome in judged.values()),
        **_figure(values),
        "loss": fmean(losses),
        "loss_interval": bootstrap_interval(losses),
    }


def _values(test: Collection, reranker: Reranker, judgments: Mapping[str, Mapping[str, Judgment]]) -> dict[str, float]:
    """nDCG@10 by query; `judgments` by query_id and doc_id."""
    documents = {document.doc_id: document for document in test.documents}
    run = candidates_of(test).run

    def ranked(query: Query) -> list[str]:
        ranking = reranker.arrange(query, documents, run[query.query_id], judgments[query.query_id])
        return [result.id for result in ranking]

    return per_query(test, ranked)


def _by_query(test: Collection, judgments: Mapping[tuple[str, str], Judgment]) -> dict[str, dict[str, Judgment]]:
    return {
        query_id: {doc_id: judgments[query_id, doc_id] for doc_id in doc_ids}
        for query_id, doc_ids in test.candidates.items()
    }


def _per_query(test: Collection, tokens: Mapping[tuple[str, str], int]) -> list[int]:
    return [sum(tokens[query.query_id, d] for d in test.candidates[query.query_id]) for query in test.queries]


def _figure(values: Mapping[str, float]) -> dict[str, Any]:
    return {MEASURE: fmean(values.values()), "interval": bootstrap_interval(list(values.values()))}


# ---- drawing --------------------------------------------------------------------------------------------------


def _draw(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "whyrank"  # the same figures give the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(cases), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, case in zip(panels, cases, strict=True):
        budgeted = [row for row in case["rows"] if row["top_k"] == 10 and row["tolerance"] == 0.0]
        free = [row for row in case["rows"] if row["top_k"] == 10 and row["tolerance"] > 0]
        rows = sorted(budgeted, key=lambda row: row["tokens"])
        bars = [
            [row[MEASURE] - row["interval"][0] for row in rows],
            [row["interval"][1] - row[MEASURE] for row in rows],
        ]
        panel.errorbar(
            [r["tokens"] for r in rows], [r[MEASURE] for r in rows], bars, marker="o", capsize=2, label="auto"
        )
        panel.plot([r["tokens"] for r in free], [r[MEASURE] for r in free], "D", label="auto, by tolerance")
        panel.plot(case["explain"]["tokens"], case["explain"][MEASURE], "s", label="explain")
        panel.plot(0, case["direct"][MEASURE], "^", label="direct")
        panel.set_title(f"{case['name']}, {case['num_candidates']} candidates", fontsize=10)
        panel.set_xlabel("tokens written per query")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(MEASURE)
    panels[0].legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What mode auto saves and what it costs.")
    parser.add_argument("work", nargs="?", type=Path, default=ROOT / "out" / "auto-tradeoff")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    chosen = parser.parse_args()
    main(chosen.work, as_json=chosen.json)
