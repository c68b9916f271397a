"""Do distillation and refinement beat an erring teacher? The table, on three domains of the almanac.

    python scripts/refining_table.py [WORK_FOLDER] [--workers N]     train what is missing, measure, sum up
    python scripts/refining_table.py --sum-up                        sum up what has been measured so far

A teacher that errs systematically, links of which one in ten leads astray, and students of one network, three seeds; a
seed changes the teacher's mistakes, texts, links and weights, but not the test queries. Every student's figures are
written to results/refining/ as soon as it is measured; students whose figures are there, made with the same settings,
are not trained again. results/refining.json sums them up; the demo shows a copy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
from provenance import RESULTS, ROOT, provenance, write_result

from whyrank.almanac import Collection, build
from whyrank.almanac.links import LinksConfig, answer_links
from whyrank.almanac.teacher import TeacherConfig, teacher_judgments
from whyrank.demo.config import RECIPE, DemoConfig
from whyrank.demo.recorded import RECORDED_NAME
from whyrank.demo.systems import MEASURE, bootstrap_interval, candidates_of, loaded, per_query, student_row
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_tokenizer
from whyrank.records import Judgment, Query
from whyrank.rerank import Reranker
from whyrank.store import read_json
from whyrank.template import Template
from whyrank.training.config import DistillConfig
from whyrank.training.curriculum import choose
from whyrank.training.distill import distill
from whyrank.training.drawing import draw
from whyrank.training.evidence import gather_evidence
from whyrank.training.examples import examples_of
from whyrank.training.refine import RefineData, refine
from whyrank.training.refine_config import RefineConfig
from whyrank.training.rollouts import Evidence
from whyrank.training.validation import DevSet

TEMPLATE = Template.load("almanac")
DOMAINS = DemoConfig().domains
NUM_TRAIN_QUERIES, NUM_DEV_QUERIES, NUM_TEST_QUERIES, NUM_IRRELEVANT, NUM_REPLAYED = 2000, 100, 144, 5, 2000
LEVELS = {
    "default": TeacherConfig(),
    "low": TeacherConfig(overlap=0.45, unquoted=0.1, confusion=0.05, setting=0.05),
    "high": TeacherConfig(overlap=1.0, unquoted=0.4, confusion=0.2, setting=0.2),
}
SEEDS = (0, 1, 2)
DISTILL = replace(RECIPE, num_steps=600, eval_every=100, num_threads=1)
# As many answers are learned from as refinement draws.
AFTERWARDS = replace(DISTILL, num_steps=200, learning_rate=2e-3, num_warmup_steps=10, decay_fraction=1.0, eval_every=40)
REFINE = RefineConfig(
    num_steps=100,
    num_queries=4,
    num_candidates=8,
    num_samples=4,
    temperature=1.2,
    num_epochs=1,
    minibatch_size=8,
    microbatch_size=8,
    learning_rate=3e-4,
    num_value_steps=1,
    dev_every=20,
    device="cpu",
    num_threads=1,
)
REFINEMENTS = {
    "ppo": REFINE,
    "grpo": replace(REFINE, algorithm="grpo"),
    "rwl": replace(REFINE, algorithm="rwl"),
    "ppo-with-ranking-gain": replace(REFINE, rewards=("agreement=1", "ranking_gain=1")),
}
SYSTEMS = ("teacher", "distilled", "ppo", "grpo", "supervised", "rejection", "rwl", "ppo-with-ranking-gain")
NUM_FIRST = 4
AT_OTHER_LEVELS = ("teacher", "distilled", "ppo")
PairIds = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Job:
    """One row of one seed."""

    system: str
    level: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.system}-{self.level}-{self.seed}"

    @property
    def parent(self) -> Job | None:
        """The student that has to be there before."""
        return None if self.system in ("teacher", "distilled") else Job("distilled", self.level, self.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the figures, as far as it is set in this file."""
        found: dict[str, Any] = {
            "sizes": [*DOMAINS, NUM_TRAIN_QUERIES, NUM_DEV_QUERIES, NUM_TEST_QUERIES, NUM_IRRELEVANT, NUM_REPLAYED],
            "template": TEMPLATE.version,
            "teacher": asdict(LEVELS[self.level]),
            "links": asdict(LinksConfig()),
        }
        if self.system != "teacher":
            found["distill"] = asdict(DISTILL)
        if self.parent is not None:
            found["refine"] = asdict(REFINEMENTS.get(self.system, REFINE))
        if self.system in ("supervised", "rejection"):
            found["afterwards"] = asdict(AFTERWARDS)
        plain: dict[str, Any] = _as_json(found)
        return plain

    @property
    def result(self) -> Path:
        """Where its figures are."""
        return RESULTS / "refining" / f"{self.name}.json"

    @property
    def is_measured(self) -> bool:
        """Whether figures are there, made with the same settings; one that came later had its default value."""
        if not self.result.is_file():
            return False
        known = read_json(self.result)["settings"]
        return {key: {**DEFAULTS[key], **value} if key in DEFAULTS else value for key, value in known.items()} == (
            self.settings
        )


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


