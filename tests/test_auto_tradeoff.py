"""The lists and the simulation of the script that measures mode `auto`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from whyrank.almanac import Collection, build
from whyrank.almanac.gold import gold_judgments
from whyrank.calibration import Calibration
from whyrank.demo.systems import candidates_of
from whyrank.generators.overlap import Overlap
from whyrank.judging import Judge
from whyrank.template import Template
from whyrank.waves import Auto

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
DOMAINS = ("bicycle", "bread", "houseplants")


@pytest.fixture(scope="module")
def tradeoff() -> Iterator[ModuleType]:
    """Scripts import each other by name, as they do when one of them is run."""
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("auto_tradeoff")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def own() -> Collection:
    return build("dev", 6, domains=DOMAINS)


def test_strangers_are_of_other_domains_and_irrelevant(tradeoff: ModuleType, own: Collection) -> None:
    mixed = tradeoff.with_strangers(own, 20)
    assert {**mixed.labels, **own.labels} == mixed.labels
    for query in mixed.queries:
        shown, before = mixed.candidates[query.query_id], own.candidates[query.query_id]
        assert len(shown) == len(set(shown)) == 24 + 20
        assert [doc_id for doc_id in shown if doc_id in before] != list(before)  # shuffled in
        domain = mixed.query_facts[query.query_id].domain
        strangers = set(shown) - set(before)
        assert all(mixed.document_facts[doc_id].domain != domain for doc_id in strangers)
        assert {mixed.labels[query.query_id, doc_id] for doc_id in strangers} == {0}
        # What is said of the query does not depend on the document.
        assert len({mixed.reasons[query.query_id, doc_id].query_cause for doc_id in shown}) == 1
    assert mixed == tradeoff.with_strangers(own, 20)


def test_a_student_is_taught_some_of_both(tradeoff: ModuleType, own: Collection) -> None:
    template = Template.load("almanac")
    mixed = tradeoff.with_strangers(own, 20)
    taught = list(tradeoff.mixed_judgments(own, mixed, template, num_irrelevant=2, num_strangers=3))
    pairs = [(judgment.query_id, judgment.doc_id) for judgment in taught]
    assert len(set(pairs)) == len(pairs)
    num_relevant = sum(label > 0 for label in own.labels.values())
    assert Counter(pair in own.labels for pair in pairs) == {True: num_relevant + 6 * 2, False: 6 * 3}
    assert all(judgment.label == str(mixed.labels[pair]) for judgment, pair in zip(taught, pairs, strict=True))


def test_the_simulation_by_hand(tradeoff: ModuleType, own: Collection) -> None:
    """Direct and explained scores are gold: with every ceiling at the gold label, the rule asks for those that may be
    among the first two, and all that draw level; each takes 5 tokens. Without a reason for the rest nothing is lost."""
    template = Template.load("almanac")
    gold = {(j.query_id, j.doc_id): replace(j, num_completion_tokens=5) for j in gold_judgments(own, template)}
    direct = {ids: replace(j, mode="direct", num_completion_tokens=0) for ids, j in gold.items()}
    exact = Calibration((0.0, 2.0), (0.0, 2.0), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0), 0.9, 9, "m")
    found = {"explain": gold, "direct": direct}
    judge = Judge(template, Overlap())
    perfect = dict.fromkeys((query.query_id for query in own.queries), 1.0)
    row = tradeoff._simulate(own, judge, Auto(exact, 2), found, perfect)
    num_best = [sum(own.labels[q.query_id, d] == 2 for d in own.candidates[q.query_id]) for q in own.queries]
    assert min(num_best) >= 2
    assert row["explained"] == sum(num_best) / 6  # all that could draw level with the second
    assert row["tokens"] == pytest.approx(5 * row["explained"])
    assert (row["nDCG@10"], row["loss"], row["loss_interval"], row["cut_short"]) == (1.0, 0.0, (0.0, 0.0), 0.0)
    none = tradeoff._simulate(own, judge, Auto(exact, 2, 5), found, perfect)  # a reason may take 64
    assert (none["tokens"], none["explained"], none["cut_short"], none["nDCG@10"]) == (0.0, 0.0, 1.0, 1.0)
    assert candidates_of(own).num_pairs == len(gold)
