"""Loops in several threads: in torch's own, which are there already.

Between two products, torch's threads (OpenMP's) do not sleep: they look for work for some milliseconds. Threads of our
own would have to share the cores with them, and a loop in two of those was no faster than in one (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["in_threads"]

WORTH_A_THREAD = 1 << 17  # numbers that are read; handing work to a thread costs as much as reading a fraction of these

Part = Callable[[int, int], object]


def in_threads(num_read: int, call: Part) -> None:
    """`call(i, n)` for every i below n, side by side: as many as torch may use threads, or one if there is little to
    read. What a call raises is raised here, when all are over.

    `call` has to be without the interpreter's lock for most of its time.
    """
    num = torch.get_num_threads()
    if num == 1 or num_read < num * WORTH_A_THREAD:
        call(0, 1)
        return
    openmp = _openmp()
    if openmp is None:
        _in_own_threads(num, call)
    else:
        _in_team(openmp, num, call)


# ---- torch's threads -------------------------------------------------------------------------------------------

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMp(NamedTuple):
    """What compilers call for a parallel region, and in it (GNU libgomp manual, "Implementing PARALLEL construct").
    LLVM's and Intel's libraries have the same calls on Linux."""

    region: Callable[..., object]
    number: Callable[[], int]
    num_threads: Callable[[], int]


@cache
def _openmp() -> _OpenMp | None:
    """The OpenMP library that torch itself uses, of which there may be several in a process; `None` if it uses none,
    or one without these calls."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:  # names are looked for in the library and those that it needs
        region = ctypes.CDLL(str(path)).GOMP_parallel
        inside = ctypes.PyDLL(str(path))  # keeps the interpreter's lock: these calls are short
        found = _OpenMp(region, inside.omp_get_thread_num, inside.omp_get_num_threads)
    except (OSError, AttributeError):
        return None
    region.argtypes, region.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found


def _in_team(openmp: _OpenMp, num: int, call: Part) -> None:
    """All threads or none: those that a smaller region leaves out would be ended, and started anew for the next."""
    errors: list[BaseException] = []

    def body(_: object) -> None:
        try:  # what leaves a function that C has called is printed and lost
            call(openmp.number(), openmp.num_threads())
        except BaseException as error:
            errors.append(error)

    openmp.region(_Body(body), None, num, 0)
    if errors:
        raise errors[0]


# ---- threads of our own ----------------------------------------------------------------------------------------


def _in_own_threads(num: int, call: Part) -> None:
    others = [_workers(num).submit(call, i, num) for i in range(1, num)]
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
