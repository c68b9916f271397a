"""The mathematics of refinement, as pure functions on tensors.

An answer is an episode of a token-level Markov decision process: a state is what has been read and written so far, an
action is the next token, and the last action is the label, drawn from the distribution restricted to the scale. The
reward comes with the last action; on the way there is only the price of leaving the reference policy.

Shapes: R rollouts, T actions of the longest of them, L labels, V tokens of the vocabulary. `mask` is `(R, T)`, 1 where
there is an action; the actions of a rollout come first in its row, and every rollout has at least one (its label).
What stands at masked places is read by no function. Log-probabilities are natural.

Losses are sums divided by `num_actions`, which the caller counts over everything that goes into one optimizer step.
Accumulating them over parts of the batch therefore gives the gradient of the whole batch, however it is divided.

Equations are numbered (1) to (14) in the docstrings, and named so in docs/refine.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "adapted_coefficient",
    "clip_share",
    "discounted_advantages",
    "entropy",
    "explained_variance",
    "group_advantages",
    "kl_k1",
    "kl_k3",
    "leave_one_out",
    "likelihood_loss",
    "likelihood_weights",
    "masked_mean",
    "policy_loss",
    "restricted",
    "token_rewards",
    "value_loss",
    "whiten",
]

MOST_ADAPTED = 0.2  # share by which one full horizon changes the KL coefficient at most


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all actions of all rollouts, which count alike. `values` and `mask`: `(R, T)`; result: scalar."""
    return torch.where(mask > 0, values, 0.0).sum() / mask.sum()


def restricted(label_log_probs: Tensor) -> Tensor:
    """Log-probabilities of the labels given that one of them is chosen, (1): log p(l) - log sum_m p(m).

    Args:
        label_log_probs: `(..., L)`; each is the sum over the label's tokens along the trie, terminator included.

    Returns:
        `(..., L)`; their exponentials sum to 1.
    """
    return label_log_probs - label_log_probs.logsumexp(dim=-1, keepdim=True)


def kl_k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """One-sample estimate of KL(policy || other) at actions drawn from the policy, (2): log p - log q.

    Unbiased, may be negative (Schulman 2020, http://joschu.net/blog/kl-approx.html, k1). Any shape, kept.
    """
    return log_probs - other_log_probs


def kl_k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """The same with less variance, never negative, (3): q / p - 1 - log(q / p) (k3 there). Any shape, kept."""
    log_ratio = other_log_probs - log_probs
    return log_ratio.exp() - 1 - log_ratio


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, (4): -sum_v p_v log p_v. `(..., V)` to `(...)`."""
    log_probs = torch.log_softmax(logits, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The reward of every action, (5): -coefficient * kl_t, and the rollout's own reward on top at its last action.

    Args:
        rewards: `(R,)`, one for each whole answer.
        kl: `(R, T)`, per action, from `kl_k1`; it is a price and carries no gradient.
        mask: `(R, T)`.
        coefficient: the price of one nat.

    Returns:
        `(R, T)`, 0 where there is no action.
    """
    priced = torch.where(mask > 0, -coefficient * kl.detach(), 0.0)
    last = mask.long().sum(dim=1, keepdim=True) - 1
    return priced.scatter_add(1, last, rewards[:, None].to(priced.dtype))


def discounted_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that values are fitted to (Schulman et al. 2016, eq. 16).

    (6): delta_t = r_t + discount * V_{t+1} - V_t, with V = 0 behind the last action; A_t = sum_l (discount * trace)^l
    delta_{t+l}; the return is A_t + V_t.

    Args:
        rewards: `(R, T)`, from `token_rewards`.
        values: `(R, T)`, of the state before each action.
        mask: `(R, T)`.
        discount: gamma, from 0 to 1.
        trace: lambda, from 0 (one step) to 1 (the whole rest of the answer).

    Returns:
        Advantages and returns, each `(R, T)`, 0 where there is no action; neither carries gradient.
    """
    rewards, values = (torch.where(mask > 0, tensor.detach(), 0.0) for tensor in (rewards, values))
    behind = torch.zeros_like(values[:, 0])
    value_behind, found = behind, []
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + discount * value_behind - values[:, step]
        behind = delta + discount * trace * behind
        value_behind = values[:, step]
        found.append(behind)
    advantages = torch.where(mask > 0, torch.stack(found[::-1], dim=1), 0.0)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over all actions, (7): (x - mean) / sqrt(variance + epsilon), variance over n.

    `values` and `mask`: `(R, T)`. Returns `(R, T)`, 0 where there is no action.
    """
    centred = values - masked_mean(values, mask)
    variance = masked_mean(centred**2, mask)
    return torch.where(mask > 0, centred * torch.rsqrt(variance + epsilon), 0.0)


