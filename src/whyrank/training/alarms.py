"""Signs that a refinement is going wrong, read from its metrics. Each ends the run; the best checkpoint is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from whyrank.training.refine_config import RefineConfig

__all__ = ["RefineStep", "find_alarm"]

WINDOW = 5  # rounds over which means are taken
SHORTEST = 0.2  # of the length at the beginning
MOST_CAPPED = 0.5
LEAST_LABEL_ENTROPY = 0.1  # nats, of the labels of all documents together


@dataclass(frozen=True, slots=True)
class RefineStep:
    """One round, one line of `metrics.jsonl`.

    `reward` is the mean over answers, `rewards` the mean of every component before its weight. `kl` (k1) and `kl_k3`
    are nats per action from the distilled policy before the round's update, `step_kl` (k3) how far the update moved, in
    `num_updates` optimizer steps. `entropy` is the mean over actions, `label_entropy` that of the labels of all answers
    together, both in nats. `length` is in tokens, without the label. `labels` are the shares of the sampled labels in
    the order of the scale; `num_capped` answers hit the cap, `num_unreadable` had no label. `gap` and `max_gap` are
    mean and largest absolute difference between the engine's and the trainer's log-probabilities. `dev` is nDCG@10 of
    the dev queries after the round where they were ranked. `seconds` is wall time so far.
    """

    step: int
    reward: float
    rewards: dict[str, float]
    kl: float
    kl_k3: float
    step_kl: float
    kl_coefficient: float
    entropy: float
    label_entropy: float
    labels: tuple[float, ...]
    length: float
    num_rollouts: int
    num_capped: int
    num_unreadable: int
    policy_loss: float
    value_loss: float
    replay_loss: float
    explained_variance: float
    clip_share: float
    grad_norm: float
    learning_rate: float
    gap: float
    max_gap: float
    num_updates: int
    seconds: float
    dev: float | None = None


def find_alarm(history: Sequence[RefineStep], config: RefineConfig) -> str | None:
    """What is wrong with a run, in one sentence; `None` while all is well.

    Args:
        history: all rounds so far, at least one.
        config: its limits.
    """
    last, recent = history[-1], history[-WINDOW:]
    # Not k3: one token that has become very improbable, and is drawn all the same, makes it as large as can be.
    if last.kl > config.kl_limit:
        return (
            f"the policy has moved {last.kl:.3g} nats per token from the distilled one, the limit is "
            f"{config.kl_limit:g}; raise kl_coefficient or lower learning_rate"
        )
    if len(recent) == WINDOW:
        before, now = fmean(step.length for step in history[:WINDOW]), fmean(step.length for step in recent)
        if now < SHORTEST * before:
            return f"explanations have shrunk from {before:.1f} to {now:.1f} tokens; raise length_price"
        if sum(step.num_capped for step in recent) > MOST_CAPPED * sum(step.num_rollouts for step in recent):
            return "most explanations hit their cap; raise length_price or the template's max_explanation_tokens"
        if all(step.label_entropy < LEAST_LABEL_ENTROPY for step in recent):
            return "all documents get the same label; look at the evidence and its trusts"
    return _diverging(history, config)


def _diverging(history: Sequence[RefineStep], config: RefineConfig) -> str | None:
    """Whether rewards have risen since the best dev ranking while the last two rankings fell well below it."""
    ranked = [(place, step.dev) for place, step in enumerate(history) if step.dev is not None]
    if len(ranked) < 3:
        return None
    best_place, best = max(ranked, key=lambda pair: pair[1])
    if best_place >= ranked[-2][0] or any(found > best - config.max_dev_drop for _, found in ranked[-2:]):
        return None
    then = fmean(step.reward for step in history[max(0, best_place - WINDOW + 1) : best_place + 1])
    now = fmean(step.reward for step in history[-WINDOW:])
    if not (now > then or math.isclose(now, then)):
        return None
    return (
        f"rewards went from {then:.3f} to {now:.3f} while nDCG@10 of the dev queries fell from {best:.3f} to "
        f"{ranked[-1][1]:.3f}: the rewards are being gamed; look at their components"
    )
