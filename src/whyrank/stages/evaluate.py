"""`whyrank evaluate`: runs and qrels in, measures out."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import islice
from pathlib import Path

from whyrank.datasets import Run, read_excluded, read_qrels, read_run, without_excluded
from whyrank.errors import InputError
from whyrank.evaluation import Evaluation, Ties, evaluate, judgments_beside
from whyrank.stages import warn_of_bad_lines
from whyrank.store import BadLines

__all__ = ["evaluate_files"]


def evaluate_files(
    runs: Sequence[Path],
    qrels: Path,
    measures: Sequence[str],
    *,
    ties: Ties = "trec_eval",
    allow_unparsed: float = 0.01,
    excluded: Path | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Evaluation:
    """Measure the runs; each is named by its path as given.

    Args:
        excluded: documents that are taken out of every run before it is measured.
        limit: only the first so many queries of the qrels.

    Raises:
        InputError: see `evaluation.evaluate`; also if a run is given twice.
        TooManyUnparsed: see `evaluation.evaluate`.
    """
    if len(set(runs)) < len(runs):
        raise InputError(f"expected each run once, found {', '.join(map(str, runs))}")
    bad = BadLines() if skip_bad else None
    judged = read_qrels(qrels, bad=bad)
    left_out: set[str] = set()
    if limit is not None:
        left_out = set(islice(dict.fromkeys(qrel.query_id for qrel in judged), limit, None))
        judged = [qrel for qrel in judged if qrel.query_id not in left_out]
    banned = read_excluded(excluded, bad=bad) if excluded else {}
    found = {str(path): _restricted(without_excluded(read_run(path, bad=bad), banned)[0], left_out) for path in runs}
    warn_of_bad_lines(bad)
    judgments = {str(path): beside for path in runs if (beside := judgments_beside(path)) is not None}
    return evaluate(judged, found, measures, allow_unparsed=allow_unparsed, judgments=judgments, ties=ties)


def _restricted(run: Run, left_out: Set[str]) -> Run:
    """Without the queries that --limit leaves out, which are not to be counted as having no qrels."""
    return {query_id: documents for query_id, documents in run.items() if query_id not in left_out}
