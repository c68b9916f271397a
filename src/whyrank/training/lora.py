"""Training an adapter instead of the weights: put it on, train it alone, look past it, save it.

Adapters are peft's, injected into the model in place, so that the model stays what it is for everything else
(`packing`, the engine, saving). There is no dropout in them: the ratio of refinement must be 1 before the first update,
and the reference policy is the same network with the adapter off (`without_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from whyrank.errors import InputError, require
from whyrank.generators.hf.adapters import write_quantize
from whyrank.training.config import AdapterConfig

__all__ = ["add_adapter", "has_adapter", "save_adapter", "trainable_parameters", "without_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: AdapterConfig, seed: int) -> None:
    """Freeze a model's weights and put a new adapter on it, which changes nothing until it is trained.

    Args:
        model: changed in place.
        config: rank above 0.
        seed: fixes the adapter's first half; the second is zero.

    Raises:
        MissingExtra: peft is not installed.
        InputError: the model has no layer of the names that were asked for.
    """
    require("peft", "train")
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets: str | list[str] = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        model.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.scaled_alpha,
                lora_dropout=0.0,
                target_modules=targets,
                task_type="CAUSAL_LM",
            )
        )
    except ValueError as cause:
        raise InputError(f"no adapter can be put on {model.config.model_type}: {cause}") from cause
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()  # small updates would be lost in half precision


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether `add_adapter` has been called on it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and values of what training changes, each parameter once (tied weights are one)."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The base inside the block, as if the adapter had never been there; afterwards it acts again.

    Raises:
        InputError: there is no adapter: a model that was trained as a whole keeps no reference in itself.
    """
    if not has_adapter(model):
        raise InputError("expected a model with an adapter, found one without; load the reference a second time")
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def save_adapter(folder: Path, model: PreTrainedModel, config: AdapterConfig) -> None:
    """Write the adapter alone (safetensors), with the name of its base; `load_model` of the folder gives both merged.

    A base that is a folder is named by its absolute path.
    """
    require("peft", "train")
    from peft import get_peft_model_state_dict

    base = Path(str(model.name_or_path))
    (settings,) = model.peft_config.values()
    settings.base_model_name_or_path = str(base.resolve()) if base.is_dir() else str(base)
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(folder))
    # Not model.save_pretrained: that asks the hub about the base. The prefix is that of every published adapter.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}, folder / WEIGHTS_NAME
    )
    if config.quantize != "none":
        write_quantize(folder, config.quantize)
