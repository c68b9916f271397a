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
from whyrank.errors import InputError, OtherJob
from whyrank.generators.hf.load import load_model, without_progress_bars
from whyrank.store import read_json, sha256_file
from whyrank.training.config import AdapterConfig
from whyrank.training.dividing import divided_like, is_divided, whole, whole_state, whole_weights
from whyrank.training.lora import save_adapter, trainable_parameters
from whyrank.training.ranks import ranks

__all__ = [
    "BEST_NAME",
    "Snapshot",
    "TrainingState",
    "atomic_folder",
    "find_state",
    "load_state",
    "moments_of",
    "recover",
    "remove_state",
    "restore",
    "restore_moments",
    "save_checkpoint",
    "save_state",
    "snapshot_of",
    "write_state",
]

STATE_NAME = "state.json"
MODEL_NAME, OPTIMIZER_NAME, BEST_NAME = "model.safetensors", "optimizer.safetensors", "best.safetensors"
log = logging.getLogger("whyrank")

Snapshot = Mapping[str, torch.Tensor]
"""Copies of what is trained, by name."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What resuming needs beside the tensors. `identity` is a digest of data and config."""

    identity: str
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty sibling folder that takes the place of `folder` when the block ends well.

    What was there before is kept as `.NAME.old`. Between the two renames only that is there; `find_state` and `recover`
    know.
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
    complete. With `adapter.is_merged` the adapter is written into whole weights, float32. All processes call it, the
    first one writes."""
    state = whole_state(model) if is_divided(model) else None
    if ranks().is_main:
        _write_checkpoint(folder, model, state, tokenizer, card, adapter)
    ranks().wait()


def _write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    state: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    card: Card,
    adapter: AdapterConfig,
) -> None:
    """Write it; `state` are the weights, if the model does not hold them whole."""
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
            model.save_pretrained(growing, state_dict=state)
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
    """A copy of what is trained, in the memory of the CPU; weights that are divided are put together by all
    processes."""
    with whole_weights(model):
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in trainable_parameters(model)}


def save_state(
    folder: Path,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainingState,
    best: Snapshot | None = None,
) -> None:
    """Write what is trained, the optimizers' moments, history, and the best weights so far; `load_state` goes on."""
    tensors = {MODEL_NAME: snapshot_of(model), OPTIMIZER_NAME: moments_of(optimizers)}
    write_state(folder, {**tensors, **({} if best is None else {BEST_NAME: best})}, asdict(state))


def load_state(
    folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], identity: str
) -> tuple[TrainingState, Snapshot | None] | None:
    """Continue a killed run: fill model and optimizers from `folder`, or from the state before it if that is damaged.

    Returns:
        The state and the best weights so far; `None` if there is no state that is whole.

    Raises:
        OtherJob: the state belongs to other data or another config.
    """
    found = find_state(folder, identity)
    if found is None:
        return None
    place, told = found
    restore(model, load_file(place / MODEL_NAME))
    restore_moments(optimizers, load_file(place / OPTIMIZER_NAME))
    return TrainingState(**told), load_file(place / BEST_NAME) if (place / BEST_NAME).is_file() else None


def restore(model: PreTrainedModel, snapshot: Snapshot) -> None:
    """Give a model the weights of a snapshot of itself."""
    parameters = dict(trainable_parameters(model))
    with torch.no_grad():
        for name, value in snapshot.items():
            parameters[name].copy_(divided_like(parameters[name], value))


# ---- states of any training ------------------------------------------------------------------------------------


def write_state(folder: Path, tensors: Mapping[str, Snapshot], told: Mapping[str, Any]) -> None:
    """Write tensors by file name, and last what is told beside them, with the files' digests; whole or not at all. Of
    several processes, the first writes."""
    if not ranks().is_main:
        return
    with atomic_folder(folder) as growing:
        for name, found in tensors.items():
            save_file(dict(found), growing / name)
        files = {path.name: sha256_file(path) for path in sorted(growing.iterdir())}
        (growing / STATE_NAME).write_text(json.dumps({**told, "files": files}), encoding="utf-8")


def find_state(folder: Path, identity: str) -> tuple[Path, dict[str, Any]] | None:
    """The last state that is whole, or the one before it: where its files lie, and what was told beside them.

    Raises:
        OtherJob: the state belongs to other data or other options.
    """
    for place in (folder, _siblings(folder)[1]):
        told = _told_if_whole(place)
        if told is None:
            continue
        if told.get("identity") != identity:
            raise OtherJob(
                f"{folder} holds a state of another run (other data, model, template or options); remove it, or "
                "choose another -o"
            )
        return place, told
    return None


def _told_if_whole(place: Path) -> dict[str, Any] | None:
    """What is told in a folder, without its digests, if all of it is as it was written."""
    if not place.is_dir():
        return None
    try:
        told = dict(read_json(place / STATE_NAME))
        files = told.pop("files").items()
        damaged = [name for name, digest in files if sha256_file(place / name) != digest]
    except (InputError, OSError, TypeError, ValueError, KeyError, AttributeError) as cause:
        log.warning("%s is damaged (%s); going on from an earlier state", place, cause)
        return None
    if damaged:
        log.warning("%s is damaged (%s is not what was written); going on from an earlier state", place, damaged[0])
        return None
    return told


def recover(folder: Path) -> None:
    """Take the old content back where a kill came between the two renames of `atomic_folder`."""
    old = _siblings(folder)[1]
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def moments_of(optimizers: Sequence[torch.optim.Optimizer]) -> Snapshot:
    """Every moment under `optimizer.parameter.name`, as numbers where there are such."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return {
        f"{number}.{index}.{name}": whole(value).contiguous()
        for number, state in enumerate(states)
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_moments(optimizers: Sequence[torch.optim.Optimizer], known: Snapshot) -> None:
    """Give optimizers the moments of `moments_of`."""
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, value in known.items():
        number, index, name = key.split(".")
        moments[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, own in zip(optimizers, moments, strict=True):
        parameters: list[torch.Tensor] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for place, values in own.items():
            own[place] = {key: divided_like(parameters[place], value) for key, value in values.items()}
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
