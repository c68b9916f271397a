"""The one thing every model is: continue a chat, then choose among given labels.

`hf`, `vllm`, `endpoint`, `scripted` and `overlap` implement the protocol; teacher, student and server are the same
type. This module imports no backend, so that the base install needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = [
    "ApproximateTokens",
    "Completion",
    "FinishReason",
    "Generator",
    "Request",
    "Role",
    "Sampling",
    "Segment",
    "SegmentKind",
    "TextTokens",
]

Role = Literal["system", "user", "assistant"]
SegmentKind = Literal["structure", "instruction", "query", "document"]
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a chat that is tokenised apart from its neighbours.

    Only `structure` may contain a tokenizer's special tokens. All other kinds reach the model as plain text,
    whatever they contain.
    """

    role: Role
    kind: SegmentKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the explanation is drawn. `temperature` 0 is greedy; `max_tokens` caps it; `seed` fixes the draw."""

    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One chat to continue, then the labels to choose among.

    `segments` is the prompt; trailing assistant segments are the beginning of the answer. `stops` end the
    explanation (the text before the first of them is kept). `label_prompt` is what the runtime appends before
    it reads the label; `labels` are the texts that may follow it, terminators included. Without labels the text is
    all that is wanted, and `label_probs` is empty or `None`. `is_direct` skips the explanation. `chat_options` are
    passed on to the model's chat template.
    """

    segments: tuple[Segment, ...]
    stops: tuple[str, ...]
    label_prompt: str
    labels: tuple[str, ...]
    sampling: Sampling = Sampling()
    is_direct: bool = False
    chat_options: Mapping[str, bool | str] = field(default_factory=dict)

    def text_of(self, kind: SegmentKind) -> str:
        """All segments of one kind, joined; what `scripted` and `overlap` look at."""
        return "".join(segment.text for segment in self.segments if segment.kind == kind)


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for one request.

    A two-phase backend puts the explanation in `text` and the unrestricted probability of each label, in the
    request's order, in `label_probs`. `num_completion_tokens` counts what the model wrote, not what was appended. A
    backend that cannot append (a chat endpoint) puts the whole answer in
    `text` and leaves `label_probs` at `None`: the template parses it. `token_ids` and `logprobs` (natural
    logarithm) cover the explanation; `logprobs` is `None` where the explanation ended inside a token that the model
    chose, because the rest of it was spelled anew. A failed request carries its exception in `error` and nothing else.
    """

    text: str
    finish_reason: FinishReason
    label_probs: tuple[float, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    error: Exception | None = None

    @classmethod
    def failed(cls, error: Exception) -> Completion:
        """The completion of a request that ended in an exception."""
        return cls(text="", finish_reason="error", error=error)


class TextTokens(Protocol):
    """Measures text in tokens, so that a template can cut documents without knowing a tokenizer."""

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Character span `[start, end)` of every token of `text`, in order."""
        ...


class Generator(Protocol):
    """A model. `name` identifies it in judgments, keys and manifests."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> TextTokens: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield `(index of the request, completion)` as soon as each is ready, in any order.

        `requests` may be an endless stream: implementations read ahead by a bounded amount. A request that
        fails yields `Completion.failed`; an exception that leaves this method ends the job.
        """
        ...


@dataclass(frozen=True, slots=True)
class ApproximateTokens:
    """Stands in for a tokenizer that is out of reach: one token per `characters_per_token` characters.

    Four characters per token is the usual rule of thumb for English; limits that rest on it are estimates.
    """

    characters_per_token: int = 4

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Spans of equal length; the last may be shorter."""
        size = self.characters_per_token
        return [(start, min(start + size, len(text))) for start in range(0, len(text), size)]
