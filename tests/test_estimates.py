"""Estimates: values worked by hand, and laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whyrank.errors import InputError
from whyrank.estimates import (
    Expected,
    Hardware,
    Price,
    Work,
    cost,
    distilling,
    expanding,
    hours,
    judging,
    refining,
    tiny_parameters,
)
from whyrank.training.config import TinyConfig

# 10 + 20 + 30 = 60 tokens are read for a pair; 4 + 1 are written.
SMALL = Expected(instruction_tokens=10, query_tokens=20, document_tokens=30, explanation_tokens=4)
MACHINE = Hardware("a machine", peak_tflops=1.0, reading=0.5, writing=0.1, training=0.25)


def test_beginnings_are_read_once_for_a_query_or_billed_for_every_pair() -> None:
    # Two queries with three documents each: 2 x (10 + 20) + 6 x 30, or 6 x 60.
    assert judging(SMALL, 2, 6) == Work(6, 60 + 180, 6 * 5)
    assert judging(SMALL, 2, 6, is_shared=False) == Work(6, 360, 30)


def test_samples_are_written_each_and_billed_with_their_prompts() -> None:
    assert judging(SMALL, 2, 6, num_samples=3) == Work(6, 240, 90)
    assert judging(SMALL, 2, 6, num_samples=3, is_shared=False) == Work(6, 1080, 90)


def test_auto_may_come_to_both_answers() -> None:
    direct, explained = judging(SMALL, 1, 1, "direct"), judging(SMALL, 1, 1)
    assert (direct.num_written, explained.num_written) == (1, 5)
    assert judging(SMALL, 1, 1, "auto").num_written == 6


def test_expanding_reads_questions_and_writes_search_queries() -> None:
    assert expanding(replace(SMALL, search_query_tokens=7), 3) == Work(0, 3 * 30, 21)


def test_distilling_trains_on_prompts_and_answers() -> None:
    assert distilling(SMALL, 100) == Work(100, num_trained=100 * 65)
    assert distilling(SMALL, 100, "direct") == Work(100, num_trained=100 * 61)


def test_refining_draws_scores_twice_and_learns() -> None:
    # Two rounds of 3 queries with 4 documents: 24 pairs, 6 beginnings. Drawing reads 6 x 30 + 24 x 30 = 900 tokens. A
    # row of a pair with 2 samples is 60 + 2 x 5 = 70 tokens, scored by two networks and trained on 3 times.
    assert refining(SMALL, 2, 3, 4, 2, 3) == Work(24, 900 + 2 * 24 * 70, 24 * 2 * 5, 3 * 24 * 70)


def test_cost_is_by_the_million() -> None:
    assert cost(Work(1, 2_000_000, 500_000, 7), Price(0.6, 0.8)) == pytest.approx(1.2 + 0.4)


def test_hours_on_a_machine() -> None:
    # 1e9 parameters on 1e12 operations per second. Reading 9e5 tokens: 2 x 1e9 x 9e5 / 5e11 = 3,600 s. Writing 1.8e5:
    # 2 x 1e9 x 1.8e5 / 1e11 = 3,600 s. Training 1.5e5: 6 x 1e9 x 1.5e5 / 2.5e11 = 3,600 s, or 2,400 s by an adapter.
    work = Work(1, 900_000, 180_000, 150_000)
    assert hours(work, 1e9, MACHINE) == pytest.approx(3.0)
    assert hours(work, 1e9, MACHINE, is_adapter=True) == pytest.approx(2 + 2 / 3)


@given(st.lists(st.tuples(*[st.integers(0, 10**9)] * 4), min_size=1, max_size=4))
def test_time_and_money_of_a_whole_are_those_of_its_parts(parts: list[tuple[int, int, int, int]]) -> None:
    works = [Work(*part) for part in parts]
    price = Price(0.3, 1.1)
    assert cost(sum(works, Work()), price) == pytest.approx(sum(cost(work, price) for work in works))
    whole = hours(sum(works, Work()), 1e6, MACHINE)
    assert whole == pytest.approx(sum(hours(work, 1e6, MACHINE) for work in works))


def test_tiny_parameters_are_those_of_the_network_that_is_made() -> None:
    from whyrank.training.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(["why do leaves turn brown"], 300)
    shape = TinyConfig(vocab_size=300, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48)
    model = tiny_model(tokenizer, shape, seed=0)
    assert tiny_parameters(len(tokenizer), 32, 3, 48) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("values", [{"peak_tflops": 0.0}, {"reading": 0.0}, {"writing": 1.1}, {"training": -0.1}])
def test_hardware_outside_its_ranges_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Hardware("x", **{"peak_tflops": 1.0, **values})


def test_negative_expectations_are_refused() -> None:
    with pytest.raises(InputError, match="query_tokens of at least 0, found -1"):
        Expected(query_tokens=-1)
