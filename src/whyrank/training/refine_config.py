"""What can be chosen about refinement; importable without torch, because the command line shows it."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from whyrank.errors import InputError
from whyrank.store import read_json
from whyrank.training.config import AdapterConfig

__all__ = ["Algorithm", "EvidenceConfig", "RefineConfig", "read_config"]

Algorithm = Literal["ppo", "grpo", "rwl"]
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class EvidenceConfig:
    """What is believed of a label, and how much. Trusts are weights of votes; 0 leaves a source out.

    Raises:
        InputError: a trust is negative.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    qrels_trust: float = 4.0
    """Trust in a person's judgment."""
    link_trust: float = 1.0
    """Trust in an answer's link: the document is worth the highest label."""
    unlinked_trust: float = 1.0
    """Trust in the absence of a link: the document is worth unlinked_value."""
    unlinked_value: float = 0.0
    """What a document is worth that no answer links to; most of them are irrelevant, some are not."""
    consensus_trust: float = 0.5
    """Trust in the mean of what teachers said of a pair."""

    def __post_init__(self) -> None:
        for name in ("qrels_trust", "link_trust", "unlinked_trust", "consensus_trust"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"expected {name} of at least 0, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class RefineConfig:
    """How a student is refined.

    Raises:
        InputError: a number is outside its range.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    algorithm: Algorithm = "ppo"
    """ppo: clipped, with values of every token; grpo: without values, against the pair's other samples; rwl: likelihood
    weighted by reward, as in the paper's published code."""
    rewards: tuple[str, ...] = ("agreement=1",)
    """Rewards as NAME=WEIGHT: agreement, ranking_gain, format, evidence, brevity, model:PATH, judge:MODEL or
    module:function."""
    unreadable_reward: float = -1.0
    """What an answer gets in place of its rewards if it hit its cap or has no label."""
    num_steps: int = 100
    """Rounds of sampling and updating."""
    num_queries: int = 4
    """Queries per round."""
    num_candidates: int = 8
    """Documents per query and round; linked and judged ones come first, for up to half of the places."""
    num_samples: int = 4
    """Answers drawn per document."""
    temperature: float = 1.0
    """Of the explanations that are drawn."""
    num_epochs: int = 2
    """How often a round's answers are learned from."""
    minibatch_size: int = 16
    """Documents, with all their answers, per optimizer step."""
    microbatch_size: int = 16
    """Documents, or replayed judgments, per forward pass; smaller needs less memory and changes nothing else."""
    learning_rate: float = 2e-4
    """Peak learning rate of the network. 2e-4 suits tiny models, 1e-6 pretrained ones."""
    num_warmup_steps: int = 3
    """Rounds over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    clip: float = 0.2
    """How far the probability of an action may move before its gradient ends."""
    discount: float = 1.0
    """Worth of a reward one token later."""
    trace: float = 1.0
    """Lambda of the advantage estimates: 0 trusts the values, 1 the rewards."""
    value_clip: float = 0.5
    """How far a value may move per round before its gradient ends."""
    value_learning_rate: float = 1e-2
    """Learning rate of the value head, which reads the last hidden state and sends no gradient into it."""
    num_value_steps: int = 3
    """Rounds at the beginning in which the value head learns alone (ppo)."""
    is_centred: bool = True
    """Rewards count above the mean of the pair's other samples (ppo, with at least two samples)."""
    is_whitened: bool = True
    """Advantages are brought to mean 0 and variance 1 (ppo)."""
    is_scaled: bool = True
    """Advantages are divided by the standard deviation of the pair's rewards (grpo)."""
    reward_power: float = 3.0
    """Power of the reward in the weight of an answer (rwl)."""
    kl_coefficient: float = 0.02
    """Price of a nat of distance from the distilled policy, per token."""
    kl_target: float = 0.0
    """Distance per token that the price is adapted to; 0 keeps the price as it is."""
    kl_horizon: int = 10_000
    """Answers over which the price may change by a fifth."""
    max_step_kl: float = 0.05
    """A round ends early when it has moved the policy by so many nats per token."""
    kl_limit: float = 2.0
    """Alarm: distance from the distilled policy in nats per token."""
    entropy_bonus: float = 0.0
    """Reward for a nat of uncertainty about the next token."""
    length_price: float = 0.2
    """Price of an explanation that is longer or shorter than at the beginning by its whole length, beyond a tenth."""
    curriculum: float = 1.0
    """How much more often hard pairs come: a pair that is all wrong comes 1 + curriculum times as often."""
    replay_weight: float = 0.05
    """Weight of the distillation loss on replayed judgments; 0 replays nothing."""
    replay_size: int = 16
    """Replayed judgments per optimizer step."""
    dev_every: int = 20
    """Rounds between rankings of the dev queries; the best checkpoint is kept."""
    max_dev_drop: float = 0.05
    """Alarm: so much nDCG@10 below the best, twice in a row, while rewards rise."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Matrix products in training; weights stay float32, and answers are drawn in float32."""
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
    batch_size: int = 64
    """Answers that are written at once."""
    save_every: int = 10
    """Rounds between the states from which a killed run resumes."""
    seed: int = 0
    """Fixes data order and everything that is drawn."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Refine a low-rank adapter in place of all weights; the reference is then the same network without it."""
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    """What is believed of a label, and how much."""

    def __post_init__(self) -> None:
        counts = ("num_steps", "num_queries", "num_candidates", "num_samples", "num_epochs", "minibatch_size")
        for name in (*counts, "microbatch_size", "kl_horizon", "replay_size", "dev_every", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, found {getattr(self, name)}")
        for name in ("temperature", "learning_rate", "value_learning_rate", "max_grad_norm", "max_step_kl", "kl_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"expected {name} above 0, found {getattr(self, name)}")
        amounts = (
            "num_warmup_steps",
            "num_value_steps",
            "kl_coefficient",
            "kl_target",
            "entropy_bonus",
            "reward_power",
        )
        for name in (
            *amounts,
            "length_price",
            "curriculum",
            "replay_weight",
            "max_dev_drop",
            "num_threads",
            "value_clip",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"expected {name} of at least 0, found {getattr(self, name)}")
        for name in ("discount", "trace", "clip"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"expected {name} from 0 to 1, found {getattr(self, name)}")
        if self.is_divided and self.adapter.rank:
            raise InputError("expected no adapter with divided weights, found one; its gradients are small")
        if not self.rewards:
            raise InputError("expected at least one reward, found none")
        if self.algorithm == "grpo" and self.num_samples < 2:
            raise InputError("grpo compares the samples of a pair: expected num_samples of at least 2, found 1")


def read_config(path: Path) -> RefineConfig:
    """Options from a TOML file, or JSON where the name ends in .json; what it leaves out has its default. The tables
    `evidence` and `adapter` hold theirs.

    Raises:
        InputError: it is neither, or has an unknown key or a value of the wrong kind or range.
    """
    try:
        is_json = path.suffix == ".json"
        data = read_json(path) if is_json else tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return TypeAdapter(RefineConfig).validate_python(data)
    except ValidationError as cause:
        problem = cause.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        found = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {key}: {found}" if key else f"{path}: {found}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise InputError(f"{path}: expected TOML, found: {cause}") from cause
