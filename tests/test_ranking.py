"""From scores to an order: gaps and mixtures by hand, and laws over drawn lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrank.errors import InputError, TooManyUnparsed
from whyrank.ranking import Fuse, FuseMethod, OnUnparsed, impute, order, parse_fuse
from whyrank.records import Judgment, ScoredDocument


def judgment(doc_id: str, score: float | None) -> Judgment:
    """Only ids, status and score matter here."""
    return Judgment(
        key=doc_id,
        query_id="q",
        doc_id=doc_id,
        status="unparsed" if score is None else "ok",
        mode="explain",
        label=None if score is None else "1",
        score=score,
        probs=None,
        label_mass=None,
        explanation="",
        passage=(0, 0),
        is_document_cut=False,
        is_query_cut=False,
        num_prompt_tokens=0,
        num_completion_tokens=0,
        template="t",
        model="m",
    )


def ranked(
    model: Sequence[float | None],
    first: Sequence[float] | None = None,
    *,
    fuse: str = "none",
    on_unparsed: OnUnparsed = "first_stage",
) -> dict[str, float]:
    """Documents a, b, c, ... in first-stage order; what comes back is in the new order."""
    doc_ids = [chr(ord("a") + index) for index in range(len(model))]
    candidates = [
        ScoredDocument("q", doc_id, rank, -float(rank) if first is None else first[rank - 1])
        for rank, doc_id in enumerate(doc_ids, start=1)
    ]
    judgments = {doc_id: judgment(doc_id, score) for doc_id, score in zip(doc_ids, model, strict=True)}
    found = order(candidates[::-1], judgments, fuse=parse_fuse(fuse), on_unparsed=on_unparsed)
    return {candidate.doc_id: rank_score for candidate, rank_score in found}


# ---- gaps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "filled"),
    [
        ([2.0, None, 1.0], [2.0, 1.5, 1.0]),
        ([2.0, None, None, 1.0], [2.0, 1.5, 1.5, 1.0]),
        ([None, None, 0.5, 2.0], [0.5, 0.5, 0.5, 2.0]),
        ([0.5, 2.0, None], [0.5, 2.0, 2.0]),
        ([None, 1.0, None, 0.0, None], [1.0, 1.0, 0.5, 0.0, 0.0]),
        ([None, None], [0.0, 0.0]),
        ([], []),
    ],
)
def test_gaps_take_the_mean_of_their_neighbours(scores: list[float | None], filled: list[float]) -> None:
    assert impute(scores) == filled


def test_an_unread_document_stays_between_its_neighbours() -> None:
    # b is imputed as (2 + 0) / 2 = 1 and so falls below d.
    assert list(ranked([2.0, None, 0.0, 1.5]).items()) == [("a", 2.0), ("d", 1.5), ("b", 1.0), ("c", 0.0)]


def test_a_missing_judgment_counts_as_unread() -> None:
    candidates = [ScoredDocument("q", doc_id, rank, 0.0) for rank, doc_id in enumerate("abc", start=1)]
    judgments = {"a": judgment("a", 0.0), "c": judgment("c", 2.0)}
    assert [candidate.doc_id for candidate, _ in order(candidates, judgments)] == ["c", "b", "a"]


def test_last_puts_unread_documents_behind_all_others_in_first_stage_order() -> None:
    found = ranked([None, 0.0, None, 2.0], on_unparsed="last")
    assert list(found.items()) == [("d", 2.0), ("b", 0.0), ("a", -1.0), ("c", -1.0)]
    assert list(ranked([None, None], on_unparsed="last")) == ["a", "b"]


def test_error_names_the_query_and_the_first_document() -> None:
    with pytest.raises(TooManyUnparsed, match=r"query q: no readable judgment for 2 of 3 documents, the first being b"):
        ranked([1.0, None, None], on_unparsed="error")
    assert list(ranked([1.0, 2.0], on_unparsed="error")) == ["b", "a"]


# ---- ties ---------------------------------------------------------------------------------------------------


def test_ties_are_broken_by_first_stage_rank_then_id() -> None:
    candidates = [ScoredDocument("q", "c", 2, 0.0), ScoredDocument("q", "b", 2, 0.0), ScoredDocument("q", "z", 1, 0.0)]
    judgments = {doc_id: judgment(doc_id, 1.0) for doc_id in "bcz"}
    for given_order in (candidates, candidates[::-1]):
        assert [candidate.doc_id for candidate, _ in order(given_order, judgments)] == ["z", "b", "c"]


# ---- mixing in the first stage ------------------------------------------------------------------------------


def test_zscore_by_hand() -> None:
    # Model 0, 1, 2: mean 1, deviation sqrt(2/3), so -z, 0, z with z = sqrt(3/2). First stage 5, 3, 1: z, 0, -z.
    z = math.sqrt(1.5)
    found = ranked([0.0, 1.0, 2.0], [5.0, 3.0, 1.0], fuse="zscore:0.75")
    assert list(found) == ["c", "b", "a"]
    assert list(found.values()) == pytest.approx([0.75 * z - 0.25 * z, 0.0, -0.75 * z + 0.25 * z])


def test_minmax_by_hand() -> None:
    # Model 0, 1, 2 becomes 0, .5, 1; the first stage 9, 8, 1 becomes 1, .875, 0.
    found = ranked([0.0, 1.0, 2.0], [9.0, 8.0, 1.0], fuse="minmax:0.4")
    assert found == pytest.approx({"b": 0.4 * 0.5 + 0.6 * 0.875, "a": 0.6, "c": 0.4})
    assert list(found) == ["b", "a", "c"]


def test_rrf_by_hand() -> None:
    # The model's order is b, c, a (b and c tied, b came first); the first stage's is a, b, c.
    found = ranked([0.0, 1.0, 1.0], fuse="rrf")
    assert found == pytest.approx({"b": 1 / 61 + 1 / 62, "a": 1 / 63 + 1 / 61, "c": 1 / 62 + 1 / 63})
    assert list(found) == ["b", "a", "c"]


@pytest.mark.parametrize("fuse", ["zscore:0.5", "minmax:0.5"])
def test_equal_scores_have_no_say(fuse: str) -> None:
    # The mean of three times .1 is not exactly .1 in floating point.
    assert list(ranked([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], fuse=fuse)) == ["c", "b", "a"]
    assert list(ranked([0.0, 1.0, 2.0], [0.1, 0.1, 0.1], fuse=fuse)) == ["c", "b", "a"]
    assert set(ranked([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], fuse=fuse).values()) == {0.0}


def test_imputed_scores_are_mixed_like_others_and_last_ones_are_not() -> None:
    # With a first stage of 2, 1, 0 and a gap in the middle: model 0, 1, 2, minmax 0, .5, 1 against 1, .5, 0.
    filled = ranked([0.0, None, 2.0], [2.0, 1.0, 0.0], fuse="minmax:0.75")
    assert filled == pytest.approx({"c": 0.75, "b": 0.5, "a": 0.25})
    last = ranked([0.0, None, 2.0], [2.0, 1.0, 0.0], fuse="minmax:0.75", on_unparsed="last")
    assert list(last.items()) == [("c", 0.75), ("a", 0.25), ("b", -0.75)]


@pytest.mark.parametrize("text", ["zscore:0.25", "minmax:1", "minmax:0", "none", "rrf"])
def test_fuse_prints_as_it_is_read(text: str) -> None:
    assert str(parse_fuse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "zscore", "zscore:", "zscore:x", "zscore:1.1", "zscore:-0.1", "minmax:nan", "rrf:0.5", "none:1", "sum:1"],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--fuse: expected none, rrf, zscore:w or minmax:w"):
        parse_fuse(text)


# ---- laws ---------------------------------------------------------------------------------------------------

# Grades in quarters, as expected labels are: exact in floating point, and with ties.
grades = st.one_of(st.none(), st.integers(0, 8).map(lambda quarters: quarters / 4))
lists = st.lists(st.tuples(grades, st.integers(-50, 50).map(float)), min_size=1, max_size=20)
methods = st.sampled_from(list(get_args(FuseMethod)))
weights = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def draw_order(drawn: list[tuple[float | None, float]], fuse: Fuse, on_unparsed: OnUnparsed) -> Mapping[str, float]:
    """The first stage is ordered by its scores, as runs are."""
    by_score = sorted(drawn, key=lambda pair: -pair[1])
    candidates = [ScoredDocument("q", f"d{index:02}", index + 1, score) for index, (_, score) in enumerate(by_score)]
    judgments = {
        candidate.doc_id: judgment(candidate.doc_id, model)
        for candidate, (model, _) in zip(candidates, by_score, strict=True)
    }
    found = order(candidates, judgments, fuse=fuse, on_unparsed=on_unparsed)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    return {candidate.doc_id: score for candidate, score in found}


@given(lists, methods, weights, st.sampled_from(["first_stage", "last"]))
def test_nothing_is_lost_or_added(
    drawn: list[tuple[float | None, float]], method: FuseMethod, weight: float, on_unparsed: OnUnparsed
) -> None:
    found = draw_order(drawn, Fuse(method, weight), on_unparsed)
    assert sorted(found) == [f"d{index:02}" for index in range(len(drawn))]
    assert all(math.isfinite(score) for score in found.values())


@given(lists, st.sampled_from(["zscore", "minmax"]), st.sampled_from(["first_stage", "last"]))
def test_the_whole_weight_gives_the_models_order(
    drawn: list[tuple[float | None, float]], method: FuseMethod, on_unparsed: OnUnparsed
) -> None:
    alone = draw_order(drawn, Fuse(), on_unparsed)
    assert list(draw_order(drawn, Fuse(method, 1.0), on_unparsed)) == list(alone)


@given(lists, st.sampled_from(["zscore", "minmax"]))
def test_no_weight_gives_the_first_stages_order(drawn: list[tuple[float | None, float]], method: FuseMethod) -> None:
    assert list(draw_order(drawn, Fuse(method, 0.0), "first_stage")) == [f"d{index:02}" for index in range(len(drawn))]


@given(lists, st.sampled_from(["zscore", "minmax"]), weights, st.integers(-1000, 1000))
def test_a_constant_on_the_first_stage_changes_nothing(
    drawn: list[tuple[float | None, float]], method: FuseMethod, weight: float, constant: int
) -> None:
    plain = draw_order(drawn, Fuse(method, weight), "first_stage")
    moved = draw_order([(model, score + constant) for model, score in drawn], Fuse(method, weight), "first_stage")
    # Documents may swap places where both have the same mixture but for rounding: the mixtures are what stays.
    assert moved == pytest.approx(plain, abs=1e-9)


@given(lists)
def test_the_first_stage_is_kept_where_nothing_can_be_read(drawn: list[tuple[float | None, float]]) -> None:
    unread: list[tuple[float | None, float]] = [(None, score) for _, score in drawn]
    for on_unparsed in ("first_stage", "last"):
        assert list(draw_order(unread, Fuse(), on_unparsed)) == [f"d{index:02}" for index in range(len(drawn))]
