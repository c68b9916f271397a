"""Measure public runs and compare with their published figures; writes results/reproduction.json.

    python scripts/reproduce.py PATH_TO_DATA

The data are not part of whyrank: TREC DL19 runs and qrels (anserini-tools, rank_llm_data), BRIGHT qrels, the runs of
ReasonIR (in the ReasonRank repository) and of XRR2, Cranfield and Vaswani. Published values stand below with where
they were read; nothing in the output is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from provenance import RESULTS, provenance, write_result

from whyrank.stages.evaluate import evaluate_files
from whyrank.stages.search import search_files

MEASURE = "nDCG@10"
OUT = RESULTS / "reproduction.json"

DL19 = {  # rank_llm and anserini documentation, four decimals
    "BM25": 0.5058,
    "BM25_RM3": 0.5216,
    "D_BERT_KD_TASB": 0.7210,
    "REP_LLAMA": 0.7384,
    "SPLADE_P_P_ENSEMBLE_DISTIL": 0.7308,
}
REASONIR = {  # the runs' own reports, times 100, two decimals
    "biology": 43.49,
    "earth_science": 43.00,
    "economics": 32.65,
    "psychology": 39.57,
    "robotics": 20.82,
    "stackoverflow": 30.96,
    "sustainable_living": 27.34,
    "leetcode": 31.68,
    "pony": 19.55,
    "aops": 7.37,
    "theoremqa_theorems": 36.68,
}
XRR2 = {  # README of jataware/XRR2: (rr, rr2), five decimals
    "biology": (0.62310, 0.63137),
    "earth_science": (0.55802, 0.55440),
    "economics": (0.37408, 0.38486),
    "psychology": (0.54178, 0.52883),
    "robotics": (0.35234, 0.37096),
    "stackoverflow": (0.36901, 0.38242),
    "sustainable_living": (0.43194, 0.44636),
    "leetcode": (0.21329, 0.21861),
    "pony": (0.33238, 0.35037),
    "aops": (0.16690, 0.15691),
    "theoremqa_theorems": (0.45734, 0.46188),
}


def main(data: Path) -> None:
    """Measure everything that is there and write the table."""
    rows = [*_dl19(data), *_bright(data), *_collections(data)]
    made = provenance("python scripts/reproduce.py PATH_TO_DATA")
    write_result(OUT, {**made, "measure": MEASURE, "ties": "trec_eval", "rows": rows})
    wrong = [row for row in rows if row.get("is_equal") is False]
    sys.stdout.write(f"{len(rows)} runs measured, {len(wrong)} differ from their published value: {OUT}\n")
    for row in wrong:
        sys.stdout.write(f"  {row}\n")
    sys.exit(1 if wrong else 0)


def _measured(run: Path, qrels: Path) -> float:
    return evaluate_files([run], qrels, [MEASURE]).runs[0].values[MEASURE]


def _row(name: str, value: float, published: float, decimals: int, scale: float = 1.0) -> dict[str, Any]:
    is_equal = round(value * scale, decimals) == round(published, decimals)
    return {"run": name, "value": value, "published": published, "decimals": decimals, "is_equal": is_equal}


def _dl19(data: Path) -> list[dict[str, Any]]:
    folder = data / "trec-dl"
    qrels = folder / "qrels.dl19-passage.txt"
    return [
        _row(f"DL19 {name}", _measured(folder / f"run.dl19.{name}.txt", qrels), published, 4)
        for name, published in DL19.items()
    ]


def _bright(data: Path) -> list[dict[str, Any]]:
    folder = data / "bright"
    rows = []
    for subset, published in REASONIR.items():
        qrels = folder / "qrels" / f"qrels.bright-{subset.replace('_', '-')}.txt"
        run = folder / "runs" / "reasonir-gpt4" / f"{subset}.reasonir_gpt4cot_top100.txt"
        rows.append(_row(f"BRIGHT {subset} ReasonIR", _measured(run, qrels), published, 2, scale=100.0))
        for kind, figure in zip(("rr", "rr2"), XRR2[subset], strict=True):
            run = folder / "runs" / "xrr2" / f"{subset}__{kind}_results.json"
            rows.append(_row(f"BRIGHT {subset} XRR2 {kind}", _measured(run, qrels), figure, 5))
    return rows


def _collections(data: Path) -> list[dict[str, Any]]:
    """BM25 with our defaults; there is no published value for these settings."""
    cranfield, vaswani = data / "collections" / "cranfield", data / "collections" / "vaswani"
    found = []
    for name, corpus, queries, qrels in (
        (
            "Cranfield",
            cranfield / "cranfield-data.json",
            cranfield / "cranfield-gt.csv",
            cranfield / "cranfield-gt.csv",
        ),
        ("Vaswani", vaswani / "doc-text.trec", vaswani / "query-text.trec", vaswani / "qrels"),
    ):
        run = OUT.parent / f".{name}.trec"
        start = time.perf_counter()
        search_files(corpus, queries, run)
        seconds = time.perf_counter() - start
        found.append({"run": f"{name} BM25", "value": _measured(run, qrels), "seconds": round(seconds, 2)})
        run.unlink()
        run.with_name(f"{run.name}.manifest.json").unlink()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="PATH_TO_DATA")
    main(parser.parse_args().data)
