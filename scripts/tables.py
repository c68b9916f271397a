"""Tables of recorded figures for the documentation; every number comes from `results/*.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from provenance import RESULTS

__all__ = [
    "TASKS",
    "auto",
    "code",
    "demo",
    "embedded",
    "explaining",
    "fairness",
    "precision",
    "refining",
    "reproduction",
    "speed",
    "table",
    "training",
]

MEASURE = "nDCG@10"
TASKS = {"W": "explain and label", "S": "label only"}  # the workloads of benchmarks/rerank.py


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; empty last columns are left out."""
    width = len(head) if any(row[-1] for row in rows) else len(head) - 1
    cells = [head, ("---",) * len(head), *rows]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row[:width]] for row in cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def code(text: str) -> str:
    """Inline code."""
    return f"`{text}`"


def reproduction(what: str, body: str) -> str:
    """Figures of `reproduction.json` whose run's name begins with `what`."""
    recorded = _recorded("reproduction.json")
    rows = []
    for row in recorded["rows"]:
        if row["run"].startswith(what):
            published = f"{row['published']:.{row['decimals']}f}" if "published" in row else ""
            rows.append((row["run"], f"{row['value']:.5f}", published))
    if not rows:
        raise SystemExit(f"results: no recorded run begins with {what!r}")
    return table(("run", recorded["measure"], "published"), rows) + _provenance(recorded)


def demo(what: str, body: str) -> str:
    """The tables of a recorded demo: `subset`, the domains that its students learned, or `full`, all of them."""
    recorded = _recorded("demo.json")
    chosen = [row for row in recorded["rows"] if row["test_set"] == "subset"]
    rows = []
    for row in recorded["full_test_set"] if what == "full" else chosen:
        accuracy = "-" if row["label_accuracy"] is None else f"{row['label_accuracy']:.3f}"
        figures = (_with_interval(row[MEASURE], row[f"{MEASURE}_interval"]), accuracy)
        rows.append((row["system"], *figures, f"{row['tokens_per_document']:.1f}"))
    head = ("system", f"{MEASURE} [95 % interval]", "label accuracy", "tokens written per document")
    minutes = f"{recorded['seconds'] / 60:.1f} minutes on {recorded['hardware']['num_cpus']} CPU cores"
    return table(head, rows) + _provenance(recorded, f"seed {recorded['seed']}", minutes)


def explaining(what: str, body: str) -> str:
    """Does explaining help: the `table`, or the `gains` over every other system."""
    recorded = _recorded("explaining.json")
    rows: list[tuple[str, ...]]
    if what == "gains":
        by_system: dict[str, dict[str, str]] = {}
        for gain in recorded["gains"]:
            shown = _with_interval(gain[MEASURE], gain["interval"])
            by_system.setdefault(gain["over"], {})[gain["test_set"]] = shown
        rows = [(system, found["test"], found["handwritten"]) for system, found in by_system.items()]
        return table(("`explain` minus", "test", "handwritten"), rows) + _provenance(recorded)
    slices = ("test", "known_phrasings", "held_out_phrasings", "handwritten")
    rows = []
    for row in recorded["rows"]:
        figures = [_with_interval(row[name][MEASURE], row[name]["interval"]) for name in slices]
        seeds = " ".join(f"{value:.3f}" for value in row.get("seeds", ())) or "-"
        spent = f"{row['num_tokens'] / 1e6:.1f} M" if "num_tokens" in row else "-"
        loss = f"{row['last_loss']:.3f}" if "last_loss" in row else "-"
        rows.append((row["system"], *figures, seeds, spent, loss))
    head = ("system", *(name.replace("_", " ") for name in slices), "seeds (test)", "training tokens", "last loss")
    return table(head, rows) + _provenance(recorded)


def fairness(what: str, body: str) -> str:
    """Whether the almanac can be gamed: `overlap` by split, or `one-sided` classifiers."""
    recorded = _recorded("fairness.json")
    if what == "one-sided":
        rows = [(f"the {row['sees']} alone", f"{row['accuracy']:.3f}") for row in recorded["one_sided"]]
        return table(("the classifier sees", "accuracy (chance .333)"), rows) + _provenance(recorded)
    systems = ("random", "bm25", "bm25-reversed")
    found = [
        (row["split"], str(row["num_queries"]), *(_with_interval(row[s][MEASURE], row[s]["interval"]) for s in systems))
        for row in recorded["overlap"]
    ]
    return table(("split", "queries", *systems), found) + _provenance(recorded)


