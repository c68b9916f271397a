"""Loops that torch has no fast form of, compiled for this processor by numba when they are first called.

`attend_rows` is attention of sequences that write one token each. Almost all its time goes into reading keys and values
once, and torch's kernels, made for many queries per sequence, read them at less than half the speed (docs/log.md). The
others put into one pass over memory what torch does in ten: 8-bit rows, and a gated MLP's product on the way to them.

What is compiled is kept beside this file or in the user's cache. Everything is computed in float32, on the CPU; keys
and values may be kept in bfloat16, of which half as many bytes have to be read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Activation", "Seen", "attend_rows", "gated_rows", "is_compiled", "quantize_rows", "write_rows"]

Activation = Literal["swish", "gelu"]
LARGEST, ZERO = 127, 128  # of 8-bit rows: they are stored without a sign, because oneDNN's products of those are faster
WORTH_A_THREAD = 1 << 17  # numbers that are read; starting a thread costs as much as reading a fraction of these

Function = TypeVar("Function", bound=Callable[..., Any])
Array = NDArray[Any]
# Sums may be taken in any order, a product and a sum in one step; infinities and NaN stay what they are. Division by 0
# gives infinity, as in numpy: raising an exception would take a test per number.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
}
float32 = np.float32


def _compiled(function: Function) -> Function:
    """Compiled on its first call, without the interpreter's lock, and kept on disk where there is a place to write."""
    try:
        made = numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # nowhere to write, as in a read-only container: every process compiles for itself
        made = numba.njit(**OPTIONS)(function)
    return cast(Function, made)


def is_compiled(tensor: Tensor) -> bool:
    """Whether there are loops for tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


# ---- bfloat16 ------------------------------------------------------------------------------------------------


def _array(tensor: Tensor) -> Array:
    """The tensor's memory; numpy has no bfloat16, so that these come as 16-bit integers."""
    bits: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return bits


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


# ---- attention -------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Which queries see which keys: query `rows[i]` those of `slots[i]` from `starts[i]` up to `ends[i]`; int64."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


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
    arrays = _array(queries), _array(keys), _array(values)
    num_read = int((seen.ends - seen.starts).sum()) * keys.shape[1] * (keys.shape[3] + values.shape[3])
    scales = float32(scaling), float32(softcap or 0.0)
    found: tuple[Array, Array] = out.numpy(), total.numpy()
    _in_threads(num_read, lambda i, n: _attend(*arrays, *seen, *scales, *found, i, n))


def write_rows(pool: Tensor, rows: Tensor, slots: Tensor, places: Tensor) -> None:
    """Put `rows[i]`, `(heads, size)`, into `pool[slots[i]]`, `(heads, capacity, size)`, at `places[i]`."""
    _write(_array(pool), _array(rows.to(pool.dtype).contiguous()), slots.numpy(), places.numpy())


@_compiled
def _write(pool: Array, rows: Array, slots: Array, places: Array) -> None:
    for i in range(len(rows)):
        for head in range(rows.shape[1]):
            pool[slots[i], head, places[i]] = rows[i, head]


@_compiled
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
    powers = np.empty(keys.shape[2], np.int32)
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
            query = queries[rows[i], head, group]
            top = float32(-math.inf)
            for token in range(num):
                score = float32(0)
                for place in range(len(query)):
                    score += query[place] * _wide(own_keys[token, place])
                score *= scaling
                if softcap > 0:
                    score = softcap * math.tanh(score / softcap)
                scores[token] = score
                top = max(top, score)
            for token in range(num):
                scores[token] -= top
            _exponentials(scores, powers, num)
            weight = float32(0)
            for token in range(num):
                weight += scores[token]
            found[:] = 0
            for token in range(num):
                share = scores[token]
                for place in range(len(found)):
                    found[place] += share * _wide(own_values[token, place])
            before, own = total[rows[i], head, group], top + math.log(weight)
            both = max(before, own) + math.log1p(math.exp(-abs(before - own)))
            keep, add = float32(math.exp(before - both)), float32(math.exp(own - both) / weight)
            for place in range(len(found)):
                out[rows[i], head, group, place] = keep * out[rows[i], head, group, place] + add * found[place]
            total[rows[i], head, group] = both


