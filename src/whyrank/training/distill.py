"""Supervised fine-tuning on explanation and label (the paper's first stage).

Deviations from arXiv 2504.03947: full fine-tuning (no adapters yet), no query-generation task, any teacher.
The loss is the mean negative log-likelihood per answer token of a batch; the prompt carries none.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from whyrank.checkpoint import CARD_NAME, Card, read_card
from whyrank.errors import InputError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_model, load_tokenizer, resolve_device
from whyrank.records import Document, Judgment, Query
from whyrank.store import content_key, read_jsonl, write_jsonl
from whyrank.template import Template
from whyrank.training.checkpoints import TrainingState, load_state, save_checkpoint, save_state
from whyrank.training.config import DistillConfig
from whyrank.training.examples import IGNORED, Example, collate, examples_of, is_teachable
from whyrank.training.optimizers import optimizers_of
from whyrank.training.tiny import tiny_model, tiny_tokenizer

__all__ = ["Distilled", "Step", "distill", "learning_rate_at", "student_tokenizer"]

LOG_NAME = "log.jsonl"
ROOM_FOR_WORDS = 1024  # tokens for a template's own words


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the training log. `loss` is in nats per answer token; `seconds` is wall time so far."""

    step: int
    loss: float
    learning_rate: float
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Distilled:
    """What training produced."""

    checkpoint: Path
    num_examples: int
    num_left_out: int
    num_parameters: int
    history: tuple[Step, ...]


def distill(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    out: Path,
    config: DistillConfig = DistillConfig(),
    *,
    on_step: Callable[[Step], None] | None = None,
) -> Distilled:
    """Train a student on judgments and save it as a Hugging Face checkpoint in `out`, with its `whyrank.json`.

    A run that was killed resumes from its last saved state when called again with the same data and config.

    Args:
        judgments: those that are not `ok` (see `is_teachable`) are left out and counted.
        queries: by query_id.
        documents: by doc_id.
        template: the prompt and answer shape to teach.
        out: folder of the checkpoint; `out/state` holds what resuming needs until training is over.
        config: how to train.
        on_step: called after every optimizer step.

    Raises:
        InputError: nothing to learn from, or an example does not fit the model.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    tokenizer, model = _student(judgments, queries, documents, template, config, device)
    tokens = ChatTokens(tokenizer)
    examples = list(
        examples_of(
            judgments,
            queries,
            documents,
            template,
            tokens,
            config.modes,
            is_label_first=config.is_label_first,
            word_dropout=config.word_dropout,
            seed=config.seed,
        )
    )
    _check(examples, model)
    # What is trained on, not where it came from: a judgment's key stays when its label is made anew.
    identity = content_key(template.version, repr(config), *(content_key(repr(example)) for example in examples))
    num_left_out = sum(not is_teachable(judgment) for judgment in judgments)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    finished = _finished_before(out, identity)
    if finished is not None:
        return Distilled(out, len(examples), num_left_out, num_parameters, finished)
    optimizers = optimizers_of(model, config)
    state = load_state(out / "state", model, optimizers, identity)
    history = [Step(**step) for step in state.history] if state else []
    model.train()
    if device.type == "cpu":
        # torch's fused attention is several times slower in the backward pass on CPUs, most of all in bfloat16.
        model.set_attn_implementation("eager")
    clock = time.perf_counter() - (history[-1].seconds if history else 0.0)
    batches = _batches(examples, config, num_done=len(history))
    for number in range(len(history), config.num_steps):
        batch = next(batches)
        torch.manual_seed(config.seed + number)  # dropout is then the same whether or not the run was resumed
        rate = learning_rate_at(number, config)
        loss, num_tokens = _update(model, optimizers, batch, rate, _pad_id(tokenizer), config)
        step = Step(number + 1, loss, rate, num_tokens, time.perf_counter() - clock)
        if not math.isfinite(step.loss):
            raise InputError(f"the loss is {step.loss} at step {step.step}; lower --learning-rate")
        history.append(step)
        if on_step:
            on_step(step)
        if step.step % config.save_every == 0 and step.step < config.num_steps:
            save_state(out / "state", model, optimizers, TrainingState(identity, [asdict(s) for s in history]))
    provenance = {"config": json.loads(json.dumps(asdict(config))), "num_examples": len(examples), "identity": identity}
    card = Card(template, config.modes, tokens.label_tokens(template), training=provenance)
    write_jsonl(out / LOG_NAME, history)
    save_checkpoint(out, model, tokenizer, card)
    return Distilled(out, len(examples), num_left_out, num_parameters, tuple(history))


def _update(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Sequence[Example],
    rate: float,
    pad_id: int,
    config: DistillConfig,
) -> tuple[float, int]:
    """One step of all optimizers; returns the loss in nats per answer token and the number of tokens read."""
    ids, mask, targets = (tensor.to(model.device) for tensor in collate(batch, pad_id))
    num_last = max(len(example.ids) - example.num_prompt for example in batch) + 1
    with _autocast(config, model.device):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=num_last
        )
    loss = answer_loss(output.logits, targets[:, -num_last:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), int(mask.sum())


def _finished_before(out: Path, identity: str) -> tuple[Step, ...] | None:
    """The history of the same training if `out` already holds its result.

    Raises:
        InputError: `out` holds another checkpoint.
    """
    if not (out / CARD_NAME).is_file():
        return None
    if read_card(out / CARD_NAME).training.get("identity") != identity:
        raise InputError(
            f"{out} holds a checkpoint trained on other data or with other options; remove it, or choose another folder"
        )
    return tuple(read_jsonl(out / LOG_NAME, Step))


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats over the tokens that have a target, in float32.

    Args:
        logits: `(rows, length, vocabulary)`; position i predicts token i + 1.
        targets: `(rows, length)`, `IGNORED` where there is no loss.
    """
    wanted = targets[:, 1:] != IGNORED
    return cross_entropy(logits[:, :-1][wanted].float(), targets[:, 1:][wanted])


