"""What is known of a pair's label before anybody asks the student: links, teachers, people, each with its trust.

A document that no answer links to is not thereby irrelevant. What it is worth, and how far that is trusted, is an
option like any other (`unlinked_value`, `unlinked_trust`), so that a run says what it assumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

from whyrank.errors import InputError
from whyrank.records import Judgment, Pair, Qrel
from whyrank.template import Scale
from whyrank.training.examples import is_teachable
from whyrank.training.refine_config import EvidenceConfig
from whyrank.training.rollouts import Evidence

__all__ = ["gather_evidence"]

PairIds = tuple[str, str]


def gather_evidence(
    pairs: Iterable[Pair],
    judgments: Iterable[Judgment],
    qrels: Iterable[Qrel],
    scale: Scale,
    config: EvidenceConfig,
) -> Mapping[PairIds, tuple[Evidence, ...]]:
    """All evidence by `(query_id, doc_id)`, in the order of the pairs; pairs that only qrels or teachers know follow.

    Args:
        pairs: `linked` is worth the highest label, `negative` is `unlinked_value`, `judged` its own relevance.
        judgments: teachers' words; those that are not `ok` are left out, several of one pair are averaged.
        qrels: people's grades, on the template's scale.
        scale: what labels are worth.
        config: values and trusts; a trust of 0 leaves a source out, and its pairs without evidence.

    Raises:
        InputError: a grade lies outside the scale.
    """
    found: dict[PairIds, list[Evidence]] = {}
    for pair in pairs:
        rows = found.setdefault((pair.query_id, pair.doc_id), [])
        if pair.relation == "linked":
            rows.append(Evidence(max(scale.values), config.link_trust, "link"))
        elif pair.relation == "negative":
            rows.append(Evidence(config.unlinked_value, config.unlinked_trust, "unlinked"))
        elif pair.relevance is not None:
            rows.append(_judged(pair.query_id, pair.doc_id, pair.relevance, scale, config))
    said: dict[PairIds, list[float]] = defaultdict(list)
    for judgment in judgments:
        if is_teachable(judgment) and judgment.score is not None:
            said[judgment.query_id, judgment.doc_id].append(judgment.score)
    for ids, scores in said.items():
        found.setdefault(ids, []).append(Evidence(fmean(scores), config.consensus_trust, "consensus"))
    for qrel in qrels:
        judged = _judged(qrel.query_id, qrel.doc_id, qrel.relevance, scale, config)
        found.setdefault((qrel.query_id, qrel.doc_id), []).append(judged)
    return {ids: tuple(evidence for evidence in rows if evidence.trust > 0) for ids, rows in found.items()}


def _judged(query_id: str, doc_id: str, relevance: int, scale: Scale, config: EvidenceConfig) -> Evidence:
    if not min(scale.values) <= relevance <= max(scale.values):
        raise InputError(
            f"({query_id}, {doc_id}): expected a relevance from {min(scale.values):g} to {max(scale.values):g}, the "
            f"template's scale, found {relevance}"
        )
    return Evidence(float(relevance), config.qrels_trust, "qrels")