DEFAULTS = {
    "distill": _as_json(asdict(DistillConfig())),
    "afterwards": _as_json(asdict(DistillConfig())),
    "refine": _as_json(asdict(RefineConfig())),
}


def all_jobs() -> list[Job]:
    """Whole rows first: what matters most for every seed, then the rest of them, then other levels of noise."""
    order = [Job(system, "default", seed) for seed in SEEDS for system in SYSTEMS[:NUM_FIRST]]
    order += [Job(system, "default", seed) for seed in SEEDS for system in SYSTEMS[NUM_FIRST:]]
    return order + [Job(system, level, SEEDS[0]) for level in ("low", "high") for system in AT_OTHER_LEVELS]


class World:
    """What a teacher of one level and seed leaves behind: texts, its judgments, links, and what follows from them."""

    def __init__(self, level: str, seed: int) -> None:
        self.seed = seed
        self.teacher = replace(LEVELS[level], seed=seed)
        self.train = build("train", NUM_TRAIN_QUERIES, seed=seed, domains=DOMAINS)
        self.queries: Mapping[str, Query] = {query.query_id: query for query in self.train.queries}
        self.documents = {document.doc_id: document for document in self.train.documents}

    @cached_property
    def taught(self) -> list[Judgment]:
        """What students are distilled from."""
        return list(
            teacher_judgments(self.train, TEMPLATE, self.teacher, num_irrelevant=NUM_IRRELEVANT, seed=self.seed)
        )

    @cached_property
    def evidence(self) -> Mapping[PairIds, tuple[Evidence, ...]]:
        """Links and the teacher's judgments of all candidates, with the default trusts."""
        judgments = teacher_judgments(self.train, TEMPLATE, self.teacher)
        links = answer_links(self.train, LinksConfig(), self.seed)
        return gather_evidence(links, judgments, (), TEMPLATE.scale, REFINE.evidence)

    @cached_property
    def dev(self) -> DevSet:
        """Ranked on the way, by students of all kinds."""
        found = build("dev", NUM_DEV_QUERIES, seed=self.seed, domains=DOMAINS)
        candidates = candidates_of(found)
        return DevSet(tuple(candidates.queries), candidates.documents, candidates.run, found.qrels)

    def label_by_evidence(self, ids: PairIds) -> str:
        """The label nearest to the mean of what is believed of a pair, weighted by trust."""
        found = self.evidence[ids]
        believed = sum(item.trust * item.value for item in found) / sum(item.trust for item in found)
        return TEMPLATE.scale.label_of(min(TEMPLATE.scale.values, key=lambda value: abs(value - believed)))


# ---- training --------------------------------------------------------------------------------------------------


