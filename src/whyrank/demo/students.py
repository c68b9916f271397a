"""Several students, trained side by side: one process per core finishes sooner than one student after the other on all
cores, because a network this small keeps a second thread waiting."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from statistics import fmean

from whyrank.datasets import read_corpus, read_queries
from whyrank.generators.hf.chat import ChatTokens
from whyrank.progress import Progress
from whyrank.records import Document, Judgment, Mode, Query
from whyrank.store import read_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig
from whyrank.training.distill import Distilled, Step, distill, student_tokenizer
from whyrank.training.examples import examples_of

__all__ = ["Plan", "steps_for_same_compute", "train_students"]

SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """One student: what it is called (and its folder), what it learns from, and how."""

    name: str
    judgments: Path
    config: DistillConfig


def train_students(
    plans: Sequence[Plan],
    data: Path,
    out: Path,
    template: Template,
    *,
    on_trained: Callable[[Plan, Distilled], None] = lambda plan, student: None,
) -> Mapping[str, Distilled]:
    """Train all students, as many at a time as there are cores, in the order of the plans.

    Students that a killed run has finished are not trained again; others continue from their last state.

    Args:
        plans: their names differ.
        data: folder with the queries and the corpus that all judgments are about.
        out: gets one checkpoint folder per student.
        template: what is taught.
        on_trained: called in this process as soon as a student is done, while others are still being trained.

    Returns:
        What training produced, by name.

    Raises:
        WhyrankError: see `distill`.
    """
    num_workers = min(os.cpu_count() or 1, len(plans))
    context = multiprocessing.get_context("spawn")
    steps: Queue[Step] = context.Queue()
    with (
        ProcessPoolExecutor(num_workers, mp_context=context, initializer=_report_to, initargs=(steps,)) as pool,
        Progress(f"training {len(plans)} students", sum(plan.config.num_steps for plan in plans)) as progress,
    ):
        waiting: dict[str, Future[Distilled]] = {}
        for plan in plans:
            # One thread each, however many plans there are: a student's own config must not depend on its company.
            alone = replace(plan, config=replace(plan.config, num_threads=1))
            waiting[plan.name] = pool.submit(_train, alone, data, out / plan.name, template.to_dict())
        try:
            _watch(plans, waiting, steps, progress, on_trained)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {name: student.result() for name, student in waiting.items()}


def _watch(
    plans: Sequence[Plan],
    waiting: Mapping[str, Future[Distilled]],
    steps: Queue[Step],
    progress: Progress,
    on_trained: Callable[[Plan, Distilled], None],
) -> None:
    """Count steps and report students until all are done."""
    reported: set[str] = set()
    while len(reported) < len(plans):
        try:
            steps.get(timeout=SECONDS_BETWEEN_LOOKS)
            progress.advance()
        except Empty:
            pass
        for plan in plans:
            if plan.name not in reported and waiting[plan.name].done():
                on_trained(plan, waiting[plan.name].result())
                reported.add(plan.name)


def steps_for_same_compute(
    judgments: Path, data: Path, template: Template, config: DistillConfig, mode: Mode = "direct"
) -> int:
    """How many steps of `mode`'s examples hold as many tokens as the `num_steps` of `config` do with its own modes."""
    taught, queries, documents = _read(judgments, data)
    tokens = ChatTokens(student_tokenizer(taught, queries, documents, template, config.tiny.vocab_size))

    def size(modes: Sequence[Mode]) -> float:
        return fmean(len(example.ids) for example in examples_of(taught, queries, documents, template, tokens, modes))

    return round(config.num_steps * size(config.modes) / size((mode,)))


_reports: list[Queue[Step]] = []  # in a worker: where its steps go


def _report_to(steps: Queue[Step]) -> None:
    _reports.append(steps)


def _train(plan: Plan, data: Path, out: Path, template: Mapping[str, object]) -> Distilled:
    """One student, in a process of its own."""
    judgments, queries, documents = _read(plan.judgments, data)
    taught = Template.from_dict(template, where=plan.name)
    parent = os.getppid()

    def on_step(step: Step) -> None:
        if os.getppid() != parent:  # it was killed, and another run may already be training this student
            os._exit(1)  # not an exception, which the pool would keep for a parent that is gone
        _reports[0].put(step)

    return distill(judgments, queries, documents, taught, out, plan.config, on_step=on_step)


def _read(judgments: Path, data: Path) -> tuple[list[Judgment], dict[str, Query], dict[str, Document]]:
    taught = list(read_jsonl(judgments, Judgment))
    queries = {query.query_id: query for query in read_queries(data / "queries.jsonl")}
    wanted = {judgment.doc_id for judgment in taught}
    documents = {doc.doc_id: doc for doc in read_corpus(data / "corpus.jsonl") if doc.doc_id in wanted}
    return taught, queries, documents
