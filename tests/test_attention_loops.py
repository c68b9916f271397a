"""Attention multiplied in bfloat16 against torch's own in float32, over the same keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whyrank.generators.hf import attention_products
from whyrank.generators.hf.attention_loops import QUERIES_AT_ONCE, attend_several_narrow
from whyrank.generators.hf.attention_products import Rule
from whyrank.generators.hf.packing import Packing, Pool, Span, Store

NUM_HEADS, NUM_GROUPS, SIZE, NUM_SHARED, CAPACITY = 2, 3, 16, 70, 600


def kept(num_tokens: int, offset: float = 0.0) -> dict[int, tuple[Tensor, Tensor]]:
    shape = (NUM_HEADS, num_tokens, SIZE)
    return {0: ((torch.randn(shape) + offset).bfloat16(), torch.randn(shape).bfloat16())}


def prompt(num_tokens: int, at: int, num_asking: int, offset: float = 0.0) -> tuple[Tensor, Span]:
    torch.manual_seed(7)
    shared = Store(NUM_SHARED, NUM_SHARED, kept(NUM_SHARED, offset))
    own = Store(CAPACITY, at + num_tokens, kept(CAPACITY, offset))
    span = Span(0, num_tokens, own, at, (shared,), num_asking)
    return torch.randn(NUM_HEADS * NUM_GROUPS, num_asking, SIZE), span


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize(
    ("num_tokens", "at", "num_asking"),
    [(9, 0, 9), (9, 4, 1), (2 * QUERIES_AT_ONCE + 3, 0, 2 * QUERIES_AT_ONCE + 3), (300, 0, QUERIES_AT_ONCE)],
    ids=["short", "last token behind others", "longer than two parts", "last tokens of many"],
)
def test_narrow_attention_is_off_by_its_rounding(num_tokens: int, at: int, num_asking: int, window: int | None) -> None:
    """Scores, weights and sums are each rounded to 8 bits: together less than two hundredths of the values."""
    queries, span = prompt(num_tokens, at, num_asking)
    rule = Rule(0.25, window, None, None)
    packing = Packing(Pool(1, CAPACITY), [], [span], torch.device("cpu"))
    wanted = attention_products.attend_several(queries, span, packing, 0, rule)
    found = attend_several_narrow(queries, span, 0, rule)
    assert found.shape == wanted.shape == (NUM_HEADS * NUM_GROUPS, num_asking, SIZE)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 0.02
    assert (found - wanted).abs().mean() < 0.006 * wanted.abs().mean()


def test_what_all_keys_have_in_common_costs_no_precision() -> None:
    """Keys with a large bias, as some models have: their scores are of the order of hundreds, which 8 bits hold to a
    unit only. Without taking the common part away the error would be about the size of the values."""
    queries, span = prompt(100, 0, 100, offset=30.0)
    rule = Rule(0.25, None, None, None)
    packing = Packing(Pool(1, CAPACITY), [], [span], torch.device("cpu"))
    wanted = attention_products.attend_several(queries, span, packing, 0, rule)
    found = attend_several_narrow(queries, span, 0, rule)
    assert (found - wanted).abs().max() < 0.02
