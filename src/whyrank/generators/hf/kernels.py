"""Loops that torch has no fast form of, compiled for this processor by numba when they are first called.

`attend_rows` is attention of sequences that write one token each. Almost all its time goes into reading keys and values
once, and torch's kernels, made for many queries per sequence, read them at less than half the speed (docs/log.md). The
others put into one pass over memory what torch does in several: weights of scores, 8-bit rows and a gated MLP's product
on the way to them, norms, the choice of the next token.

What is compiled is kept beside this file or in the user's cache. Everything is computed in float32, on the CPU; keys
and values may be kept in bfloat16, of which half as many bytes have to be read.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic, overload
from torch import Tensor

from whyrank.generators.hf.compiling import Array, Numbers, array, compiling, is_compiled, matrix
from whyrank.generators.hf.threads import in_threads

__all__ = [
    "Activation",
    "Seen",
    "attend_rows",
    "best_tokens",
    "gated_rows",
    "norm_rows",
    "quantize_rows",
    "weigh_scores",
    "write_rows",
]

Activation = Literal["swish", "gelu"]
LARGEST, ZERO = 127, 128  # of 8-bit rows: they are stored without a sign, because oneDNN's products of those are faster
float32 = np.float32

# Without the interpreter's lock. Sums may be taken in any order, a product and a sum in one step; infinities and NaN
# stay what they are. Division by 0 gives infinity, as in numpy: raising an exception would take a test per number.
compiled = compiling({"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"})


# ---- bfloat16 ------------------------------------------------------------------------------------------------


@intrinsic
def _float_of_bits(typing_context, bits):  # type: ignore[no-untyped-def]  # called with the second argument alone
    """The float32 whose bits these are."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), code


def _wide(number: Any) -> Any:
    """A float32 as it is; of a bfloat16, which comes as an integer, the float32 that begins with its bits."""
    raise NotImplementedError("known to compiled code only")


@overload(_wide)
def _wide_compiled(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Integer):
        return lambda number: _float_of_bits(np.int32(number) << np.int32(16))  # type: ignore[call-arg]
    return lambda number: number


@compiled
def _put_narrow(row: Array, numbers: Array) -> None:
    """Write float32 numbers into a row of bfloat16, to which they are rounded."""
    bits = numbers.view(np.int32)
    for place in range(len(numbers)):
        is_odd = (bits[place] >> np.int32(16)) & np.int32(1)  # to the nearest, halves to the even one
        row[place] = np.int16((bits[place] + np.int32(0x7FFF) + is_odd) >> np.int32(16))


# ---- attention -------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Which queries see which keys: query `rows[i]` those of `slots[i]` from `starts[i]` up to `ends[i]`; int64."""

    rows: Numbers
    slots: Numbers
    starts: Numbers
    ends: Numbers


def attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Seen,
    out: Tensor,
    total: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> None:
    """Attention of one query per sequence and head; adds to what `out` and `total` hold of other keys already.

    Parts are put together by their log-sum-exp (Milakov & Gimelshein 2018, arXiv 1805.02867), which is exact.

    Args:
        queries: `(sequences, key/value heads, queries per head, size)`, float32, and contiguous like all others.
        keys: `(slots, key/value heads, capacity, size)`, float32 or bfloat16.
        values: `(slots, key/value heads, capacity, value size)`, likewise.
        seen: which queries see which of the keys.
        out: `(sequences, key/value heads, queries per head, value size)`, changed in place.
        total: log-sum-exp of the scores, `(sequences, key/value heads, queries per head)`; minus infinity where nothing
            has been seen yet. Changed in place.
        scaling: factor of the scores.
        softcap: scores are squeezed into (-softcap, softcap) by tanh.
    """
    arrays = array(queries), array(keys), array(values)
    num_read = int((seen.ends - seen.starts).sum()) * keys.shape[1] * (keys.shape[3] + values.shape[3])
    scales = float32(scaling), float32(softcap or 0.0)
    found: tuple[Array, Array] = out.numpy(), total.numpy()
    in_threads(num_read, lambda i, n: _attend(*arrays, *seen, *scales, *found, i, n))