def run_job(job: Job, work: Path) -> dict[str, Any]:
    """Train and measure one row, in a process of its own."""
    world, test = World(job.level, job.seed), build("test", NUM_TEST_QUERIES, seed=1, domains=DOMAINS)
    if job.system == "teacher":
        return teacher_figures(world, test)
    out, parent = work / job.name, work / Job("distilled", job.level, job.seed).name
    start = time.perf_counter()
    if job.system in REFINEMENTS:
        more = refined(world, parent, out, replace(REFINEMENTS[job.system], seed=job.seed))
    else:
        judgments, config = lessons(job.system, world, parent)
        done = distill(
            judgments, world.queries, world.documents, TEMPLATE, out, replace(config, seed=job.seed), dev=world.dev
        )
        devs = [(step.step, step.dev_ndcg) for step in done.history if step.dev_ndcg is not None]
        more = {"best_step": done.best_step, "dev": devs, "num_examples": done.num_examples}
    more["seconds"] = round(time.perf_counter() - start, 1)
    row = student_row(test, Reranker.of(TEMPLATE, loaded(out)), job.system, work / f"{job.name}-test")
    return {**row.to_json(), "per_query": dict(row.per_query), **more}


def lessons(system: str, world: World, parent: Path) -> tuple[list[Judgment], DistillConfig]:
    """What a student that is not refined learns from, and how."""
    if system == "distilled":
        return world.taught, DISTILL
    config = replace(AFTERWARDS, model=str(parent))
    if system == "rejection":
        return list(agreeing_answers(world, parent)), config
    told = ((judgment, world.label_by_evidence((judgment.query_id, judgment.doc_id))) for judgment in world.taught)
    return [relabelled(judgment, label) for judgment, label in told], config


def agreeing_answers(world: World, parent: Path) -> Iterator[Judgment]:
    """As many answers as refinement draws, about pairs chosen in the same way; those whose label is that of the
    evidence."""
    generator, teacher = loaded(parent), {(j.query_id, j.doc_id): j for j in world.taught}
    some = next(iter(teacher.values()))
    for number in range(REFINE.num_steps):
        sizes = {"num_queries": REFINE.num_queries, "num_candidates": REFINE.num_candidates}
        ids = choose(world.evidence, {}, **sizes, strength=0.0, rng=Random(f"{world.seed}/{number}"))
        chosen = [
            (world.queries[query_id], [world.documents[doc_id] for doc_id in doc_ids]) for query_id, doc_ids in ids
        ]
        drawn = draw(
            generator,
            TEMPLATE,
            chosen,
            world.evidence,
            num_samples=REFINE.num_samples,
            temperature=REFINE.temperature,
            seed=f"{world.seed}/{number}",
        )
        for group in drawn.groups:
            for candidate, rollout in group.pairs:
                pair = group.query_id, candidate.doc_id
                if rollout.is_as_asked and rollout.label == world.label_by_evidence(pair):
                    answer = replace(some, query_id=pair[0], doc_id=pair[1], explanation=rollout.explanation)
                    yield relabelled(answer, rollout.label)


def relabelled(judgment: Judgment, label: str) -> Judgment:
    """The same explanation, with another label."""
    place = TEMPLATE.scale.labels.index(label)
    probs = tuple(float(other == place) for other in range(len(TEMPLATE.scale.labels)))
    return replace(judgment, label=label, score=TEMPLATE.scale.values[place], probs=probs)


def refined(world: World, parent: Path, out: Path, config: RefineConfig) -> dict[str, Any]:
    """Refine the distilled student."""
    replayed = Random(world.seed).sample(world.taught, NUM_REPLAYED)
    tokens = ChatTokens(load_tokenizer(parent))
    replay = list(examples_of(replayed, world.queries, world.documents, TEMPLATE, tokens))
    data = RefineData(world.evidence, world.queries, world.documents, replay, world.dev)
    done = refine(parent, data, TEMPLATE, out, config)
    return {
        "best_step": done.best_step,
        "dev": [(0, done.first_dev), *((step.step, step.dev) for step in done.history if step.dev is not None)],
        "alarm": done.alarm,
        "num_rollouts": sum(step.num_rollouts for step in done.history),
        "kl": done.history[-1].kl,
        "training_seconds": done.history[-1].seconds,
    }


# ---- measuring -------------------------------------------------------------------------------------------------


