"""Compiled loops against their definitions, in float64 and by torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from whyrank.generators.hf.compiling import compiling, is_compiled
from whyrank.generators.hf.kernels import (
    Activation,
    Seen,
    _exp,
    attend_rows,
    best_tokens,
    gated_rows,
    norm_rows,
    weigh_scores,
    write_rows,
)

NUM_SLOTS, NUM_HEADS, NUM_GROUPS, CAPACITY, SIZE, VALUE_SIZE = 5, 3, 2, 41, 24, 17


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr("whyrank.generators.hf.threads.WORTH_A_THREAD", 1)
    yield
    torch.set_num_threads(before)


def numbers(*found: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(found, dtype=np.int64)


def random_attention(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(4, NUM_HEADS, NUM_GROUPS, SIZE, generator=generator) * 2
    keys = torch.randn(NUM_SLOTS, NUM_HEADS, CAPACITY, SIZE, generator=generator)
    values = torch.randn(NUM_SLOTS, NUM_HEADS, CAPACITY, VALUE_SIZE, generator=generator)
    return queries, keys.to(dtype), values.to(dtype)


def attended(parts: list[Seen], dtype: torch.dtype = torch.float32, **rule: float) -> tuple[Tensor, Tensor]:
    queries, keys, values = random_attention(dtype)
    out = torch.zeros(len(queries), NUM_HEADS, NUM_GROUPS, VALUE_SIZE)
    total = torch.full(out.shape[:3], -torch.inf)
    for seen in parts:
        attend_rows(queries, keys, values, seen, out, total, scaling=0.3, softcap=rule.get("softcap"))
    return out, total


def by_definition(
    row: int, slot: int, start: int, end: int, dtype: torch.dtype, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax of scaled scores over the keys that are seen, in float64."""
    queries, keys, values = (tensor.double() for tensor in random_attention(dtype))
    scores = torch.einsum("hgs,hts->hgt", queries[row], keys[slot, :, start:end]) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hgt,htv->hgv", scores.softmax(-1), values[slot, :, start:end]), scores.logsumexp(-1)


# Four queries, of which the third is not asked, in other slots; one sees a single key, one a window.
SEEN = Seen(numbers(0, 3, 1), numbers(2, 0, 4), numbers(0, 20, 7), numbers(41, 21, 30))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_what_its_definition_says(dtype: torch.dtype, softcap: float | None) -> None:
    out, total = attended([SEEN], dtype, **({} if softcap is None else {"softcap": softcap}))
    for row, slot, start, end in zip(*SEEN, strict=True):
        wanted, wanted_total = by_definition(row, slot, start, end, dtype, softcap)
        torch.testing.assert_close(out[row].double(), wanted, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(total[row].double(), wanted_total, atol=2e-6, rtol=2e-6)
    assert not out[2].any()
    assert torch.isneginf(total[2]).all()


@pytest.mark.parametrize("places", [[0, 41], [0, 1, 41], [0, 12, 13, 40, 41], [0, 0, 20, 41]])
def test_keys_may_come_in_parts_and_in_any_order(places: list[int]) -> None:
    whole = attended([Seen(numbers(1), numbers(3), numbers(0), numbers(41))])
    parts = [Seen(numbers(1), numbers(3), numbers(start), numbers(end)) for start, end in pairwise(places)]
    for order in (parts, parts[::-1]):
        torch.testing.assert_close(attended(order), whole, atol=2e-6, rtol=2e-6)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """Scores of 10 000 and -10 000: the first takes all the weight, and the log-sum-exp is the score itself."""
    queries = torch.full((1, 1, 1, 1), 100.0)
    keys = torch.tensor([-100.0, 100.0, -100.0]).view(1, 1, 3, 1)
    values = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    out, total = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), -torch.inf)
    attend_rows(queries, keys, values, Seen(*map(numbers, (0, 0, 0, 3))), out, total, scaling=1.0)
    assert (out.item(), total.item()) == (2.0, 10_000.0)


def test_what_is_not_a_number_stays_so() -> None:
    """A broken model must not look like a sound one."""
    queries, keys, values = random_attention()
    queries[1, 0, 0, 5] = torch.nan
    out, total = torch.zeros(4, NUM_HEADS, NUM_GROUPS, VALUE_SIZE), torch.full((4, NUM_HEADS, NUM_GROUPS), -torch.inf)
    attend_rows(queries, keys, values, Seen(*map(numbers, (1, 0, 0, 20))), out, total, scaling=0.3)
    assert out[1, 0, 0].isnan().all()
    assert not out[1, 1:].isnan().any()


def test_exponentials_are_right_to_four_millionths() -> None:
    """The error grows with the number of halvings that are split off; near 0, where weights matter, it is rounding."""
    values = torch.cat([-torch.logspace(-6, 1.93, 5000), torch.tensor([0.0, -200.0, -torch.inf])])
    found = torch.tensor([_exp(value) for value in values.numpy()])
    wanted = values.double().exp()
    error = ((found.double() - wanted) / wanted)[:-2].abs()
    assert error[values[:-2] > -1].max() < 3e-7
    assert error.max() < 5e-6
    assert found[-3] == 1
    assert (found[-2:] < 1.2e-38).all()  # the smallest number of full precision stands for all that are smaller


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("window", [None, 1, 10, 46, 1000])
def test_scores_become_weights_of_what_is_seen(window: int | None) -> None:
    """A softmax in float64 over each query's own stretch of the keys, rounded once, at the end. What is not asked for
    stays as it is."""
    generator = torch.Generator().manual_seed(5)
    scores = (torch.randn(3, 5, 50, generator=generator) * 20).bfloat16()
    wanted = torch.zeros(3, 4, 50, dtype=torch.float64)
    for query in range(4):
        seen = slice(0 if window is None else max(0, 45 + query - window), 45 + query)
        wanted[:, query, seen] = (scores[:, query, seen].double() * 0.3).softmax(dim=-1)
    untouched = scores[:, 4].clone()
    weigh_scores(scores, 45, 4, window=window, scaling=0.3)
    assert torch.equal(scores[:, 4], untouched)
    found = scores[:, :4].double()
    assert (found - wanted).abs().le(wanted * 2**-8 + 1e-9).all()
    assert torch.equal(found == 0, wanted == 0)


