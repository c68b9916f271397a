"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from whyrank.almanac import Collection
from whyrank.demo.systems import Row
from whyrank.records import Mode
from whyrank.rerank import Ranking
from whyrank.store import atomic_path
from whyrank.training.distill import Distilled, Step

__all__ = ["write_report"]

INK, ACCENT, QUIET = "#22303c", "#2f6f8f", "#c9d3da"


def write_report(
    path: Path,
    rows: Sequence[Row],
    curves: Mapping[Mode, Distilled],
    ranking: Ranking,
    collection: Collection,
    facts: Mapping[str, str],
) -> None:
    """Write the report: table, two plots and one ranking with its reasons.

    Args:
        path: the HTML file.
        rows: the systems in the order of the table.
        curves: trained students by system.
        ranking: an example from the explaining student.
        collection: where the example's query and gold labels come from.
        facts: short statements about the run, shown at the end.
    """
    page = (files("whyrank.demo") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    query = next(query for query in collection.queries if query.query_id == ranking.query_id)
    text = environment.from_string(page).render(
        rows=rows,
        bars=_bars(rows),
        loss=_loss({system: student.history for system, student in curves.items()}),
        query=query.text,
        results=[(result, collection.labels[query.query_id, result.id]) for result in ranking[:8]],
        facts=facts,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _bars(rows: Sequence[Row]) -> Markup:
    figure = Figure(figsize=(6.4, 0.5 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        low, high = row.interval
        axes.barh(place, row.ndcg, height=0.6, color=ACCENT if row.system == "explain" else QUIET)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.5)
        axes.text(max(high, row.ndcg) + 0.015, place, f"{row.ndcg:.3f}", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [row.system for row in reversed(rows)])
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("nDCG@10, with 95 % bootstrap interval over queries")
    return _svg(figure)


def _loss(curves: Mapping[str, Sequence[Step]]) -> Markup:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    for system, steps in curves.items():
        color = ACCENT if system == "explain" else "#9a6b3f"
        axes.plot([step.seconds for step in steps], [step.loss for step in steps], label=system, color=color)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("nats per answer token")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> Markup:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "whyrank", "svg.fonttype": "none"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    text = drawing.getvalue()
    return Markup(text[text.index("<svg") :])
