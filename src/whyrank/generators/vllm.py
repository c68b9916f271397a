"""vLLM in the same process: both phases on its engine, for teachers and large jobs on a GPU.

The explanation is one request. For the label a second one is made of the same tokens, the explanation that was kept
and the label prompt, so that the engine finds almost all of it in its prefix cache; it asks for the log-probabilities
of the tokens that may follow (`logprob_token_ids`), one request per inner node of the trie of labels. They are taken
from the model's logits before any mask or temperature (`logprobs_mode` "raw_logprobs"), so that the label mass is that
of the whole vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple, Self

from whyrank.errors import GenerationError, InputError, MissingExtra, TemplateMismatch, require
from whyrank.generators import Completion, FinishReason, Request
from whyrank.generators.explanations import num_until_stop, settle_explanation
from whyrank.generators.hf.chat import ChatTokens, Endings
from whyrank.generators.hf.labels import children, inner_nodes, label_log_probs
from whyrank.generators.hf.load import Dtype, load_tokenizer

__all__ = ["EngineConfig", "VllmGenerator", "safetensors_digest"]

FIRST_VERSION, NEXT_VERSION = (0, 29), (0, 34)  # the interface was read in every release between them
MOST_TOKEN_IDS = 128  # vLLM's bound on the length of `logprob_token_ids`
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096  # of every weights file, for its digest

Node = tuple[int, ...]
"""The beginning of a label, in tokens: an inner node of the trie of labels. The empty one is its root."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine is built; everything else is vLLM's default.

    Raises:
        InputError: a value is out of range.
    """

    max_num_seqs: int = 256
    """Sequences that the engine advances at once; as many pairs are under way, and read ahead."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and answer together; by default what the model was built for."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM takes for weights and cache, in (0, 1]."""
    tensor_parallel_size: int = 1
    """GPUs that share the model."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"vllm: expected {name} to be at least 1, found {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"vllm: expected gpu_memory_utilization above 0 and at most 1, found {self.gpu_memory_utilization}"
            )


@dataclass(frozen=True, slots=True)
class VllmGenerator:
    """A model on vLLM's engine, as a `Generator`.

    Completions come as they finish. Explanations are drawn with the request's seed; another vLLM, GPU or company in
    the batch may still change a draw or a close greedy choice, because sums are then rounded otherwise. `logprobs` are
    those of the model at temperature 1, and `None` where explanations are drawn at another temperature above 0.
    """

    name: str
    engine: Any
    """`vllm.LLMEngine`."""
    tokens: ChatTokens
    max_pairs: int = 256
    """Pairs under way at once."""
    numbers: Iterator[int] = field(default_factory=count, repr=False)
    """Of the requests to the engine."""
    in_use: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        dtype: Dtype = "auto",
        config: EngineConfig = EngineConfig(),
        name: str | None = None,
    ) -> Self:
        """Start an engine with a checkpoint from a folder or the hub.

        Args:
            model: folder or hub id; weights must be safetensors.
            dtype: `auto` is bfloat16.
            config: size of the engine.
            name: how judgments call the model; by default `vllm:` and what was given as `model`.

        Raises:
            InputError: nothing loadable is there, or vLLM refuses the model or the settings.
            MissingExtra: vLLM is not installed, or not in a version that this backend was written for.
            UnsupportedModel: a tokenizer that cannot be used safely.
        """
        vllm = _import_vllm()
        vllm_error = import_module("vllm.exceptions").VLLMError
        tokens = ChatTokens(load_tokenizer(model))
        try:
            arguments = vllm.EngineArgs(
                model=str(model),
                runner="generate",
                dtype="bfloat16" if dtype == "auto" else dtype,
                max_num_seqs=config.max_num_seqs,
                max_model_len=config.max_model_len,
                gpu_memory_utilization=config.gpu_memory_utilization,
                tensor_parallel_size=config.tensor_parallel_size,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                load_format="safetensors",
                trust_remote_code=False,
                disable_log_stats=True,
            )
            engine = vllm.LLMEngine.from_engine_args(arguments)
        except (OSError, ValueError, RuntimeError, vllm_error) as cause:
            raise InputError(
                f"vLLM could not start with {str(model)!r}: {_first_line(cause)}; its messages above may say more"
            ) from cause
        return cls(name or f"vllm:{model}", engine, tokens, config.max_num_seqs)

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the engine accepts."""
        return int(self.engine.model_config.max_model_len)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield completions as they come; at most `max_pairs` requests are read ahead of them.

        A generator that is closed early takes its requests back from the engine.

        Raises:
            GenerationError: the engine died, or another iteration over this generator has not ended.
            TemplateMismatch: the labels cannot be told apart in the model's tokens.
        """
        if not self.in_use.acquire(blocking=False):
            raise GenerationError(f"{self.name} is answering other requests; end or close that iteration first")
        job = _Job(self)
        try:
            yield from job.run(requests)
        finally:
            job.close()
            self.in_use.release()


