"""Refinement: a distilled student learns from rewards for its own answers (the paper's second stage).

A round draws answers about the candidates of some queries, rewards them, and updates the student in a few optimizer
steps. Deviations from arXiv 2504.03947, and every choice the equations leave open, are numbered in docs/refine.md.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrank.checkpoint import CARD_NAME, Card, read_card
from whyrank.errors import InputError, OtherJob
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_model, load_tokenizer, resolve_device, weights_digest
from whyrank.records import Document, Mode, Query
from whyrank.store import JsonlAppender, content_key, read_jsonl
from whyrank.template import Template
from whyrank.training import ppo_math
from whyrank.training.alarms import RefineStep, find_alarm
from whyrank.training.checkpoints import (
    BEST_NAME,
    atomic_folder,
    recover,
    remove_state,
    restore,
    save_checkpoint,
    snapshot_of,
)
from whyrank.training.curriculum import choose, hardness_of
from whyrank.training.dividing import check_divisible, whole_weights
from whyrank.training.drawing import Drawn, draw
from whyrank.training.examples import Example
from whyrank.training.lora import add_adapter
from whyrank.training.model_rewards import open_reward
from whyrank.training.ranks import ranks
from whyrank.training.refine_config import RefineConfig
from whyrank.training.refine_state import RefineState, load_refine_state, save_refine_state
from whyrank.training.rewards import Rewarded, WeightedReward, length_costs, parse_reward, reward_group
from whyrank.training.rollouts import Evidence
from whyrank.training.scoring import Episode, Scores
from whyrank.training.updating import Learner, Lesson, Updated
from whyrank.training.validation import DevSet, rank_dev

__all__ = ["METRICS_NAME", "RefineData", "Refined", "refine"]

METRICS_NAME = "metrics.jsonl"
PairIds = tuple[str, str]


@dataclass(frozen=True, slots=True)
class RefineData:
    """What a student is refined on.

    `evidence` is by `(query_id, doc_id)`, `queries` and `documents` by id; `replay` are judgments as examples; without
    `dev` the last checkpoint counts as the best.
    """

    evidence: Mapping[PairIds, tuple[Evidence, ...]]
    queries: Mapping[str, Query]
    documents: Mapping[str, Document]
    replay: Sequence[Example] = ()
    dev: DevSet | None = None


@dataclass(frozen=True, slots=True)
class Refined:
    """What refinement produced.

    `first_dev` is nDCG@10 of the dev queries before it, `best_dev` that of the checkpoint that was kept, which is of
    round `best_step` (0 is the distilled student). `alarm` says why it stopped early.
    """

    checkpoint: Path
    num_pairs: int
    first_dev: float | None
    best_dev: float | None
    best_step: int
    alarm: str | None
    history: tuple[RefineStep, ...]


def refine(
    model: str | Path,
    data: RefineData,
    template: Template,
    out: Path,
    config: RefineConfig,
    *,
    modes: tuple[Mode, ...] = ("explain",),
    on_step: Callable[[RefineStep], None] | None = None,
) -> Refined:
    """Refine a distilled student and save the best checkpoint in `out`, with its `whyrank.json` and `metrics.jsonl`.

    A run that was killed resumes from its last saved state when called again with the same arguments.

    Args:
        model: where to start, a folder or a hub id.
        data: pairs with evidence, and what belongs to them.
        template: the prompt that the student was distilled with.
        out: folder of the checkpoint; `out/state` and `out/best` are there until refinement is over.
        config: how to refine.
        modes: what the checkpoint is allowed to be asked for; only `explain` is refined.
        on_step: called after every round.

    Raises:
        InputError: no pair has evidence, a text is missing, a reward is not one, or `out` holds something else.
    """
    if config.is_divided:
        check_divisible()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    _check(data)
    device = resolve_device(config.device)
    tokenizer = load_tokenizer(model)
    network = load_model(model, device, torch.float32, quantize=config.adapter.quantize)
    identity = _identity(weights_digest(network), data, template, config)
    finished = _finished_before(out, identity, data)
    if finished is not None:
        return finished
    if config.adapter.rank:
        add_adapter(network, config.adapter, config.seed)
    run = _Run(network, tokenizer, data, template, out, config, modes, identity)
    return run.to_the_end(on_step)


class _Run:
    """One refinement under way."""

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: RefineData,
        template: Template,
        out: Path,
        config: RefineConfig,
        modes: tuple[Mode, ...],
        identity: str,
    ) -> None:
        self.tokenizer, self.data, self.template, self.out = tokenizer, data, template, out
        self.config, self.modes, self.identity = config, modes, identity
        self.learner = Learner(network, config)
        self.generator = HfGenerator("student", network, ChatTokens(tokenizer), config.batch_size)
        self.rewards = [WeightedReward(name, open_reward(name), weight) for name, weight in _named(config)]
        self.networks = {"model": network, "head": self.learner.head}
        state = load_refine_state(out / "state", self.networks, self.learner.optimizer, identity)
        self.state = state or RefineState(identity, config.kl_coefficient)
        self.history = [RefineStep(**{**row, "labels": tuple(row["labels"])}) for row in self.state.history]
        self.hardness = {(query_id, doc_id): value for query_id, doc_id, value in self.state.hardness}
        self.clock = time.perf_counter() - (self.history[-1].seconds if self.history else 0.0)
        ranks().wait()  # before the first process changes what the others look for
        if ranks().is_main:
            recover(out / "best")
        if state is None:
            self._begin()

    def _begin(self) -> None:
        """Rank the dev queries with the distilled student, which is the best until a round does better."""
        if self.data.dev is not None:
            self.state.first_dev = self._ranked(self.data.dev)
        self._keep_as_best()

    def to_the_end(self, on_step: Callable[[RefineStep], None] | None) -> Refined:
        """All rounds that are left, until the last or an alarm."""
        alarm = find_alarm(self.history, self.config) if self.history else None
        is_main = ranks().is_main
        with JsonlAppender(self.out / METRICS_NAME, RefineStep) if is_main else nullcontext() as metrics:
            if metrics is not None:
                metrics.rewrite(self.history)
            while alarm is None and len(self.history) < self.config.num_steps:
                step = self._round(len(self.history))
                self.history.append(step)
                if metrics is not None:
                    metrics.append(step)
                if self.data.dev is None or (step.dev is not None and step.step == self._best()[0]):
                    self._keep_as_best()
                alarm = find_alarm(self.history, self.config)
                if step.step % self.config.save_every == 0 and (is_main or self.config.is_divided):
                    self._save()
                if on_step:
                    on_step(step)
        return self._finish(alarm)

    def _round(self, number: int) -> RefineStep:
        """Draw, reward, update; `number` counts from 0."""
        config, seed = self.config, f"{self.config.seed}/{number}"
        chosen = choose(
            self.data.evidence,
            self.hardness,
            num_queries=config.num_queries,
            num_candidates=config.num_candidates,
            strength=config.curriculum,
            rng=Random(f"choose {seed}"),
        )
        texts = [(self.data.queries[q], [self.data.documents[d] for d in ids]) for q, ids in chosen]
        with whole_weights(self.learner.model):
            drawn = draw(
                self.generator,
                self.template,
                texts,
                self.data.evidence,
                num_samples=config.num_samples,
                temperature=config.temperature,
                seed=seed,
            )
        usual = self.history[0].length if self.history else _mean_length(drawn)
        # By one process alone: an endpoint that judges would tell each of them something else.
        rewarded = ranks().from_main(
            lambda: [reward_group(group, self.rewards, unreadable=config.unreadable_reward) for group in drawn.groups]
        )
        earned = [
            total - cost
            for group, found in zip(drawn.groups, rewarded, strict=True)
            for total, cost in zip(found.total, length_costs(group, max(usual, 1.0), config.length_price), strict=True)
        ]
        coefficient = self.state.kl_coefficient
        lesson = self.learner.prepare(drawn.episodes, earned, coefficient)
        rate = config.learning_rate * min(1.0, (number + 1) / max(1, config.num_warmup_steps))
        order = Random(f"order {seed}")
        updated = self.learner.update(
            lesson,
            rate=rate,
            coefficient=coefficient,
            is_value_only=config.algorithm == "ppo" and number < config.num_value_steps,
            replay=lambda: self._replayed(order),
            rng=order,
        )
        for group in drawn.groups:
            self.hardness.update(hardness_of(group))
        step = self._measured(number, drawn, rewarded, earned, lesson, updated, rate)
        if config.kl_target:
            self.state.kl_coefficient = ppo_math.adapted_coefficient(
                coefficient,
                step.kl,
                target=config.kl_target,
                horizon=config.kl_horizon,
                num_rollouts=len(drawn.episodes),
            )
        return step

    def _replayed(self, rng: Random) -> Sequence[Example]:
        if not self.config.replay_weight or not self.data.replay:
            return ()
        return rng.choices(self.data.replay, k=self.config.replay_size)

    def _measured(
        self,
        number: int,
        drawn: Drawn,
        rewarded: Sequence[Rewarded],
        earned: Sequence[float],
        lesson: Lesson,
        updated: Updated,
        rate: float,
    ) -> RefineStep:
        """The round as a line of metrics, with a ranking of the dev queries where it is time."""
        rollouts = [rollout for group in drawn.groups for _, rollout in group.pairs]
        counts = Counter(rollout.label for rollout in rollouts if rollout.label is not None)
        shares = tuple(counts[label] / max(1, counts.total()) for label in self.template.scale.labels)
        old, gaps = updated.old, _gaps(lesson.episodes, updated.old)
        distances = (found(old.log_probs, lesson.reference) for found in (ppo_math.kl_k1, ppo_math.kl_k3))
        kl, kl_k3 = (float(ppo_math.masked_mean(found, lesson.mask)) for found in distances)
        step = RefineStep(
            step=number + 1,
            reward=fmean(earned),
            rewards={
                item.name: fmean(value for found in rewarded for value in found.components[item.name])
                for item in self.rewards
            },
            kl=kl,
            kl_k3=kl_k3,
            step_kl=updated.step_kl,
            kl_coefficient=self.state.kl_coefficient,
            entropy=float(ppo_math.masked_mean(old.entropies, lesson.mask)),
            label_entropy=-sum(share * math.log(share) for share in shares if share),
            labels=shares,
            length=_mean_length(drawn),
            num_rollouts=len(rollouts),
            num_capped=sum(rollout.status == "forced" for rollout in rollouts),
            num_unreadable=sum(rollout.label is None for rollout in rollouts),
            policy_loss=updated.policy_loss,
            value_loss=updated.value_loss,
            replay_loss=updated.replay_loss,
            explained_variance=float(ppo_math.explained_variance(old.values, lesson.returns, lesson.mask)),
            clip_share=updated.clip_share,
            grad_norm=updated.grad_norm,
            learning_rate=rate,
            gap=fmean(gaps) if gaps else 0.0,
            max_gap=max(gaps, default=0.0),
            num_updates=updated.num_updates,
            seconds=time.perf_counter() - self.clock,
            dev=self._dev(number + 1),
        )
        if not math.isfinite(step.policy_loss + step.value_loss + step.kl + step.grad_norm):
            raise InputError(f"the loss is no number any more at round {step.step}; lower --learning-rate")
        return step

    # ---- the best checkpoint, states, the end ------------------------------------------------------------------

    def _dev(self, step: int) -> float | None:
        is_time = step % self.config.dev_every == 0 or step == self.config.num_steps
        return self._ranked(self.data.dev) if self.data.dev is not None and is_time else None

    def _ranked(self, dev: DevSet) -> float:
        ranked = partial(rank_dev, self.learner.model, self.generator.tokens, self.template, "explain", dev)
        with whole_weights(self.learner.model):
            return ranks().from_main(ranked).ndcg

    def _best(self) -> tuple[int, float | None]:
        """Round and nDCG@10 of the best ranking so far; the first of equals."""
        if self.data.dev is None:
            return len(self.history), None
        ranked = [(0, self.state.first_dev or 0.0), *((s.step, s.dev) for s in self.history if s.dev is not None)]
        return max(ranked, key=lambda pair: pair[1])

    def _keep_as_best(self) -> None:
        if self.data.dev is None:
            return  # the last one will do, and it is at hand
        if ranks().is_main or self.config.is_divided:
            best = dict(snapshot_of(self.learner.model))
        if ranks().is_main:
            with atomic_folder(self.out / "best") as growing:
                save_file(best, growing / BEST_NAME)
        ranks().wait()

    def _save(self) -> None:
        self.state.hardness = [(*ids, value) for ids, value in self.hardness.items()]
        self.state.history = [asdict(step) for step in self.history]
        save_refine_state(self.out / "state", self.networks, self.learner.optimizer, self.state)

    def _finish(self, alarm: str | None) -> Refined:
        best_step, best_dev = self._best()
        outcome = {"alarm": alarm, "first_dev": self.state.first_dev, "best_dev": best_dev, "best_step": best_step}
        provenance = {"config": json.loads(json.dumps(asdict(self.config))), "identity": self.identity, **outcome}
        labels = self.generator.tokens.label_tokens(self.template)
        card = Card(self.template, self.modes, labels, provenance)
        if self.data.dev is not None:
            restore(self.learner.model, load_file(self.out / "best" / BEST_NAME))
        save_checkpoint(self.out, self.learner.model, self.tokenizer, card, self.config.adapter)
        if ranks().is_main:
            remove_state(self.out / "best")
        num_pairs = len(self.data.evidence)
        return Refined(self.out, num_pairs, self.state.first_dev, best_dev, best_step, alarm, tuple(self.history))


def _named(config: RefineConfig) -> list[tuple[str, float]]:
    """Names and weights of the rewards.

    Raises:
        InputError: a weight is no number, or a name is there twice.
    """
    named = [parse_reward(text) for text in config.rewards]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise InputError(f"expected every reward once, found {twice[0]!r} twice")
    return named


def _check(data: RefineData) -> None:
    """Everything that can be missing is found before anything is loaded."""
    known = [ids for ids, found in data.evidence.items() if found]
    if not known:
        raise InputError("expected pairs with evidence to learn from, found none; give links, judgments or qrels")
    for query_id, doc_id in known:
        if query_id not in data.queries or doc_id not in data.documents:
            missing = f"query {query_id!r}" if query_id not in data.queries else f"document {doc_id!r}"
            raise InputError(f"the pair ({query_id}, {doc_id}): {missing} is not in the given files")


def _identity(start: str, data: RefineData, template: Template, config: RefineConfig) -> str:
    """A digest of everything that decides how the run ends.

    `start` tells the weights to begin with, not where they lie: a folder may be distilled into anew. Pairs are drawn
    in the order of the evidence, so that order counts.
    """
    texts = {q: data.queries[q].text for q, _ in data.evidence if q in data.queries}
    documents = {d: data.documents[d].full_text for _, d in data.evidence if d in data.documents}
    # A run that lacked memory may go on with layers that are computed again: that changes no step.
    chosen = repr(replace(config, is_recomputed=False))
    parts = (start, template.version, chosen, repr(list(data.evidence.items())), repr(sorted(texts.items())))
    return content_key(
        *parts, repr(sorted(documents.items())), repr(data.replay), data.dev.key if data.dev is not None else ""
    )


def _finished_before(out: Path, identity: str, data: RefineData) -> Refined | None:
    """The same refinement if `out` already holds its result.

    Raises:
        OtherJob: `out` holds another checkpoint.
    """
    if not (out / CARD_NAME).is_file():
        return None
    told = read_card(out / CARD_NAME).training
    if told.get("identity") != identity:
        raise OtherJob(
            f"{out} holds a checkpoint trained on other data or with other options; remove it, or choose another folder"
        )
    for leftover in ("state", "best"):  # of a run that was killed behind its last write
        remove_state(out / leftover)
    history = tuple(read_jsonl(out / METRICS_NAME, RefineStep))
    outcome = told["first_dev"], told["best_dev"], told["best_step"], told["alarm"]
    return Refined(out, len(data.evidence), *outcome, history)


def _mean_length(drawn: Drawn) -> float:
    return fmean(rollout.num_tokens for group in drawn.groups for _, rollout in group.pairs)


def _gaps(episodes: Sequence[Episode], old: Scores) -> list[float]:
    """Absolute differences between engine and trainer at every token of the explanations."""
    found: list[float] = []
    for episode, row in zip(episodes, old.log_probs.tolist(), strict=True):
        if episode.log_probs is not None:
            found += [abs(engine - trainer) for engine, trainer in zip(episode.log_probs, row, strict=False)]
    return found