def write_rows(pool: Tensor, rows: Tensor, slots: Tensor, places: Tensor) -> None:
    """Put `rows[i]`, `(heads, size)`, into `pool[slots[i]]`, `(heads, capacity, size)`, at `places[i]`."""
    _write(array(pool), array(rows.to(pool.dtype).contiguous()), slots.numpy(), places.numpy())


@compiled
def _write(pool: Array, rows: Array, slots: Array, places: Array) -> None:
    for i in range(len(rows)):
        for head in range(rows.shape[1]):
            pool[slots[i], head, places[i]] = rows[i, head]


@compiled
def _attend(
    queries: Array,
    keys: Array,
    values: Array,
    rows: Array,
    slots: Array,
    starts: Array,
    ends: Array,
    scaling: np.float32,
    softcap: np.float32,
    out: Array,
    total: Array,
    first: int,
    step: int,
) -> None:
    _, num_heads, num_groups, _ = queries.shape
    scores = np.empty(keys.shape[2], float32)
    found = np.empty(values.shape[3], float32)
    for item in range(first, num_heads * len(rows), step):
        # Head by head: of what many sequences see, one head's keys stay in the caches.
        head, i = item // len(rows), item % len(rows)
        num = ends[i] - starts[i]
        if num <= 0:
            continue
        own_keys = keys[slots[i], head, starts[i] : ends[i]]
        own_values = values[slots[i], head, starts[i] : ends[i]]
        for group in range(num_groups):
            weights = scores[:num]
            _products(queries[rows[i], head, group], own_keys, weights)
            top, weight = _weigh_row(weights, scaling, softcap)
            _weighted_sum(weights, own_values, found)
            before, own = total[rows[i], head, group], top + math.log(weight)
            both = max(before, own) + math.log1p(math.exp(-abs(before - own)))
            keep, add = float32(math.exp(before - both)), float32(math.exp(own - both) / weight)
            for place in range(len(found)):
                out[rows[i], head, group, place] = keep * out[rows[i], head, group, place] + add * found[place]
            total[rows[i], head, group] = both


@compiled
def _products(query: Array, keys: Array, scores: Array) -> None:
    """The product of a query with each key; four at a time, so that additions need not wait for each other."""
    rest = len(keys) // 4 * 4
    for token in range(0, rest, 4):
        key, key1, key2, key3 = keys[token], keys[token + 1], keys[token + 2], keys[token + 3]
        sum_ = sum1 = sum2 = sum3 = float32(0)
        for place in range(len(query)):
            number = query[place]
            sum_ += number * _wide(key[place])
            sum1 += number * _wide(key1[place])
            sum2 += number * _wide(key2[place])
            sum3 += number * _wide(key3[place])
        scores[token], scores[token + 1], scores[token + 2], scores[token + 3] = sum_, sum1, sum2, sum3
    for token in range(rest, len(keys)):
        sum_ = float32(0)
        for place in range(len(query)):
            sum_ += query[place] * _wide(keys[token, place])
        scores[token] = sum_


@compiled
def _weighted_sum(weights: Array, values: Array, found: Array) -> None:
    """The sum of weighted values; four at a time, so that it is read and written a quarter as often."""
    found[:] = 0
    rest = len(values) // 4 * 4
    for token in range(0, rest, 4):
        value, value1, value2, value3 = values[token], values[token + 1], values[token + 2], values[token + 3]
        weight, weight1, weight2, weight3 = weights[token], weights[token + 1], weights[token + 2], weights[token + 3]
        for place in range(len(found)):
            first = weight * _wide(value[place]) + weight1 * _wide(value1[place])
            found[place] += first + weight2 * _wide(value2[place]) + weight3 * _wide(value3[place])
    for token in range(rest, len(values)):
        for place in range(len(found)):
            found[place] += weights[token] * _wide(values[token, place])


def weigh_scores(scores: Tensor, first_end: int, num_asking: int, *, window: int | None, scaling: float) -> None:
    """Turn scores into weights, in place: a softmax over what each query sees, 0 for the rest.

    Args:
        scores: products of queries and keys, `(heads, queries, keys)`, bfloat16, contiguous.
        first_end: how many keys the first query sees; each sees one more than the query before it.
        num_asking: how many of the queries are asked; scores of the others are left as they are.
        window: how many keys a query sees at most, the last ones.
        scaling: factor of the scores.
    """
    most = scores.shape[2] if window is None else window
    arrays = array(scores), first_end, num_asking, most, float32(scaling)
    in_threads(scores.numel(), lambda i, n: _weigh(*arrays, i, n))


