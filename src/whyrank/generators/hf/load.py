"""Loading a causal language model from a folder or the hub: safetensors only, no remote code, no surprises."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from whyrank.errors import InputError, UnsupportedModel
from whyrank.generators.hf.adapters import Quantize, keep_differentiable, merge_from, quantization, read_adapter
from whyrank.generators.hf.compiling import multiplies_bfloat16

__all__ = [
    "DTYPES",
    "Device",
    "Dtype",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
    "weights_digest",
    "without_progress_bars",
]

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
STANDARD_LAYERS = {"full_attention", "sliding_attention"}


def resolve_device(device: Device) -> torch.device:
    """`auto` is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        InputError: the named device is not on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, is_there in available.items() if is_there))
    if not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise InputError(f"--device {device}: this machine (or this build of torch) offers only {there}")
    return torch.device(device)


def resolve_dtype(dtype: Dtype, device: torch.device, model: str | Path) -> torch.dtype | Literal["auto"]:
    """What weights are loaded in; 8-bit ones are made of what the checkpoint holds, which transformers calls "auto".

    `auto` is bfloat16 where both the checkpoint and the machine have it (on CUDA whatever the checkpoint has, and
    float16 on cards that know no bfloat16), else float32: nothing is rounded that was not rounded before, and nothing
    is multiplied in a format that the processor only imitates.

    Raises:
        InputError: 8-bit weights on another device than a CPU, or no checkpoint is there.
    """
    if dtype == "int8":
        if device.type != "cpu":
            raise InputError(f"--dtype int8 runs on CPUs, not on {device.type}; use bfloat16 there")
        return "auto"
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    is_native = device.type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if is_native and _stored_dtype(model) == torch.bfloat16 else torch.float32


def _stored_dtype(model: str | Path) -> torch.dtype | None:
    """What a checkpoint says its weights are; an adapter's base is asked."""
    adapter = read_adapter(model)
    if adapter is not None:
        return _stored_dtype(adapter.base)
    stated = _read_config(model).get_text_config(decoder=True).dtype
    return stated if isinstance(stated, torch.dtype) else None


def _read_config(model: str | Path) -> PretrainedConfig:
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(str(model), trust_remote_code=False))
    except (OSError, ValueError, KeyError) as cause:
        raise InputError(
            f"expected a folder with a Hugging Face checkpoint or a hub id, found {str(model)!r}: {_first_line(cause)}"
        ) from cause


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: there is none.
    """
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(str(model), trust_remote_code=False))
    except (OSError, ValueError, KeyError) as cause:
        raise InputError(f"no tokenizer could be loaded from {str(model)!r}: {_first_line(cause)}") from cause


def load_model(
    model: str | Path,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    *,
    quantize: Quantize = "none",
) -> PreTrainedModel:
    """A causal LM with a standard key/value cache, in evaluation mode.

    A folder with an adapter gives its base with the adapter merged into it.

    Args:
        model: folder or hub id.
        device: where it goes.
        dtype: of the weights; of the products where they are quantised.
        quantize: how linear layers are held, for training an adapter on them.

    Raises:
        InputError: no checkpoint with safetensors weights is there.
        MissingExtra: peft or bitsandbytes is needed and not installed.
        UnsupportedModel: an encoder-decoder, or a model whose layers keep another kind of state.
    """
    adapter = read_adapter(model)
    if adapter is None:
        return _load_whole(model, device, dtype, quantize)
    if quantize != "none":
        raise InputError(f"{model} is an adapter, which cannot be quantised; write whole weights with --merge")
    base = load_model(adapter.base, device, dtype, quantize=adapter.quantize)
    with without_progress_bars():
        return merge_from(base, adapter)


def _load_whole(
    model: str | Path, device: torch.device, dtype: torch.dtype | Literal["auto"], quantize: Quantize
) -> PreTrainedModel:
    """A checkpoint with all its weights.

    Raises:
        InputError: no checkpoint with safetensors weights is there.
        UnsupportedModel: an encoder-decoder, or a model whose layers keep another kind of state.
    """
    config = _read_config(model)
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; whyrank runs decoder-only causal language models")
    layers = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or [])
    if not layers <= STANDARD_LAYERS:
        strange = ", ".join(sorted(layers - STANDARD_LAYERS))
        raise UnsupportedModel(f"{name} has layers without a standard key/value cache ({strange})")
    architectures = list(getattr(config, "architectures", None) or [])
    if architectures and not any(architecture.endswith(GENERATIVE) for architecture in architectures):
        raise UnsupportedModel(f"{', '.join(architectures)} cannot continue a text; expected a causal language model")
    held: dict[str, Any] = {}
    if quantize != "none":
        held = {
            "quantization_config": quantization(torch.float32 if dtype == "auto" else dtype),
            "device_map": {"": device},
        }
    try:
        with without_progress_bars():
            found: Any = AutoModelForCausalLM.from_pretrained(
                str(model), dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **held
            )
    except (OSError, ValueError) as cause:
        raise InputError(f"{name} could not be loaded from {str(model)!r}: {_first_line(cause)}") from cause
    loaded, report = found
    if getattr(loaded, "_is_stateful", False):
        raise UnsupportedModel(f"{name} keeps a recurrent state instead of a key/value cache")
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModel(
            f"the weights in {str(model)!r} lack {len(missing)} tensors of {type(loaded).__name__}, the first is "
            f"{missing[0]}; they would be random"
        )
    torch.nn.Module.train(loaded, False)
    if held:
        keep_differentiable(loaded)
    else:
        torch.nn.Module.to(loaded, device)
    return cast(PreTrainedModel, loaded)


def weights_digest(model: PreTrainedModel) -> str:
    """Eight digits that change with the weights: a digest of 64 values of every tensor, spread over its length."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        # In float64: float32 cannot tell the places of a tensor of more than 2**24 values apart.
        places = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long().to(flat.device)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bars over ours."""
    was_on = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
