"""What can be chosen about training; importable without torch, because the command line shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from whyrank.errors import InputError
from whyrank.records import Mode

__all__ = ["AdapterConfig", "DistillConfig", "TinyConfig"]


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Shape of a model trained from scratch."""

    vocab_size: int = 2048
    """Most tokens the tokenizer may have."""
    hidden_size: int = 128
    """Width of the model."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    intermediate_size: int = 384
    """Width of the feed-forward layers."""
    max_positions: int = 1024
    """Longest sequence in tokens."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Whether all weights are trained, or a low-rank adapter beside them (LoRA, QLoRA).

    Raises:
        InputError: a number is outside its range, or an option says something about an adapter that there is not.
    """

    rank: int = 0
    """Rank of a LoRA adapter, which is trained in place of the weights; 0 trains all weights."""
    alpha: int = 0
    """The adapter's change is scaled by this over the rank; 0 is twice the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter, separated by commas; all-linear is all but the output."""
    quantize: Literal["none", "4bit"] = "none"
    """Hold the frozen weights as they are, or in 4 bits (QLoRA)."""
    is_merged: bool = False
    """Write whole weights with the adapter merged in, in place of the adapter alone."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise InputError(f"expected a LoRA rank and alpha of at least 0, found {self.rank} and {self.alpha}")
        if not self.targets or not all(self.targets):
            raise InputError("expected names of layers for the adapter, found an empty one; all-linear takes all")
        says_more = self.alpha or self.targets != ("all-linear",) or self.quantize != "none" or self.is_merged
        if not self.rank and says_more:
            raise InputError(
                "lora_alpha, lora_targets, quantize and merge say something about a LoRA adapter, and there is none; "
                "give a lora_rank above 0"
            )

    @property
    def scaled_alpha(self) -> int:
        """`alpha`, or what stands for it."""
        return self.alpha or 2 * self.rank


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """How a student is trained.

    Raises:
        InputError: a number is outside its range, or there is no mode.
    """

    model: str = "tiny"
    """Where to start: `tiny` (from scratch), a folder or a hub id."""
    modes: tuple[Mode, ...] = ("explain",)
    """What the student learns: explain, direct or both."""
    is_label_first: bool = False
    """Direct examples go on to the explanation after their label: the same supervision, but no reasons before it."""
    word_dropout: float = 0.0
    """Share of the words of queries and documents, drawn at random, that examples leave out: robustness to wording."""
    max_tokens: int = 0
    """Examples of more tokens, prompt and answer, are left out and counted; 0 takes all that the model holds."""
    label_weight: float = 1.0
    """What a token of the label counts in the loss; a token of the explanation counts 1."""
    is_balanced: bool = False
    """Draw the labels equally often, however rare they are among the judgments."""
    search_query_share: float = 0.2
    """Share of the examples drawn that are about writing search queries, where such are given."""
    num_steps: int = 600
    """Optimizer steps."""
    batch_size: int = 64
    """Examples per step."""
    group_size: int = 1
    """Most examples of one query that are drawn together, so that their common beginning is read once; 1 draws each
    example by itself."""
    is_packed: bool = True
    """Lay a batch out side by side without padding, common beginnings once; else one padded row per example."""
    max_pass_tokens: int = 16384
    """Most tokens per forward pass; a larger batch is read in several, with the same gradient."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon updates the matrices of the blocks with Muon, the rest with AdamW; tiny models learn faster with it."""
    learning_rate: float = 3e-3
    """Peak learning rate. For tiny models from scratch 3e-3 suits adamw and 6e-3 muon; 1e-5 suits pretrained ones."""
    num_warmup_steps: int = 40
    """Steps over which the learning rate rises from zero."""
    decay_fraction: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to zero; 1 is from the start."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix products; weights stay float32. auto is bfloat16 where the hardware multiplies it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto prefers CUDA, then MPS, then the CPU."""
    num_threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    is_recomputed: bool = False
    """Keep what goes into each layer only, and compute the rest again for gradients: much less memory, about a third
    more work."""
    is_divided: bool = False
    """Divide weights, gradients and moments among the processes (FSDP), for models that are too large to train whole on
    each GPU."""
    save_every: int = 200
    """Steps between the states from which a killed run resumes."""
    eval_every: int = 100
    """Steps between rankings of the dev queries, where such are given."""
    patience: int = 0
    """Stop after so many dev rankings in a row without a better one; 0 goes on to the end."""
    seed: int = 0
    """Fixes weights, data order and everything else that is drawn."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained: all weights, or an adapter."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    """Shape of a model that starts from scratch."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "group_size", "max_pass_tokens", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"expected {name} above 0, found {getattr(self, name)}")
        for name in ("num_warmup_steps", "weight_decay", "num_threads", "max_tokens", "label_weight", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"expected {name} of at least 0, found {getattr(self, name)}")
        if not 0 < self.decay_fraction <= 1:
            raise InputError(f"expected decay_fraction above 0 and at most 1, found {self.decay_fraction}")
        if not 0 < self.search_query_share < 1:
            raise InputError(f"expected search_query_share above 0 and below 1, found {self.search_query_share}")
        if not 0 <= self.word_dropout < 1:
            raise InputError(f"expected word_dropout of at least 0 and below 1, found {self.word_dropout}")
        if self.is_label_first and "direct" not in self.modes:
            raise InputError(
                "is_label_first is about direct examples; expected direct among the modes, found only explain"
            )
        if self.adapter.rank and self.model == "tiny":
            raise InputError("a model from scratch has no weights to keep; give --lora-rank with a pretrained --model")
        if self.is_divided and (self.adapter.rank or self.optimizer == "muon"):
            found = "an adapter, whose gradients are small" if self.adapter.rank else "muon, which needs whole matrices"
            raise InputError(f"expected adamw and no adapter with divided weights, found {found}")
        if not self.modes:
            raise InputError("expected at least one mode to learn, explain or direct, found none")
