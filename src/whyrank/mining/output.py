"""Write what was mined: a shared corpus, two splits, who wrote what, and how it came to be."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from whyrank.datasets.trec import write_trec_qrels
from whyrank.mining.config import MiningConfig
from whyrank.mining.pairs import Mined, is_test
from whyrank.records import Qrel
from whyrank.store import Manifest, write_jsonl

__all__ = ["write"]


def write(
    mined: Mined,
    directory: Path | str,
    config: MiningConfig,
    *,
    inputs: Iterable[Path | str] = (),
    clock_start: float | None = None,
) -> Manifest:
    """Write `corpus.jsonl`, `attribution.jsonl`, `{train,test}/{queries,pairs}.jsonl`, `{train,test}/qrels.trec`
    and, last, `manifest.json`; returns the manifest.

    Splits hold disjoint questions and share the corpus. In the qrels a linked document has relevance 1 and no
    other appears. `clock_start` is a reading of `time.perf_counter()` taken when mining began. Two runs with the
    same input and seed write the same bytes, but for the manifest's times.
    """
    directory = Path(directory)
    clock_start = time.perf_counter() if clock_start is None else clock_start
    manifest = Manifest(stage="mine", config=asdict(config), seed=config.seed).with_inputs(*inputs)
    counts = dict(mined.counts)
    write_jsonl(directory / "corpus.jsonl", mined.documents)
    write_jsonl(directory / "attribution.jsonl", mined.attributions)
    tests = {query.query_id for query in mined.queries if is_test(query.query_id, config.test_fraction)}
    for split in ("train", "test"):
        queries = [query for query in mined.queries if (query.query_id in tests) == (split == "test")]
        pairs = [pair for pair in mined.pairs if (pair.query_id in tests) == (split == "test")]
        counts[f"{split}.queries"] = write_jsonl(directory / split / "queries.jsonl", queries)
        counts[f"{split}.pairs"] = write_jsonl(directory / split / "pairs.jsonl", pairs)
        counts[f"{split}.qrels"] = write_trec_qrels(
            directory / split / "qrels.trec",
            (Qrel(pair.query_id, pair.doc_id, 1) for pair in pairs if pair.relation == "linked"),
        )
    manifest = manifest.finished(clock_start, counts=counts)
    manifest.write(directory)
    return manifest
