"""How good a run is: measures by ir_measures, per query and on average.

Tools that read scores order ties in their own ways: trec_eval by descending document id, after rounding to 32-bit
floats. So do we unless told otherwise, because published figures are made so; `ties="rank"` measures the order that
the run itself gives. Runs that whyrank writes have no ties.

Averages run over the queries of the qrels: one that the run lacks counts as the measure's default, which is 0
almost everywhere. Queries that the run has and the qrels lack are counted and left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast, get_args

import ir_measures
from pydantic import JsonValue
from rich.table import Table

from whyrank.datasets.runs import Run
from whyrank.errors import InputError, TooManyUnparsed
from whyrank.records import JUDGED_STATUSES, Judgment, Qrel
from whyrank.store import read_json, read_jsonl

__all__ = [
    "Evaluation",
    "RunResult",
    "Ties",
    "evaluate",
    "judgments_beside",
    "parse_measures",
    "table",
    "unparsed_rate",
]

RERANKED_NAMES = ("run.trec", "run.json")  # what `stages.rerank` writes beside its judgments
LARGEST = 2**31 - 1  # of trec_eval's integers
Ties = Literal["rank", "trec_eval"]
"""How equal scores are ordered: as the run has them, or by the rules of trec_eval."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What one run reached.

    `num_queries` are the queries of the qrels, over which `values` are averaged; `num_missing` of them have no
    document in the run. `num_without_qrels` queries of the run are in no qrels. `per_query` maps measure to query id to
    value. `unparsed_rate` is the share of judgments beside the run that carry no label, `None` where there are none.
    """

    name: str
    num_queries: int
    num_missing: int
    num_without_qrels: int
    values: Mapping[str, float]
    per_query: Mapping[str, Mapping[str, float]]
    unparsed_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Runs against measures, both in the order in which they were given."""

    measures: tuple[str, ...]
    runs: tuple[RunResult, ...]

    def to_json(self, *, per_query: bool = False) -> dict[str, JsonValue]:
        """Plain values at full precision; with `per_query` also every query's values."""
        return {"measures": list(self.measures), "runs": [_run_to_json(run, per_query) for run in self.runs]}


def _run_to_json(run: RunResult, per_query: bool) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {
        "name": run.name,
        "queries": run.num_queries,
        "missing": run.num_missing,
        "without_qrels": run.num_without_qrels,
        "values": dict(run.values),
        "unparsed_rate": run.unparsed_rate,
    }
    if per_query:
        found["per_query"] = {measure: dict(values) for measure, values in run.per_query.items()}
    return found


def evaluate(
    qrels: Iterable[Qrel],
    runs: Mapping[str, Run],
    measures: Sequence[str],
    *,
    allow_unparsed: float = 0.01,
    judgments: Mapping[str, Path] | None = None,
    ties: Ties = "trec_eval",
) -> Evaluation:
    """Measure every run against the qrels.

    `measures` are names that ir_measures knows, such as `nDCG@10` or `RR(rel=2)`; results are keyed by its own
    spelling of them. `judgments` maps names of runs to their `judgments.jsonl` (see `judgments_beside`);
    `allow_unparsed` is the share, from 0 to 1, of judgments without a label up to which a run is measured.

    Raises:
        InputError: measures cannot be read or computed (all of them are named), there are no qrels or runs, a pair
            is judged twice, a run is out of order, or a run has no query in common with the qrels.
        TooManyUnparsed: a run's judgments lack more labels than allowed.
    """
    if ties not in get_args(Ties):
        raise InputError(f"expected ties among {', '.join(get_args(Ties))}, found {ties!r}")
    if not 0 <= allow_unparsed <= 1:
        raise InputError(f"expected allow_unparsed from 0 to 1, found {allow_unparsed}")
    if not runs:
        raise InputError("expected at least one run to evaluate, found none")
    judgments = judgments or {}
    strangers = sorted(set(judgments) - set(runs))
    if strangers:
        raise InputError(f"expected judgments of the runs {', '.join(runs)}, found judgments of {', '.join(strangers)}")
    parsed = parse_measures(measures)
    relevance = _relevance(qrels)
    rates = {name: _allowed_rate(name, path, allow_unparsed) for name, path in judgments.items()}
    evaluator = ir_measures.evaluator(parsed, relevance)
    results = [
        _evaluate_one(name, run, parsed, relevance, evaluator, ties, rates.get(name)) for name, run in runs.items()
    ]
    return Evaluation(tuple(map(str, parsed)), tuple(results))