@_compiled
def _exponentials(values: Array, powers: Array, num: int) -> None:
    """exp of values from -inf to 0, in place: two to a whole number, times a Taylor polynomial. Right but for rounding
    near 0, to five millionths at the far end. Unlike calls of the library's exp, this is done for many values at once.
    `powers` is space for int32."""
    for i in range(num):
        halvings = max(values[i] * float32(1.4426950408889634), float32(-126))
        whole = np.floor(halvings + float32(0.5))
        rest = (halvings - whole) * float32(0.6931471805599453)  # at most 0.35: the next term is below 10**-8
        sum_ = float32(1 / 5040) * rest + float32(1 / 720)
        sum_ = sum_ * rest + float32(1 / 120)
        sum_ = sum_ * rest + float32(1 / 24)
        sum_ = sum_ * rest + float32(1 / 6)
        sum_ = sum_ * rest + float32(1 / 2)
        sum_ = sum_ * rest + float32(1)
        values[i] = sum_ * rest + float32(1)
        powers[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)  # the bits of 2.0**whole
    scales = powers.view(np.float32)
    for i in range(num):
        values[i] *= scales[i]


# ---- 8-bit rows ------------------------------------------------------------------------------------------------


def _matrix(rows: Tensor) -> Array:
    """`(…, features)` as a matrix over the same memory; refuses what is not contiguous, which would be a copy."""
    found: Array = rows.view(-1, rows.shape[-1]).numpy()
    return found


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows `(…, features)`, from 1 to 255 with 128 for zero, and the scale of each, `(…, 1)`, float32."""
    rows = rows.float().contiguous()
    small, scales = rows.new_empty(rows.shape, dtype=torch.uint8), rows.new_empty((*rows.shape[:-1], 1))
    flat = _matrix(rows), _matrix(small), scales.view(-1).numpy()
    _in_threads(rows.numel(), lambda i, n: _quantize(*flat, i, n))
    return small, scales


@_compiled
def _quantize(rows: Array, small: Array, scales: Array, first: int, step: int) -> None:
    for row in range(first, len(rows), step):
        scales[row] = _quantize_row(rows[row], small[row])


@_compiled
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
    flat = _matrix(gate), _matrix(up), _matrix(small)
    ends = scales.view(-1).numpy(), found.view(-1).numpy()
    _in_threads(gate.numel(), lambda i, n: _gated(activation == "gelu", *flat, *ends, i, n))
    return small, found


@_compiled
def _gated(
    is_gelu: bool, gate: Array, up: Array, small: Array, scales: Array, found: Array, first: int, step: int
) -> None:
    decays = np.empty(gate.shape[1], float32)
    powers = np.empty(gate.shape[1], np.int32)
    products = np.empty(gate.shape[1], float32)
    for row in range(first, len(gate), step):
        own, other, scale = gate[row], up[row], scales[row]
        # Both are x * sigmoid(slope), where the slope has the sign of x: exp(-|slope|) cannot overflow.
        for place in range(len(own)):
            x = own[place] * scale
            slope = float32(1.5957691216057308) * (x + float32(0.044715) * x * x * x) if is_gelu else x
            decays[place] = -abs(slope)
        _exponentials(decays, powers, len(own))
        for place in range(len(own)):
            share = float32(1) if own[place] >= 0 else decays[place]
            products[place] = own[place] * other[place] * (scale * scale) * share / (float32(1) + decays[place])
        found[row] = _quantize_row(products, small[row])


# ---- threads ---------------------------------------------------------------------------------------------------


def _in_threads(num_read: int, call: Callable[[int, int], object]) -> None:
    """`call(i, n)` for every i below n: as many threads as torch may use, or fewer if there is little to read."""
    num = max(1, min(torch.get_num_threads(), num_read // WORTH_A_THREAD))
    others = [_workers(torch.get_num_threads()).submit(call, i, num) for i in range(1, num)]
    call(0, num)
    for other in others:
        other.result()


@cache
def _workers(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, thread_name_prefix="whyrank-kernels")


os.register_at_fork(after_in_child=_workers.cache_clear)  # threads stay with the parent