@compiled
def _weigh(
    scores: Array, first_end: int, num_asking: int, window: int, scaling: np.float32, first: int, step: int
) -> None:
    wide = np.empty(scores.shape[2], float32)
    for item in range(first, len(scores) * num_asking, step):
        head, query = item // num_asking, item % num_asking
        end = first_end + query
        start = max(end - window, 0)
        row, weights = scores[head, query], wide[: end - start]
        seen = row[start:end]  # an index of its own: with sums for indices, loops do many at once no more
        for place in range(len(weights)):
            weights[place] = _wide(seen[place])
        _, sum_ = _weigh_row(weights, scaling, float32(0))
        share = float32(1) / sum_
        for place in range(len(weights)):
            weights[place] *= share
        row[:start] = 0
        row[end:] = 0
        _put_narrow(seen, weights)


@compiled
def _weigh_row(scores: Array, scaling: np.float32, softcap: np.float32) -> tuple[Any, Any]:
    """In place, exp of each score minus the largest one; returns that one and the sum."""
    for place in range(len(scores)):
        scores[place] *= scaling
    if softcap > 0:
        for place in range(len(scores)):
            scores[place] = softcap * math.tanh(scores[place] / softcap)
    top = _largest(scores)
    sum_ = float32(0)
    for place in range(len(scores)):
        weight = _exp(scores[place] - top)
        scores[place] = weight
        sum_ += weight
    return top, sum_


