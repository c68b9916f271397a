"""Loops in several threads: in torch's own, which are there already.

Between two products, torch's threads (OpenMP's) do not sleep: they look for work for some milliseconds. Threads of our
own would have to share the cores with them, and a loop in two of those was no faster than in one (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

__all__ = ["in_threads"]

WORTH_A_THREAD = 1 << 17  # numbers that are read; handing work to a thread costs as much as reading a fraction of these

Part = Callable[[int, int], object]


def in_threads(num_read: int, call: Part) -> None:
    """`call(i, n)` for every i below n, side by side: as many as torch may use threads, or fewer if there is little to
    read. What a call raises is raised here, when all are over.

    `call` has to be without the interpreter's lock for most of its time.
    """
    num = max(1, min(torch.get_num_threads(), num_read // WORTH_A_THREAD))
    if num == 1:
        call(0, 1)
    elif (openmp := _openmp()) is None:
        _in_own_threads(num, call)
    else:
        _in_team(openmp, num, call)


# ---- torch's threads -------------------------------------------------------------------------------------------

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMp(NamedTuple):
    """What GCC's compilers call for a parallel region since 4.9, and in it (`GOMP_parallel` in libgomp's libgomp_g.h;
    OpenMP 4.5, 3.2). LLVM's and Intel's libraries have the same calls on Linux."""

    region: Callable[..., object]
    number: Callable[[], int]
    num_threads: Callable[[], int]


@cache
def _openmp() -> _OpenMp | None:
    """The OpenMP library that torch itself uses, of which there may be several in a process; `None` if it uses none,
    or this is not Linux.

    As the linker does for torch, names are looked for in what is there for all (a library may have been preloaded), and
    then in torch's module and the libraries that it needs.
    """
    if sys.platform == "linux":
        for module in (None, torch._C.__file__):
            inside = ctypes.PyDLL(module)  # keeps the interpreter's lock: calls in a region are short
            if hasattr(inside, "GOMP_parallel"):
                region = ctypes.CDLL(module).GOMP_parallel
                region.argtypes, region.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
                return _OpenMp(region, inside.omp_get_thread_num, inside.omp_get_num_threads)
    return None


def _in_team(openmp: _OpenMp, num: int, call: Part) -> None:
    """All threads come, even if some have nothing to do: those that a smaller region leaves out would be ended, and
    started anew for the next."""
    ended: list[int] = []
    errors: list[BaseException] = []

    def body(_: object) -> None:
        try:  # what leaves a function that C has called is printed and lost
            for part in range(openmp.number(), num, openmp.num_threads()):
                call(part, num)
                ended.append(part)
        except BaseException as error:
            errors.append(error)

    openmp.region(_Body(body), None, torch.get_num_threads(), 0)
    if errors:
        raise errors[0]
    if len(ended) < num:
        raise KeyboardInterrupt  # it came just before `try`, where nothing but an interrupt comes from


# ---- threads of our own ----------------------------------------------------------------------------------------


def _in_own_threads(num: int, call: Part) -> None:
    others = [_workers(torch.get_num_threads()).submit(call, i, num) for i in range(1, num)]
    try:
        call(0, num)
    finally:
        problems = [other.exception() for other in others]
    for problem in problems:
        if problem is not None:
            raise problem


@cache
def _workers(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, thread_name_prefix="whyrank-loops")


os.register_at_fork(after_in_child=_workers.cache_clear)  # threads stay with the parent
