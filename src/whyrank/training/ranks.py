"""Training in several processes: each does its share of a step, and all of them have the same weights afterwards.

`torchrun --nproc-per-node 4 -m whyrank distill ...` (or `accelerate launch`, which sets the same variables) starts the
command once per GPU. Every process reads the same data and draws the same batches; examples and answers are shared out,
gradients are added up, and what was computed apart is put together, so that one step is that of a single process but
for rounding. The first process alone ranks dev queries, writes files and prints. Weights are held whole by each process
(as by DistributedDataParallel), which with adapters on 3B fits any training GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from whyrank.errors import InputError

__all__ = ["ALONE", "Ranks", "launched", "ranks"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all that train together: `rank` counts from 0 to `size - 1`."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: neighbours stay together, and no part is longer by more than one."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def gathered(self, part: Sequence[T]) -> list[T]:
        """The parts of all processes, in the order of `share`. They travel pickled, between processes of one job."""
        if self.size == 1:
            return list(part)
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, list(part))
        return [item for found in parts for item in found]

    def from_main(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in all of them."""
        if self.size == 1:
            return compute()
        found: list[Any] = [compute() if self.is_main else None]
        distributed.broadcast_object_list(found)
        return cast(T, found[0])

    def sums(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes, the same in each."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def most(self, *values: int) -> tuple[int, ...]:
        """The largest that any process has, the same in each."""
        if self.size == 1:
            return values
        found = torch.tensor(values)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return tuple(found.tolist())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes; one that had nothing to do adds nothing. What no process has a
        gradient for is left without one: its optimizer would count a step. Divided gradients are sums already."""
        held = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.size == 1 or not held:
            return
        used = self.most(*(int(parameter.grad is not None) for parameter in held))
        for parameter, is_used in zip(held, used, strict=True):
            if not is_used:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Ranks()
PATIENCE = timedelta(hours=2)  # the others wait while the first process ranks dev queries


def ranks() -> Ranks:
    """This process among those that `launched` brought together; alone without it."""
    is_launched = distributed.is_available() and distributed.is_initialized()
    return Ranks(distributed.get_rank(), distributed.get_world_size()) if is_launched else ALONE


@contextmanager
def launched() -> Iterator[Ranks]:
    """Join the processes that were started together by `torchrun` or `accelerate launch`; alone otherwise.

    With CUDA each process takes the GPU of its number on its machine.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks() is not ALONE:
        yield ranks()
        return
    if torch.cuda.is_available():
        place, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= num_gpus:
            raise InputError(f"expected one process per GPU, found process {place + 1} on a machine with {num_gpus}")
        torch.cuda.set_device(place)
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield ranks()
    finally:
        distributed.destroy_process_group()