@dataclass(slots=True)
class _Pair:
    """A request on its way. `kept` is its explanation, `after` what may follow each node that was read."""

    index: int
    request: Request
    prompt: list[int]
    endings: Endings
    finish: FinishReason = "stop"
    kept: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = ()
    num_written: int = 0
    after: dict[Node, dict[int, float]] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)


class _Call(NamedTuple):
    """What the engine was asked for: an explanation, or the log-probabilities of some tokens after a node."""

    pair: _Pair
    node: Node | None = None
    children: tuple[int, ...] = ()


class _EngineStopped(GenerationError):
    """No request of this engine can be answered any more."""


class _Job:
    """One iteration over requests: what the engine has been asked for, and for which pair."""

    def __init__(self, generator: VllmGenerator) -> None:
        self._generator = generator
        self._engine = generator.engine
        self._tokens = generator.tokens
        self._vllm = _import_vllm()
        # vLLM's own errors of validation are no ValueErrors, but not all that it raises on purpose are its own.
        self._refusals = (ValueError, import_module("vllm.exceptions").VLLMClientError)
        self._final = import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        self._calls: dict[str, _Call] = {}
        self._pairs: set[int] = set()

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Keep the engine full until the requests are used up and answered."""
        numbered = enumerate(requests)
        has_more = True
        while has_more or self._calls:
            while has_more and len(self._pairs) < self._generator.max_pairs:
                item = next(numbered, None)
                has_more = item is not None
                if item is not None:
                    yield from self._begin(*item)
            if self._calls:
                for output in self._step():
                    if output.finished and output.request_id in self._calls:
                        yield from self._answered(output)

    def close(self) -> None:
        """Take back what the engine still holds."""
        if self._calls:
            self._engine.abort_request(list(self._calls))
            self._calls.clear()

    def _step(self) -> Sequence[Any]:
        try:
            outputs: Sequence[Any] = self._engine.step()
        except Exception as cause:
            raise self._stopped(cause) from cause
        return outputs

    def _stopped(self, cause: Exception) -> _EngineStopped:
        """Whatever it was: vLLM's engine does not survive an exception of its core."""
        self._calls.clear()
        return _EngineStopped(
            f"{self._generator.name}: the engine stopped with {len(self._pairs)} pairs under way "
            f"({type(cause).__name__}: {_first_line(cause)}); vLLM's messages above may say why"
        )

    def _begin(self, index: int, request: Request) -> Iterator[tuple[int, Completion]]:
        name = self._generator.name
        try:
            endings = self._tokens.endings(request)
        except TemplateMismatch as cause:
            raise TemplateMismatch(f"{name}: {cause}") from cause
        pair = _Pair(index, request, self._tokens.prompt_ids(request), endings)
        room = len(endings.prompt) + max((len(label) for label in endings.labels), default=0)
        num_explanation = 0 if request.is_direct else request.sampling.max_tokens
        num_needed = len(pair.prompt) + num_explanation + room
        holds = self._generator.max_tokens
        self._pairs.add(index)
        try:
            if num_needed > holds:
                raise GenerationError(
                    f"the request needs {num_needed} tokens ({len(pair.prompt)} prompt, {num_explanation} explanation, "
                    f"{room} label), {name} holds {holds}; lower max_document_tokens"
                )
            if num_explanation:
                self._ask(_Call(pair), pair.prompt, self._explanation_params(request))
            else:
                pair.finish = "stop" if request.is_direct else "length"
                self._ask_node(pair, ())
        except _EngineStopped:
            raise
        except GenerationError as error:
            yield self._failed(pair, error)

    def _explanation_params(self, request: Request) -> Any:
        sampling = request.sampling
        return self._params(
            temperature=sampling.temperature,
            seed=sampling.seed % 2**63,  # vLLM takes -1 for no seed at all
            max_tokens=sampling.max_tokens,
            stop=list(request.stops),
            logprobs=0,  # that of the token itself
        )

    def _params(self, **settings: Any) -> Any:
        try:
            return self._vllm.SamplingParams(output_kind=self._final, **settings)
        except self._refusals as cause:
            raise GenerationError(f"vLLM refuses the request: {_first_line(cause)}") from cause

    def _ask(self, call: _Call, ids: list[int], params: Any) -> None:
        request_id = f"whyrank-{next(self._generator.numbers)}"
        try:
            self._engine.add_request(request_id, self._vllm.TokensPrompt(prompt_token_ids=ids), params)
        except self._refusals as cause:
            raise GenerationError(f"vLLM refuses the request: {_first_line(cause)}") from cause
        except Exception as cause:
            raise self._stopped(cause) from cause
        self._calls[request_id] = call
        call.pair.calls.add(request_id)

    def _ask_node(self, pair: _Pair, node: Node) -> None:
        pair.after[node] = {}
        ids = [*pair.prompt, *pair.kept, *pair.endings.prompt, *node]
        following = children(pair.endings.labels, node)
        for start in range(0, len(following), MOST_TOKEN_IDS):
            part = following[start : start + MOST_TOKEN_IDS]
            params = self._params(temperature=0.0, max_tokens=1, logprob_token_ids=part, detokenize=False)
            self._ask(_Call(pair, node, tuple(part)), ids, params)

    def _answered(self, output: Any) -> Iterator[tuple[int, Completion]]:
        """Take an answer in, and ask for what comes next, or let the pair go."""
        call = self._calls.pop(output.request_id)
        pair = call.pair
        pair.calls.discard(output.request_id)
        try:
            answer = output.outputs[0]
            if answer.finish_reason not in ("stop", "length"):
                raise GenerationError(f"vLLM gave the request up with finish reason {answer.finish_reason!r}")
            if call.node is None:
                self._take_explanation(pair, answer)
            else:
                _take_node(pair, call.node, call.children, answer)
            if not pair.calls:
                # The root goes first, alone: afterwards all that the others share is in the prefix cache.
                left = [n for n in inner_nodes(pair.endings.labels) if n not in pair.after]
                for following in left if pair.after else left[:1]:
                    self._ask_node(pair, following)
        except _EngineStopped:
            raise
        except GenerationError as error:
            yield self._failed(pair, error)
        else:
            if not pair.calls:
                yield self._completed(pair)

    def _take_explanation(self, pair: _Pair, answer: Any) -> None:
        request, ids = pair.request, list(answer.token_ids)
        given = answer.logprobs or []
        if len(given) < len(ids):
            raise GenerationError(f"vLLM returned {len(given)} log-probabilities for {len(ids)} tokens")
        logprobs = [_logprob(position, token) for token, position in zip(ids, given, strict=False)]
        # A stop string is named, an end token is not, or by its number: then it is the last token.
        is_ended = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
        written = ids[:-1] if is_ended else ids
        # vLLM searches the text for stops, but not its beginning for those that want a newline before them.
        end = num_until_stop(written, self._tokens, request)
        explanation = settle_explanation(written[:end], self._tokens, request)
        pair.kept = (*written[: explanation.num_kept], *explanation.tail)
        is_as_drawn = request.sampling.temperature in (0.0, 1.0)
        pair.logprobs = None if explanation.tail or not is_as_drawn else tuple(logprobs[: explanation.num_kept])
        pair.finish = "stop" if answer.finish_reason == "stop" or end is not None else "length"
        pair.num_written = len(ids)

    def _completed(self, pair: _Pair) -> tuple[int, Completion]:
        self._pairs.discard(pair.index)
        return pair.index, Completion(
            text=self._tokens.decode(pair.kept),
            finish_reason=pair.finish,
            label_probs=tuple(math.exp(p) for p in label_log_probs(pair.endings.labels, pair.after)),
            token_ids=pair.kept,
            logprobs=pair.logprobs,
            num_prompt_tokens=len(pair.prompt),
            num_completion_tokens=pair.num_written,
        )

    def _failed(self, pair: _Pair, error: GenerationError) -> tuple[int, Completion]:
        self._pairs.discard(pair.index)
        if pair.calls:
            self._engine.abort_request(sorted(pair.calls))
            for call in pair.calls:
                del self._calls[call]
            pair.calls.clear()
        return pair.index, Completion.failed(error)