def learning_rate_at(step: int, config: DistillConfig) -> float:
    """Linear rise over the warm-up, the peak until `decay_fraction` of the steps is left, then linear decay.

    Step 0 is the first; no step has rate 0.
    """
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    num_decay = max(1, round(config.num_steps * config.decay_fraction))
    return config.learning_rate * min(1.0, (config.num_steps - step) / num_decay)


def student_tokenizer(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    vocab_size: int,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a student from scratch, learned from everything that it will read and write."""
    texts = [text for label in template.scale.labels for text in (template.answer(label, ""),) * len(judgments)]
    texts += [query.text for query in queries.values()]
    texts += [document.full_text for document in documents.values()]
    texts += [f" {judgment.explanation}" for judgment in judgments]
    texts += [template.prompt.task, template.prompt.query_heading, template.prompt.document_heading]
    return tiny_tokenizer(texts, vocab_size)


def _student(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    config: DistillConfig,
    device: torch.device,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if config.model != "tiny":
        return load_tokenizer(config.model), load_model(config.model, device, torch.float32)
    tokenizer = student_tokenizer(judgments, queries, documents, template, config.tiny.vocab_size)
    # Positions cost nothing: whatever the template's limits admit must fit.
    limits = template.limits
    longest = limits.max_query_tokens + limits.max_document_tokens + limits.max_explanation_tokens
    room = max(config.tiny.max_positions, longest + ROOM_FOR_WORDS)
    model = tiny_model(tokenizer, replace(config.tiny, max_positions=room), config.seed)
    torch.nn.Module.to(model, device)
    return tokenizer, model


def _check(examples: Sequence[Example], model: PreTrainedModel) -> None:
    if not examples:
        raise InputError("expected judgments with labels to learn from, found none")
    longest = max(len(example.ids) for example in examples)
    holds = getattr(model.config, "max_position_embeddings", None)
    if isinstance(holds, int) and longest > holds:
        raise InputError(
            f"the longest example has {longest} tokens, the model holds {holds}; lower the template's limits"
        )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def _batches(examples: Sequence[Example], config: DistillConfig, num_done: int) -> Iterator[list[Example]]:
    """Endless epochs in a seeded order; the order of step n does not depend on where a run was resumed.

    Within a window of several batches, examples of similar length go together, so that little is padded.
    """
    rng = random.Random(config.seed)
    number = 0
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        window = config.batch_size * 16
        epoch: list[list[int]] = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda i: len(examples[i].ids))
            epoch += [near[at : at + config.batch_size] for at in range(0, len(near), config.batch_size)]
        rng.shuffle(epoch)
        for batch in epoch:
            number += 1
            if number > num_done:
                yield [examples[i] for i in batch]


def _autocast(config: DistillConfig, device: torch.device) -> torch.autocast | nullcontext[None]:
    is_fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    if config.precision == "bfloat16" or (config.precision == "auto" and is_fast):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
