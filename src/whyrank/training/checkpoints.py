"""Checkpoints on disk, whole or not at all.

A state for resuming is written into a sibling folder that is renamed when it is whole; the one before it is kept until
the next. A state's files are listed with their digests in its `state.json`, so that one that was cut short or changed
is noticed, and the one before it, or the beginning, is gone on from: every step is worked out from seeds, so that the
end is the same. A finished checkpoint is complete when it has its `whyrank.json`, which is written last. Tensors are
safetensors, the rest JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrank.checkpoint import Card, write_card
from whyrank.errors import InputError
from whyrank.generators.hf.load import load_model, without_progress_bars
from whyrank.store import read_json, sha256_file
from whyrank.training.config import AdapterConfig
from whyrank.training.lora import save_adapter, trainable_parameters

__all__ = [
    "Snapshot",
    "TrainingState",
    "atomic_folder",
    "load_state",
    "remove_state",
    "restore",
    "save_checkpoint",
    "save_state",
    "snapshot_of",
]

STATE_NAME = "state.json"
MODEL_NAME, OPTIMIZER_NAME, BEST_NAME = "model.safetensors", "optimizer.safetensors", "best.safetensors"
log = logging.getLogger("whyrank")

Snapshot = Mapping[str, torch.Tensor]
"""Copies of what is trained, by name."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What resuming needs beside the tensors. `identity` is a digest of data and config; `files` maps the names of the
    other files to their SHA-256, and is filled in by `save_state`."""

    identity: str
    history: list[dict[str, Any]] = field(default_factory=list)
    files: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty sibling folder that takes the place of `folder` when the block ends well.

    What was there before is kept as `.NAME.old`. Between the two renames only that is there; `load_state` knows.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    growing, old = _siblings(folder)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    yield growing
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(growing, folder)


def _siblings(folder: Path) -> tuple[Path, Path]:
    """Where the new content grows, and where the content before it is kept."""
    return folder.with_name(f".{folder.name}.growing"), folder.with_name(f".{folder.name}.old")


def save_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: Card, adapter: AdapterConfig
) -> None:
    """Write weights or adapter (safetensors), config and tokenizer, and last the card that makes the checkpoint
    complete. With `adapter.is_merged` the adapter is written into whole weights, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    growing = folder / ".growing"
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    with without_progress_bars():
        if adapter.rank and adapter.is_merged:
            save_adapter(growing / "adapter", model, adapter)
            load_model(growing / "adapter", torch.device("cpu"), torch.float32).save_pretrained(growing)
            shutil.rmtree(growing / "adapter")
        elif adapter.rank:
            save_adapter(growing, model, adapter)
        else:
            model.save_pretrained(growing)
        tokenizer.save_pretrained(growing)
    for path in growing.iterdir():
        os.replace(path, folder / path.name)
    growing.rmdir()
    write_card(folder, card)
    remove_state(folder / "state")


def remove_state(folder: Path) -> None:
    """Take away what resuming needed, once training is over."""
    for leftover in (folder, *_siblings(folder)):
        shutil.rmtree(leftover, ignore_errors=True)


def snapshot_of(model: PreTrainedModel) -> Snapshot:
    """A copy of what is trained, in the memory of the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in trainable_parameters(model)}


def save_state(
    folder: Path,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainingState,
    best: Snapshot | None = None,
) -> None:
    """Write what is trained, the optimizers' moments, history, and the best weights so far; `load_state` goes on."""
    with atomic_folder(folder) as growing:
        save_file(dict(snapshot_of(model)), growing / MODEL_NAME)
        save_file(_flat(optimizers), growing / OPTIMIZER_NAME)
        if best is not None:
            save_file(dict(best), growing / BEST_NAME)
        files = {path.name: sha256_file(path) for path in sorted(growing.iterdir())}
        whole = {**asdict(state), "files": files}
        (growing / STATE_NAME).write_text(json.dumps(whole), encoding="utf-8")


def load_state(
    folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], identity: str
) -> tuple[TrainingState, Snapshot | None] | None:
    """Continue a killed run: fill model and optimizers from `folder`, or from the state before it if that is damaged.

    Returns:
        The state and the best weights so far; `None` if there is no state that is whole.

    Raises:
        InputError: the state belongs to other data or another config.
    """
    for place in (folder, _siblings(folder)[1]):
        state = _read_state(place)
        if state is None:
            continue
        if state.identity != identity:
            raise InputError(
                f"{folder} holds a state of another run (other data, template or options); remove it, or choose "
                "another -o"
            )
        _fill(place, model, optimizers)
        return state, load_file(place / BEST_NAME) if BEST_NAME in state.files else None
    return None


def _read_state(place: Path) -> TrainingState | None:
    """The state in a folder, if all of it is as it was written."""
    if not place.is_dir():
        return None
    try:
        state = TrainingState(**read_json(place / STATE_NAME))
        damaged = [name for name, digest in state.files.items() if sha256_file(place / name) != digest]
    except (InputError, OSError, TypeError) as cause:
        log.warning("%s is damaged (%s); going on from an earlier state", place, cause)
        return None
    if damaged:
        log.warning("%s is damaged (%s is not what was written); going on from an earlier state", place, damaged[0])
        return None
    return state


def _fill(place: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    restore(model, load_file(place / MODEL_NAME))
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(place / OPTIMIZER_NAME).items():
        number, index, name = key.split(".")
        moments[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, known in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": known, "param_groups": optimizer.state_dict()["param_groups"]})


def restore(model: PreTrainedModel, snapshot: Snapshot) -> None:
    """Give a model the weights of a snapshot of itself."""
    parameters = dict(trainable_parameters(model))
    with torch.no_grad():
        for name, value in snapshot.items():
            parameters[name].copy_(value)


def _flat(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every moment under `optimizer.parameter.name`, as numbers where there are such."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return {
        f"{number}.{index}.{name}": value.contiguous()
        for number, state in enumerate(states)
        for index, values in state.items()
        for name, value in values.items()
    }
