"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) beside the weights that they change.

A checkpoint with an adapter holds peft's `adapter_config.json`, which names the base model, and the adapter's weights.
It is run with the adapter merged into the base, so that nothing downstream knows of it. A base that was quantised for
training (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) is rounded in the same way before merging, because the adapter
was fitted to the rounded weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from whyrank.errors import InputError, require
from whyrank.store import read_json

__all__ = [
    "Adapter",
    "Quantize",
    "keep_differentiable",
    "merge",
    "merge_from",
    "quantization",
    "read_adapter",
    "write_quantize",
]

Quantize = Literal["none", "4bit"]
"""How a base's linear weights are held while an adapter is trained: as they are, or as 4-bit normal floats."""

CONFIG_NAME = "adapter_config.json"
QUANTIZE_NAME = "quantize.json"


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a folder says about its adapter: the base it belongs to, and how that was held."""

    folder: Path
    base: str
    quantize: Quantize


def read_adapter(folder: Path | str) -> Adapter | None:
    """The adapter in a checkpoint's folder; `None` if it holds whole weights, or is not a folder.

    Raises:
        InputError: the files are damaged, or name no base.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return None
    config = read_json(path)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str):
        raise InputError(f"{path}: expected base_model_name_or_path with a folder or hub id, found {base!r}")
    note = Path(folder) / QUANTIZE_NAME
    held = read_json(note).get("quantize") if note.is_file() else "none"
    if held not in ("none", "4bit"):
        raise InputError(f"{note}: expected quantize none or 4bit, found {held!r}; update whyrank")
    return Adapter(Path(folder), base, cast(Quantize, held))


def write_quantize(folder: Path, quantize: Quantize) -> None:
    """Note how the base of the adapter in `folder` was held."""
    (folder / QUANTIZE_NAME).write_text(json.dumps({"quantize": quantize}) + "\n", encoding="utf-8")


def quantization(compute_dtype: torch.dtype) -> Any:
    """What transformers is to be told so that linear weights are loaded as 4-bit normal floats.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    require("bitsandbytes", "qlora")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights at the first evaluation on a CPU: products with rearranged ones
    have no gradient, and say so in a warning at most."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, a plain attribute of theirs


def merge_from(base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The base with an adapter's changes in its weights; `base` is changed in place.

    Raises:
        MissingExtra: peft is not installed.
        InputError: the adapter's weights do not fit the base.
    """
    require("peft", "train")
    whole = cast(PreTrainedModel, base.dequantize()) if getattr(base, "is_quantized", False) else base
    renamings = getattr(whole, "_weight_conversions", None)
    try:
        whole.load_adapter(str(adapter.folder))
    except (OSError, ValueError, RuntimeError) as cause:
        reason = str(cause).strip().split("\n", 1)[0]
        raise InputError(f"the adapter in {adapter.folder} does not fit its base {adapter.base!r}: {reason}") from cause
    merge(whole)
    # The adapter's renamings were remembered; saving the whole would apply them, and give names that nobody knows.
    setattr(whole, "_weight_conversions", renamings)  # noqa: B010, an attribute of theirs without a type
    whole.name_or_path = str(adapter.folder)  # what an adapter on top of this one belongs to
    torch.nn.Module.train(whole, False)
    return whole


def merge(model: PreTrainedModel) -> None:
    """Add the changes of a model's adapters to its weights, in place, and take the adapters away.

    Raises:
        MissingExtra: peft is not installed.
    """
    require("peft", "train")
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    for parent, name, child in adapted:
        child.merge()
        setattr(parent, name, child.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(model, attribute):
            delattr(model, attribute)