def test_weights_are_rounded_as_torch_rounds() -> None:
    """Softmax of equal scores: a third, a fifth, a seventh, in bfloat16 to the nearest."""
    for num_seen in (1, 3, 5, 7):
        scores = torch.full((1, 1, 8), 2.0, dtype=torch.bfloat16)
        weigh_scores(scores, num_seen, 1, window=None, scaling=1.0)
        wanted = (torch.ones(num_seen) / num_seen).to(torch.bfloat16)
        assert torch.equal(scores[0, 0, :num_seen], wanted)


def test_a_score_that_is_not_a_number_spoils_its_query_alone() -> None:
    scores = torch.zeros(1, 2, 6, dtype=torch.bfloat16)
    scores[0, 0, 4] = torch.nan
    weigh_scores(scores, 5, 2, window=None, scaling=1.0)
    assert scores[0, 0, :5].isnan().all()
    assert not scores[0, 1].isnan().any()


@pytest.mark.usefixtures("_threads")
def test_norms_are_what_their_definition_says() -> None:
    rows, gain = torch.randn(2, 5, 33) * torch.tensor([1e-3, 1e3])[:, None, None], torch.randn(33)
    rows[0, 0] = 0
    wanted = gain.double() * rows.double() / (rows.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm_rows(rows, gain, 1e-6).double(), wanted, atol=1e-6, rtol=1e-6)
    turned = rows.transpose(0, 1)
    assert torch.equal(norm_rows(turned, gain, 1e-6), norm_rows(rows, gain, 1e-6).transpose(0, 1))


@pytest.mark.usefixtures("_threads")
def test_the_first_of_the_best_tokens_is_chosen() -> None:
    """Against torch in float64; of two that are alike the first, as `argmax` does."""
    logits = torch.randn(5, 301, generator=torch.Generator().manual_seed(2)) * 10
    logits[1, [7, 200]] = 90.0
    logits[2] = -torch.inf
    logits[2, 300] = 3.0
    logits[3] = -70_000.0 + torch.arange(301)
    kept = logits.clone()
    tokens, log_probs = best_tokens(logits)
    assert torch.equal(logits, kept)
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()
    assert tokens[1] == 7
    wanted = logits.double().log_softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(log_probs.double(), wanted, atol=2e-6, rtol=2e-6)


def test_tokens_are_chosen_the_same_way_without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    tokens, log_probs = best_tokens(logits)
    monkeypatch.setattr("whyrank.generators.hf.kernels.is_compiled", lambda tensor: False)
    plain_tokens, plain_log_probs = best_tokens(logits)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(log_probs, plain_log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_where_they_belong(dtype: torch.dtype) -> None:
    pool, rows = torch.zeros(4, 2, 6, 3, dtype=dtype), torch.randn(2, 3, 2).transpose(1, 2)
    expected = pool.clone()
    expected[3, :, 1], expected[0, :, 5] = rows[0], rows[1]
    write_rows(pool, rows, torch.tensor([3, 0]), torch.tensor([1, 5]))
    assert torch.equal(pool, expected)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("activation", ["swish", "gelu"])
def test_gated_rows_are_off_by_half_a_step_at_most(activation: Activation) -> None:
    """Gates of -1000 and 1000 among them, where exponentials overflow if they are not watched."""
    gate, up, scales = torch.randn(2, 7, 33) * 4, torch.randn(2, 7, 33), torch.rand(2, 7, 1) + 0.1
    gate[0, 0, :2] = torch.tensor([-1000.0, 1000.0])
    gate[1, 1] = 0
    small, found = gated_rows(activation, gate, up, scales)
    real = silu if activation == "swish" else lambda rows: gelu(rows, approximate="tanh")
    wanted = real((gate * scales).double()) * up * scales
    assert small.dtype == torch.uint8
    assert found.shape == scales.shape
    assert ((small.double() - 128) * found - wanted).abs().le(found * 0.501).all()
    assert (small[1, 1] == 128).all()


def test_a_function_without_a_place_to_keep_it_is_compiled_all_the_same() -> None:
    """As where nothing may be written: numba finds no place for what comes from no file, either."""
    made: dict[str, object] = {}
    exec("def twice(number):\n    return 2 * number", made)
    twice = made["twice"]
    assert callable(twice)
    assert compiling({})(twice)(21) == 42


def test_what_is_not_contiguous_is_refused_and_not_copied() -> None:
    """What is written into a copy would be lost."""
    gate = torch.zeros(2, 3, 4).transpose(0, 1)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        gated_rows("swish", gate, gate, torch.ones(3, 2, 1))


def test_loops_are_for_float32_on_cpus() -> None:
    assert is_compiled(torch.zeros(1))
    assert not is_compiled(torch.zeros(1, dtype=torch.bfloat16))
    assert not is_compiled(torch.zeros(1, device="meta"))
