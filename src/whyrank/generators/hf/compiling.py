"""What a loop needs to be compiled by numba, to take torch's tensors, and to run in several threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "Numbers", "array", "compiling", "in_threads", "is_compiled", "matrix", "multiplies_bfloat16"]

WORTH_A_THREAD = 1 << 17  # numbers that are read; starting a thread costs as much as reading a fraction of these

Function = TypeVar("Function", bound=Callable[..., Any])
Array = NDArray[Any]
Numbers = NDArray[np.int64]


def compiling(options: Mapping[str, Any]) -> Callable[[Function], Function]:
    """A decorator: compiled by numba on the first call, and kept on disk where there is a place to write.

    numba makes it anew when the function's own file changes, and for nothing else; so the options should stand there.
    """

    def compiled(function: Function) -> Function:
        try:
            made = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # nowhere to write, as in a read-only container: every process compiles for itself
            made = numba.njit(**options)(function)
        return cast(Function, made)

    return compiled


def is_compiled(tensor: Tensor) -> bool:
    """Whether there are loops for tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 (AVX-512 BF16 or AMX), by its own account."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # torch asks x86 processors only
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def array(tensor: Tensor) -> Array:
    """The tensor's memory; numpy has no bfloat16, so that these come as 16-bit integers."""
    bits: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return bits


def matrix(rows: Tensor) -> Array:
    """`(…, features)` as a matrix over the same memory; refuses what is not contiguous, which would be a copy."""
    found: Array = rows.view(-1, rows.shape[-1]).numpy()
    return found


def in_threads(num_read: int, call: Callable[[int, int], object]) -> None:
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
