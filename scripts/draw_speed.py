"""Draw results/rerank-speed.json and its like for the larger model; writes docs/images/rerank-speed.svg.

    python scripts/draw_speed.py

A panel per model and workload, a group of bars per dtype, a bar per system. A line above a group is the roofline: as
many documents per second as this machine could do at best (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from provenance import RESULTS, ROOT
from tables import TASKS

mpl.use("svg")

from matplotlib import pyplot  # the backend comes first
from matplotlib.axes import Axes

RECORDED = ("rerank-speed", "rerank-speed-135m")
PICTURE = ROOT / "docs" / "images" / "rerank-speed.svg"
COLOURS = ("#1b6ca8", "#b9b9b9", "#969696", "#737373")  # whyrank, then plain batches
WIDTH = 0.2  # of a bar; groups are 1 apart


def main(path: Path) -> None:
    """All panels side by side."""
    mpl.rcParams["svg.hashsalt"] = "whyrank"  # the same figures give the same file
    rows = recorded_rows()
    cases = list(dict.fromkeys((row["model"], row["workload"]) for row in rows))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(11, 3.4), layout="constrained")
    for panel, (model, workload) in zip(panels, cases, strict=True):
        draw_panel(panel, [row for row in rows if (row["model"], row["workload"]) == (model, workload)])
        panel.set_title(f"{model}: {TASKS[workload]}", fontsize=9)
    panels[0].set_ylabel("documents per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, metadata={"Date": None, "Identifier": digest(rows)})
    pyplot.close(figure)


def recorded_rows() -> list[dict[str, Any]]:
    """All that is drawn."""
    return [row for name in RECORDED for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]]


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Names the figures inside the picture, so that an old picture can be told, whatever version drew it."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw_panel(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of one model and workload."""
    dtypes, systems = (list(dict.fromkeys(row[name] for row in rows)) for name in ("dtype", "system"))
    for number, (system, colour) in enumerate(zip(systems, COLOURS, strict=True)):
        own = {row["dtype"]: row for row in rows if row["system"] == system}
        places = [place + (number - 1.5) * WIDTH for place in range(len(dtypes))]
        speeds = [own[dtype]["documents_per_second"] for dtype in dtypes]
        panel.bar(places, speeds, WIDTH, color=colour, label=system)
        if system == "whyrank":
            limits = [speed / own[dtype]["roofline"] for speed, dtype in zip(speeds, dtypes, strict=True)]
            panel.hlines(
                limits,
                [p - 0.4 for p in range(len(dtypes))],
                [p + 0.4 for p in range(len(dtypes))],
                colors="#c44e52",
                label="roofline",
            )
            for place, speed, dtype in zip(places, speeds, dtypes, strict=True):
                panel.annotate(f"{own[dtype]['ratio']:.1f}x", (place, speed), ha="center", va="bottom", fontsize=8)
    panel.set_xticks(range(len(dtypes)), dtypes, fontsize=8)
    panel.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    main(PICTURE)
    sys.stdout.write(f"{PICTURE}\n")
