"""How fast whyrank explains and labels one query's documents, against transformers and against the machine.

    python benchmarks/rerank.py [--json FILE]

docs/benchmarks.md says what is measured and how to read the table. Exits with 1 when the sides disagree in float32.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run as a file, Python would look in this folder only

import torch  # noqa: E402
from provenance import provenance, write_result  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from benchmarks.machine import description  # noqa: E402
from benchmarks.measuring import Options, Setting, measure  # noqa: E402
from benchmarks.roofline import BYTES, Shape  # noqa: E402
from benchmarks.systems import SYSTEMS, plain_dtype  # noqa: E402
from benchmarks.workload import KINDS, RANDOM_MODELS, endless_copy, save_random_model  # noqa: E402
from whyrank.errors import WhyrankError  # noqa: E402
from whyrank.generators.hf.load import Dtype, without_progress_bars  # noqa: E402

DTYPE_NAMES = tuple(dtype for dtype in get_args(Dtype) if dtype in BYTES)


def settings(options: Options, work: Path) -> Iterator[Setting]:
    """Every model, with those dtypes together that are held against the same plain systems; models are made or linked
    in the folder `work`."""
    for number, model in enumerate(options.models):
        folder = work / str(number)
        if model in RANDOM_MODELS:
            save_random_model(RANDOM_MODELS[model], folder)
        else:
            endless_copy(Path(model), folder)
        shape = Shape.of(AutoConfig.from_pretrained(folder).get_text_config(decoder=True))
        name = model if model in RANDOM_MODELS else Path(model).resolve().name
        for plain in dict.fromkeys(map(plain_dtype, options.dtypes)):
            dtypes = tuple(dtype for dtype in options.dtypes if plain_dtype(dtype) == plain)
            yield Setting(name, folder, shape, dtypes)


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The rows, whether both sides agree, and what the machine can do."""
    names = ("workload", "model", "dtype", "system")
    shown = Table(*names, title="Speed by the wall clock (and per CPU second)")
    for column in ("documents/s", "ratio", "peak memory MB", "roofline"):
        shown.add_column(column, justify="right")
    for row, more in zip(result["rows"], result["measurements"], strict=True):
        speeds = f"{row['documents_per_second']:.3g} ({more['documents_per_cpu_second']:.3g})"
        against = f"{row['ratio']:.2f} ({more['ratio_cpu']:.2f})"
        figures = (speeds, against, f"{row['peak_rss_mb']:.0f}", f"{row['roofline']:.0%}")
        shown.add_row(*(row[name] for name in names), *figures, end_section=row["system"] == SYSTEMS[-1])
    yield shown
    counts = ("num_documents", "num_mismatches", "num_near_ties")
    checks = Table(*names[:3], "whyrank and", "answers", "mismatches", "near ties", "labels", title="Equal answers")
    for check in result["checks"]:
        known = [*(check[name] for name in names[:3]), check["systems"][1], *(str(check[count]) for count in counts)]
        checks.add_row(*known, f"{check['largest_label_difference']:.1e}")
    yield checks
    machine = Table("model", "dtype", "float32 GFLOP/s", "bfloat16 GFLOP/s", "int8 GOP/s", "copy GB/s", title="Limits")
    for found in result["machine"]:
        known_rates = [[rate for rate in sizes.values() if rate] for sizes in found["gemm_gflops"].values()]
        best = (f"{max(rates):.0f}" if rates else "-" for rates in known_rates)
        machine.add_row(found["model"], found["dtype"], *best, f"{found['copy_gb_per_second']:.1f}")
    yield machine


def num_float32_mismatches(result: Mapping[str, Any]) -> int:
    """Documents on which the sides disagree where they must not; other dtypes round differently and may."""
    return sum(check["num_mismatches"] for check in result["checks"] if check["dtype"] == "float32")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found {text}")
    return number


def parse(arguments: Sequence[str]) -> tuple[Options, Path | None]:
    """The options, and where the JSON goes."""
    parser = argparse.ArgumentParser(description="Speed of explaining and labelling one query's documents, on the CPU.")
    add = parser.add_argument
    known = " or ".join(RANDOM_MODELS)
    models = f"folder of a checkpoint, or {known}; may be repeated (default: both of these)"
    kinds = "W: explain and label, S: label at once (default: both)"
    dtypes = "one or more, each the same for both sides, but int8 against float32 (default: float32)"
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--model", action="append", metavar="DIR", help=models)
    add("--workload", choices=(*KINDS, "both"), default="both", help=kinds)
    add("--dtype", nargs="+", choices=DTYPE_NAMES, default=["float32"], help=dtypes)
    add("--threads", type=_count, default=1, metavar="N", help="threads of both sides (default: 1)")
    add("--repeats", type=_count, default=5, metavar="N", help="runs of every system (default: 5)")
    add("--documents", type=_count, default=32, metavar="N", help="documents of the query (default: 32)")
    chosen = parser.parse_args(arguments)
    options = Options(
        models=tuple(chosen.model or RANDOM_MODELS),
        kinds=KINDS if chosen.workload == "both" else (chosen.workload,),
        dtypes=tuple(dict.fromkeys(chosen.dtype)),
        num_threads=chosen.threads,
        num_repeats=chosen.repeats,
        num_documents=chosen.documents,
    )
    return options, chosen.json


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; the exit code."""
    options, target = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(options.num_threads)
    progress = Console(stderr=True, highlight=False)
    screen = Console(width=None if sys.stdout.isatty() else 120)
    made = {
        **provenance(shlex.join(["python", "benchmarks/rerank.py", *arguments])),
        **description(options.num_threads),
    }
    result: dict[str, Any] = {**made, "rows": [], "measurements": [], "checks": [], "machine": []}
    with tempfile.TemporaryDirectory(prefix="whyrank-benchmark-") as work, without_progress_bars():
        for setting in settings(options, Path(work)):
            for key, found in measure(setting, options, progress.print).items():
                result[key] += found
            if target is not None:  # what is there already, should a later model fail
                write_result(target, result)
    for table in tables(result):
        screen.print(table)
    screen.print(f"{made['cpu']}, threads: {options.num_threads}, median of {options.num_repeats} interleaved runs")
    num_wrong = num_float32_mismatches(result)
    if num_wrong:
        progress.print(f"{num_wrong} answers differ in float32: the times above do not compare the same work")
    return int(num_wrong > 0)


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except WhyrankError as error:
        raise SystemExit(f"rerank.py: {error}") from error