@compiled
def _largest(row: Array) -> Any:
    """Of float32 numbers, found by comparing integers, which is done for many at once: the bits of numbers from 0 on
    are in their order, those of others in the opposite one. NaN comes out where there is one without a sign."""
    bits = row.view(np.int32)
    largest = np.int32(-0x7FFFFFFF)
    for place in range(len(row)):
        largest = max(largest, np.int32(bits[place] ^ ((bits[place] >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return _float_of_bits(np.int32(largest ^ ((largest >> np.int32(31)) & np.int32(0x7FFFFFFF))))  # type: ignore[call-arg]


@compiled
def _exp(value: Any) -> Any:
    """exp of a value from -inf to 0: two to a whole number, times a Taylor polynomial. Right but for rounding near 0,
    to five millionths at the far end. Unlike the library's exp, loops do many of these at once."""
    halvings = max(value * float32(1.4426950408889634), float32(-126))
    whole = np.floor(halvings + float32(0.5))
    rest = (halvings - whole) * float32(0.6931471805599453)  # at most 0.35: the next term is below 10**-8
    sum_ = float32(1 / 5040) * rest + float32(1 / 720)
    sum_ = sum_ * rest + float32(1 / 120)
    sum_ = sum_ * rest + float32(1 / 24)
    sum_ = sum_ * rest + float32(1 / 6)
    sum_ = sum_ * rest + float32(1 / 2)
    sum_ = sum_ * rest + float32(1)
    sum_ = sum_ * rest + float32(1)
    return sum_ * _float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))  # type: ignore[call-arg]


# ---- 8-bit rows ------------------------------------------------------------------------------------------------


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows `(…, features)`, from 1 to 255 with 128 for zero, and the scale of each, `(…, 1)`, float32."""
    rows = rows.float().contiguous()
    small, scales = rows.new_empty(rows.shape, dtype=torch.uint8), rows.new_empty((*rows.shape[:-1], 1))
    flat = matrix(rows), matrix(small), scales.view(-1).numpy()
    in_threads(rows.numel(), lambda i, n: _quantize(*flat, i, n))
    return small, scales


@compiled
def _quantize(rows: Array, small: Array, scales: Array, first: int, step: int) -> None:
    for row in range(first, len(rows), step):
        scales[row] = _quantize_row(rows[row], small[row])


@compiled
def _quantize_row(row: Array, small: Array) -> Any:
    # Of numbers without their sign, the order is that of their bits, and these are compared many at a time. At least
    # 10**-30, so that the scale of a row of zeros and its inverse are finite.
    bits = row.view(np.int32)
    largest_bits = np.int32(228737632)
    for place in range(len(row)):
        largest_bits = max(largest_bits, np.int32(bits[place] & np.int32(0x7FFFFFFF)))
    largest: Any = _float_of_bits(largest_bits)  # type: ignore[call-arg]
    steps = float32(LARGEST) / largest
    for place in range(len(row)):
        small[place] = np.uint8(np.int32(np.rint(row[place] * steps)) + np.int32(ZERO))
    return largest / float32(LARGEST)


def gated_rows(activation: Activation, gate: Tensor, up: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows of `activation(gate * scales) * up * scales`, and their scales.

    Args:
        activation: `swish` (SiLU), or `gelu` in its approximation by tanh.
        gate: `(…, features)`, contiguous.
        up: likewise.
        scales: `(…, 1)`.
    """
    small, found = gate.new_empty(gate.shape, dtype=torch.uint8), scales.new_empty(scales.shape)
    flat = matrix(gate), matrix(up), matrix(small)
    ends = scales.view(-1).numpy(), found.view(-1).numpy()
    in_threads(gate.numel(), lambda i, n: _gated(activation == "gelu", *flat, *ends, i, n))
    return small, found


@compiled
def _gated(
    is_gelu: bool, gate: Array, up: Array, small: Array, scales: Array, found: Array, first: int, step: int
) -> None:
    products = np.empty(gate.shape[1], float32)
    for row in range(first, len(gate), step):
        own, other, scale = gate[row], up[row], scales[row]
        # Both are x * sigmoid(slope), where the slope has the sign of x: exp(-|slope|) cannot overflow.
        for place in range(len(own)):
            x = own[place] * scale
            slope = float32(1.5957691216057308) * (x + float32(0.044715) * x * x * x) if is_gelu else x
            decay = _exp(-abs(slope))
            share = float32(1) if x >= 0 else decay
            products[place] = x * (other[place] * scale) * share / (float32(1) + decay)
        found[row] = _quantize_row(products, small[row])


# ---- norms and logits ------------------------------------------------------------------------------------------


def norm_rows(rows: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """`gain * rows / sqrt(mean(rows**2) + epsilon)` over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        rows: `(…, features)`, float32.
        gain: `(features,)`, float32.
        epsilon: keeps rows of zeros from being divided by zero.
    """
    rows = rows.contiguous()
    found = torch.empty_like(rows)
    arrays = matrix(rows), gain.numpy(), float32(epsilon), matrix(found)
    in_threads(rows.numel(), lambda i, n: _norm(*arrays, i, n))
    return found


@compiled
def _norm(rows: Array, gain: Array, epsilon: np.float32, found: Array, first: int, step: int) -> None:
    for i in range(first, len(rows), step):
        row, out = rows[i], found[i]
        sum_ = float32(0)
        for place in range(len(row)):
            sum_ += row[place] * row[place]
        scale = float32(1 / math.sqrt(sum_ / float32(len(row)) + epsilon))
        for place in range(len(row)):
            out[place] = gain[place] * (row[place] * scale)


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first token with the largest logit, int64, and its natural-log probability, both `(rows,)`.

    Args:
        logits: `(rows, vocabulary)`, float32, contiguous; anywhere.
    """
    if not is_compiled(logits):
        best = logits.max(dim=-1)
        return best.indices, best.values - logits.logsumexp(dim=-1)
    tokens, log_probs = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    arrays = logits.numpy(), tokens.numpy(), log_probs.numpy()
    in_threads(logits.numel(), lambda i, n: _best(*arrays, i, n))
    return tokens, log_probs


@compiled
def _best(logits: Array, tokens: Array, log_probs: Array, first: int, step: int) -> None:
    shifted = np.empty(logits.shape[1], float32)
    for i in range(first, len(logits), step):
        row = logits[i]
        for place in range(len(row)):
            shifted[place] = row[place]
        top, sum_ = _weigh_row(shifted, float32(1), float32(0))
        tokens[i], log_probs[i] = 0, -math.log(sum_)
        for place in range(len(row)):
            if row[place] == top:
                tokens[i] = place
                break
