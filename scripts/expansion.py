"""Do search queries that a tiny student writes find what a question's own words do not? BM25 over the almanac.

    python scripts/expansion.py [WORK_FOLDER]

One student, trained on three domains to judge and to write search queries; 150 test queries, whose combinations of
observations (and, for half of them, whose phrasings) it has never seen; the corpus is the candidates of all of them.
Beside its search queries stand gold ones and none. Documents of other queries count as irrelevant, as nobody judged
them, although some would do: recall among 100 says more than nDCG@10. Writes results/expansion.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from provenance import RESULTS, ROOT, provenance, write_result

from whyrank.almanac import build
from whyrank.almanac.gold import gold_judgments, gold_search_queries
from whyrank.demo.config import RECIPE, DemoConfig
from whyrank.demo.systems import bootstrap_interval
from whyrank.evaluation import evaluate
from whyrank.generators.opening import open_writer
from whyrank.search import Bm25Index
from whyrank.search_queries import PROMPT_VERSION, QueryWriter
from whyrank.stages.expand import Expansion, by_query, fused, searched_for
from whyrank.template import Template
from whyrank.training.distill import distill

SEED = 0
NUM_TRAIN_QUERIES, NUM_TEST_QUERIES, TOP_K = 1500, 150, 100
CONFIG = replace(RECIPE, num_steps=400, search_query_share=0.3, num_threads=1, seed=SEED)
MEASURES = ("nDCG@10", "R@100")
EXPANSIONS: tuple[Expansion, ...] = ("append", "fuse")


def main(work: Path) -> None:
    """Train, write, search, measure."""
    domains = DemoConfig().domains
    train = build("train", NUM_TRAIN_QUERIES, seed=SEED, domains=domains)
    test = build("test", NUM_TEST_QUERIES, seed=SEED, domains=domains)
    template = Template.load("almanac")
    start = time.perf_counter()
    distill(
        list(gold_judgments(train, template, num_irrelevant=5, seed=SEED)),
        {query.query_id: query for query in train.queries},
        {document.doc_id: document for document in train.documents},
        template,
        work / "student",
        CONFIG,
        search_queries=list(gold_search_queries(train)),
    )
    trained = time.perf_counter()
    generator, _ = open_writer(work / "student", prompt=PROMPT_VERSION)
    written = list(QueryWriter(generator).write(test.queries))
    seconds = time.perf_counter() - trained
    index = Bm25Index.build(test.documents)

    def row(name: str, expansion: Expansion, more: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        run = {}
        for query in test.queries:
            texts = searched_for(query, more.get(query.query_id, ()), expansion)
            runs = [index.search([text], TOP_K)[query.query_id] for text in texts]
            run[query.query_id] = fused(query.query_id, runs, TOP_K) if len(runs) > 1 else runs[0]
        result = evaluate(test.qrels, {name: run}, MEASURES).runs[0]
        found: dict[str, Any] = {"search_queries": name, "expansion": expansion}
        for measure in MEASURES:
            values = list(result.per_query[measure].values())
            found |= {measure: fmean(values), f"{measure}_interval": bootstrap_interval(values)}
        return found

    rows = [row("none", "append", {})]
    for name, source in (("student", written), ("gold", list(gold_search_queries(test)))):
        rows += [row(name, expansion, by_query(source)) for expansion in EXPANSIONS]
    statuses = [item.status for item in written]
    figures = {
        "rows": rows,
        "num_documents": len(test.documents),
        "num_queries": len(test.queries),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "tokens_per_query": fmean(item.num_completion_tokens for item in written),
        "queries_per_second": len(written) / seconds,
        "training_seconds": round(trained - start, 1),
    }
    write_result(RESULTS / "expansion.json", {**provenance("python scripts/expansion.py"), **figures})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "out" / "expansion", metavar="WORK_FOLDER")
    main(parser.parse_args().folder)
