"""Measure the model that ships with whyrank; writes results/embedded-model/figures.json.

    python scripts/measure_embedded_model.py [PATH_TO_DATA]

On the almanac's test split (both halves), on the handwritten test, and, where the data are given, on ordinary text: the
first 24 BM25 passages of each TREC Deep Learning 2019 query, in random order. The data are not part of whyrank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, get_args

from provenance import RESULTS, provenance, write_result

from whyrank.almanac import NUM_CANDIDATES, Collection, build, load_handwritten
from whyrank.datasets import read_qrels, read_rankgpt
from whyrank.demo.systems import MEASURE, Row, bootstrap_interval, loaded, random_row, student_row
from whyrank.evaluation import evaluate
from whyrank.generators.opening import EMBEDDED_MODEL
from whyrank.records import Mode, ScoredDocument
from whyrank.rerank import Reranker
from whyrank.template import Template

WORK = RESULTS.parent / "out" / "embedded-model"
NUM_TEST_QUERIES = 288
NUM_SHUFFLES = 200


def main(data: Path | None) -> None:
    """Both modes on everything that is there."""
    template = Template.load("almanac")
    tests = {"test": build("test", NUM_TEST_QUERIES), "handwritten": load_handwritten()}
    rows: list[dict[str, Any]] = []
    for name, test in tests.items():
        rows += _slices(name, test, random_row(test, seed=0))
    for mode in get_args(Mode):
        reranker = Reranker.of(template, loaded(EMBEDDED_MODEL), mode=mode)
        for name, test in tests.items():
            rows += _slices(name, test, student_row(test, reranker, mode, WORK / f"{name}-{mode}"))
        if data is not None:
            rows.append(_ordinary(data, reranker, mode))
    if data is not None:
        rows.append(_ordinary(data, None, "random"))
    size = sum(path.stat().st_size for path in EMBEDDED_MODEL.iterdir())
    made = provenance("python scripts/measure_embedded_model.py PATH_TO_DATA")
    write_result(RESULTS / "embedded-model" / "figures.json", {**made, "num_bytes": size, "rows": rows})
    for row in rows:
        sys.stdout.write(f"{row['test_set']:<32}{row['system']:<10}{row[MEASURE]:.3f}\n")


def _slices(name: str, test: Collection, row: Row) -> list[dict[str, Any]]:
    """The whole of a test set, and where it has both, known and held-out phrasings apart."""
    known = {key: value for key, value in row.per_query.items() if key not in test.held_out}
    held_out = {key: value for key, value in row.per_query.items() if key in test.held_out}
    parts = {name: row}
    if known and held_out:
        parts |= {f"{name}, known phrasings": replace(row, per_query=known)}
        parts |= {f"{name}, held-out phrasings": replace(row, per_query=held_out)}
    return [
        _row(part, row.system, found.per_query, label_accuracy=row.label_accuracy if part == name else None)
        for part, found in parts.items()
    ]


def _row(test_set: str, system: str, per_query: Mapping[str, float], **more: float | None) -> dict[str, Any]:
    values = list(per_query.values())
    measured = {MEASURE: fmean(values), "interval": bootstrap_interval(values)}
    return {"test_set": test_set, "system": system, "num_queries": len(values), **measured, **more}


def _ordinary(data: Path, reranker: Reranker | None, system: str) -> dict[str, Any]:
    """The first BM25 passages of every query, shuffled; in the model's order or, without one, in many random ones."""
    folder = data / "trec-dl"
    queries, documents, run = read_rankgpt(folder / "dl19.bm25-top100.with-text.json")
    qrels = read_qrels(folder / "qrels.dl19-passage.txt")
    texts = {document.doc_id: document for document in documents}
    rng = Random(0)
    shown = {query_id: [line.doc_id for line in lines[:NUM_CANDIDATES]] for query_id, lines in run.items()}
    orders = [
        {query_id: rng.sample(doc_ids, len(doc_ids)) for query_id, doc_ids in shown.items()}
        for _ in range(1 if reranker else NUM_SHUFFLES)
    ]
    if reranker is not None:
        rankings = {
            query.query_id: reranker.rank(query, [texts[doc_id] for doc_id in orders[0][query.query_id]])
            for query in queries
        }
        orders = [{query_id: [result.id for result in ranking] for query_id, ranking in rankings.items()}]
    runs = {str(number): _as_run(found) for number, found in enumerate(orders)}
    measured = [found.per_query[MEASURE] for found in evaluate(qrels, runs, [MEASURE]).runs]
    per_query = {query_id: fmean(values[query_id] for values in measured) for query_id in measured[0]}
    return _row("ordinary text (DL19)", system, per_query)


def _as_run(found: Mapping[str, Sequence[str]]) -> dict[str, list[ScoredDocument]]:
    return {
        query_id: [ScoredDocument(query_id, doc_id, rank, -float(rank)) for rank, doc_id in enumerate(doc_ids, 1)]
        for query_id, doc_ids in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", metavar="PATH_TO_DATA")
    main(parser.parse_args().data)