def embedded(what: str, body: str) -> str:
    """The figures of the shipped model."""
    recorded = _recorded("embedded-model/figures.json")
    cells: dict[str, dict[str, str]] = {}
    for row in recorded["rows"]:
        cells.setdefault(row["test_set"], {})[row["system"]] = _with_interval(row[MEASURE], row["interval"])
        cells[row["test_set"]]["queries"] = str(row["num_queries"])
    head = ("test set", "queries", "random", "direct", "explain")
    return table(head, [(name, *(found.get(key, "-") for key in head[1:])) for name, found in cells.items()]) + (
        _provenance(recorded, f"{recorded['num_bytes'] / 1e6:.1f} MB on disk")
    )


def auto(what: str, body: str) -> str:
    """Mode `auto` in the case that `what` ends with: for several `budgets`, or for several `places` without one."""
    recorded = _recorded("auto-tradeoff.json")
    kind, _, name = what.partition(" ")
    (case,) = (found for found in recorded["cases"] if found["name"] == name)
    explain, direct = case["explain"], case["direct"]
    rows: list[tuple[str, ...]] = []
    for row in case["rows"]:
        if (row["budget"] is None) == (kind == "places"):
            first = (str(row["top_k"]), f"{row['tolerance']:g}") if kind == "places" else (str(row["budget"]),)
            fewer = f"{explain['tokens'] / row['tokens']:.1f}x" if row["tokens"] else "-"
            loss = _with_interval(row["loss"], row["loss_interval"])
            rows.append((*first, f"{row['tokens']:.0f}", fewer, f"{row['explained']:.1f}", f"{row[MEASURE]:.3f}", loss))
    head = ("places", "tolerance") if kind == "places" else ("budget",)
    head = (*head, "tokens per query", "fewer", "reasons per query", MEASURE, "loss against `explain` [95 % interval]")
    ends = (f"`explain` {explain[MEASURE]:.3f} with {explain['tokens']:.0f} tokens", f"`direct` {direct[MEASURE]:.3f}")
    queries = f"{case['num_queries']} queries with {case['num_candidates']} candidates"
    return table(head, rows) + _provenance(recorded, queries, *ends)


def precision(what: str, body: str) -> str:
    """Narrow products against float32 on the shipped model."""
    recorded = _recorded("precision.json")
    rows = [
        (
            *(row["mode"], row["dtype"], f"{row['largest_error_same_explanation']:.4f}", f"{row['mean_error']:.4f}"),
            *(f"{row['other_explanation']:.1%}", f"{row['other_label']:.1%}", f"{row[MEASURE]:.3f}"),
        )
        for row in recorded["rows"]
    ]
    head = ("mode", "dtype", "largest error of a label's probability, same explanation", "mean error, all pairs")
    pairs = f"{recorded['rows'][0]['num_pairs']:,} pairs"
    return table((*head, "other explanation", "other label", MEASURE), rows) + _provenance(recorded, pairs)


def refining(what: str, body: str) -> str:
    """Students past their teacher: the `table` at the usual noise, the `gains` over teacher and parent, or other
    levels of `noise`; `short` is the table with what matters most."""
    recorded = _recorded("refining.json")
    rows: list[tuple[str, ...]] = []
    if what == "gains":
        gains: dict[tuple[str, str], dict[str, str]] = {}
        for gain in recorded["gains"]:
            shown = _with_interval(gain[MEASURE], gain["interval"])
            gains.setdefault((gain["teacher_noise"], gain["system"]), {"runs": str(gain["runs"])})[gain["over"]] = shown
        for (level, system), found in gains.items():
            rows.append((level, system, found["runs"], found.get("teacher", "-"), found.get("distilled", "-")))
        head: tuple[str, ...] = ("noise of the teacher", "system", "seeds", "minus teacher", "minus distilled")
        return table(head, rows) + _provenance(recorded)
    for row in recorded["rows"]:
        is_usual = row["teacher_noise"] == "default"
        if (what == "noise") == is_usual or (what == "short" and row["system"] not in SHORT):
            continue
        seeds = " ".join(f"{value:.3f}" for value in row["seeds"])
        numbers = (_number(row["label_accuracy"], 3), _number(row["tokens_per_document"], 1))
        first = (row["teacher_noise"], row["system"]) if what == "noise" else (row["system"],)
        rows.append(
            (*first, _with_interval(row[MEASURE], row["interval"]), seeds, *numbers, _number(row["seconds"], 0))
        )
    names = ("noise of the teacher", "system") if what == "noise" else ("system",)
    head = (
        *names,
        f"{MEASURE} [95 % interval]",
        "seeds",
        "label accuracy",
        "tokens per document",
        "seconds of training",
    )
    return table(head, rows) + _provenance(recorded)


