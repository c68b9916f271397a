"""Weights divided among the processes that train together (FSDP2, torch.distributed.fsdp.fully_shard).

Each process holds its part of every weight, gradient and moment. A layer's weights come together while it is computed,
forwards and backwards, and are let go of afterwards: all processes must make the same number of passes. To write
answers, to rank and to save, all weights come together once (`whole_weights`); gradients and moments, most of what
training needs, stay divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from whyrank.errors import InputError
from whyrank.training.ranks import ranks

__all__ = [
    "check_divisible",
    "clip_gradients",
    "divide",
    "divided_like",
    "is_divided",
    "num_idle_passes",
    "whole",
    "whole_state",
    "whole_weights",
]


def check_divisible() -> None:
    """Refuse to divide weights where nobody is there to divide them with.

    Raises:
        InputError: this process trains alone.
    """
    if ranks().size == 1:
        raise InputError(
            "expected several processes to divide the weights among, found one; start it with torchrun or accelerate "
            "launch, or leave --divide out"
        )


def divide(model: PreTrainedModel) -> None:
    """Leave this process its part of a model's weights, in place. Every process must have loaded the same weights.

    Gradients are summed over the processes, as `Ranks.sum_gradients` does with whole ones.
    """
    mesh = init_device_mesh(model.device.type, (ranks().size,))
    names = set(model._no_split_modules or ())
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # what gloo has, too


def is_divided(model: torch.nn.Module) -> bool:
    """Whether `divide` has been called on it."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """All weights in every process inside the block, where each may run the model as often as it likes, without
    gradients. All processes must enter it. Weights that are not divided are whole anyway."""
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, put together; all processes must ask for it. Others are as they
    are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a divided model's file holds, each tied weight once, on the CPU of the first process; nothing in the others,
    which must ask, too."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    found = {}
    for name, value in model.state_dict().items():
        if name in once:
            put_together = whole(value)
            if ranks().is_main:
                found[name] = put_together.cpu()
    return found


def divided_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's part of a value that belongs to a parameter, which every process has whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a norm; returns what it was before, over all processes' parts."""
    return whole(clip_grad_norm_(parameters, max_norm)).item()


def num_idle_passes(model: torch.nn.Module, num_passes: int) -> int:
    """How many passes this process must make for nothing behind its own, because another has more to do: divided
    weights come together in all processes or in none. To be asked before the first pass."""
    return ranks().most(num_passes)[0] - num_passes if is_divided(model) else 0


def _parts(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
