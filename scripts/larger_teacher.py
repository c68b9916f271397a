"""Can a student twenty times smaller do what a language model taught it, and more? The paper's headline, in miniature.

    python scripts/larger_teacher.py [WORK_FOLDER] [--seed N]        train what is missing, measure
    python scripts/larger_teacher.py --sum-up                        sum up what has been measured so far

A larger model of the almanac learns from gold explanations of a few queries: it is the teacher, a language model behind
the same protocol as any other. It judges pairs of many more queries; a student twenty times smaller is distilled from
these judgments and refined with them and with links of which one in ten leads astray. Beside it stands a student of the
same size that learned from the teacher's gold directly. Each row is written to results/larger-teacher/ as soon as it is
measured; results/larger-teacher.json sums them up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from provenance import RESULTS, ROOT, provenance, write_result
from refining_table import (
    DISTILL,
    DOMAINS,
    NUM_TEST_QUERIES,
    REFINE,
    TEMPLATE,
    PairIds,
    World,
    matrix,
    refined,
)

from whyrank.almanac import build
from whyrank.almanac.gold import gold_judgments
from whyrank.almanac.links import LinksConfig, answer_links
from whyrank.demo.systems import MEASURE, bootstrap_interval, loaded, student_row
from whyrank.generators.hf.load import load_model
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.records import Document, Judgment, Query
from whyrank.rerank import Reranker
from whyrank.store import read_json
from whyrank.training.config import TinyConfig
from whyrank.training.distill import distill
from whyrank.training.evidence import gather_evidence
from whyrank.training.rollouts import Evidence

SEEDS = (0, 1, 2)
NUM_GOLD_QUERIES, NUM_TAUGHT_QUERIES, NUM_IRRELEVANT = 300, 800, 5
TEACHER = replace(
    DISTILL,
    num_steps=400,
    learning_rate=4e-3,
    tiny=TinyConfig(vocab_size=2048, hidden_size=256, num_layers=6, num_heads=8, intermediate_size=768),
)
STUDENT = replace(
    DISTILL,
    num_steps=1500,
    tiny=TinyConfig(vocab_size=1024, hidden_size=64, num_layers=4, num_heads=4, intermediate_size=192),
)
# `REFINE` itself, three times this rate and half as many answers per step, gained nothing: docs/log.md, 2026-11-24.
GENTLY = replace(REFINE, learning_rate=1e-4, num_steps=200, num_queries=8, minibatch_size=16)
SYSTEMS = ("teacher", "distilled", "ppo", "alone")


class TaughtWorld(World):
    """What a language model as teacher leaves behind."""

    def __init__(self, seed: int, work: Path) -> None:
        super().__init__("default", seed)
        self.work = work

    @cached_property
    def gold(self) -> list[Judgment]:
        """Gold explanations of the first few queries: all that the teacher ever saw."""
        few = {query.query_id for query in self.train.queries[:NUM_GOLD_QUERIES]}
        everything = gold_judgments(self.train, TEMPLATE, num_irrelevant=NUM_IRRELEVANT, seed=self.seed)
        return [judgment for judgment in everything if judgment.query_id in few]

    def pairs(self) -> Iterator[tuple[Query, Document]]:
        """What the teacher judges: pairs of other queries, chosen as the gold ones are."""
        taught = self.train.queries[NUM_GOLD_QUERIES : NUM_GOLD_QUERIES + NUM_TAUGHT_QUERIES]
        wanted = {query.query_id for query in taught}
        for judgment in gold_judgments(self.train, TEMPLATE, num_irrelevant=NUM_IRRELEVANT, seed=self.seed):
            if judgment.query_id in wanted:  # the pair alone: neither its label nor its explanation is looked at
                yield self.queries[judgment.query_id], self.documents[judgment.doc_id]

    @cached_property
    def taught(self) -> list[Judgment]:
        """What the teacher says of them."""
        judge = Judge(TEMPLATE, loaded(self.work / f"teacher-{self.seed}"))
        path = self.work / f"taught-{self.seed}" / "judgments.jsonl"
        return list(judge_into(path, judge, self.pairs(), JudgingCounts()))

    @cached_property
    def evidence(self) -> Mapping[PairIds, tuple[Evidence, ...]]:
        """Links of all queries but those with gold, and what the teacher said."""
        seen = {judgment.query_id for judgment in self.gold}
        links = [pair for pair in answer_links(self.train, LinksConfig(), self.seed) if pair.query_id not in seen]
        return gather_evidence(links, self.taught, (), TEMPLATE.scale, REFINE.evidence)


def settings(system: str) -> dict[str, Any]:
    """What decides a row's figures, as far as it is set in this file."""
    found: dict[str, Any] = {
        "sizes": [NUM_GOLD_QUERIES, NUM_TAUGHT_QUERIES, NUM_IRRELEVANT, NUM_TEST_QUERIES],
        "template": TEMPLATE.version,
        "teacher": asdict(TEACHER),
    }
    if system != "teacher":
        found["student"] = asdict(STUDENT)
    if system == "ppo":
        found["refine"] = asdict(GENTLY)
    return found


