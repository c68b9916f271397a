"""Checkpoints on disk, whole or not at all.

A state for resuming is written into a sibling folder that is renamed when it is whole, so that a kill at any moment
leaves the previous one in place. A finished checkpoint is complete when it has its `whyrank.json`, which is written
last. Tensors are safetensors, the rest JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrank.checkpoint import Card, write_card
from whyrank.errors import InputError
from whyrank.generators.hf.load import without_progress_bars
from whyrank.store import read_json

__all__ = ["TrainingState", "atomic_folder", "load_state", "recover", "save_checkpoint", "save_state"]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What resuming needs beside the tensors. `identity` is a digest of data and config."""

    identity: str
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty sibling folder that replaces `folder` when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    growing, old = _siblings(folder)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    yield growing
    if folder.exists():
        os.rename(folder, old)
    os.rename(growing, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish what a kill in the middle of `atomic_folder` left: between its two renames only the old one is whole."""
    _, old = _siblings(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _siblings(folder: Path) -> tuple[Path, Path]:
    """Where the new content grows, and where the old one waits until the new one has its place."""
    return folder.with_name(f".{folder.name}.growing"), folder.with_name(f".{folder.name}.old")


def save_checkpoint(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: Card) -> None:
    """Write weights (safetensors), config and tokenizer, and last the card that makes the checkpoint complete."""
    folder.mkdir(parents=True, exist_ok=True)
    growing = folder / ".growing"
    shutil.rmtree(growing, ignore_errors=True)
    with without_progress_bars():
        model.save_pretrained(growing)
        tokenizer.save_pretrained(growing)
    for path in growing.iterdir():
        os.replace(path, folder / path.name)
    growing.rmdir()
    write_card(folder, card)
    for leftover in (folder / "state", *_siblings(folder / "state")):
        shutil.rmtree(leftover, ignore_errors=True)


def save_state(
    folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], state: TrainingState
) -> None:
    """Write weights, the optimizers' moments and history, from which `load_state` continues."""
    with atomic_folder(folder) as growing:
        save_file(
            {name: value.contiguous() for name, value in _parameters(model).items()}, growing / "model.safetensors"
        )
        save_file(_flat(optimizers), growing / "optimizer.safetensors")
        (growing / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")


def load_state(
    folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], identity: str
) -> TrainingState | None:
    """Continue a killed run: fill model and optimizers from `folder`; `None` if there is no state.

    Raises:
        InputError: the state belongs to other data or another config.
    """
    recover(folder)
    if not (folder / "state.json").is_file():
        return None
    state = TrainingState(**read_json(folder / "state.json"))
    if state.identity != identity:
        raise InputError(
            f"{folder} holds a state of another run (other data, template or options); remove it, or choose another -o"
        )
    parameters = _parameters(model)
    with torch.no_grad():
        for name, value in load_file(folder / "model.safetensors").items():
            parameters[name].copy_(value)
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, index, name = key.split(".")
        moments[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, known in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": known, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Each parameter once (tied weights are one parameter)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _flat(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every moment under `optimizer.parameter.name`, as numbers where there are such."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return {
        f"{number}.{index}.{name}": value.contiguous()
        for number, state in enumerate(states)
        for index, values in state.items()
        for name, value in values.items()
    }
