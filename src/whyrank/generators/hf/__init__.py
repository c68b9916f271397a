"""Hugging Face causal language models on torch: the backend for laptops, small GPUs and training.

Two phases per request, on an engine for the shape of reranking (`engine.py`). Any decoder with a standard key/value
cache runs; others are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Self

import torch
from transformers import PreTrainedModel

from whyrank.errors import GenerationError, InputError, TemplateMismatch
from whyrank.generators import Completion, Request
from whyrank.generators.hf.attention import check_replaceable
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.engine import Answer, Engine
from whyrank.generators.hf.linears import is_available, pack
from whyrank.generators.hf.load import (
    Device,
    Dtype,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    weights_digest,
)

__all__ = ["HfGenerator"]

DEFAULT_BATCH = 32
MOST_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class HfGenerator:
    """A loaded model as a `Generator`.

    `batch_size` is the number of answers that are written at once: `None` stands for 32, or for as many as there is
    room for where `memory` bytes, on top of the weights, are given. Several threads may generate at once, or several
    iterations in turn: they share the model pass by pass.
    """

    name: str
    model: PreTrainedModel
    tokens: ChatTokens
    batch_size: int | None = None
    memory: int | None = None
    turn: Lock = field(default_factory=Lock, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: Device = "auto",
        dtype: Dtype = "auto",
        batch_size: int | None = None,
        memory: int | None = None,
        name: str | None = None,
    ) -> Self:
        """Load a checkpoint from a folder or the hub.

        Args:
            model: folder or hub id; weights must be safetensors.
            device: `auto` prefers CUDA, then MPS, then the CPU.
            dtype: see `resolve_dtype`; `int8` is for CPUs (`linears.py`).
            batch_size: answers that are written at once, at most.
            memory: bytes to take on top of the weights.
            name: how judgments call the model; by default what was given as `model`. A digest of the weights is
                added, so that judgments of another model in the same place are not taken for its own.

        Raises:
            InputError: nothing loadable is there, or the device is not, or it has no such products.
            UnsupportedModel: an architecture or tokenizer that cannot be run correctly.
        """
        place = resolve_device(device)
        loaded = load_model(model, place, resolve_dtype(dtype, place, model))
        check_replaceable(loaded)
        named = f"{name or model}@{weights_digest(loaded)}" + ("-int8" if dtype == "int8" else "")
        if dtype == "int8" and not is_available(int8=True):
            raise InputError("--dtype int8: this build of torch has no 8-bit products for this processor; use float32")
        pack(loaded, int8=dtype == "int8")
        return cls(named, loaded, ChatTokens(load_tokenizer(model)), batch_size, memory)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model was built for, if it says so."""
        longest = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return longest if isinstance(longest, int) else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer, by the tokenizer's and the checkpoint's account."""
        settings = self.model.generation_config
        stated = settings.eos_token_id if settings is not None else None
        more = stated if isinstance(stated, list) else [stated]
        return self.tokens.eos_ids | frozenset(i for i in more if isinstance(i, int))

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield each completion as soon as it is ready.

        Reads requests ahead, a few batches of them, before the first pass and whenever half of them have been let in,
        and waits for a source that has none ready: what comes over time is best asked in groups.
        """
        most = self.batch_size or (DEFAULT_BATCH if self.memory is None else MOST_AT_ONCE)
        engine = Engine(self.model, self.tokens, self.eos_ids, most, self.memory, self.turn)
        try:
            yield from engine.run(self._prepare(index, request) for index, request in enumerate(requests))
        except torch.OutOfMemoryError as cause:
            raise GenerationError(
                f"out of memory with {most} answers at once; choose a smaller --batch-size, or a --memory budget"
            ) from cause

    def _prepare(self, index: int, request: Request) -> Answer | tuple[int, Completion]:
        try:
            endings = self.tokens.endings(request)
        except TemplateMismatch as cause:
            raise TemplateMismatch(f"{self.name}: {cause}") from cause
        prompt, num_shared = self.tokens.prompt_parts(request)
        room = len(endings.prompt) + max((len(label) for label in endings.labels), default=0)
        num_needed = len(prompt) + room + (0 if request.is_direct else request.sampling.max_tokens)
        if self.max_tokens is not None and num_needed > self.max_tokens:
            problem = GenerationError(
                f"the request needs {num_needed} tokens ({len(prompt)} prompt, {request.sampling.max_tokens} "
                f"explanation, {room} label), {self.name} holds {self.max_tokens}; lower max_document_tokens"
            )
            return index, Completion.failed(problem)
        return Answer(index, request, prompt, num_shared, endings)