def parse_measures(names: Sequence[str]) -> list[Any]:
    """The measures of ir_measures, each once, in order.

    Raises:
        InputError: there are none, or some cannot be read or computed here; the message names every one of them.
    """
    if not names:
        raise InputError("expected at least one measure, such as nDCG@10, found none")
    found: dict[str, Any] = {}
    problems: list[str] = []
    for name in names:
        try:
            measure = _parse_measure(name)
        except (ValueError, AssertionError) as cause:
            problems.append(f"{name!r}: {cause}")
        else:
            found[str(measure)] = measure
    if problems:
        raise InputError("expected measures like nDCG@10, RR@10, R@100 or P(rel=2)@5, found " + "; ".join(problems))
    return list(found.values())


def _parse_measure(name: str) -> Any:
    """`Name(key=value, ...)@cutoff`.

    ir_measures has this parser too, on top of parts of `ast` that Python 3.12 deprecates and 3.14 no longer has.
    """
    try:
        tree = ast.parse(name.strip(), mode="eval").body
    except SyntaxError as cause:
        raise InputError(f"not of the form Name(key=value)@cutoff ({cause.msg})") from cause
    parameters: dict[str, object] = {}
    node, cutoff = tree, None
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.MatMult):
        node, cutoff = tree.left, tree.right
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise InputError("parameters must be named")
        parameters = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        node = node.func
    if not isinstance(node, ast.Name):
        raise InputError("not of the form Name(key=value)@cutoff")
    kind = ir_measures.measures.registry.get(node.id)
    if kind is None:
        raise InputError(f"ir_measures knows no measure {node.id}")
    if cutoff is not None:
        parameters[kind.AT_PARAM] = ast.literal_eval(cutoff)
    for parameter, value in parameters.items():
        _check_range(parameter, value)
    measure = kind(**parameters)
    measure.validate_params()
    pipeline: Any = ir_measures.DefaultPipeline
    if not pipeline.supports(measure):
        raise InputError("no installed provider of ir_measures computes it")
    return measure


def _check_range(parameter: str, value: object) -> None:
    """Refuse what would make trec_eval abort the whole process, or fail late."""
    if parameter in ("cutoff", "rel") and not (type(value) is int and 1 <= value <= LARGEST):
        raise InputError(f"expected a whole number from 1 as {parameter}, found {value!r}")
    if parameter == "recall" and not (type(value) in (int, float) and 0 <= cast(float, value) <= 1):
        raise InputError(f"expected a number from 0 to 1 as recall, found {value!r}")