def group_advantages(rewards: Tensor, *, is_scaled: bool = True, epsilon: float = 1e-4) -> Tensor:
    """GRPO's advantage of each sample among those of its pair, (8): (r - mean) / (standard deviation + epsilon).

    The standard deviation is that of a sample (over k - 1; Shao et al. 2024, arXiv 2402.03300, section 4.1.2). Without
    `is_scaled` the mean alone is taken away (Liu et al. 2025, arXiv 2503.20783). Samples that all have the same reward
    have advantage 0.

    Args:
        rewards: `(pairs, k)` with k of at least 2.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + epsilon) if is_scaled else centred


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each sample's reward above the mean of its pair's other samples, (14): (r - mean) * k / (k - 1).

    A baseline that the sample itself has no part in, and that therefore biases nothing (Kool et al. 2019). It spares
    the values from learning how hard each pair is.

    Args:
        rewards: `(pairs, k)` with k of at least 2.
    """
    k = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * k / (k - 1)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float, num_actions: int
) -> Tensor:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    (9): -1/n sum_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t), with rho_t = p_new / p_old.

    Args:
        log_probs: `(R, T)`, under the present policy; the gradient goes through these alone.
        old_log_probs: `(R, T)`, under the policy that drew the actions.
        advantages: `(R, T)`.
        mask: `(R, T)`.
        clip: how far the ratio may leave 1.
        num_actions: n, over the whole optimizer step.
    """
    # Masked before the exponential: a padded place must not turn into infinity times zero on the way back.
    ratio = torch.where(mask > 0, log_probs - old_log_probs.detach(), 0.0).exp()
    kept = torch.where(mask > 0, advantages.detach(), 0.0)
    gains = torch.minimum(ratio * kept, ratio.clamp(1 - clip, 1 + clip) * kept)
    return -gains.sum() / num_actions


def clip_share(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """Share of the actions whose ratio has left [1 - clip, 1 + clip]. All `(R, T)`; result: scalar."""
    ratio = torch.where(mask > 0, log_probs - old_log_probs, 0.0).exp()
    return masked_mean(((ratio - 1).abs() > clip).to(log_probs.dtype), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, num_actions: int
) -> Tensor:
    """Half the squared error of the values, clipped like the policy (Engstrom et al. 2020, arXiv 2005.12729).

    (10): 1/(2n) sum_t max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2). Shapes as for `policy_loss`.
    """
    values, old_values, returns = (torch.where(mask > 0, found, 0.0) for found in (values, old_values, returns))
    near = old_values.detach() + (values - old_values.detach()).clamp(-clip, clip)
    errors = torch.maximum((values - returns.detach()) ** 2, (near - returns.detach()) ** 2)
    return 0.5 * errors.sum() / num_actions


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """What the values know of the returns: 1 - Var(G - V) / Var(G); 1 is all, 0 no more than the mean, below 0 is harm.

    All `(R, T)`; result: scalar, 0 where the returns do not vary.
    """
    error = returns - values
    left = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return torch.where(total > 0, 1 - left / total, torch.zeros_like(total))


def adapted_coefficient(coefficient: float, kl: float, *, target: float, horizon: int, num_rollouts: int) -> float:
    """The next KL coefficient (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    (11): coefficient * (1 + e * num_rollouts / horizon), with e = clip(kl / target - 1, -0.2, 0.2).

    Args:
        coefficient: the present one.
        kl: what was measured, in the unit of `target` (here: nats per action).
        target: what it should be, above 0.
        horizon: rollouts over which the coefficient may change by a fifth.
        num_rollouts: since the last adaptation.
    """
    error = min(max(kl / target - 1, -MOST_ADAPTED), MOST_ADAPTED)
    return coefficient * (1 + error * num_rollouts / horizon)


def likelihood_weights(rewards: Tensor, power: float = 3.0) -> Tensor:
    """Weights of the reward-weighted likelihood, (12): max(r, 0)^power, as in the paper's published code for power 3.

    There the rewards are probabilities of a reward model. A negative reward (an answer that could not be read) weighs
    nothing: with its sign it would push a likelihood down without bound. `(R,)` to `(R,)`.
    """
    return rewards.clamp(min=0.0) ** power


def likelihood_loss(log_probs: Tensor, weights: Tensor, mask: Tensor, *, num_actions: int) -> Tensor:
    """Weighted negative log-likelihood, (13): -1/n sum_r w_r sum_t log p_t.

    Args:
        log_probs: `(R, T)`.
        weights: `(R,)`, from `likelihood_weights`.
        mask: `(R, T)`.
        num_actions: n, over the whole optimizer step.
    """
    return -(torch.where(mask > 0, log_probs, 0.0).sum(dim=1) * weights.detach()).sum() / num_actions
