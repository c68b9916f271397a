"""Both students, trained side by side: two processes with half of the cores each finish sooner than one after the
other with all of them, because a network this small keeps a second thread waiting."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from statistics import fmean

from whyrank.datasets import read_corpus, read_queries
from whyrank.demo.config import DemoConfig
from whyrank.generators.hf.chat import ChatTokens
from whyrank.progress import Progress
from whyrank.records import Document, Judgment, Mode, Query
from whyrank.store import read_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig
from whyrank.training.distill import Distilled, Step, distill, student_tokenizer
from whyrank.training.examples import examples_of

__all__ = ["MODES", "train_students"]

MODES: tuple[Mode, Mode] = ("explain", "direct")
SECONDS_BETWEEN_LOOKS = 0.5
BASE = DistillConfig(device="cpu")


def train_students(data: Path, out: Path, template: Template, config: DemoConfig) -> Mapping[Mode, Distilled]:
    """Train the explaining and the direct student on `data`, with the same number of tokens each.

    Students that a killed demo has finished are not trained again; others continue from their last state.

    Args:
        data: folder with judgments, queries and corpus.
        out: gets one checkpoint folder per mode.
        template: what is taught.
        config: number of steps of the explaining student, and the seed.

    Raises:
        WhyrankError: see `distill`.
    """
    num_steps = {"explain": config.num_steps, "direct": _steps_for_same_compute(data, template, config)}
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(len(MODES), mp_context=context) as pool,
        Progress("training both students", sum(num_steps.values())) as progress,
    ):
        steps: Queue[Step] = manager.Queue()
        students: dict[Mode, Future[Distilled]] = {
            mode: pool.submit(_train, data, out / mode, template.to_dict(), mode, num_steps[mode], config.seed, steps)
            for mode in MODES
        }
        while not all(student.done() for student in students.values()) or not steps.empty():
            try:
                steps.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                continue
            progress.advance()
        return {mode: student.result() for mode, student in students.items()}


def _train(
    data: Path,
    out: Path,
    template: Mapping[str, object],
    mode: Mode,
    num_steps: int,
    seed: int,
    steps: Queue[Step],
) -> Distilled:
    """One student, in a process of its own."""
    judgments, queries, documents = _read(data)
    num_threads = max(1, (os.cpu_count() or 1) // len(MODES))
    settings = replace(BASE, modes=(mode,), num_steps=num_steps, seed=seed, num_threads=num_threads)
    taught = Template.from_dict(template, where="the demo")
    return distill(judgments, queries, documents, taught, out, settings, on_step=steps.put)


def _read(data: Path) -> tuple[list[Judgment], dict[str, Query], dict[str, Document]]:
    judgments = list(read_jsonl(data / "judgments.jsonl", Judgment))
    queries = {query.query_id: query for query in read_queries(data / "queries.jsonl")}
    wanted = {judgment.doc_id for judgment in judgments}
    documents = {doc.doc_id: doc for doc in read_corpus(data / "corpus.jsonl") if doc.doc_id in wanted}
    return judgments, queries, documents


def _steps_for_same_compute(data: Path, template: Template, config: DemoConfig) -> int:
    """How many steps of direct examples hold as many tokens as the explaining student's."""
    judgments, queries, documents = _read(data)
    tokens = ChatTokens(student_tokenizer(judgments, queries, documents, template, BASE.tiny.vocab_size))
    sizes = {
        mode: fmean(
            len(example.ids) for example in examples_of(judgments, queries, documents, template, tokens, (mode,))
        )
        for mode in MODES
    }
    return round(config.num_steps * sizes["explain"] / sizes["direct"])
