"""Rewards: every value by hand, the laws of ranking gain, and what happens to answers that cannot be used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import ir_measures
import pytest

from whyrank.errors import InputError
from whyrank.records import Status
from whyrank.training import rewards as rw
from whyrank.training.rollouts import Evidence, Rollout, RolloutCandidate, RolloutGroup


def rollout(label: int | None, why: str = "So it is.", status: Status = "ok", num_tokens: int = 4) -> Rollout:
    if label is None:
        return Rollout(why, "unparsed", None, None, None, num_tokens)
    probs = tuple(float(label == other) for other in range(3))
    return Rollout(why, status, str(label), float(label), probs, num_tokens)


def known(*evidence: tuple[float, float]) -> tuple[Evidence, ...]:
    return tuple(Evidence(value, trust, "qrels") for value, trust in evidence)


def group_of(
    *candidates: tuple[Sequence[Rollout], tuple[Evidence, ...]], passage: str = "", query: str = ""
) -> RolloutGroup:
    return RolloutGroup(
        "q",
        query,
        tuple(RolloutCandidate(f"d{i}", passage, tuple(rows), found) for i, (rows, found) in enumerate(candidates)),
        (0.0, 1.0, 2.0),
        max_tokens=16,
    )


# ---- agreement ----------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    """Evidence 2 with trust 1 and 0 with trust .5: label 2 earns 1 + 0, label 1 half of both, label 0 earns .5."""
    samples = [rollout(2), rollout(1), rollout(0), rollout(None)]
    group = group_of((samples, known((2, 1.0), (0, 0.5))), ([rollout(2)], ()))
    assert rw.agreement(group) == [1.0, 0.75, 0.5, 0.0, 0.0]


def test_agreement_is_relative_to_the_span_of_the_scale() -> None:
    """On the scale -1, 3 the label 3 is a quarter of the span from evidence 2, and -1 three quarters."""
    group = replace(group_of(([rollout(2), rollout(1)], known((2, 1.0)))), values=(-1.0, 3.0))
    (candidate,) = group.candidates
    moved = tuple(replace(r, value=v) for r, v in zip(candidate.rollouts, (3.0, -1.0), strict=True))
    group = replace(group, candidates=(replace(candidate, rollouts=moved),))
    assert rw.agreement(group) == [0.75, 0.25]


def test_belief_is_the_mean_weighted_by_trust() -> None:
    """(2 * 3 + 1 * 1) / 4 = 7 / 4."""
    candidate = group_of(([rollout(1)], known((2, 3.0), (1, 1.0)))).candidates[0]
    assert candidate.believed == 7 / 4
    assert replace(candidate, evidence=()).believed is None
    assert replace(candidate, evidence=known((2, 0.0))).believed is None


# ---- ranking gain -------------------------------------------------------------------------------------------

D = [1 / math.log2(rank + 1) for rank in range(1, 20)]


def test_tied_ndcg_by_hand() -> None:
    """Scores (2, 1, 1, 0), gains (0, 2, 0, 1): 0 first, then 2 and 0 in either order, then 1."""
    expected = ((D[1] + D[2]) * 2 / 2 + D[3]) / (2 * D[0] + D[1])
    assert rw.tied_ndcg([2, 1, 1, 0], [0, 2, 0, 1]) == pytest.approx(expected)
    assert rw.tied_ndcg([0, 1], [0, 0]) == 0.0
    # Depth 2 of four equal ones: each stands at each place a quarter of the time.
    assert rw.tied_ndcg([1, 1, 1, 1], [3, 0, 0, 1], depth=2) == pytest.approx((D[0] + D[1]) * 1 / (3 * D[0] + D[1]))
    # Ten places count: the only relevant one of eleven stands last, or first.
    assert rw.tied_ndcg([*range(11, 0, -1)], [0] * 10 + [1]) == 0.0
    assert rw.tied_ndcg([*range(11)], [0] * 10 + [1]) == 1.0
    assert rw.tied_ndcg([0, *range(11, 1, -1)], [1] * 11) == 1.0
    assert rw.tied_ndcg([*range(11, 0, -1)], [0] * 9 + [1, 0]) == pytest.approx(D[9])


def test_tied_ndcg_wants_a_gain_for_every_score() -> None:
    with pytest.raises(ValueError, match="zip"):
        rw.tied_ndcg([1, 2, 3], [1, 1])


def test_tied_ndcg_is_the_mean_of_ir_measures_over_the_orders_of_ties() -> None:
    scores, gains = [1.0, 2.0, 1.0, 1.0, 0.0], [1, 0, 2, 0, 2]
    qrels = [ir_measures.Qrel("q", f"d{i}", gain) for i, gain in enumerate(gains)]
    found = []
    for order in itertools.permutations(range(5)):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            run = [ir_measures.ScoredDoc("q", f"d{i}", float(-rank)) for rank, i in enumerate(order)]
            found.append(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10])
    assert len(found) == 6
    assert rw.tied_ndcg(scores, gains) == pytest.approx(sum(found) / 6)


def test_ranking_gain_by_hand() -> None:
    """d0 is relevant (gain 2) with mean 1, d1 is not, with mean 1, d2 believed 1 has no label and stands last.

    With the means d0 and d1 are tied. d0 alone at 2: first; at 0: second. The same for d1, the other way round.
    """
    group = group_of(
        ([rollout(2), rollout(0)], known((2, 1.0))), ([rollout(1)], ()), ([rollout(None)], known((1, 0.3)))
    )
    best = 2 * D[0] + D[1]
    tied, first, second = (D[0] + D[1] + D[2]) / best, (2 * D[0] + D[2]) / best, (2 * D[1] + D[2]) / best
    assert rw.ranking_gain(group) == pytest.approx([first - tied, second - tied, 0.0, 0.0])


def test_samples_without_label_are_passed_over() -> None:
    """The sample behind one without label still gets its number: first place against second of two, tied before."""
    group = group_of(([rollout(None), rollout(2)], known((2, 1.0))), ([rollout(2)], ()))
    assert rw.ranking_gain(group) == pytest.approx([0.0, 0.0, 0.0])
    tied = (1 + D[1]) / 2
    group = group_of(([rollout(None), rollout(2), rollout(0)], known((2, 1.0))), ([rollout(1)], ()))
    assert rw.ranking_gain(group) == pytest.approx([0.0, 1 - tied, D[1] - tied, 0.0])


def test_ranking_gain_counts_gains_from_the_lowest_label() -> None:
    """On a scale from 1 the label 1 has no gain, so the order of d0 and d1 is all."""
    group = group_of(([rollout(2), rollout(1)], known((2, 1.0))), ([rollout(1), rollout(2)], known((1, 1.0))))
    group = replace(group, values=(1.0, 2.0))
    tied = (D[0] + D[1]) / 2
    assert rw.ranking_gain(group) == pytest.approx([1 - tied, D[1] - tied, 1 - tied, D[1] - tied])


def test_documents_without_evidence_have_no_gain() -> None:
    group = group_of(([rollout(2)], ()), ([rollout(0)], known((1, 1.0))))
    lone = replace(group, candidates=group.candidates[:1])
    assert rw.ranking_gain(group) == [0.0, 0.0]
    assert rw.ranking_gain(lone) == [0.0]


# ---- form, quotations, length -------------------------------------------------------------------------------


def test_format_by_hand() -> None:
    samples = [rollout(1), rollout(1, " \n"), rollout(1, status="low_mass"), rollout(1, status="forced"), rollout(None)]
    assert rw.format(group_of((samples, ()))) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_evidence_by_hand() -> None:
    """Case, white space and closing marks are passed over; single words and invented quotations do not count."""
    said = [
        'The text says "Yellow  leaves," and “too little light”.',  # both are there
        'It says "yellow leaves" and "green apples grow".',  # one of two
        "It says «green apples».",
        'It says "yellow".',  # one word
        "It's what doesn't stand there, isn't it?",  # apostrophes
        'It says "yellowleaves too".',  # words run together are others
        'It says "lightX" and "too little lightX".',  # a letter is no closing mark
        "It says 'too little light.' and ‘my fern’.",  # one from the query
    ]
    group = group_of(
        ([rollout(1, why) for why in said], ()),
        passage="Yellow leaves: \n too little light.",
        query="Why does my fern fade?",
    )
    assert rw.evidence(group) == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_quotations_are_sought_in_the_own_passage() -> None:
    group = group_of(([rollout(1, 'It says "yellow leaves".')], ()), ([rollout(1, 'It says "yellow leaves".')], ()))
    first, second = group.candidates
    group = replace(group, candidates=(replace(first, passage="yellow leaves"), second))
    assert rw.evidence(group) == [1.0, 0.0]


def test_brevity_by_hand() -> None:
    """4 of 16 tokens; none; as many as the cap; more, which a respelled end can be."""
    samples = [rollout(1, num_tokens=size) for size in (4, 0, 16, 17)]
    assert rw.brevity(group_of((samples, ()))) == [0.75, 1.0, 0.0, 0.0]


def test_length_costs_by_hand() -> None:
    """Usual 10, price 2: 14 tokens are .4 off, of which .1 is free: .6. 6 tokens as much. 11 cost nothing."""
    group = group_of(([rollout(1, num_tokens=size) for size in (14, 6, 11, 10)], ()))
    assert rw.length_costs(group, 10.0, 2.0) == pytest.approx([0.6, 0.6, 0.0, 0.0])


# ---- together -----------------------------------------------------------------------------------------------


def named(**weights: float) -> list[rw.WeightedReward]:
    return [rw.WeightedReward(name, rw.REWARDS[name], weight) for name, weight in weights.items()]


def test_rewards_add_up_and_unusable_answers_are_punished() -> None:
    """agreement 1, brevity .75, weights 2 and .4: 2.3; a capped or unreadable answer gets -1 whatever else it earns."""
    samples = [rollout(2), rollout(2, status="forced"), rollout(None), rollout(2, status="low_mass")]
    found = rw.reward_group(group_of((samples, known((2, 1.0)))), named(agreement=2.0, brevity=0.4), unreadable=-1.0)
    assert found.total == pytest.approx((2.3, -1.0, -1.0, 2.3))
    assert found.components == {"agreement": (1.0, 1.0, 0.0, 1.0), "brevity": (0.75, 0.75, 0.75, 0.75)}


def test_rewards_are_in_the_order_of_the_rollouts() -> None:
    group = group_of(([rollout(0), rollout(1)], known((0, 1.0))), ([rollout(2)], known((2, 1.0))))
    found = rw.reward_group(group, named(agreement=1.0), unreadable=-1.0).total
    assert found == (1.0, 0.5, 1.0)
    assert group.of_candidates(found) == [[1.0, 0.5], [1.0]]
    assert [candidate.doc_id for candidate, _ in group.pairs] == ["d0", "d0", "d1"]


@pytest.mark.parametrize(("values", "problem"), [([1.0], "one number for each of the 2"), ([1.0, math.nan], "finite")])
def test_wrong_rewards_are_named(values: list[float], problem: str) -> None:
    group = group_of(([rollout(0), rollout(1)], ()))
    broken = rw.WeightedReward("mine", lambda _: values, 1.0)
    with pytest.raises(InputError, match=f"'mine': expected {problem}"):
        rw.reward_group(group, [broken], unreadable=-1.0)


def test_rewards_are_found_by_name() -> None:
    for name, reward in rw.REWARDS.items():
        assert rw.find_reward(name) is reward
        assert rw.find_reward(f"whyrank.training.rewards:{name}") is reward
    assert set(rw.REWARDS) == {"agreement", "ranking_gain", "format", "evidence", "brevity"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("agree", "expected a reward among agreement, ranking_gain, format, evidence, brevity, or module:function"),
        ("no.such.module:f", "reward 'no.such.module:f': No module named"),
        ("math:no_such", "reward 'math:no_such': module 'math' has no attribute"),
        ("math:pi", "reward 'math:pi': expected a function of a rollout group, found a float"),
        (":f", "reward ':f'"),
        ("math:a:b", "reward 'math:a:b': module 'math' has no attribute 'a:b'"),
    ],
)
def test_unknown_rewards_are_named(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        rw.find_reward(name)


def test_weights_are_read() -> None:
    assert rw.parse_reward("agreement") == ("agreement", 1.0)
    assert rw.parse_reward("a.b:c=-0.25") == ("a.b:c", -0.25)
    assert rw.parse_reward("model:a=b=2") == ("model:a=b", 2.0)
    with pytest.raises(InputError, match="expected a number after agreement=, found 'much'"):
        rw.parse_reward("agreement=much")
    with pytest.raises(InputError, match="expected a finite weight, found inf"):
        rw.parse_reward("agreement=inf")