def _relevance(qrels: Iterable[Qrel]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for qrel in qrels:
        documents = found.setdefault(qrel.query_id, {})
        if documents.setdefault(qrel.doc_id, qrel.relevance) != qrel.relevance:
            raise InputError(
                f"expected one relevance for query {qrel.query_id!r} and document {qrel.doc_id!r}, "
                f"found {documents[qrel.doc_id]} and {qrel.relevance}"
            )
    if not found:
        raise InputError("expected qrels to evaluate against, found none")
    return found


def _evaluate_one(
    name: str,
    run: Run,
    measures: Sequence[Any],
    relevance: Mapping[str, Mapping[str, int]],
    evaluator: Any,
    ties: Ties,
    rate: float | None,
) -> RunResult:
    judged = [query_id for query_id in relevance if run.get(query_id)]
    if not judged:
        raise InputError(
            f"expected run {name!r} to rank queries of the qrels ({_some(relevance)}), found only {_some(run)}: "
            "do the two belong to the same queries?"
        )
    per_query: dict[str, dict[str, float]] = {str(measure): {} for measure in measures}
    for metric in evaluator.iter_calc({query_id: _scores(name, query_id, run, ties) for query_id in judged}):
        per_query[str(metric.measure)][metric.query_id] = float(metric.value)
    values: dict[str, float] = {}
    for measure in measures:
        aggregator = measure.aggregator()  # the mean, except for measures that count
        for query_id in relevance:
            aggregator.add(per_query[str(measure)][query_id])
        values[str(measure)] = float(aggregator.result())
    ordered = {measure: {query_id: found[query_id] for query_id in relevance} for measure, found in per_query.items()}
    num_without_qrels = sum(query_id not in relevance for query_id in run)
    return RunResult(name, len(relevance), len(relevance) - len(judged), num_without_qrels, values, ordered, rate)


def _scores(name: str, query_id: str, run: Run, ties: Ties) -> dict[str, float]:
    documents = run[query_id]
    if [scored.rank for scored in documents] != list(range(1, len(documents) + 1)):
        raise InputError(
            f"expected the documents of query {query_id!r} in run {name!r} to have ranks 1, 2, 3, ... in order"
        )
    if ties == "trec_eval":
        scores = {scored.doc_id: scored.score for scored in documents}
    else:
        scores = {scored.doc_id: float(-scored.rank) for scored in documents}  # exact in 32-bit floats up to 2^24
    if len(scores) != len(documents):
        raise InputError(f"expected every document once for query {query_id!r} in run {name!r}, found one twice")
    return scores


def _some(ids: Iterable[str]) -> str:
    listed = list(ids)
    return ", ".join(map(repr, listed[:3])) + (", ..." if len(listed) > 3 else "") or "none"


def judgments_beside(run_path: Path | str) -> Path | None:
    """The `judgments.jsonl` that a run was made from, if there is one.

    Being neighbours is not enough: other runs may lie in the folder, and other jobs leave judgments too. The run must
    have one of the names that reranking gives, and a manifest beside it, where there is one, must be of reranking.

    Raises:
        InputError: the manifest is damaged.
    """
    path = Path(run_path)
    judgments, manifest = (path.parent / name for name in ("judgments.jsonl", "manifest.json"))
    if path.name not in RERANKED_NAMES or not judgments.is_file():
        return None
    if manifest.is_file():
        found = read_json(manifest)
        if not isinstance(found, dict) or found.get("stage") != "rerank":
            return None
    return judgments


def unparsed_rate(path: Path | str) -> float | None:
    """The share, from 0 to 1, of judgments that carry no label (`unparsed` or `error`); `None` if there are none.

    Raises:
        InputError: a line is not a judgment.
    """
    num_judgments = num_unparsed = 0
    advice = "Remove the line; the command that wrote the file then judges the pair again"
    for judgment in read_jsonl(path, Judgment, advice=advice):
        num_judgments += 1
        num_unparsed += judgment.status not in JUDGED_STATUSES
    return num_unparsed / num_judgments if num_judgments else None


def _allowed_rate(name: str, path: Path, allow_unparsed: float) -> float | None:
    rate = unparsed_rate(path)
    if rate is not None and rate > allow_unparsed:
        raise TooManyUnparsed(
            f"expected at most {allow_unparsed:.2%} of the judgments of run {name!r} without a label, found "
            f"{rate:.2%} in {path}. Judge those pairs again, or allow a higher share."
        )
    return rate


def table(evaluation: Evaluation) -> Table:
    """One row per run: measures to four decimals, then queries, missing queries, and unparsed judgments."""
    has_rates = any(run.unparsed_rate is not None for run in evaluation.runs)
    has_strangers = any(run.num_without_qrels for run in evaluation.runs)
    columns = [*evaluation.measures, "queries", "missing"]
    columns += ["without qrels"] * has_strangers + ["unparsed"] * has_rates
    drawn = Table()
    drawn.add_column("run", overflow="fold")
    for column in columns:
        drawn.add_column(column, justify="right")
    for run, name in zip(evaluation.runs, _short_names([run.name for run in evaluation.runs]), strict=True):
        cells = [f"{run.values[measure]:.4f}" for measure in evaluation.measures]
        cells += [str(run.num_queries), str(run.num_missing)]
        cells += [str(run.num_without_qrels)] * has_strangers
        cells += ["-" if run.unparsed_rate is None else f"{run.unparsed_rate:.2%}"] * has_rates
        drawn.add_row(name, *cells)
    return drawn


def _short_names(names: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share, so that a table stays narrow."""
    folders = [name.split("/")[:-1] for name in names]
    is_shared = (len(set(parts)) == 1 for parts in zip(*folders, strict=False))
    num_shared = sum(1 for _ in takewhile(bool, is_shared)) if len(names) > 1 else 0
    return ["/".join(name.split("/")[num_shared:]) for name in names]
