"""Samples and passages made into one judgment: by hand, and by the laws of means and maxima."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrank.combining import best_passage, mean_of_samples, sample_seed
from whyrank.records import Judgment, Status
from whyrank.template import Scale

SCALE = Scale(("0", "1", "2"), (0.0, 1.0, 2.0))


def answer(
    why: str,
    probs: tuple[float, float, float],
    *,
    mass: float = 1.0,
    status: Status = "ok",
    passage: tuple[int, int] = (0, 9),
) -> Judgment:
    """Probabilities in halves, quarters and eighths, so that sums are exact."""
    return Judgment(
        key="k",
        query_id="q",
        doc_id="d",
        status=status,
        mode="explain",
        label=str(probs.index(max(probs))),
        score=probs[1] + 2 * probs[2],
        probs=probs,
        label_mass=mass,
        explanation=why,
        passage=passage,
        is_document_cut=False,
        is_query_cut=False,
        num_prompt_tokens=10,
        num_completion_tokens=3,
        template="t",
        model="m",
    )


def without_probs(judgment: Judgment) -> Judgment:
    """As a chat endpoint gives it: the label alone."""
    assert judgment.label is not None
    return replace(judgment, probs=None, label_mass=None, score=float(judgment.label))


def unread(status: Status, what: str = "?", passage: tuple[int, int] = (0, 9)) -> Judgment:
    nothing = replace(answer("", (1.0, 0.0, 0.0), status=status, passage=passage), label=None, score=None)
    nothing = replace(nothing, probs=None, label_mass=None)
    return replace(nothing, error=what) if status == "error" else replace(nothing, unreadable=what)


SURE_0, SURE_1, SURE_2 = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


# ---- samples --------------------------------------------------------------------------------------------------


def test_the_mean_of_three_samples_by_hand() -> None:
    # Scores 0.5, 2 and 1.25, mean 1.25, so the third explains. Probabilities: (.5 + 0 + .25) / 3 = .25,
    # (.5 + 0 + .25) / 3 = .25, (0 + 1 + .5) / 3 = .5. Masses: (.5 + 1 + .75) / 3 = .75.
    samples = [
        answer("a", (0.5, 0.5, 0.0), mass=0.5),
        answer("b", SURE_2, mass=1.0),
        answer("c", (0.25, 0.25, 0.5), mass=0.75),
    ]
    found = mean_of_samples(samples, SCALE)
    assert (found.score, found.probs, found.label, found.label_mass) == (1.25, (0.25, 0.25, 0.5), "2", 0.75)
    assert (found.explanation, found.status) == ("c", "ok")
    assert (found.num_samples, found.num_passages, found.num_unreadable) == (3, 1, 0)
    assert (found.num_prompt_tokens, found.num_completion_tokens) == (30, 9)


def test_the_first_of_equally_near_samples_explains_and_the_first_of_equal_labels_is_taken() -> None:
    # Scores 0 and 2 lie 1 from their mean; labels 0 and 2 have half of the probability each.
    found = mean_of_samples([answer("low", SURE_0), answer("high", SURE_2)], SCALE)
    assert (found.score, found.label, found.explanation) == (1.0, "0", "low")
    assert mean_of_samples([answer("high", SURE_2), answer("low", SURE_0)], SCALE).explanation == "high"


def test_without_distributions_labels_are_averaged_and_the_most_frequent_one_is_taken() -> None:
    labels = [
        without_probs(answer(why, probs)) for why, probs in zip("abcd", (SURE_0, SURE_2, SURE_2, SURE_1), strict=True)
    ]
    found = mean_of_samples(labels, SCALE)
    assert (found.score, found.label, found.probs, found.label_mass) == (1.25, "2", None, None)
    assert found.explanation == "d"  # 1 is nearer to 1.25 than 2 is


def test_one_sample_without_a_distribution_leaves_none_for_the_pair() -> None:
    # The labels' mean: (.5 + 0) / 2, (.5 + 0) / 2, (0 + 1) / 2.
    found = mean_of_samples([answer("a", (0.5, 0.5, 0.0)), without_probs(answer("b", SURE_2))], SCALE)
    assert (found.score, found.label, found.probs, found.label_mass) == (1.25, "2", None, None)


@pytest.mark.parametrize(
    ("masses", "statuses", "expected"),
    [
        ((0.75, 0.75, 0.75), ("ok", "ok", "forced"), "ok"),
        ((0.75, 0.75, 0.75), ("forced", "ok", "ok"), "forced"),  # the first explains: all scores are equal
        ((0.875, 0.25, 0.25), ("ok", "low_mass", "low_mass"), "low_mass"),  # 1.375 / 3 < .5
        ((0.875, 0.375, 0.25), ("ok", "low_mass", "low_mass"), "ok"),  # 1.5 / 3 = .5 is enough
        ((0.25, 1.0, 1.0), ("low_mass", "ok", "ok"), "low_mass"),  # the explanation that is shown
    ],
)
def test_status_is_that_of_the_mean_mass_and_of_the_explanation(
    masses: tuple[float, ...], statuses: tuple[Status, ...], expected: Status
) -> None:
    samples = [answer("w", SURE_1, mass=mass, status=status) for mass, status in zip(masses, statuses, strict=True)]
    assert mean_of_samples(samples, SCALE).status == expected


def test_unreadable_samples_are_counted_and_take_no_part() -> None:
    samples = [unread("unparsed"), answer("a", SURE_2), unread("error", "busy"), answer("b", SURE_1)]
    found = mean_of_samples(samples, SCALE)
    assert (found.score, found.probs, found.explanation, found.status) == (1.5, (0.0, 0.5, 0.5), "a", "ok")
    assert (found.num_samples, found.num_unreadable, found.num_completion_tokens) == (4, 2, 12)
    # The failure is kept, so that the pair can be tried again; text that could not be read stands only where all did.
    assert (found.error, found.unreadable) == ("busy", None)


def test_samples_of_which_none_can_be_read() -> None:
    found = mean_of_samples([unread("unparsed", "x"), unread("unparsed", "y")], SCALE)
    assert (found.status, found.label, found.score, found.probs) == ("unparsed", None, None, None)
    assert (found.unreadable, found.error, found.num_unreadable) == ("x", None, 2)
    found = mean_of_samples([unread("unparsed", "x"), unread("error", "busy"), unread("error", "gone")], SCALE)
    assert (found.status, found.score, found.unreadable, found.error) == ("error", None, None, "busy")
    assert found.num_unreadable == 3


# ---- passages -------------------------------------------------------------------------------------------------


def passages() -> list[Judgment]:
    """Scores .5, 1.5, 1.5 and 1. Made anew each time: other tests count the judgments that are alive."""
    return [
        answer("first", (0.5, 0.5, 0.0), passage=(0, 9)),  # .5
        answer("second", (0.0, 0.5, 0.5), passage=(9, 20), mass=0.25, status="low_mass"),  # 1.5
        answer("third", (0.25, 0.0, 0.75), passage=(20, 31)),  # 1.5
        answer("fourth", (0.0, 1.0, 0.0), passage=(31, 40)),  # 1
    ]


def test_the_best_passage_speaks_for_the_document_and_the_earliest_of_equals() -> None:
    for order in permutations(passages()):
        found = best_passage(order, 1, SCALE)
        assert found == replace(
            passages()[1], num_passages=4, num_prompt_tokens=40, num_completion_tokens=12, num_unreadable=0
        )


def test_the_mean_of_the_two_best_by_hand() -> None:
    # Of the second and third: (0 + .25) / 2, (.5 + 0) / 2, (.5 + .75) / 2, and masses (.25 + 1) / 2.
    for order in permutations(passages()):
        found = best_passage(order, 2, SCALE)
        assert (found.score, found.probs, found.label) == (1.5, (0.125, 0.25, 0.625), "2")
        assert (found.explanation, found.passage, found.num_passages) == ("second", (9, 20), 4)
        assert (found.label_mass, found.status) == (0.625, "low_mass")  # of the passage that is shown
    found = best_passage([passages()[0], passages()[3]], 2, SCALE)
    assert (found.score, found.explanation, found.passage) == (0.75, "fourth", (31, 40))


def test_unreadable_passages_do_not_sink_a_document() -> None:
    mixed = [unread("unparsed", passage=(0, 9)), unread("error", "busy", passage=(9, 20)), passages()[3]]
    for num_best in (1, 2):
        found = best_passage(mixed, num_best, SCALE)
        assert (found.score, found.passage, found.status, found.error) == (1.0, (31, 40), "ok", "busy")
        assert (found.num_passages, found.num_unreadable) == (3, 2)
    nothing = best_passage(mixed[1::-1], 1, SCALE)
    assert (nothing.status, nothing.score, nothing.num_unreadable, nothing.error) == ("error", None, 2, "busy")
    nothing = best_passage([unread("unparsed", "b", (9, 20)), unread("unparsed", "a", (0, 9))], 1, SCALE)
    assert (nothing.status, nothing.unreadable, nothing.passage) == ("unparsed", "a", (0, 9))


def test_samples_of_passages() -> None:
    # Two passages with two samples each; one sample of the second cannot be read, so its mean is its other's score.
    first = mean_of_samples([answer("a", SURE_1), answer("b", SURE_0)], SCALE)
    second = mean_of_samples([unread("unparsed"), answer("c", SURE_2, passage=(9, 20))], SCALE)
    found = best_passage([first, second], 1, SCALE)
    assert (found.score, found.explanation, found.passage) == (2.0, "c", (9, 20))
    assert (found.num_samples, found.num_passages, found.num_unreadable, found.num_answers) == (2, 2, 1, 4)
    both = best_passage([first, second], 2, SCALE)
    assert both.score == 1.25  # of .5 and 2


# ---- laws -----------------------------------------------------------------------------------------------------


def test_a_single_answer_is_returned_as_it_is() -> None:
    for one in (passages()[1], unread("unparsed"), unread("error")):
        assert mean_of_samples([one], SCALE) is one
        assert best_passage([one], 2, SCALE) is one


eighths = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted)
distributions = eighths.map(lambda cuts: (cuts[0] / 8, (cuts[1] - cuts[0]) / 8, (8 - cuts[1]) / 8))


@given(st.lists(distributions, min_size=2, max_size=9))
def test_means_and_maxima(drawn: list[tuple[float, float, float]]) -> None:
    samples = [answer(str(number), probs) for number, probs in enumerate(drawn)]
    mean = mean_of_samples(samples, SCALE)
    # The expected label of the mean distribution is the mean of the expected labels.
    assert mean.probs is not None
    assert mean.score == pytest.approx(SCALE.expected(mean.probs), abs=1e-12)
    assert mean.score == pytest.approx(fmean(sample.score or 0.0 for sample in samples), abs=1e-12)
    backwards = mean_of_samples(samples[::-1], SCALE)
    assert (backwards.score, backwards.probs, backwards.label) == (mean.score, mean.probs, mean.label)
    passages = [replace(sample, passage=(number, number + 1)) for number, sample in enumerate(samples)]
    best, two = best_passage(passages, 1, SCALE), best_passage(passages[::-1], 2, SCALE)
    scores = sorted(sample.score or 0.0 for sample in samples)
    assert best.score == scores[-1]
    assert two.score == (scores[-1] + scores[-2]) / 2
    assert best.passage == two.passage == passages[[sample.score for sample in samples].index(scores[-1])].passage


def test_seeds_of_samples_differ_repeat_and_begin_with_the_seed_itself() -> None:
    seeds = [[sample_seed(seed, number) for number in range(64)] for seed in (0, 1, 2, 1 << 40)]
    assert [of_one[0] for of_one in seeds] == [0, 1, 2, 1 << 40]
    assert len({seed for of_one in seeds for seed in of_one}) == 4 * 64
    assert seeds[1] == [sample_seed(1, number) for number in range(64)]
    assert all(0 <= seed < 1 << 31 for of_one in seeds for seed in of_one[1:])
