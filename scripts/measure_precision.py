"""What narrower products do to the judgments of the model that ships; writes results/precision.json.

    python scripts/measure_precision.py

The same pairs of the almanac's test split are judged with every dtype of a CPU. Reported against float32: how far the
probability of a label is off (largest and mean, over labels and pairs), how many pairs get another label, how many get
another explanation, and nDCG@10. Where the explanation is another one, the label answers to another text: its error is
in the figures all the same, and apart for the pairs with the same explanation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from provenance import RESULTS, provenance, write_result

from whyrank.almanac import Collection, build
from whyrank.demo.systems import MEASURE, per_query
from whyrank.generators.hf import HfGenerator
from whyrank.generators.opening import EMBEDDED_MODEL
from whyrank.judging import Judge
from whyrank.records import Judgment, Mode, Query
from whyrank.template import Template

MODES: tuple[Mode, ...] = ("explain", "direct")
DTYPES = ("float32", "bfloat16", "int8")
NUM_QUERIES = 48
Judgments = dict[tuple[str, str], Judgment]


def main() -> None:
    """Every dtype in every mode against float32."""
    test = build("test", NUM_QUERIES, seed=1)
    rows = []
    for mode in MODES:
        found = {dtype: _judge(test, dtype, mode) for dtype in DTYPES}
        for dtype in DTYPES:
            rows.append(_row(test, mode, dtype, found[dtype], found["float32"]))
            sys.stdout.write(f"{rows[-1]}\n")
    write_result(RESULTS / "precision.json", {**provenance("python scripts/measure_precision.py"), "rows": rows})


def _judge(test: Collection, dtype: Any, mode: Mode) -> Judgments:
    generator = HfGenerator.load(EMBEDDED_MODEL, device="cpu", dtype=dtype)
    judge = Judge(Template.load("almanac"), generator, mode)
    documents = {document.doc_id: document for document in test.documents}
    pairs = [(query, documents[doc_id]) for query in test.queries for doc_id in test.candidates[query.query_id]]
    judged = [judgment for _, judgment in judge.judge(pairs)]
    return {(judgment.query_id, judgment.doc_id): judgment for judgment in judged}


def _row(test: Collection, mode: Mode, dtype: str, found: Judgments, exact: Judgments) -> dict[str, Any]:
    errors = {pair: _errors(found[pair], exact[pair]) for pair in exact}
    same = [pair for pair in exact if found[pair].explanation == exact[pair].explanation]
    every = [error for pair in exact for error in errors[pair]]
    with_same = [error for pair in same for error in errors[pair]]
    return {
        "mode": mode,
        "dtype": dtype,
        "num_pairs": len(exact),
        "largest_error": max(every),
        "mean_error": sum(every) / len(every),
        "largest_error_same_explanation": max(with_same),
        "other_label": sum(found[pair].label != exact[pair].label for pair in exact) / len(exact),
        "other_explanation": 1 - len(same) / len(exact),
        MEASURE: _ndcg(test, found),
    }


def _errors(one: Judgment, other: Judgment) -> Sequence[float]:
    """How far every label's probability is off."""
    assert one.probs is not None
    assert other.probs is not None
    return [abs(p - q) for p, q in zip(one.probs, other.probs, strict=True)]


def _ndcg(test: Collection, found: Judgments) -> float:
    def ranked(query: Query) -> list[str]:
        scores = {doc_id: found[query.query_id, doc_id].score for doc_id in test.candidates[query.query_id]}
        return sorted(scores, key=lambda doc_id: -(scores[doc_id] or 0.0))

    return fmean(per_query(test, ranked).values())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
