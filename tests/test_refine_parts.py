"""What a refinement is made of, without a network: evidence, curriculum, alarms, options."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.test_rewards import group_of, known, rollout
from whyrank.errors import InputError
from whyrank.records import Judgment, Pair, Qrel
from whyrank.template import Template
from whyrank.training.alarms import RefineStep, find_alarm
from whyrank.training.curriculum import choose, hardness_of
from whyrank.training.evidence import gather_evidence
from whyrank.training.refine_config import EvidenceConfig, RefineConfig, read_config
from whyrank.training.rollouts import Evidence

SCALE = Template.load("almanac").scale


def judgment(query_id: str, doc_id: str, score: float, status: str = "ok") -> Judgment:
    """Only what evidence looks at."""
    return Judgment(
        key="",
        query_id=query_id,
        doc_id=doc_id,
        status=status,  # type: ignore[arg-type]
        mode="explain",
        label=str(round(score)),
        score=score,
        probs=None,
        label_mass=None,
        explanation="",
        passage=(0, 1),
        is_document_cut=False,
        is_query_cut=False,
        num_prompt_tokens=0,
        num_completion_tokens=0,
        template="",
        model="",
    )


# ---- evidence -------------------------------------------------------------------------------------------------


def test_evidence_by_hand() -> None:
    """A link is the highest label, its absence what the config says; two teachers' 1 and 2 make 1.5."""
    pairs = [Pair("q", "a", "linked"), Pair("q", "b", "negative"), Pair("q", "c", "judged", relevance=1)]
    said = [
        judgment("q", "b", 1.0),
        judgment("q", "b", 2.0),
        judgment("q", "b", 0.0, "forced"),
        judgment("r", "a", 0.5),
    ]
    config = EvidenceConfig(qrels_trust=3, link_trust=0.9, unlinked_trust=0.4, unlinked_value=0.25, consensus_trust=0.5)
    found = gather_evidence(pairs, said, [Qrel("q", "a", 0)], SCALE, config)
    assert found == {
        ("q", "a"): (Evidence(2.0, 0.9, "link"), Evidence(0.0, 3, "qrels")),
        ("q", "b"): (Evidence(0.25, 0.4, "unlinked"), Evidence(1.5, 0.5, "consensus")),
        ("q", "c"): (Evidence(1.0, 3, "qrels"),),
        ("r", "a"): (Evidence(0.5, 0.5, "consensus"),),
    }
    assert list(found) == [("q", "a"), ("q", "b"), ("q", "c"), ("r", "a")]


def test_a_trust_of_zero_leaves_a_source_out() -> None:
    pairs = [Pair("q", "a", "linked"), Pair("q", "b", "negative")]
    found = gather_evidence(pairs, [], [], SCALE, EvidenceConfig(unlinked_trust=0.0))
    assert found == {("q", "a"): (Evidence(2.0, 1.0, "link"),), ("q", "b"): ()}


def test_grades_outside_the_scale_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(q, a\): expected a relevance from 0 to 2, the template's scale, found 3"):
        gather_evidence([], [], [Qrel("q", "a", 3)], SCALE, EvidenceConfig())


# ---- curriculum -----------------------------------------------------------------------------------------------

MANY = {("q", f"d{i}"): known((0.0, 1.0)) for i in range(6)} | {("r", f"d{i}"): known((0.0, 1.0)) for i in range(6)}
UNLINKED = {ids: (Evidence(0.0, 1.0, "unlinked"),) for ids in MANY}


def chosen(seed: int, evidence: Any = UNLINKED, hardness: Any = None, **changed: Any) -> list[tuple[str, list[str]]]:
    options = {"num_queries": 1, "num_candidates": 2, "strength": 3.0} | changed
    easy = dict.fromkeys(evidence, 0.0)
    return choose(evidence, easy if hardness is None else hardness, rng=Random(seed), **options)


