"""What a workload costs at the very least: arithmetic and memory traffic of a Llama, and the seconds they take.

Nothing here is measured and nothing imports torch. An addition and a multiplication are two operations. Norms,
rotations, softmax and activations are left out; that can only make the bound lower. Attention is taken to be full: for
layers with a sliding window that is narrower than the text, the bound is too high.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

__all__ = [
    "BYTES",
    "Job",
    "Limits",
    "Precision",
    "Shape",
    "Work",
    "causal_pairs",
    "forward_work",
    "ideal_work",
    "least_seconds",
]


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of one weight and of one cached key or value."""

    weight: int
    value: int


BYTES = {
    "float32": Precision(4, 4),
    "bfloat16": Precision(2, 2),
    "float16": Precision(2, 2),
    "int8": Precision(1, 2),  # as whyrank keeps them
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama; `mlp_matrices` is 3 for gated blocks."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_matrices: int = 3

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a transformers config with the usual names (Llama, Mistral, Qwen and their kin)."""
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: query and output, key and value, and the MLP."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def key_value_weights(self) -> int:
        """Those of them that make keys and values."""
        return 2 * self.hidden_size * self.head_dim * self.num_kv_heads

    @property
    def head_weights(self) -> int:
        """Weights of the matrix that turns a hidden state into logits, shared with the embeddings or not."""
        return self.hidden_size * self.vocab_size

    @property
    def cached_values(self) -> int:
        """Numbers that the key/value cache holds per token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, and bytes that cross the memory bus."""

    flops: int = 0
    num_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine can do, per second: operations in matrix products, and bytes to or from memory."""

    flops: float
    num_bytes: float

    def seconds(self, work: Work) -> float:
        """The longer of computing and moving; perfect overlap is assumed."""
        return max(work.flops / self.flops, work.num_bytes / self.num_bytes)


@dataclass(frozen=True, slots=True)
class Job:
    """One query's documents, in tokens.

    `prefix` is what all prompts begin with, `documents` what each has beyond it. `generated` tokens are written per
    document (0: the label at once), then `label_prompt` is appended. `label_depths` holds the depth of every inner node
    of the labels' trie beyond its root; it is empty where every label is one token.
    """

    prefix: int
    documents: tuple[int, ...]
    generated: int
    label_prompt: int
    label_depths: tuple[int, ...] = ()


def causal_pairs(num_cached: int, num_new: int) -> int:
    """Pairs of a new token and one that it attends to: all cached ones, the earlier new ones, and itself."""
    return num_new * num_cached + num_new * (num_new + 1) // 2


def forward_work(
    shape: Shape,
    precision: Precision,
    *,
    num_tokens: int,
    num_pairs: int,
    num_logits: int,
    num_asking: int | None = None,
    num_asking_pairs: int | None = None,
    num_read: int = 0,
) -> Work:
    """One forward pass.

    Args:
        num_tokens: tokens that pass through the layers, over all sequences.
        num_pairs: pairs of a token and one that it attends to, over all sequences (`causal_pairs`).
        num_logits: positions whose logits are computed.
        num_asking: tokens of which the last layer computes more than keys and values; all unless given.
        num_asking_pairs: their pairs.
        num_read: cached tokens whose keys and values are read from memory.

    Every matrix is read once, keys and values of new tokens are written once, and activations stay in the processor's
    caches.
    """
    num_asking = num_tokens if num_asking is None else num_asking
    num_asking_pairs = num_pairs if num_asking_pairs is None else num_asking_pairs
    before = shape.num_layers - 1
    passed = num_tokens * (before * shape.layer_weights + shape.key_value_weights)
    asked = num_asking * (shape.layer_weights - shape.key_value_weights)
    products = 2 * (passed + asked + num_logits * shape.head_weights)
    # Per pair, head and dimension: one multiply-add for the score and one for the weighted sum of values.
    attention = 4 * (before * num_pairs + num_asking_pairs) * shape.num_heads * shape.head_dim
    weights = shape.num_layers * shape.layer_weights + (shape.head_weights if num_logits else 0)
    cached = (num_tokens + num_read) * shape.cached_values
    return Work(products + attention, weights * precision.weight + cached * precision.value)


def ideal_work(shape: Shape, precision: Precision, job: Job) -> list[Work]:
    """The least work of each phase: of the prefill, then (where something is generated) of decoding and the label.

    All documents go through together. The prefix is computed once for all of them; its keys and values are read once
    per step. Without an explanation the label prompt goes through with the documents. The last layer computes keys and
    values of all tokens, the rest only where logits are wanted: after each prompt, after what is generated, after the
    label prompt and at the inner nodes of the labels.
    """
    num = len(job.documents)
    label_places = [*range(1, job.label_prompt + 1), *(job.label_prompt + depth for depth in job.label_depths)]
    num_label_logits = num * (1 + len(job.label_depths))
    contexts = [job.prefix + length for length in job.documents]
    prompts = job.prefix + sum(job.documents)
    pairs = causal_pairs(0, job.prefix) + sum(causal_pairs(job.prefix, length) for length in job.documents)

    def appended(places: Iterable[int]) -> int:
        """Pairs of tokens that stand so many places after their document; they attend to all before and themselves."""
        return sum(context + place for place in places for context in contexts)

    def asking(before_labels: int) -> dict[str, int]:
        """The last token of the label prompt, which so many tokens stand before, and the inner nodes."""
        places = [job.label_prompt, *(job.label_prompt + depth for depth in job.label_depths)]
        return {
            "num_asking": num * len(places),
            "num_asking_pairs": appended(before_labels + place for place in places),
        }

    if not job.generated:
        tokens = prompts + num * len(label_places)
        pairs += appended(label_places)
        return [
            forward_work(shape, precision, num_tokens=tokens, num_pairs=pairs, num_logits=num_label_logits, **asking(0))
        ]
    prefill = forward_work(
        shape,
        precision,
        num_tokens=prompts,
        num_pairs=pairs,
        num_logits=num,
        num_asking=num,
        num_asking_pairs=appended([0]),
    )
    decode = Work()
    # The prefill yields the first token; the last one is fed together with the label prompt.
    for step in range(1, job.generated):
        decode += forward_work(
            shape,
            precision,
            num_tokens=num,
            num_pairs=appended([step]),
            num_logits=num,
            num_read=prompts + num * (step - 1),
        )
    last = [job.generated, *(job.generated + place for place in label_places)]
    label = forward_work(
        shape,
        precision,
        num_tokens=num * len(last),
        num_pairs=appended(last),
        num_logits=num_label_logits,
        num_read=prompts + num * (job.generated - 1),
        **asking(job.generated),
    )
    return [prefill, decode + label]


def least_seconds(phases: Sequence[Work], limits: Limits) -> float:
    """The time below which this machine cannot stay: phase after phase, each at its own limit."""
    return sum(limits.seconds(work) for work in phases)
