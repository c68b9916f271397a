"""What a killed refinement resumes from: written into a sibling folder that is renamed when it is whole.

A state is taken between rounds. Everything that a round draws (queries, answers, labels, order of minibatches) follows
from the seed and the number of the round, so that the answers of a round that was cut off are drawn again as they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whyrank.errors import InputError
from whyrank.store import read_json
from whyrank.training.checkpoints import atomic_folder

__all__ = ["RefineState", "load_refine_state", "recover", "save_refine_state"]


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
    with atomic_folder(folder) as growing:
        for name, network in networks.items():
            save_file(
                {key: tensor.contiguous() for key, tensor in _trained(network).items()}, growing / f"{name}.safetensors"
            )
        moments = optimizer.state_dict()["state"]
        flat = {
            f"{index}.{name}": value.contiguous() for index, found in moments.items() for name, value in found.items()
        }
        save_file(flat, growing / "optimizer.safetensors")
        (growing / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")


def load_refine_state(
    folder: Path, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, identity: str
) -> RefineState | None:
    """Fill networks and optimizer from `folder`; `None` if there is no complete state.

    Raises:
        InputError: the state belongs to other data or other options.
    """
    recover(folder)
    if not (folder / "state.json").is_file():
        return None
    state = RefineState(**read_json(folder / "state.json"))
    if state.identity != identity:
        raise InputError(
            f"{folder} holds a state of another run (other data, model, template or options); remove it, or choose "
            "another -o"
        )
    with torch.no_grad():
        for name, network in networks.items():
            tensors = _trained(network)
            for key, value in load_file(folder / f"{name}.safetensors").items():
                tensors[key].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def recover(folder: Path) -> None:
    """Take the old content back where a kill came between the two renames of `atomic_folder`."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def _trained(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, each once (tied weights are one parameter)."""
    return {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