def _take_node(pair: _Pair, node: Node, following: tuple[int, ...], answer: Any) -> None:
    if not answer.logprobs:
        raise GenerationError("vLLM returned no log-probabilities for the label")
    pair.after[node] |= {child: _logprob(answer.logprobs[0], child) for child in following}


def _logprob(position: Any, token: int) -> float:
    """Of one token at one position of an answer."""
    if token not in position:
        raise GenerationError(f"vLLM returned no log-probability for token {token}")
    return float(position[token].logprob)


def _import_vllm() -> ModuleType:
    # vLLM writes its messages to standard output unless told otherwise; that is where results go.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    vllm = require("vllm", "vllm")
    found = str(vllm.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    version = (int(numbers[1]), int(numbers[2])) if numbers else None
    if version is None or not FIRST_VERSION <= version < NEXT_VERSION:
        first, beyond = (".".join(map(str, numbers)) for numbers in (FIRST_VERSION, NEXT_VERSION))
        raise MissingExtra(
            f"expected vllm at least {first} and below {beyond}, found {found}: its interface changes between "
            "versions. In an environment of its own: pip install 'whyrank[vllm]'"
        )
    return vllm


def safetensors_digest(folder: Path) -> str:
    """Eight digits that change with the weights in a folder: a digest of sizes, and of samples spread over each file.

    Raises:
        InputError: there are no safetensors files.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"expected weights as *.safetensors in {folder}, found none")
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(NUM_SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:8]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
