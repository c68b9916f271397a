"""Loops in several threads: every part once, what they raise, and whose threads they are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from whyrank.generators.hf.threads import WORTH_A_THREAD, Part, _in_own_threads, _in_team, _OpenMp, _openmp, in_threads

NUM_THREADS = 3
Way = Callable[[int, Part], None]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


def in_torchs_threads(num: int, call: Part) -> None:
    openmp = _openmp()
    assert openmp is not None
    _in_team(openmp, num, call)


IS_LENT = sys.platform == "linux" and "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
if_lent = pytest.mark.skipif(not IS_LENT, reason="torch lends its threads on Linux, where it is built with OpenMP")


@pytest.fixture(params=[pytest.param(in_torchs_threads, marks=if_lent), _in_own_threads], ids=["torch's", "own"])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


def test_torch_lends_its_threads_where_it_has_some() -> None:
    assert (_openmp() is not None) == IS_LENT


@pytest.mark.parametrize("num", [2, NUM_THREADS])
def test_every_part_is_called_once_side_by_side(way: Way, num: int) -> None:
    meeting = threading.Barrier(num, timeout=30)  # passed only if all are there at once
    called: list[tuple[int, int, int]] = []

    def call(i: int, n: int) -> None:
        meeting.wait()
        called.append((i, n, threading.get_native_id()))

    way(num, call)
    assert sorted(call[:2] for call in called) == [(i, num) for i in range(num)]
    assert len({thread for _, _, thread in called}) == num
    assert threading.get_native_id() in {thread for _, _, thread in called}


@pytest.mark.parametrize("failing", [0, 1])
def test_what_a_part_raises_is_raised_when_all_are_over(way: Way, failing: int) -> None:
    ended = []

    def call(i: int, n: int) -> None:
        if i == failing:
            raise KeyboardInterrupt(f"part {i} of {n}")
        ended.append(i)

    with pytest.raises(KeyboardInterrupt, match=f"part {failing} of {NUM_THREADS}"):
        way(NUM_THREADS, call)
    assert sorted(ended) == [i for i in range(NUM_THREADS) if i != failing]


def test_an_interrupt_that_ctypes_swallows_is_raised() -> None:
    """Before the first line of what C calls, nothing can catch it: the part is left out."""

    def region(body: Callable[[object], None], *_: object) -> None:
        body(None)  # one thread of two

    with pytest.raises(KeyboardInterrupt):
        _in_team(_OpenMp(region, lambda: 0, lambda: 2), 2, lambda i, n: None)


def test_a_team_of_one_does_everything() -> None:
    """OpenMP may give fewer threads than were asked for."""

    def region(body: Callable[[object], None], *_: object) -> None:
        body(None)

    called: list[tuple[int, int]] = []
    _in_team(_OpenMp(region, lambda: 0, lambda: 1), 3, lambda i, n: called.append((i, n)))
    assert called == [(0, 3), (1, 3), (2, 3)]


@if_lent
def test_loops_start_no_thread_beside_those_that_torch_s_products_have() -> None:
    rows = torch.ones(512, 256)
    assert torch.equal(rows @ rows.T, torch.full((512, 512), 256.0))
    before = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    found: list[int] = []
    in_torchs_threads(NUM_THREADS, lambda i, n: found.append(threading.get_native_id()))
    assert len(set(found)) == NUM_THREADS
    assert set(found) <= before


@pytest.mark.parametrize(
    ("num_read", "num_threads", "num_parts"),
    [
        (NUM_THREADS * WORTH_A_THREAD, NUM_THREADS, NUM_THREADS),
        (NUM_THREADS * WORTH_A_THREAD - 1, NUM_THREADS, NUM_THREADS - 1),
        (2 * WORTH_A_THREAD - 1, NUM_THREADS, 1),
        (1 << 40, 1, 1),
    ],
)
def test_a_loop_that_reads_little_has_fewer_parts(num_read: int, num_threads: int, num_parts: int) -> None:
    torch.set_num_threads(num_threads)
    called: list[tuple[int, int]] = []
    in_threads(num_read, lambda i, n: called.append((i, n)))
    assert sorted(called) == [(i, num_parts) for i in range(num_parts)]


def test_an_error_leaves_the_threads_ready_for_the_next_loop(way: Way) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        way(NUM_THREADS, lambda i, n: int("none"))
    called: list[int] = []
    way(NUM_THREADS, partial(lambda found, i, n: found.append(i), called))
    assert sorted(called) == list(range(NUM_THREADS))
