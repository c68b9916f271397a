"""One round of learning: what drawn answers are worth, and the optimizer steps that follow from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from random import Random
from statistics import fmean

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from whyrank.training import ppo_math
from whyrank.training.dividing import clip_gradients, divide, num_idle_passes
from whyrank.training.examples import Example, to_strand
from whyrank.training.lora import has_adapter, without_adapter
from whyrank.training.packing import continuation_log_probs, pack
from whyrank.training.ranks import ranks
from whyrank.training.recomputing import recompute_layers
from whyrank.training.refine_config import RefineConfig
from whyrank.training.scoring import Episode, Scores, ValueHead, action_mask, score

__all__ = ["Learner", "Lesson", "Updated", "example_loss"]

BETAS = (0.9, 0.98)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A round of R answers, ready to be learned from; all tensors are `(R, T)` but `weights`, `(R,)`.

    `old` is what the policy that drew the answers says of them. It is `None` where the round's only optimizer step
    finds that out by itself.
    """

    episodes: tuple[Episode, ...]
    mask: Tensor
    old: Scores | None
    reference: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Updated:
    """Means over the optimizer steps of a round; `step_kl` is that of the last one. `old` is what the policy that drew
    the answers says of them."""

    old: Scores
    policy_loss: float = 0.0
    value_loss: float = 0.0
    replay_loss: float = 0.0
    clip_share: float = 0.0
    grad_norm: float = 0.0
    step_kl: float = 0.0
    num_updates: int = 0


