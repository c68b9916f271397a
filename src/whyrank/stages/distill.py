"""`whyrank distill`: judgments in, a checkpoint out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from whyrank.datasets import read_corpus, read_queries
from whyrank.errors import InputError
from whyrank.progress import Progress
from whyrank.records import Document, Judgment, Query
from whyrank.store import Manifest, read_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig
from whyrank.training.distill import Distilled, Step, distill

__all__ = ["distill_files"]

MEND = "Remove the line: training on the others does without it"


def distill_files(
    judgments: Sequence[Path],
    queries: Sequence[Path],
    corpora: Sequence[Path],
    template: Template,
    out: Path,
    config: DistillConfig,
    manifest: Manifest,
    *,
    limit: int | None = None,
) -> Distilled:
    """Train a student on judgments from one or more files, into `out`; `out/metrics.jsonl` holds the curves.

    `config`, the template and `limit` are added to the manifest's config.

    Raises:
        InputError: a file cannot be read, or a judgment's texts are in none of the files.
    """
    start = time.perf_counter()
    resolved = {**asdict(config), "template": template.version, "limits": asdict(template.limits), "limit": limit}
    manifest = replace(manifest, config={**manifest.config, **json.loads(json.dumps(resolved))})
    taught = (judgment for path in judgments for judgment in read_jsonl(path, Judgment, advice=MEND))
    known = list(islice(taught, limit))
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
    has_begun = False
    with Progress(f"distilling into {out}", config.num_steps) as progress:

        def on_step(step: Step) -> None:
            nonlocal has_begun
            if not has_begun:  # not earlier: a folder that is refused keeps the manifest of its own checkpoint
                manifest.write(out)
                progress.advance(step.step - 1, is_from_before=True)
                has_begun = True
            progress.advance(note=f"loss {step.loss:.3f}")

        result = distill(known, asked, documents, template, out, config, on_step=on_step)
    counts = {
        "num_judgments": len(known),
        "num_examples": result.num_examples,
        "num_left_out": result.num_left_out,
    }
    manifest.finished(start, counts=counts, num_parameters=result.num_parameters).write(out)
    return result


T = TypeVar("T", Query, Document)


def _add(known: dict[str, T], record_id: str, record: T, path: Path) -> None:
    if known.setdefault(record_id, record).text != record.text:
        raise InputError(
            f"{path}: {record_id!r} has another text in a file given before; give the files that belong "
            "to the judgments"
        )
