"""`whyrank calibrate`: a checkpoint and development pairs in; what mode `auto` rests on, in its card, out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from whyrank.calibration import COVERAGE, Calibration, fit_calibration
from whyrank.checkpoint import CARD_NAME, read_card, write_card
from whyrank.errors import InputError
from whyrank.judging import Judge, JudgingCounts, judge_into
from whyrank.progress import Progress
from whyrank.records import Judgment
from whyrank.stages.failures import require_answers
from whyrank.stages.rerank import DIRECT_JUDGMENTS, JUDGMENTS, Candidates
from whyrank.store import Manifest

__all__ = ["Calibrated", "calibrate_files", "check_calibratable"]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration did. `num_left_out` pairs could not be read in one of the modes; `mean_shift` and
    `mean_distance` are the means of what a reason added to a score and of its absolute value, in label units."""

    card: Path
    calibration: Calibration
    counts: JudgingCounts
    num_left_out: int
    mean_shift: float
    mean_distance: float
    seconds: float

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values for `--json`."""
        counts: dict[str, JsonValue] = dict(self.counts.to_counts())
        return {
            "card": str(self.card),
            "calibration": self.calibration.to_dict(),
            "counts": counts,
            "left_out": self.num_left_out,
            "mean_shift": self.mean_shift,
            "mean_distance": self.mean_distance,
            "seconds": self.seconds,
        }


def check_calibratable(folder: Path) -> None:
    """Refuse what cannot be calibrated before it is loaded.

    Raises:
        InputError: it is not the folder of a checkpoint that whyrank trained.
        TemplateMismatch: it was not trained for both modes.
    """
    if not (folder / CARD_NAME).is_file():
        raise InputError(
            f"expected a folder with a checkpoint of whyrank distill at {folder}, found no {CARD_NAME} there: that is "
            "where a calibration is kept"
        )
    read_card(folder / CARD_NAME).check_both_modes()


def calibrate_files(
    candidates: Candidates, judge: Judge, folder: Path, out: Path, manifest: Manifest, *, coverage: float = COVERAGE
) -> Calibrated:
    """Judge all pairs in both modes into `out/judgments-direct.jsonl` and `out/judgments.jsonl`, and write what reasons
    did to the scores into the card of the checkpoint in `folder`. No relevance labels are needed.

    Killed at any moment, it continues where it was when called again.

    Args:
        candidates: pairs like those that will be ranked, but not those that quality is measured on.
        judge: the checkpoint in mode `explain`.
        folder: of the checkpoint; only its `whyrank.json` is changed.
        out: gets the judgments and the manifest.
        manifest: of this job.
        coverage: see `fit_calibration`.

    Raises:
        InputError: no pair could be read in both modes, or see `judge_into`.
        GenerationError: every request failed.
    """
    start = time.perf_counter()
    check_calibratable(folder)
    counts = JudgingCounts()
    with Progress(f"judging with {judge.generator.name}", 2 * candidates.num_pairs) as progress:
        direct_judge = replace(judge, mode="direct")
        direct = _scores(judge_into(out / DIRECT_JUDGMENTS, direct_judge, candidates.pairs(), counts), progress)
        explained = _scores(judge_into(out / JUDGMENTS, judge, candidates.pairs(), counts), progress)
    require_answers(counts.statuses["error"], counts.num_judgments, "see the judgments in " + str(out))
    pairs = [(direct[ids], score) for ids, score in explained.items() if ids in direct]
    if not pairs:
        raise InputError(f"none of the {candidates.num_pairs} pairs could be read in both modes; see {out}")
    values = judge.template.scale.values
    calibration = fit_calibration(
        pairs,
        lowest=min(values),
        highest=max(values),
        weights=judge.generator.name.rpartition("@")[2],
        coverage=coverage,
    )
    write_card(folder, replace(read_card(folder / CARD_NAME), calibration=calibration))
    num_pairs = len(dict.fromkeys((query.query_id, document.doc_id) for query, document in candidates.pairs()))
    shifts = [explained - direct for direct, explained in pairs]
    done = Calibrated(
        card=folder / CARD_NAME,
        calibration=calibration,
        counts=counts,
        num_left_out=num_pairs - len(pairs),
        mean_shift=sum(shifts) / len(shifts),
        mean_distance=sum(map(abs, shifts)) / len(shifts),
        seconds=round(time.perf_counter() - start, 3),
    )
    figures: dict[str, JsonValue] = {"mean_shift": done.mean_shift, "mean_distance": done.mean_distance}
    all_counts = {**counts.to_counts(), "num_left_out": done.num_left_out}
    manifest.finished(start, counts=all_counts, calibration=calibration.to_dict(), **figures).write(out)
    return done


def _scores(judgments: Iterable[Judgment], progress: Progress) -> dict[tuple[str, str], float]:
    """The scores that could be read, by query_id and doc_id."""
    found = {}
    for judgment in judgments:
        progress.advance()
        if judgment.score is not None:
            found[judgment.query_id, judgment.doc_id] = judgment.score
    return found
