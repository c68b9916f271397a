"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from whyrank.demo.examples import ExampleRanking
from whyrank.demo.recorded import Recorded, RecordedRow
from whyrank.demo.systems import Row
from whyrank.records import Mode
from whyrank.store import atomic_path
from whyrank.training.distill import Distilled, Step

__all__ = ["write_report"]

NUM_SHOWN = 6  # results of each ranking
NUM_SMOOTHED = 10  # steps in the running mean of a learning curve
HIGHLIGHTED = ("explain", "shipped", "refined (ppo)")
INK, ACCENT, QUIET = "#22303c", "#2f6f8f", "#c9d3da"


def write_report(
    path: Path,
    rows: Sequence[Row],
    full_rows: Sequence[Row],
    recorded: Recorded,
    curves: Mapping[Mode, Distilled],
    examples: Sequence[ExampleRanking],
    facts: Mapping[str, str],
) -> None:
    """Write the report: three tables with their plots, learning curves, and rankings with their reasons.

    Args:
        path: the HTML file.
        rows: the systems on the domains that the students learned, in the order of the table.
        full_rows: the systems on all domains.
        recorded: what was measured before the release.
        curves: trained students by mode.
        examples: rankings of the explaining student.
        facts: short statements about the run, shown at the end.
    """
    page = (files("whyrank.demo") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(page).render(
        tables=[
            ("The two students, on the domains they learned", rows, _bars(rows)),
            ("The shipped model, on all domains", full_rows, _bars(full_rows)),
            (
                f"Past the teacher (recorded on {recorded.date}, not trained now)",
                recorded.rows,
                _bars(recorded.rows, "nDCG@10, with 95 % bootstrap interval over seeds and queries"),
            ),
        ],
        loss=_loss({mode: student.history for mode, student in curves.items()}),
        examples=examples,
        num_shown=NUM_SHOWN,
        facts=facts,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _bars(
    rows: Sequence[Row | RecordedRow], axis: str = "nDCG@10, with 95 % bootstrap interval over queries"
) -> Markup:
    figure = Figure(figsize=(6.4, 0.5 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        low, high = row.interval
        axes.barh(place, row.ndcg, height=0.6, color=ACCENT if row.system in HIGHLIGHTED else QUIET)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.5)
        axes.text(max(high, row.ndcg) + 0.015, place, f"{row.ndcg:.3f}", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [row.system for row in reversed(rows)])
    axes.set_xlim(0, 1.12)
    axes.set_xlabel(axis)
    return _svg(figure)


def _loss(curves: Mapping[str, Sequence[Step]]) -> Markup:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    for system, steps in curves.items():
        color = ACCENT if system == "explain" else "#9a6b3f"
        seconds, losses = [step.seconds for step in steps], [step.loss for step in steps]
        axes.plot(seconds, losses, color=color, linewidth=0.6, alpha=0.35)
        smoothed = [fmean(losses[max(0, at - NUM_SMOOTHED + 1) : at + 1]) for at in range(len(losses))]
        axes.plot(seconds, smoothed, label=system, color=color)
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
