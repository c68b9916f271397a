"""Rewards that ask a model: a sequence classifier, or a judge behind any generator.

Named `model:PATH` and `judge:MODEL`. Both see query, passage, explanation and label; both give numbers from 0 to 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from whyrank.errors import GenerationError, InputError
from whyrank.generators.hf.load import Device, load_tokenizer, resolve_device, without_progress_bars
from whyrank.generators.opening import open_model
from whyrank.judging import Judge
from whyrank.records import Document, Query
from whyrank.training.rewards import Reward, find_reward
from whyrank.training.rollouts import Rollout, RolloutCandidate, RolloutGroup

__all__ = ["ClassifierReward", "JudgeReward", "open_reward"]

log = logging.getLogger("whyrank")
JUDGE_TASK = (
    "The document below is a passage followed by an explanation of how relevant the passage is to the query, and a "
    "label. Judge the explanation: is it true to the passage, does it follow from it, and does the label agree?"
)


@dataclass(frozen=True, slots=True)
class ClassifierReward:
    """The probability that a sequence classifier gives an answer: sigmoid of a single logit, or the share of the last
    class of several. The question and the answer are the two texts of a pair; what is longer than `max_tokens` is cut
    from the question."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int = 512
    batch_size: int = 32

    @classmethod
    def load(cls, path: str | Path, device: Device = "auto") -> ClassifierReward:
        """A classifier from a folder or the hub, safetensors only.

        Raises:
            InputError: there is none.
        """
        try:
            with without_progress_bars():
                model = AutoModelForSequenceClassification.from_pretrained(
                    str(path), trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError) as cause:
            raise InputError(f"expected a sequence classifier in {str(path)!r}: {cause}") from cause
        model.train(False)
        return cls(model.to(resolve_device(device)), load_tokenizer(path))

    @torch.no_grad()
    def __call__(self, group: RolloutGroup) -> list[float]:
        """One probability per rollout."""
        pairs = list(group.pairs)
        found: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            encoded = self.tokenizer(
                [f"{group.query}\n\n{candidate.passage}" for candidate, _ in part],
                [_answer(rollout) for _, rollout in part],
                truncation="only_first",
                max_length=self.max_tokens,
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            logits = self.model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits.float()
            share = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
            found += share[:, -1].tolist()
        return found


@dataclass(frozen=True, slots=True)
class JudgeReward:
    """What a judge makes of an explanation, as a share of its template's scale.

    Judgments that cannot be read count as the mean of the group's others, and are told by a warning.

    Raises:
        GenerationError: none of a group's judgments could be read.
    """

    judge: Judge
    name: str = field(default="judge")

    @classmethod
    def load(cls, model: str) -> JudgeReward:
        """A judge by the name of any model: `endpoint:URL#MODEL`, a folder, a hub id.

        Raises:
            WhyrankError: see `open_model`.
        """
        generator, template = open_model(model, mode="direct")
        return cls(Judge(template, generator, "direct", instruction=JUDGE_TASK), f"judge:{model}")

    def __call__(self, group: RolloutGroup) -> list[float]:
        """One number from 0 to 1 per rollout."""
        values = self.judge.template.scale.values
        found: list[float | None] = [None] * group.num_rollouts
        for place, judgment in self.judge.judge(self._asked(group)):
            if judgment.score is not None:
                found[place] = (judgment.score - min(values)) / (max(values) - min(values))
        known = [value for value in found if value is not None]
        if not known:
            raise GenerationError(
                f"{self.name}: none of {len(found)} judgments of query {group.query_id} could be read"
            )
        if len(known) < len(found):
            log.warning("%s: %d of %d judgments could not be read", self.name, len(found) - len(known), len(found))
        usual = fmean(known)
        return [usual if value is None else value for value in found]

    @staticmethod
    def _asked(group: RolloutGroup) -> Iterator[tuple[Query, Document]]:
        for number, (candidate, rollout) in enumerate(group.pairs):
            yield Query(group.query_id, group.query), _shown(candidate, rollout, number)


def open_reward(name: str) -> Reward:
    """A reward by name, those that need a model included.

    Raises:
        InputError: there is no such reward, or no such model.
    """
    kind, _, model = name.partition(":")
    if kind == "model":
        return ClassifierReward.load(model)
    return JudgeReward.load(model) if kind == "judge" else find_reward(name)


def _shown(candidate: RolloutCandidate, rollout: Rollout, number: int) -> Document:
    return Document(f"{candidate.doc_id}/{number}", f"{candidate.passage}\n\n{_answer(rollout)}")


def _answer(rollout: Rollout) -> str:
    return f"Explanation: {rollout.explanation}\nLabel: {rollout.label}"
