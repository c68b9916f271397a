"""Several answers about one pair made into one judgment: samples into their mean, passages into the best.

Pure functions. An answer that could not be read takes no part in a mean and wins nothing; it is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from whyrank.records import Judgment, Status
from whyrank.store import content_key
from whyrank.template import Scale

__all__ = ["best_passage", "mean_of_samples", "sample_seed"]

LEAST_LABEL_MASS = 0.5  # below it the model was not answering the question; status `low_mass`


def mean_of_samples(samples: Sequence[Judgment], scale: Scale) -> Judgment:
    """One judgment from sampled judgments of the same text; a single one is returned as it is.

    `score`, `probs` and `label_mass` are the means over the samples that could be read; without `probs` of all of
    them, `probs` is `None`. `label` is the most probable one of the mean, where a sample without `probs` counts as
    sure of its label. The explanation is that of the sample whose score lies nearest the mean, the first of equals.
    The status is `low_mass` where the mean label mass is, and otherwise that of the explanation. Tokens are summed.

    If no sample could be read, neither can the pair: `error` if a request failed, so that it is tried again, and
    otherwise `unparsed`. If only some failed, `error` keeps the first one's exception.
    """
    if len(samples) == 1:
        return samples[0]
    readable = [sample for sample in samples if sample.score is not None]
    if readable:
        mean = fmean(_score(sample) for sample in readable)
        shown = min(readable, key=lambda sample: abs(_score(sample) - mean))
        base = _averaged(readable, shown, scale)
    else:
        base = _representative(samples)
    return replace(_totalled(base, samples), num_samples=len(samples))


def best_passage(passages: Sequence[Judgment], num_best: int, scale: Scale) -> Judgment:
    """One judgment from those of a document's passages, in any order; a single one is returned as it is.

    Explanation and `passage` are those of the passage with the highest score, the earliest of equals. With a
    `num_best` of 2, `score`, `probs`, `label` and `label_mass` are the means over the two best, as for samples.
    Passages that could not be read are passed over; if all are, so is the document.
    """
    if len(passages) == 1:
        return passages[0]
    in_order = sorted(passages, key=lambda passage: passage.passage)
    readable = [passage for passage in in_order if passage.score is not None]
    best = sorted(readable, key=lambda passage: -_score(passage))[:num_best]
    base = _averaged(best, best[0], scale) if best else _representative(in_order)
    return replace(_totalled(base, in_order), num_passages=len(passages))


def sample_seed(seed: int, number: int) -> int:
    """The seed of sample `number`, counted from 0. The first has the seed itself, so that one sample is what a single
    judgment is; the others' lie anywhere in 31 bits, so that neighbouring seeds have no samples in common."""
    return seed if number == 0 else int(content_key(str(seed), str(number))[:8], 16) >> 1


def _score(judgment: Judgment) -> float:
    assert judgment.score is not None
    return judgment.score


def _averaged(readable: Sequence[Judgment], shown: Judgment, scale: Scale) -> Judgment:
    """`shown` with the means over `readable`, of which it is one."""
    probs = [judgment.probs for judgment in readable if judgment.probs is not None]
    masses = [judgment.label_mass for judgment in readable if judgment.label_mass is not None]
    sure = [judgment.probs or tuple(float(label == judgment.label) for label in scale.labels) for judgment in readable]
    mean = [fmean(column) for column in zip(*sure, strict=True)]
    mass = fmean(masses) if len(masses) == len(readable) else None
    status: Status = "low_mass" if mass is not None and mass < LEAST_LABEL_MASS else shown.status
    return replace(
        shown,
        status=status,
        label=scale.labels[max(range(len(mean)), key=mean.__getitem__)],
        score=fmean(_score(judgment) for judgment in readable),
        probs=tuple(mean) if len(probs) == len(readable) else None,
        label_mass=mass,
    )


def _representative(judgments: Sequence[Judgment]) -> Judgment:
    """What stands for judgments of which none could be read: the first that failed, or else the first."""
    return next((judgment for judgment in judgments if judgment.status == "error"), judgments[0])


def _totalled(base: Judgment, judgments: Sequence[Judgment]) -> Judgment:
    return replace(
        base,
        num_prompt_tokens=sum(judgment.num_prompt_tokens for judgment in judgments),
        num_completion_tokens=sum(judgment.num_completion_tokens for judgment in judgments),
        num_unreadable=sum(judgment.num_unread_answers for judgment in judgments),
        error=next((judgment.error for judgment in judgments if judgment.error is not None), None),
    )
