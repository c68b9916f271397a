"""`whyrank distill`: judgments in, a checkpoint out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

from whyrank.datasets import read_corpus, read_qrels, read_queries
from whyrank.errors import InputError
from whyrank.records import Document, Judgment, Query
from whyrank.stages.expand import written_by
from whyrank.stages.following import followed
from whyrank.stages.rerank import read_candidates
from whyrank.store import Manifest, read_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig
from whyrank.training.distill import Distilled, Step, distill
from whyrank.training.examples import is_teachable
from whyrank.training.ranks import ranks
from whyrank.training.sampling import shares_of_sources
from whyrank.training.validation import DevSet

__all__ = ["DevFiles", "distill_files"]

MEND = "Remove the line: training on the others does without it"


@dataclass(frozen=True, slots=True)
class DevFiles:
    """What is ranked while training: a run, its texts and labels, and how many candidates of each query to rank."""

    run: Path
    queries: Path | None
    corpus: Path | None
    qrels: Path
    top_k: int

    @classmethod
    def of(
        cls, run: Path | None, queries: Path | None, corpus: Path | None, qrels: Path | None, top_k: int
    ) -> Self | None:
        """The files, or `None` if there are none.

        Raises:
            InputError: some were given, but neither a run nor its labels are among them.
        """
        if run is None or qrels is None:
            if (run, queries, corpus, qrels) != (None, None, None, None):
                raise InputError("expected --dev-run and --dev-qrels together (and --dev-queries and --dev-corpus)")
            return None
        return cls(run, queries, corpus, qrels, top_k)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them, for a manifest."""
        return tuple(path for path in (self.run, self.queries, self.corpus, self.qrels) if path is not None)

    def read(self) -> DevSet:
        """Read them. Queries of the run that are not judged are left out.

        Raises:
            InputError: a file cannot be read, a text is missing, or a judged query is not in the run.
        """
        found = read_candidates(self.run, corpus=self.corpus, queries=self.queries, top_k=self.top_k)
        qrels = tuple(read_qrels(self.qrels))
        judged = {qrel.query_id for qrel in qrels}
        asked = tuple(query for query in found.queries if query.query_id in judged)
        lines = {query.query_id: found.run[query.query_id] for query in asked}
        ranked = {line.doc_id for run in lines.values() for line in run}
        return DevSet(asked, {doc_id: found.documents[doc_id] for doc_id in ranked}, lines, qrels)


def distill_files(
    judgments: Sequence[Path],
    queries: Sequence[Path],
    corpora: Sequence[Path],
    template: Template,
    out: Path,
    config: DistillConfig,
    manifest: Manifest,
    *,
    dev: DevFiles | None = None,
    shares: Sequence[float] | None = None,
    search_queries: Sequence[Path] = (),
    limit: int | None = None,
    has_board: bool = False,
) -> Distilled:
    """Train a student on judgments from one or more files, into `out`; `out/metrics.jsonl` holds the curves.

    `config`, the template and the other options are added to the manifest's config.

    Args:
        dev: ranked while training; the best student is kept.
        shares: proportion in which the judgments files are drawn, one number for each; by default every judgment is
            drawn equally often.
        search_queries: files of whyrank expand, to teach writing such, too.
        limit: only the first so many judgments.
        has_board: write the curves for TensorBoard, too, in `out/tensorboard`.

    Raises:
        InputError: a file cannot be read, or a judgment's texts are in none of the files.
        MissingExtra: TensorBoard is asked for and not installed.
    """
    start = time.perf_counter()
    resolved = {**asdict(config), "template": template.version, "limits": asdict(template.limits), "limit": limit}
    resolved |= {"source_weights": list(shares) if shares else None, "dev_top_k": dev.top_k if dev else None}
    manifest = replace(manifest, config={**manifest.config, **json.loads(json.dumps(resolved))})
    taught = ((n, found) for n, path in enumerate(judgments) for found in read_jsonl(path, Judgment, advice=MEND))
    numbered = list(islice(taught, limit))
    known = [judgment for _, judgment in numbered]
    weights = None
    if shares:
        teachable = Counter(number for number, judgment in numbered if is_teachable(judgment))
        often = shares_of_sources([teachable[number] for number in range(len(judgments))], shares)
        weights = [often[number] for number, _ in numbered]
    wanted = {judgment.doc_id for judgment in known}
    asked: dict[str, Query] = {}
    for path in queries:
        for query in read_queries(path):
            _add(asked, query.query_id, query, path)
    documents: dict[str, Document] = {}
    for path in corpora:
        for document in read_corpus(path):
            if document.doc_id in wanted:
                _add(documents, document.doc_id, document, path)
    dev_set = dev.read() if dev else None
    to_search = list(written_by(search_queries))

    def note(step: Step) -> str:
        ranked = "" if step.dev_ndcg is None else f", dev nDCG@10 {step.dev_ndcg:.3f}"
        return f"loss {step.loss:.3f}{ranked}"

    with followed(f"distilling into {out}", config.num_steps, out, manifest, note, has_board=has_board) as on_step:
        result = distill(
            known,
            asked,
            documents,
            template,
            out,
            config,
            weights=weights,
            search_queries=to_search,
            dev=dev_set,
            on_step=on_step,
        )
    counts = {
        "num_judgments": len(known),
        "num_examples": result.num_examples,
        "num_left_out": result.num_left_out,
        "num_too_long": result.num_too_long,
        "num_search_examples": result.num_search_examples,
        "best_step": result.best_step,
    }
    if ranks().is_main:
        manifest.finished(start, counts=counts, num_parameters=result.num_parameters).write(out)
    return result


T = TypeVar("T", Query, Document)


def _add(known: dict[str, T], record_id: str, record: T, path: Path) -> None:
    if known.setdefault(record_id, record).text != record.text:
        raise InputError(
            f"{path}: {record_id!r} has another text in a file given before; give the files that belong "
            "to the judgments"
        )
