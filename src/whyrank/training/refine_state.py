"""What a killed refinement resumes from, kept as `checkpoints.py` keeps states.

A state is taken between rounds. Everything that a round draws (queries, answers, labels, order of minibatches) follows
from the seed and the number of the round, so that the answers of a round that was cut off are drawn again as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from whyrank.training.checkpoints import find_state, moments_of, restore_moments, write_state
from whyrank.training.dividing import divided_like, whole

__all__ = ["RefineState", "load_refine_state", "save_refine_state"]

OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(slots=True)
class RefineState:
    """What resuming needs beside the tensors. `identity` is a digest of data, start and options; `hardness` has
    `(query_id, doc_id, hardness)` of the pairs that have come; `first_dev` is nDCG@10 of the distilled policy."""

    identity: str
    kl_coefficient: float
    first_dev: float | None = None
    hardness: list[tuple[str, str, float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def save_refine_state(
    folder: Path, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, state: RefineState
) -> None:
    """Write the trainable tensors of all networks, the optimizer's moments, and last what makes the state complete."""
    trained = {
        f"{name}.safetensors": {key: whole(tensor).contiguous() for key, tensor in _trained(network).items()}
        for name, network in networks.items()
    }
    write_state(folder, {**trained, OPTIMIZER_NAME: moments_of([optimizer])}, asdict(state))


def load_refine_state(
    folder: Path, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, identity: str
) -> RefineState | None:
    """Fill networks and optimizer from `folder`, or from the state before it if that is damaged; `None` if there is no
    state that is whole.

    Raises:
        InputError: the state belongs to other data or other options.
    """
    found = find_state(folder, identity)
    if found is None:
        return None
    place, told = found
    with torch.no_grad():
        for name, network in networks.items():
            tensors = _trained(network)
            for key, value in load_file(place / f"{name}.safetensors").items():
                tensors[key].copy_(divided_like(tensors[key], value))
    restore_moments([optimizer], load_file(place / OPTIMIZER_NAME))
    return RefineState(**told)


def _trained(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, each once (tied weights are one parameter)."""
    return {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