SHORT = ("teacher", "distilled", "ppo", "grpo")


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def training(what: str, body: str) -> str:
    """Speed of training against padded rows and TRL."""
    recorded = _recorded("train-speed.json")
    rows = [
        (part, system, f"{found:.2f}", f"{recorded[part]['packed_is_faster_by'][system]:.2f}")
        for part in ("distillation", "refinement")
        for system, found in recorded[part]["samples_per_second"].items()
    ]
    return table(("stage", "system", "samples/s", "packed is faster by"), rows) + _provenance(recorded)


def speed(what: str, body: str) -> str:
    """Speed against plain `generate`, for every workload, dtype and system of a recorded run; of it `short`, only
    against the best of the plain ones."""
    name, _, part = what.partition(" ")
    recorded = _recorded(f"{name}.json")
    if part == "short":
        return _speed_in_short(recorded)
    rows = [
        (
            *(row["workload"], row["model"], row["dtype"], row["system"], f"{row['documents_per_second']:.2f}"),
            *(f"{row['ratio']:.2f}", f"{row['roofline']:.0%}", f"{row['peak_rss_mb']:.0f}"),
        )
        for row in recorded["rows"]
    ]
    head = ("workload", "model", "dtype", "system", "documents/s", "ratio", "roofline", "peak memory MB")
    return table(head, rows) + _provenance(recorded, f"{recorded['cpu']}, threads: {recorded['num_threads']}")


def _speed_in_short(recorded: Mapping[str, Any]) -> str:
    rows = []
    for row in recorded["rows"]:
        key = (row["workload"], row["model"], row["dtype"])
        if row["system"] == "whyrank":
            found = f"{row['documents_per_second']:.1f}"
            plain = max(
                other["documents_per_second"]
                for other in recorded["rows"]
                if other is not row and (other["workload"], other["model"], other["dtype"]) == key
            )
            rows.append((TASKS[row["workload"]], row["dtype"], found, f"{plain:.1f}", f"{row['ratio']:.1f}"))
    head = ("task", "products", "whyrank, documents/s", "best of transformers, documents/s", "times as fast")
    return table(head, rows) + _provenance(recorded, f"{recorded['cpu']}, threads: {recorded['num_threads']}")


def expansion(what: str, body: str) -> str:
    """BM25 with and without search queries in place of the question."""
    recorded = _recorded("expansion.json")
    rows = [
        (
            {"none": "none", "student": "the student's", "gold": "gold"}[row["search_queries"]],
            "" if row["search_queries"] == "none" else row["expansion"],
            *(_with_interval(row[measure], row[f"{measure}_interval"]) for measure in ("R@100", "nDCG@10")),
        )
        for row in recorded["rows"]
    ]
    head = ("search queries", "expansion", "R@100 [95 % interval]", "nDCG@10 [95 % interval]")
    sizes = f"{recorded['num_queries']} queries, {recorded['num_documents']:,} documents"
    return table(head, rows) + _provenance(recorded, sizes)


def larger(what: str, body: str) -> str:
    """A larger language model as teacher, and students a twentieth of its size."""
    recorded = _recorded("larger-teacher.json")
    rows = [
        (
            row["system"],
            f"{row['num_parameters']:,.0f}",
            _with_interval(row[MEASURE], row["interval"]),
            " ".join(f"{value:.3f}" for value in row["seeds"]),
            f"{row['label_accuracy']:.3f}",
            f"{row['tokens_per_document']:.1f}",
            f"{1000 / row['documents_per_second']:.0f}",
            f"{row['seconds']:.0f}",
            *(
                _with_interval(row[over][MEASURE], row[over]["interval"]) if over in row else "-"
                for over in ("over_teacher", "over_distilled")
            ),
        )
        for row in recorded["rows"]
    ]
    head = ("system", "parameters", f"{MEASURE} [95 % interval]", "seeds", "label accuracy", "tokens per document")
    more = ("ms per document", "seconds of training", "minus teacher", "minus distilled")
    return table((*head, *more), rows) + _provenance(recorded)


def _recorded(name: str) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return recorded


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _provenance(recorded: Mapping[str, Any], *more: str) -> str:
    """Where a table's figures come from."""
    parts = (code(recorded["command"]), f"commit {recorded['commit'][:7]}", recorded["date"], *more)
    return f"\n{', '.join(parts)}.\n"
