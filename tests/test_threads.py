"""Loops in several threads: every part once, what they raise, and whose threads they are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from whyrank.generators.hf.threads import WORTH_A_THREAD, Part, _in_own_threads, _in_team, _openmp, in_threads

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
    if openmp is None:
        pytest.skip("this build of torch has no OpenMP that can be called")
    _in_team(openmp, num, call)


@pytest.fixture(params=[in_torchs_threads, _in_own_threads], ids=["torch's threads", "own threads"])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


def test_the_package_index_s_torch_for_linux_lends_its_threads() -> None:
    is_openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    if sys.platform == "linux" and is_openmp:
        assert _openmp() is not None
    else:
        assert not is_openmp or sys.platform in ("darwin", "win32")


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


def test_torch_s_products_and_loops_take_turns_in_the_same_threads() -> None:
    def threads_of_a_loop() -> set[int]:
        found: list[int] = []
        in_torchs_threads(NUM_THREADS, lambda i, n: found.append(threading.get_native_id()))
        return set(found)

    before = threads_of_a_loop()
    rows = torch.ones(512, 256)
    assert torch.equal(rows @ rows.T, torch.full((512, 512), 256.0))
    assert threads_of_a_loop() == before


@pytest.mark.parametrize(
    ("num_read", "num_threads", "num_parts"),
    [
        (NUM_THREADS * WORTH_A_THREAD, NUM_THREADS, NUM_THREADS),
        (NUM_THREADS * WORTH_A_THREAD - 1, NUM_THREADS, 1),
        (1 << 40, 1, 1),
    ],
)
def test_a_loop_that_reads_little_stays_in_its_thread(num_read: int, num_threads: int, num_parts: int) -> None:
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