def test_hard_pairs_come_by_their_odds() -> None:
    """With strength 3 a hard pair counts 4, an easy one 1. First of one place: 4 of 9 of the time. Query q has the mean
    9 / 6 against 1: 3 of 5 of the time. 2,000 draws, within four standard errors."""
    hardness = dict.fromkeys(UNLINKED, 0.0) | {("q", "d0"): 1.0}
    draws = [chosen(seed, hardness=hardness, num_candidates=1)[0] for seed in range(2000)]
    of_q = [ids[0] for query_id, ids in draws if query_id == "q"]
    assert len(of_q) / 2000 == pytest.approx(3 / 5, abs=4 * math.sqrt(0.24 / 2000))
    assert of_q.count("d0") / len(of_q) == pytest.approx(4 / 9, abs=4 * math.sqrt(20 / 81 / len(of_q)))
    others = Counter(of_q)
    assert set(others) == {f"d{i}" for i in range(6)}


def test_nothing_comes_twice_and_pairs_without_evidence_never() -> None:
    evidence = UNLINKED | {("q", "d5"): (), ("s", "d0"): ()}
    found = chosen(1, evidence, num_queries=5, num_candidates=10)
    assert {query_id: len(ids) for query_id, ids in found} == {"q": 5, "r": 6}
    assert all(len(set(ids)) == len(ids) for _, ids in found)
    assert "d5" not in dict(found)["q"]
    assert chosen(1) == chosen(1)


def test_linked_documents_come_first_for_half_of_the_places() -> None:
    linked = {("q", f"d{i}"): (Evidence(2.0, 1.0, "link"),) for i in range(2)}
    for seed in range(20):
        ((_, ids),) = chosen(seed, {**{k: v for k, v in UNLINKED.items() if k[0] == "q"}, **linked}, num_candidates=5)
        assert set(ids[:2]) == {"d0", "d1"}
        assert len(ids) == 5
        ((_, ids),) = chosen(seed, {**{k: v for k, v in UNLINKED.items() if k[0] == "q"}, **linked}, num_candidates=1)
        assert set(ids) < {"d0", "d1"}


def test_new_pairs_count_as_hard() -> None:
    hardness = dict.fromkeys(UNLINKED, 0.0)
    del hardness["q", "d3"]
    draws = [ids[0] for q, ids in (chosen(s, hardness=hardness, num_candidates=1)[0] for s in range(1000)) if q == "q"]
    assert draws.count("d3") / len(draws) == pytest.approx(4 / 9, abs=0.09)


def test_hardness_by_hand() -> None:
    """d0: labels 2 and 0 where 2 is known: half wrong, but sure. d1 is right and undecided between two of three labels:
    log 2 / log 3. d2 has no label: as hard as can be. d3 has no evidence and is sure."""
    unsure = replace(rollout(1), probs=(0.5, 0.5, 0.0))
    group = group_of(
        ([rollout(2), rollout(0)], known((2, 0.5))),
        ([unsure], known((1, 3.0))),
        ([rollout(None)], ()),
        ([rollout(1)], ()),
    )
    found = hardness_of(group)
    assert found == pytest.approx(
        {("q", "d0"): 0.5, ("q", "d1"): math.log(2) / math.log(3), ("q", "d2"): 1.0, ("q", "d3"): 0.0}
    )


# ---- alarms ---------------------------------------------------------------------------------------------------


def step(number: int, **changed: Any) -> RefineStep:
    usual: dict[str, Any] = dict.fromkeys(RefineStep.__slots__, 0.0)
    usual |= {"rewards": {}, "labels": (), "length": 30.0, "label_entropy": 0.8, "num_rollouts": 100, "dev": None}
    return RefineStep(**{**usual, "step": number, **changed})


def history(*changes: dict[str, Any]) -> list[RefineStep]:
    return [step(number, **changed) for number, changed in enumerate(changes, start=1)]


CONFIG = RefineConfig(kl_limit=1.0, max_dev_drop=0.05)


