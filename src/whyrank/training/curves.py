"""`curves.svg`: what happened while a model was trained, as a picture beside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from whyrank.store import atomic_path

__all__ = ["Curve", "draw_curves"]

Curve = Mapping[int, float]
"""Values by step."""

MAX_POINTS = 500  # more cannot be told apart, and make a large file


def draw_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """Draw curves below each other over the steps; those without values are left out.

    The same values give the same file. Long curves are drawn as means over neighbouring steps.

    Args:
        path: an `.svg`; replaced at once.
        curves: by their title, which says the unit.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = {title: curve for title, curve in curves.items() if curve}
    if not shown:
        return
    with mpl.rc_context({"svg.hashsalt": "whyrank", "font.size": 8, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6, 1.6 * len(shown)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(shown), squeeze=False, sharex=True)[:, 0]
        for axis, (title, curve) in zip(axes, shown.items(), strict=True):
            steps, values = _thinned(sorted(curve.items()))
            axis.plot(steps, values, linewidth=1, marker="." if len(steps) < 20 else "")
            axis.set_title(title, loc="left")
            axis.grid(visible=True, linewidth=0.3)
        axes[-1].set_xlabel("step")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, at most `MAX_POINTS` of them."""
    size = -(-len(points) // MAX_POINTS)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    means = [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]
    return [step for step, _ in means], [value for _, value in means]
