"""vLLM's documented interface (0.29 to 0.33) over a small torch model, one whole forward per token, no cache.

Names, arguments, defaults, refusals and the meaning of outputs follow vLLM's documentation and its sources; whatever is
not here raises, so that a drift of the backend's use of it shows. Nothing in it knows whyrank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, Literal, TypedDict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class VLLMError(Exception):
    """Base of vLLM's own errors: no ValueError."""


class VLLMClientError(VLLMError):
    """A request is at fault."""


class VLLMValidationError(VLLMClientError):
    """A request cannot be what it is."""


class EngineDeadError(VLLMError):
    """The core of the engine is gone."""


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    """The settings that the backend uses; all others raise a TypeError, as misspelt ones do in vLLM."""

    temperature: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise VLLMValidationError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is None or self.max_tokens < 1:
            raise VLLMValidationError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if any(not stop for stop in self.stops):
            raise VLLMValidationError("stop cannot contain an empty string.")
        if self.stops and not self.detokenize:
            raise VLLMValidationError("stop strings are only supported when detokenize is True.")
        if self.logprobs not in (None, 0):
            raise NotImplementedError("the fake returns the log-probability of the chosen token only")
        if self.seed == -1:
            self.seed = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


@dataclass
class EngineArgs:
    """The settings that the backend uses, with vLLM's defaults."""

    model: str
    runner: Literal["auto", "generate", "pooling", "draft"] = "auto"
    dtype: str = "auto"
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool | None = None
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] = "raw_logprobs"
    load_format: str = "auto"
    trust_remote_code: bool = False
    disable_log_stats: bool = False


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class ModelConfig:
    max_model_len: int


@dataclass
class Running:
    """A request inside the engine."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    is_given_up: bool
    written: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


class LLMEngine:
    """Advances up to `max_num_seqs` requests by one token per step.

    `received` keeps every prompt with its settings. Tests may set `dies_at_step`, and `gives_up_on`: the number of a
    request, in the order in which they came, that ends with finish reason `abort`.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        built_for = int(self.model.config.max_position_embeddings)
        self.model_config = ModelConfig(args.max_model_len or built_for)
        self.received: list[tuple[list[int], SamplingParams]] = []
        self.running: dict[str, Running] = {}
        self.num_steps = 0
        self.dies_at_step: int | None = None
        self.gives_up_on: int | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        return cls(engine_args)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def add_request(self, request_id: str, prompt: TokensPrompt, params: SamplingParams) -> str:
        assert isinstance(request_id, str)
        assert request_id not in self.running
        assert list(prompt) == ["prompt_token_ids"]
        ids = prompt["prompt_token_ids"]
        if not ids or len(ids) > self.model_config.max_model_len:
            raise VLLMValidationError(f"a prompt of {len(ids)} tokens")
        if params.logprob_token_ids is not None and len(params.logprob_token_ids) > 128:
            raise VLLMValidationError(f"Requested logprob_token_ids of length {len(params.logprob_token_ids)}")
        if params.output_kind is not RequestOutputKind.FINAL_ONLY:
            raise NotImplementedError("the fake tells the end only")
        is_given_up = len(self.received) == self.gives_up_on
        self.running[request_id] = Running(request_id, list(ids), params, is_given_up)
        self.received.append((list(ids), params))
        return request_id

    def abort_request(self, request_ids: list[str]) -> None:
        assert isinstance(request_ids, list)
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        self.num_steps += 1
        if self.dies_at_step is not None and self.num_steps >= self.dies_at_step:
            raise EngineDeadError("EngineCore encountered an issue.\nSee stack trace (above) for the root cause.")
        chosen = list(self.running.values())[: self.args.max_num_seqs]
        return [output for running in chosen for output in self._advance(running)]

    def _advance(self, running: Running) -> list[RequestOutput]:
        if running.is_given_up:
            return [self._finished(running, "abort", None)]
        params = running.params
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([running.prompt + running.written])).logits[0, -1].double()
        raw = torch.log_softmax(logits, dim=-1)
        token = int(raw.argmax())
        if params.temperature > 0:
            # A draw of its own for every position: what other requests do is of no matter, as it is in vLLM.
            random = torch.Generator()
            if params.seed is not None:
                random.manual_seed(hash((params.seed, len(running.written))))
            else:
                random.seed()
            token = int(torch.multinomial(torch.softmax(logits / params.temperature, dim=-1), 1, generator=random))
        running.written.append(token)
        wanted = [token, *(params.logprob_token_ids or [])]
        if params.logprobs is not None or params.logprob_token_ids:
            running.logprobs.append({i: Logprob(float(raw[i])) for i in wanted})
        return self._ended(running, token)

    def _ended(self, running: Running, token: int) -> list[RequestOutput]:
        params = running.params
        more_ends = self.model.generation_config.eos_token_id
        ends = more_ends if isinstance(more_ends, list) else [more_ends]
        if token == self.tokenizer.eos_token_id:
            return [self._finished(running, "stop", None)]
        if token in ends:
            return [self._finished(running, "stop", token)]
        text = self._text(running)
        for stop in params.stops:
            if stop in text:
                return [self._finished(running, "stop", stop)]
        is_full = len(running.prompt) + len(running.written) >= self.model_config.max_model_len
        if len(running.written) == params.max_tokens or is_full:
            return [self._finished(running, "length", None)]
        return []

    def _text(self, running: Running) -> str:
        if not running.params.detokenize:
            return ""
        return str(self.tokenizer.decode(running.written, skip_special_tokens=True))

    def _finished(self, running: Running, reason: str, stop: int | str | None) -> RequestOutput:
        del self.running[running.request_id]
        text = self._text(running)
        if isinstance(stop, str):
            text = text[: text.index(stop)]
        output = CompletionOutput(
            index=0,
            text=text,
            token_ids=list(running.written),
            cumulative_logprob=None,
            logprobs=running.logprobs or None,
            finish_reason=reason,
            stop_reason=stop,
        )
        return RequestOutput(running.request_id, running.prompt, [output], finished=True)


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.33.0") -> None:
    """Let `import vllm` find this."""
    names: Mapping[str, Mapping[str, Any]] = {
        "vllm": {
            "__version__": version,
            "EngineArgs": EngineArgs,
            "LLMEngine": LLMEngine,
            "SamplingParams": SamplingParams,
            "TokensPrompt": TokensPrompt,
        },
        "vllm.sampling_params": {"SamplingParams": SamplingParams, "RequestOutputKind": RequestOutputKind},
        "vllm.exceptions": {"VLLMError": VLLMError, "VLLMClientError": VLLMClientError},
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