def test_all_is_well() -> None:
    assert find_alarm(history(*[{}] * 8), CONFIG) is None
    assert find_alarm(history({}), CONFIG) is None


@pytest.mark.parametrize(
    ("bad", "fine", "problem"),
    [
        ({"length": 5.9}, {"length": 6.1}, "shrunk from 30.0 to 5.9"),
        ({"num_capped": 51}, {"num_capped": 50}, "hit their cap"),
        ({"label_entropy": 0.09}, {"label_entropy": 0.11}, "all documents get the same label"),
    ],
)
def test_collapse_is_told_after_five_rounds(bad: dict[str, Any], fine: dict[str, Any], problem: str) -> None:
    assert problem in str(find_alarm(history(*[{}] * 5, *[bad] * 5), CONFIG))
    assert find_alarm(history(*[{}] * 5, *[fine] * 5), CONFIG) is None
    assert find_alarm(history(*[{}] * 9, bad), CONFIG) is None


def test_distance_is_told_at_once() -> None:
    assert "1.1 nats per token" in str(find_alarm(history({}, {"kl": 1.1}), CONFIG))
    assert find_alarm(history({}, {"kl": 0.9, "kl_k3": 40.0}), CONFIG) is None


def test_gaming_is_told() -> None:
    """dev 0.6, then 0.54 twice, while rewards rise; not when they fall, after one bad ranking, or a small fall."""

    def told(*devs: float, rewards: tuple[float, ...] = (1.0, 1.1, 1.2)) -> str | None:
        return find_alarm(history(*({"dev": d, "reward": r} for d, r in zip(devs, rewards, strict=True))), CONFIG)

    assert "from 0.600 to 0.540" in str(told(0.6, 0.54, 0.54))
    assert told(0.6, 0.54, 0.54, rewards=(1.0, 0.8, 0.8)) is None
    assert told(0.6, 0.54, 0.56) is None
    assert told(0.6, 0.58, 0.54) is None
    assert told(0.54, 0.6, 0.54) is None
    assert told(0.6, 0.54, rewards=(1.0, 1.2)) is None
    assert told(0.5, 0.54, 0.54) is None


# ---- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"num_steps": 0}, "num_steps of at least 1, found 0"),
        ({"temperature": 0.0}, "temperature above 0, found 0"),
        ({"kl_coefficient": -0.1}, "kl_coefficient of at least 0, found -0.1"),
        ({"trace": 1.1}, "trace from 0 to 1, found 1.1"),
        ({"rewards": ()}, "at least one reward"),
        ({"algorithm": "grpo", "num_samples": 1}, "num_samples of at least 2, found 1"),
    ],
)
def test_impossible_options_are_refused(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        RefineConfig(**changed)


def test_trusts_are_not_negative() -> None:
    with pytest.raises(InputError, match="link_trust of at least 0, found -1"):
        EvidenceConfig(link_trust=-1)


def test_options_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "refine.toml"
    path.write_text(
        'algorithm = "grpo"\nrewards = ["agreement=1", "brevity=0.1"]\nclip = 0.1\n[evidence]\nunlinked_value = 0.2\n'
    )
    evidence = EvidenceConfig(unlinked_value=0.2)
    expected = RefineConfig(algorithm="grpo", rewards=("agreement=1", "brevity=0.1"), clip=0.1, evidence=evidence)
    assert read_config(path) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("clips = 0.1", "clips: Unexpected keyword argument"),
        ("[evidence]\nlink = 1", "evidence.link: Unexpected keyword argument"),
        ('clip = "wide"', "clip: Input should be a valid number"),
        ("clip = 2", "expected clip from 0 to 1, found 2"),
        ('algorithm = "a2c"', "algorithm: Input should be 'ppo', 'grpo' or 'rwl'"),
        ("clip", "expected TOML"),
    ],
)
def test_wrong_toml_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "refine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"refine\.toml: .*{problem}"):
        read_config(path)
