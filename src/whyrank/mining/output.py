"""Write what was mined: a shared corpus, two splits, and who wrote what."""

from __future__ import annotations

from pathlib import Path

from whyrank.datasets.trec import write_trec_qrels
from whyrank.mining.config import MiningConfig
from whyrank.mining.pairs import Mined, is_test
from whyrank.records import Qrel
from whyrank.store import write_jsonl

__all__ = ["write"]


def write(mined: Mined, directory: Path | str, config: MiningConfig) -> dict[str, int]:
    """Write `corpus.jsonl`, `attribution.jsonl`, `{train,test}/{queries,pairs}.jsonl` and `{train,test}/qrels.trec`;
    returns the counts of mining and of what was written.

    Splits hold disjoint questions and share the corpus. In the qrels a linked document has relevance 1 and no
    other appears. Two runs with the same input and seed write the same bytes.
    """
    directory = Path(directory)
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
    return counts
