"""Measure whether the almanac can be gamed; writes results/fairness.json. About two minutes.

    python scripts/fairness.py

nDCG@10 of chance and of word overlap in both directions on every split, and the accuracy of classifiers that see one
side of a pair only: balanced over the labels, so that chance is one third.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from provenance import RESULTS, provenance, write_result

from whyrank.almanac import DRAWN_SPLITS, Collection, build, load_handwritten
from whyrank.demo.shallow import Shallow, ShallowKind, training_pairs
from whyrank.demo.systems import MEASURE, bm25_row, random_row

NUM_QUERIES = 1000
NUM_TRAIN_QUERIES = 3000
ONE_SIDED: tuple[ShallowKind, ...] = ("query", "document")


def main() -> None:
    """Measure every split and both sides."""
    splits: dict[str, Collection] = {split: build(split, NUM_QUERIES) for split in DRAWN_SPLITS}
    rows = [*_overlap({**splits, "test-handwritten": load_handwritten()})]
    accuracies = [{"sees": kind, "accuracy": _balanced_accuracy(kind, splits["test"])} for kind in ONE_SIDED]
    made = provenance("python scripts/fairness.py")
    write_result(RESULTS / "fairness.json", {**made, "overlap": rows, "one_sided": accuracies})
    sys.stdout.write(f"{RESULTS / 'fairness.json'}\n")


def _overlap(splits: dict[str, Collection]) -> Iterator[dict[str, Any]]:
    for split, collection in splits.items():
        rows = [random_row(collection, seed=0), bm25_row(collection), bm25_row(collection, is_reversed=True)]
        figures = {row.system: {MEASURE: row.ndcg, "interval": row.interval} for row in rows}
        yield {"split": split, "num_queries": len(collection.queries), **figures}


def _balanced_accuracy(kind: ShallowKind, test: Collection) -> float:
    """The mean share of right answers over the three labels, so that a label's frequency is worth nothing."""
    train = build("train", NUM_TRAIN_QUERIES)
    model = Shallow.train(kind, train, training_pairs(train, num_irrelevant=2))  # it weighs the labels equally itself
    asked = list(test.labels)
    guesses = model.probabilities(test, asked).argmax(axis=1)
    hits: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for pair, guess in zip(asked, guesses, strict=True):
        hits[test.labels[pair]].append(test.labels[pair] == guess)
    return fmean(fmean(found) for found in hits.values())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