def run_row(system: str, seed: int, work: Path) -> dict[str, Any]:
    """Train and measure one row; those before it have been."""
    world, test = TaughtWorld(seed, work), build("test", NUM_TEST_QUERIES, seed=1, domains=DOMAINS)
    out = work / f"{system}-{seed}"
    if system == "ppo":
        more = refined(world, work / f"distilled-{seed}", out, replace(GENTLY, seed=seed))
        seconds = more.pop("training_seconds")
    else:
        config = TEACHER if system == "teacher" else STUDENT
        lessons = world.taught if system == "distilled" else world.gold
        done = distill(
            lessons, world.queries, world.documents, TEMPLATE, out, replace(config, seed=seed), dev=world.dev
        )
        devs = [(step.step, step.dev_ndcg) for step in done.history if step.dev_ndcg is not None]
        more = {"best_step": done.best_step, "dev": devs, "num_examples": done.num_examples}
        seconds = done.history[-1].seconds
        if system == "distilled":
            right = [float(j.label == str(world.train.labels[j.query_id, j.doc_id])) for j in lessons]
            more["label_accuracy_of_lessons"] = fmean(right)
    more["seconds"] = round(seconds, 1)  # of all sittings, if it was killed in between
    generator = loaded(out)
    row = student_row(test, Reranker.of(TEMPLATE, generator), system, work / f"{system}-{seed}-test")
    return {**row.to_json(), "per_query": dict(row.per_query), "num_parameters": num_parameters(out), **more}


def num_parameters(checkpoint: Path) -> int:
    """As many as are saved; the engine holds some of them in other forms."""
    return load_model(checkpoint, torch.device("cpu"), torch.float32).num_parameters()


def summary() -> list[dict[str, Any]]:
    """Rows over seeds, and what students gain over the teacher, query by query."""
    rows = []
    for system in SYSTEMS:
        paths = [RESULTS / "larger-teacher" / f"{system}-{seed}.json" for seed in SEEDS]
        runs = {path.stem.rpartition("-")[2]: read_json(path) for path in paths if path.is_file()}
        if not runs:
            continue
        row: dict[str, Any] = {"system": system, "seeds": [run[MEASURE] for run in runs.values()]}
        row |= {MEASURE: fmean(row["seeds"]), "interval": bootstrap_interval(matrix(list(runs.values())))}
        for key in ("num_parameters", "label_accuracy", "tokens_per_document", "documents_per_second", "seconds"):
            row[key] = fmean(run[key] for run in runs.values())
        for over in ("teacher", "distilled"):
            others = {seed: RESULTS / "larger-teacher" / f"{over}-{seed}.json" for seed in runs}
            if system not in ("teacher", over) and all(path.is_file() for path in others.values()):
                gains = matrix(list(runs.values())) - matrix([read_json(path) for path in others.values()])
                row[f"over_{over}"] = {MEASURE: float(gains.mean()), "interval": bootstrap_interval(gains)}
        rows.append(row)
    return rows


def main(work: Path, seed: int, *, is_summary: bool) -> None:
    """Train and measure what is missing of one seed (unless only the summary is wanted), and sum up."""
    for system in () if is_summary else SYSTEMS:
        result = RESULTS / "larger-teacher" / f"{system}-{seed}.json"
        if not result.is_file():
            known = {"system": system, "seed": seed, "settings": settings(system)}
            figures = run_row(system, seed, work)
            write_result(result, {**provenance("python scripts/larger_teacher.py"), **known, **figures})
            sys.stdout.write(f"{system}-{seed}: {MEASURE} {figures[MEASURE]:.3f}, {figures['seconds']:.0f} s\n")
            sys.stdout.flush()
    write_result(RESULTS / "larger-teacher.json", {**provenance("python scripts/larger_teacher.py"), "rows": summary()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Can a student twenty times smaller do what it was taught, and more?")
    parser.add_argument("work", nargs="?", type=Path, default=ROOT / "out" / "larger-teacher", help="checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of texts, links and weights")
    parser.add_argument("--sum-up", action="store_true", help="train nothing: sum up what has been measured so far")
    chosen = parser.parse_args()
    main(chosen.work, chosen.seed, is_summary=chosen.sum_up)
