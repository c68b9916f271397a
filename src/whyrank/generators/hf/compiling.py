"""What a loop needs to be compiled by numba, and to take torch's tensors."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "Numbers", "array", "compiling", "is_compiled", "matrix", "multiplies_bfloat16"]

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
