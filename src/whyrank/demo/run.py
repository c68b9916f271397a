"""The demo, from data to report.

Both students see the same pairs and the same gold labels. The direct one has shorter examples, so it gets more
steps: as many as it takes to process the same number of tokens. The shipped model, which was trained in the same way
for longer, ranks the test split of all domains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import JsonValue
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from whyrank.almanac import Collection, build, domain_names
from whyrank.almanac.gold import gold_judgments
from whyrank.demo.config import RECIPE, DemoConfig
from whyrank.demo.examples import ExampleRanking, choose_examples
from whyrank.demo.recorded import Recorded, RecordedRow, read_recorded
from whyrank.demo.report import write_report
from whyrank.demo.students import Plan, steps_for_same_compute, train_students
from whyrank.demo.systems import MEASURE, Row, bm25_row, loaded, random_row, student_row
from whyrank.generators.opening import EMBEDDED_MODEL
from whyrank.records import Mode
from whyrank.rerank import Reranker
from whyrank.store import Manifest, atomic_path, write_jsonl
from whyrank.template import Template
from whyrank.training.distill import Distilled

__all__ = ["DemoOutcome", "run_demo"]

TEMPLATE = "almanac"
NUM_SHOWN = 3
MODES: tuple[Mode, Mode] = ("direct", "explain")


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """Everything the demo prints. `rows` are about the domains that the students learned, `full_rows` about all;
    `recorded` was measured before the release."""

    out: Path
    rows: tuple[Row, ...]
    full_rows: tuple[Row, ...]
    recorded: Recorded
    examples: tuple[ExampleRanking, ...]
    seconds: float

    def to_json(self) -> dict[str, JsonValue]:
        """As written to `results.json`: one row per system, and those of the full test set with their own baselines."""
        rows: list[JsonValue] = [{**row.to_json(), "test_set": "subset"} for row in self.rows]
        full: list[JsonValue] = [{**row.to_json(), "test_set": "full"} for row in self.full_rows]
        recorded: list[JsonValue] = [row.to_json() for row in self.recorded.rows]
        return {"rows": rows + full[-1:], "full_test_set": full, "recorded": recorded}

    def print(self, screen: Console) -> None:
        """The tables, one ranking with its reasons, and the way to the report."""
        screen.print(_table("the students, on the domains they learned", self.rows))
        screen.print(_table("the shipped model, on all domains", self.full_rows))
        screen.print(_table(f"recorded on {self.recorded.date}, not trained now: past the teacher", self.recorded.rows))
        example = self.examples[0]
        screen.print(Text(f"\nquery: {example.query}", style="bold"))
        for result in example.ranking[:NUM_SHOWN]:
            label, gold = result.label, example.gold[result.id]
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
    train = build("train", config.num_train_queries, seed=config.seed, domains=config.domains)
    test = build("test", config.num_queries, seed=config.seed, domains=config.domains)
    full = build("test", config.num_shipped_queries, seed=config.seed)
    for collection, name in ((train, "train"), (test, "test"), (full, "full-test")):
        collection.write(out / "data" / name)
    template = Template.load(TEMPLATE)
    curves = _students(out, train, template, config)
    students = {mode: _reranker(out / "students" / mode, mode, template) for mode in MODES}
    rows = [random_row(test, config.seed), bm25_row(test)]
    rows += [student_row(test, reranker, mode, out / mode) for mode, reranker in students.items()]
    shipped = student_row(full, _reranker(EMBEDDED_MODEL, "explain", template), "shipped", out / "shipped")
    full_rows = (random_row(full, config.seed), bm25_row(full), shipped)
    outcome = DemoOutcome(
        out=out,
        rows=tuple(rows),
        full_rows=full_rows,
        recorded=read_recorded(),
        examples=choose_examples(test, rows[-1], students["explain"], out / "explain"),
        seconds=round(time.perf_counter() - start, 1),
    )
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(json.dumps(outcome.to_json(), indent=2) + "\n", encoding="utf-8")
    facts = _facts(config, train, full, curves, outcome)
    write_report(out / "report.html", rows, full_rows, outcome.recorded, curves, outcome.examples, facts)
    manifest = Manifest("demo", {**asdict(config), "domains": list(config.domains)}, seed=config.seed)
    counts = {"train_pairs": curves["explain"].num_examples, "test_pairs": len(test.labels) + len(full.labels)}
    manifest.finished(start, counts=counts).write(out)
    return outcome


def _students(out: Path, train: Collection, template: Template, config: DemoConfig) -> Mapping[Mode, Distilled]:
    """The direct and the explaining student, with the same number of tokens each."""
    data = out / "data" / "train"
    gold = data / "judgments.jsonl"
    write_jsonl(gold, gold_judgments(train, template, num_irrelevant=config.num_irrelevant, seed=config.seed))
    explain = replace(RECIPE, modes=("explain",), num_steps=config.num_steps, seed=config.seed)
    num_steps = steps_for_same_compute(gold, data, template, explain)
    direct = replace(RECIPE, modes=("direct",), num_steps=num_steps, seed=config.seed)
    trained = train_students(
        [Plan("explain", gold, explain), Plan("direct", gold, direct)], data, out / "students", template
    )
    return {mode: trained[mode] for mode in MODES}


def _reranker(model: Path, mode: Mode, template: Template) -> Reranker:
    return Reranker.of(template, loaded(model), mode=mode)


def _facts(
    config: DemoConfig, train: Collection, full: Collection, curves: Mapping[Mode, Distilled], outcome: DemoOutcome
) -> dict[str, str]:
    explain, direct = curves["explain"], curves["direct"]
    tokens = [sum(step.num_tokens for step in student.history) for student in (explain, direct)]
    return {
        "Data": f"{len(config.domains)} domains of the almanac ({', '.join(config.domains)}); {explain.num_examples} "
        f"training pairs from {len(train.queries)} queries, {config.num_queries} test queries with 24 candidates each; "
        "no combination of observations and setting is in both.",
        "Students": f"Llama with {explain.num_parameters:,} parameters, from scratch; explain {len(explain.history)} "
        f"steps and {tokens[0]:,} tokens, direct {len(direct.history)} steps and {tokens[1]:,} tokens.",
        "Shipped model": f"ranked {len(full.queries)} test queries of all {len(domain_names())} domains.",
        "Time": f"{outcome.seconds:.0f} s in all; training took {explain.history[-1].seconds:.0f} s for the "
        f"explaining and {direct.history[-1].seconds:.0f} s for the direct student, side by side.",
        "Past the teacher": f"recorded by {outcome.recorded.command} on {outcome.recorded.date}, not trained now.",
        "What it is not": "The almanac is a model organism; these figures say nothing about quality on real text.",
    }


def _table(title: str, rows: Sequence[Row | RecordedRow]) -> Table:
    table = Table("system", title=title, title_justify="left")
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
