"""The demo, from data to report.

Both students see the same pairs and the same gold labels. The direct one has shorter examples, so it gets more
steps: as many as it takes to process the same number of tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from whyrank.almanac import Collection, build
from whyrank.almanac.gold import gold_judgments
from whyrank.demo.config import DemoConfig
from whyrank.demo.report import write_report
from whyrank.demo.students import train_students
from whyrank.demo.systems import MEASURE, Row, bm25_row, candidates_of, random_row, student_row
from whyrank.generators.hf import HfGenerator
from whyrank.records import Judgment, Mode
from whyrank.rerank import Ranking, Reranker
from whyrank.store import Manifest, atomic_path, read_jsonl, write_jsonl
from whyrank.template import Template
from whyrank.training.distill import Distilled

__all__ = ["DemoOutcome", "run_demo"]

TEMPLATE = "almanac"
NUM_SHOWN = 5
RANKING_BATCH = 48


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """Everything the demo prints: figures by system, one ranking with the query it answers, and where the files are."""

    out: Path
    rows: tuple[Row, ...]
    query: str
    example: Ranking
    gold: Mapping[str, int]
    seconds: float

    def to_json(self) -> dict[str, JsonValue]:
        """As written to `results.json`."""
        return {"rows": [row.to_json() for row in self.rows]}

    def print(self, screen: Console) -> None:
        """The table, one ranking with its reasons, and the way to the report."""
        screen.print(_table(self.rows))
        screen.print(Text(f"\nquery: {self.query}", style="bold"))
        for result in self.example[:NUM_SHOWN]:
            label, gold = result.label, self.gold[result.id]
            screen.print(Text(f"\n{result.rank}. {result.passage}"))
            screen.print(Padding(Text(f"why: {result.explanation}", style="italic"), (0, 0, 0, 3)), soft_wrap=False)
            score = "none" if result.score is None else f"{result.score:.3f}"
            verdict = Text(f"score {score}, label {label}, gold label {gold}", style="dim")
            screen.print(Padding(verdict, (0, 0, 0, 3)), soft_wrap=False)
        screen.print(f"\nreport: {self.out / 'report.html'} ({self.seconds:.0f} s in all)")


def run_demo(out: Path, config: DemoConfig) -> DemoOutcome:
    """Build data, train both students, rank, measure, and write everything into `out`.

    A demo that was killed continues where its students last saved their states.

    Raises:
        WhyrankError: a stage failed.
    """
    start = time.perf_counter()
    domains = config.domains
    train = build("train", config.num_train_queries, seed=config.seed, domains=domains)
    test = build("test", config.num_queries, seed=config.seed, domains=domains)
    train.write(out / "data" / "train")
    test.write(out / "data" / "test")
    template = Template.load(TEMPLATE)
    gold = out / "data" / "train" / "judgments.jsonl"
    write_jsonl(gold, gold_judgments(train, template, num_irrelevant=config.num_irrelevant, seed=config.seed))
    curves = train_students(out / "data" / "train", out / "students", template, config)
    rows = [random_row(test, config.seed), bm25_row(test)]
    students = {mode: _student(out, mode, template) for mode in ("direct", "explain")}
    rows += [student_row(test, reranker, mode, out / mode) for mode, reranker in students.items()]
    example = _example(test, students["explain"], out / "explain")
    outcome = DemoOutcome(
        out=out,
        rows=tuple(rows),
        query=next(query.text for query in test.queries if query.query_id == example.query_id),
        example=example,
        gold={result.id: test.labels[example.query_id, result.id] for result in example},
        seconds=round(time.perf_counter() - start, 1),
    )
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(json.dumps(outcome.to_json(), indent=2) + "\n", encoding="utf-8")
    write_report(out / "report.html", outcome.rows, curves, example, test, _facts(config, train, test, curves, outcome))
    manifest = Manifest("demo", {**asdict(config), "domains": list(config.domains)}, seed=config.seed)
    manifest.finished(
        start, counts={"train_pairs": curves["explain"].num_examples, "test_pairs": len(test.labels)}
    ).write(out)
    return outcome


def _student(out: Path, mode: Mode, template: Template) -> Reranker:
    generator = HfGenerator.load(
        out / "students" / mode, device="cpu", dtype="float32", batch_size=RANKING_BATCH, name=f"demo-{mode}"
    )
    return Reranker.of(template, generator, mode=mode)


def _example(test: Collection, reranker: Reranker, folder: Path) -> Ranking:
    """The first test query's ranking, from the judgments on disk."""
    candidates = candidates_of(test)
    query = test.queries[0]
    judgments = {j.doc_id: j for j in read_jsonl(folder / "judgments.jsonl", Judgment) if j.query_id == query.query_id}
    return reranker.arrange(query, candidates.documents, candidates.run[query.query_id], judgments)


def _facts(
    config: DemoConfig, train: Collection, test: Collection, curves: Mapping[Mode, Distilled], outcome: DemoOutcome
) -> dict[str, str]:
    explain, direct = curves["explain"], curves["direct"]
    tokens = [sum(step.num_tokens for step in student.history) for student in (explain, direct)]
    return {
        "Data": f"{len(config.domains)} domains of the almanac ({', '.join(config.domains)}); {explain.num_examples} "
        f"training pairs from {len(train.queries)} queries, {len(test.queries)} test queries with 24 candidates each; "
        "no combination of observations and setting is in both.",
        "Students": f"Llama with {explain.num_parameters:,} parameters, from scratch; explain {len(explain.history)} "
        f"steps and {tokens[0]:,} tokens, direct {len(direct.history)} steps and {tokens[1]:,} tokens.",
        "Time": f"{outcome.seconds:.0f} s in all; training took {explain.history[-1].seconds:.0f} s for the "
        f"explaining and {direct.history[-1].seconds:.0f} s for the direct student.",
        "What it is not": "The almanac is a model organism; these figures say nothing about quality on real text.",
    }


def _table(rows: Sequence[Row]) -> Table:
    table = Table("system")
    for column in (MEASURE, "95 % interval", "accuracy", "tokens/doc", "docs/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.system,
            f"{row.ndcg:.3f}",
            f"{row.interval[0]:.3f}–{row.interval[1]:.3f}",
            "-" if row.label_accuracy is None else f"{row.label_accuracy:.3f}",
            f"{row.tokens_per_document:.1f}",
            "-" if row.documents_per_second is None else f"{row.documents_per_second:.0f}",
        )
    return table