class Learner:
    """A network, its value head, its frozen reference, and the optimizer of both.

    Args:
        model: what is refined; kept in evaluation mode, because dropout would make ratios differ from 1.
        config: how.
    """

    def __init__(self, model: PreTrainedModel, config: RefineConfig) -> None:
        self.model = model
        self.config = config
        self._frozen = None if has_adapter(model) else copy.deepcopy(model).requires_grad_(False)
        if config.is_recomputed:
            recompute_layers(model)
        if config.is_divided:
            for network in filter(None, (model, self._frozen)):
                divide(network)
        hidden: int = model.config.get_text_config(decoder=True).hidden_size
        self.head = ValueHead(hidden).to(model.device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        head = list(self.head.parameters())
        self.optimizer = AdamW([{"params": self.parameters}, {"params": head}], lr=0.0, betas=BETAS, weight_decay=0.0)

    def prepare(self, episodes: Sequence[Episode], rewards: Sequence[float], coefficient: float) -> Lesson:
        """Score answers under the policy and its reference, and find out how much better than expected each action was.

        Args:
            episodes: R answers, the samples of a pair one after the other.
            rewards: one for each.
            coefficient: price of a nat of distance from the reference.
        """
        config, device = self.config, self.model.device
        with torch.no_grad():
            is_found_later = self._is_only_step(len(episodes) // config.num_samples)
            old = None if is_found_later else self._scores(self.model, self.head, episodes)
            with self._reference() as frozen:
                reference = self._scores(frozen, None, episodes).log_probs
        mask = action_mask(episodes, device)
        earned = torch.tensor(rewards, device=device, dtype=torch.float32)
        if config.algorithm == "ppo" and old is not None:
            if config.is_centred and config.num_samples > 1:
                earned = ppo_math.leave_one_out(earned.view(-1, config.num_samples)).flatten()
            priced = ppo_math.token_rewards(earned, ppo_math.kl_k1(old.log_probs, reference), mask, coefficient)
            advantages, returns = ppo_math.discounted_advantages(
                priced, old.values, mask, discount=config.discount, trace=config.trace
            )
            if config.is_whitened:
                advantages = ppo_math.whiten(advantages, mask)
        elif config.algorithm == "grpo":
            per_pair = ppo_math.group_advantages(earned.view(-1, config.num_samples), is_scaled=config.is_scaled)
            advantages, returns = per_pair.reshape(-1, 1) * mask, torch.zeros_like(mask)
        else:
            advantages = returns = torch.zeros_like(mask)
        weights = ppo_math.likelihood_weights(earned, config.reward_power)
        return Lesson(tuple(episodes), mask, old, reference, advantages, returns, weights)

    def _is_only_step(self, num_pairs: int) -> bool:
        """Whether a round has one optimizer step, whose scores are those of the policy that drew the answers: a pass
        over them beforehand would tell nothing new. The advantages of ppo need the values before."""
        config = self.config
        return config.algorithm != "ppo" and config.num_epochs == 1 and num_pairs <= config.minibatch_size

    def update(
        self,
        lesson: Lesson,
        *,
        rate: float,
        coefficient: float,
        is_value_only: bool,
        replay: Callable[[], Sequence[Example]],
        rng: Random,
    ) -> Updated:
        """Learn from a round in minibatches of whole pairs, epoch after epoch, until the policy has moved far enough.

        Args:
            lesson: from `prepare`.
            rate: learning rate of the network.
            coefficient: price of a nat; used here by grpo, whose price is part of the loss.
            is_value_only: the policy stays as it is.
            replay: distilled examples for one optimizer step, perhaps none.
            rng: orders the pairs.
        """
        config = self.config
        self.optimizer.param_groups[0]["lr"] = 0.0 if is_value_only else rate
        self.optimizer.param_groups[1]["lr"] = config.value_learning_rate
        num_pairs = len(lesson.episodes) // config.num_samples
        done: list[Updated] = []
        for _ in range(config.num_epochs):
            order = list(range(num_pairs))
            if lesson.old is not None:
                rng.shuffle(order)
            for start in range(0, num_pairs, config.minibatch_size):
                pairs = order[start : start + config.minibatch_size]
                found = self._minibatch(lesson, pairs, coefficient, is_value_only, replay)
                if found.step_kl > config.max_step_kl:
                    self.optimizer.zero_grad(set_to_none=True)
                    return _mean_of(done, found)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                done.append(found)
        return _mean_of(done, done[-1])

    def _minibatch(
        self,
        lesson: Lesson,
        pairs: Sequence[int],
        coefficient: float,
        is_value_only: bool,
        replay: Callable[[], Sequence[Example]],
    ) -> Updated:
        """Gradients of one optimizer step, accumulated over microbatches and processes."""
        config, samples = self.config, self.config.num_samples
        every = [pair * samples + number for pair in pairs for number in range(samples)]
        num_actions = int(lesson.mask[every].sum())
        policy = value = moved = clipped = 0.0
        together, seen = ranks(), []
        own = [pair * samples + number for pair in together.share(pairs) for number in range(samples)]
        starts = range(0, len(own), config.microbatch_size * samples)
        num_idle = num_idle_passes(self.model, len(starts))
        for start in starts:
            rows = own[start : start + config.microbatch_size * samples]
            mask = lesson.mask[rows]
            width = int(mask.sum(dim=1).max())
            part = _rows(lesson, rows, width)
            with self._precision():
                new = self._score_rows(part)
            old = new.detach() if part.old is None else part.old
            seen.append(old)
            share = float(part.mask.sum()) / num_actions
            losses = self._losses(new, old, part, coefficient, num_actions)
            (losses[1] if is_value_only else losses[0] + losses[1]).backward()
            policy, value = policy + float(losses[0].detach()), value + float(losses[1].detach())
            with torch.no_grad():
                distance = ppo_math.kl_k3(old.log_probs, new.log_probs)
                moved += share * float(ppo_math.masked_mean(distance, part.mask))
                shares = ppo_math.clip_share(new.log_probs, old.log_probs, part.mask, clip=config.clip)
                clipped += share * float(shares)
        self._idle(lesson, num_idle, has_gradient=not is_value_only)
        replayed = self._replay([] if is_value_only else replay())
        together.sum_gradients([*self.parameters, *self.head.parameters()])
        policy, value, clipped, replayed, moved = together.sums(policy, value, clipped, replayed, moved)
        norm = clip_gradients(self.parameters, config.max_grad_norm)
        clip_gradients(list(self.head.parameters()), config.max_grad_norm)
        before = self._together(seen, lesson.mask.shape[1]) if lesson.old is None else lesson.old
        return Updated(before, policy, value, replayed, clipped, norm, moved, 1)

    def _idle(self, lesson: Lesson, num_passes: int, *, has_gradient: bool) -> None:
        """Passes for nothing, where another process has more to do."""
        for _ in range(num_passes):
            with self._precision():
                scores = score(self.model, None, lesson.episodes[: self.config.num_samples], self.config.temperature)
            if has_gradient:
                (0.0 * scores.log_probs.sum()).backward()

    def _replay(self, examples: Sequence[Example]) -> float:
        """Add the gradient of the distillation loss on examples, a microbatch at a time; returns what this process's
        share adds to the loss."""
        size, loss = self.config.microbatch_size, 0.0
        if not examples:
            return loss
        own = ranks().share(examples)
        num_answer_tokens = sum(len(found.ids) - found.num_prompt for found in examples)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        idle = [examples[:1]] * num_idle_passes(self.model, len(parts))
        for part, weight in (*((part, self.config.replay_weight) for part in parts), *((part, 0.0) for part in idle)):
            with self._precision():
                found = example_loss(self.model, part, num_answer_tokens)
            (weight * found).backward()
            loss += float(found.detach()) if weight else 0.0
        return loss

    def _losses(
        self, new: Scores, old: Scores, part: Lesson, coefficient: float, num_actions: int
    ) -> tuple[Tensor, Tensor]:
        """Policy loss and value loss of some rows, as their parts of the whole minibatch."""
        config, mask = self.config, part.mask
        none = torch.zeros((), device=mask.device)
        if config.algorithm == "rwl":
            return ppo_math.likelihood_loss(new.log_probs, part.weights, mask, num_actions=num_actions), none
        policy = ppo_math.policy_loss(
            new.log_probs, old.log_probs, part.advantages, mask, clip=config.clip, num_actions=num_actions
        )
        if config.entropy_bonus:
            policy = policy - config.entropy_bonus * (new.entropies * mask).sum() / num_actions
        if config.algorithm == "grpo":
            distance = ppo_math.kl_k3(new.log_probs, part.reference) * mask
            return policy + coefficient * distance.sum() / num_actions, none
        value = ppo_math.value_loss(
            new.values, old.values, part.returns, mask, clip=config.value_clip, num_actions=num_actions
        )
        return policy, value

    def _scores(self, model: PreTrainedModel, head: ValueHead | None, episodes: Sequence[Episode]) -> Scores:
        """Scores of a whole round, a microbatch at a time, put together in one table; of several processes each works
        out its share."""
        samples = self.config.num_samples
        size = self.config.microbatch_size * samples
        pairs = ranks().share(range(len(episodes) // samples))
        own = episodes[pairs[0] * samples : (pairs[-1] + 1) * samples] if pairs else ()
        starts = range(0, len(own), size)
        num_idle = num_idle_passes(model, len(starts))
        with self._precision():
            parts = [score(model, head, own[start : start + size], self.config.temperature) for start in starts]
            for _ in range(num_idle):
                score(model, head, episodes[:samples], self.config.temperature)
        return self._together(parts, action_mask(episodes).shape[1])

    def _together(self, parts: Sequence[Scores], width: int) -> Scores:
        """One table of the microbatches of all processes."""
        if ranks().size > 1:
            device = self.model.device
            parts = [part.to(device) for part in ranks().gathered([part.to(torch.device("cpu")) for part in parts])]

        def table(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(found, (0, width - found.shape[1])) for found in tensors])

        return Scores(
            table([part.log_probs for part in parts]),
            table([part.values for part in parts]),
            table([part.entropies for part in parts]),
            torch.cat([part.labels for part in parts]),
        )

    def _score_rows(self, part: Lesson) -> Scores:
        head = self.head if self.config.algorithm == "ppo" else None
        has_bonus = self.config.entropy_bonus > 0
        return score(self.model, head, part.episodes, self.config.temperature, has_entropy_gradient=has_bonus)

    @contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        """The policy that was distilled: a copy, or the same network with its adapter off."""
        if self._frozen is not None:
            yield self._frozen
            return
        with without_adapter(self.model):
            yield self.model

    @contextmanager
    def _precision(self) -> Iterator[None]:
        is_half = self.config.precision == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16) if is_half else nullcontext():
            yield


def example_loss(model: PreTrainedModel, examples: Sequence[Example], num_answer_tokens: int) -> Tensor:
    """Negative log-likelihood of distilled answers in nats, divided by the number of tokens of all answers that count
    together: what these examples add to the mean."""
    strands = [to_strand(found) for found in examples]
    return -continuation_log_probs(model, pack(strands, model.device)).sum() / num_answer_tokens


def _rows(lesson: Lesson, rows: Sequence[int], width: int) -> Lesson:
    """Some answers of a lesson, as wide as the longest of them."""
    chosen = list(rows)
    return Lesson(
        episodes=tuple(lesson.episodes[row] for row in chosen),
        mask=lesson.mask[chosen, :width],
        old=None if lesson.old is None else lesson.old.rows(chosen, width),
        reference=lesson.reference[chosen, :width],
        advantages=lesson.advantages[chosen, :width],
        returns=lesson.returns[chosen, :width],
        weights=lesson.weights[chosen],
    )


def _mean_of(done: Sequence[Updated], last: Updated) -> Updated:
    if not done:
        return Updated(last.old, step_kl=last.step_kl)
    return Updated(
        last.old,
        policy_loss=fmean(found.policy_loss for found in done),
        value_loss=fmean(found.value_loss for found in done),
        replay_loss=fmean(found.replay_loss for found in done),
        clip_share=fmean(found.clip_share for found in done),
        grad_norm=fmean(found.grad_norm for found in done),
        step_kl=last.step_kl,
        num_updates=len(done),
    )