def teacher_figures(world: World, test: Collection) -> dict[str, Any]:
    """The teacher on the test queries; equal labels keep the order of the candidates."""
    scores = {(j.query_id, j.doc_id): j.score or 0.0 for j in teacher_judgments(test, TEMPLATE, world.teacher)}

    def ranked(query: Query) -> list[str]:
        return sorted(test.candidates[query.query_id], key=lambda doc_id: -scores[query.query_id, doc_id])

    values = per_query(test, ranked)
    accuracy = fmean(scores[pair] == label for pair, label in test.labels.items())
    on_train = fmean(float(j.score == world.train.labels[j.query_id, j.doc_id]) for j in world.taught)
    interval = list(bootstrap_interval(list(values.values())))
    found = {MEASURE: fmean(values.values()), f"{MEASURE}_interval": interval, "label_accuracy": accuracy}
    return {**found, "label_accuracy_of_lessons": on_train, "per_query": values}


def summary() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows over seeds, and what refined students gain over teacher and parent, query by query."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in all_jobs():
        if job.is_measured:
            found.setdefault((job.level, job.system), []).append({**read_json(job.result), "seed": job.seed})
    rows, gains = [], []
    for (level, system), runs in found.items():
        row: dict[str, Any] = {"teacher_noise": level, "system": system, "seeds": [run[MEASURE] for run in runs]}
        row |= {MEASURE: fmean(row["seeds"]), "interval": bootstrap_interval(matrix(runs))}
        for key in ("label_accuracy", "tokens_per_document", "seconds"):
            row[key] = fmean(run[key] for run in runs) if all(key in run for run in runs) else None
        rows.append(row)
        for over in ("teacher", "distilled"):
            others = {run["seed"]: run for run in found.get((level, over), [])}
            paired = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
            if paired and system not in ("teacher", over):
                differences = matrix([run for run, _ in paired]) - matrix([other for _, other in paired])
                gain = {MEASURE: float(differences.mean()), "interval": bootstrap_interval(differences)}
                gains.append({"teacher_noise": level, "system": system, "over": over, "runs": len(paired), **gain})
    return rows, gains


def matrix(runs: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Figures as `(runs, queries)`."""
    return np.array([[run["per_query"][query_id] for query_id in sorted(runs[0]["per_query"])] for run in runs])


# ---- all of it -------------------------------------------------------------------------------------------------


def main(work: Path, num_workers: int, *, is_summary: bool) -> None:
    """Train what is missing (unless only the summary is wanted), measure it, and sum up."""
    missing = [job for job in all_jobs() if not job.is_measured and not is_summary]
    sys.stdout.write(f"{len(missing)} of {len(all_jobs())} rows are to be measured, {num_workers} at a time\n")
    train_all(missing, work, num_workers)
    rows, gains = summary()
    kept = {**provenance("make refining"), "rows": rows, "gains": gains}
    for path in (RESULTS / "refining.json", ROOT / "src" / "whyrank" / "demo" / RECORDED_NAME):
        write_result(path, kept)


def train_all(waiting: list[Job], work: Path, num_workers: int) -> None:
    """Several at a time, each when its parent is there. A distilled student whose figures are known but whose weights
    are gone is trained again first."""
    gone = {
        job.parent: None for job in waiting if job.parent and not (work / job.parent.name / "whyrank.json").is_file()
    }
    waiting = [*(job for job in gone if job not in waiting), *waiting]
    running: dict[Future[dict[str, Any]], Job] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        while waiting or running:
            busy = {*waiting, *running.values()}
            for job in [job for job in waiting if job.parent not in busy][: num_workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job, work)] = job
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                figures = done.result()
                known = {"system": job.system, "teacher_noise": job.level, "seed": job.seed, "settings": job.settings}
                write_result(job.result, {**provenance("make refining"), **known, **figures})
                sys.stdout.write(f"{job.name}: {MEASURE} {figures[MEASURE]:.3f}, {figures.get('seconds', 0):.0f} s\n")
                sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Do distillation and refinement beat an erring teacher?")
    parser.add_argument("work", nargs="?", type=Path, default=ROOT / "out" / "refining", help="checkpoints")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="rows at a time")
    parser.add_argument("--sum-up", action="store_true", help="train nothing: sum up what has been measured so far")
    chosen = parser.parse_args()
    main(chosen.work, chosen.workers, is_summary=chosen.sum_up)
