"""What a stage will read, write and train, what that costs and how long it takes: arithmetic without running anything.

A forward pass takes 2 floating-point operations per parameter and token (a multiplication and an addition), the
backward pass twice as many: 4, of which the half that belongs to frozen weights is not needed when an adapter is
trained (Kaplan et al., arXiv 2001.08361, section 2.1, which also says why attention is left out). How much of a
machine's peak is reached is not calculated but told by the recipe: the estimate of hours stands and falls with it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from pydantic import ConfigDict

from whyrank.errors import InputError

__all__ = [
    "Expected",
    "Hardware",
    "Price",
    "Work",
    "cost",
    "distilling",
    "expanding",
    "hours",
    "judging",
    "refining",
    "tiny_parameters",
]

STRICT = ConfigDict(extra="forbid")
LABEL_TOKENS = 1


@dataclass(frozen=True, slots=True)
class Expected:
    """How much there is and how long it is, as far as no file tells.

    Raises:
        InputError: a number is negative.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    questions: int = 1000
    """Training questions that mining keeps."""
    documents_per_question: int = 5
    """Pairs that a training question is in."""
    queries: int = 100
    """Queries of a run that is ranked."""
    candidates: int = 100
    """Documents of each of them in the run."""
    instruction_tokens: int = 200
    """Tokens of a prompt around query and document."""
    query_tokens: int = 150
    """Tokens of a query."""
    document_tokens: int = 500
    """Tokens of a document, as cut by the template."""
    explanation_tokens: int = 120
    """Tokens of an explanation."""
    search_query_tokens: int = 60
    """Tokens of all search queries that are written for a question."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 0:
                raise InputError(f"expected {item.name} of at least 0, found {getattr(self, item.name)}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are read for one pair."""
        return self.instruction_tokens + self.query_tokens + self.document_tokens

    def written_tokens(self, mode: str) -> int:
        """Tokens that are written for one pair: an explanation and a label, or a label alone in mode `direct`. Mode
        `auto` writes both where every document gets its reason, which is the most it may come to."""
        explained, direct = self.explanation_tokens + LABEL_TOKENS, LABEL_TOKENS
        return {"explain": explained, "direct": direct, "auto": explained + direct}[mode]


@dataclass(frozen=True, slots=True)
class Price:
    """What an endpoint asks for a million tokens, in the recipe's currency."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prompt: float
    completion: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where models run, and which share of its peak each kind of work reaches.

    Raises:
        InputError: a number is outside its range.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """As it is to be printed."""
    peak_tflops: float
    """Floating-point operations per second of the dtype in use, in units of 10^12."""
    reading: float = 0.4
    """Share of the peak while prompts are read."""
    writing: float = 0.05
    """Share of the peak while tokens are written, which is bound by memory rather than arithmetic."""
    training: float = 0.35
    """Share of the peak in training."""

    def __post_init__(self) -> None:
        if not self.peak_tflops > 0:
            raise InputError(f"expected peak_tflops above 0, found {self.peak_tflops}")
        for name in ("reading", "writing", "training"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"expected {name} above 0 and at most 1, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of a stage: `num_read` go into a model as a prompt, `num_written` come out of it, `num_trained` pass
    forwards and backwards. `num_pairs` counts pairs of query and document, as often as they are looked at."""

    num_pairs: int = 0
    num_read: int = 0
    num_written: int = 0
    num_trained: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def judging(
    expected: Expected,
    num_queries: int,
    num_pairs: int,
    mode: Literal["explain", "direct", "auto"] = "explain",
    *,
    num_samples: int = 1,
    is_shared: bool = True,
) -> Work:
    """Read every pair once and write `num_samples` answers. With `is_shared`, instruction and query are read once for
    all documents of a query, as our engine does; an endpoint bills them for every pair and sample."""
    written = num_pairs * num_samples * expected.written_tokens(mode)
    if not is_shared:
        return Work(num_pairs, num_pairs * num_samples * expected.prompt_tokens, written)
    beginnings = num_queries * (expected.instruction_tokens + expected.query_tokens)
    return Work(num_pairs, beginnings + num_pairs * expected.document_tokens, written)


def expanding(expected: Expected, num_queries: int) -> Work:
    """Read every question once and write its search queries; nothing is shared between questions but instructions."""
    num_read = num_queries * (expected.instruction_tokens + expected.query_tokens)
    return Work(num_read=num_read, num_written=num_queries * expected.search_query_tokens)


def distilling(expected: Expected, num_examples: int, mode: Literal["explain", "direct"] = "explain") -> Work:
    """Train on so many examples: their prompts and answers, as if no two shared a beginning (those that do are read
    faster)."""
    length = expected.prompt_tokens + expected.written_tokens(mode)
    return Work(num_examples, num_trained=num_examples * length)


def refining(
    expected: Expected, num_rounds: int, num_queries: int, num_candidates: int, num_samples: int, num_epochs: int
) -> Work:
    """Rounds of drawing answers, scoring them by the policy that drew them and by the reference, and learning.

    The samples of a pair stand side by side behind one prompt, in scoring and in training.
    """
    num_pairs = num_rounds * num_queries * num_candidates
    drawn = judging(expected, num_rounds * num_queries, num_pairs, num_samples=num_samples)
    row = expected.prompt_tokens + num_samples * expected.written_tokens("explain")
    return replace(drawn, num_read=drawn.num_read + 2 * num_pairs * row, num_trained=num_epochs * num_pairs * row)


def cost(work: Work, price: Price) -> float:
    """What an endpoint asks, in the currency of the price."""
    return (work.num_read * price.prompt + work.num_written * price.completion) / 1e6


def hours(work: Work, num_parameters: float, hardware: Hardware, *, is_adapter: bool = False) -> float:
    """Time on the hardware, for a model of so many parameters; with `is_adapter`, most weights stay as they are."""
    trained = 4 if is_adapter else 6
    seconds = sum(
        operations * num_parameters * num_tokens / (hardware.peak_tflops * 1e12 * share)
        for operations, num_tokens, share in (
            (2, work.num_read, hardware.reading),
            (2, work.num_written, hardware.writing),
            (trained, work.num_trained, hardware.training),
        )
    )
    return seconds / 3600


def tiny_parameters(vocab_size: int, hidden_size: int, num_layers: int, intermediate_size: int) -> int:
    """Parameters of a Llama whose input and output share their embeddings and whose heads all have their own keys:
    four square matrices, three of the feed-forward layers and two norms per block, and a norm at the end."""
    block = 4 * hidden_size**2 + 3 * hidden_size * intermediate_size + 2 * hidden_size
    return vocab_size * hidden_size + num_layers * block + hidden_size
