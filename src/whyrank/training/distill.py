"""Supervised fine-tuning on explanation and label (the paper's first stage).

Deviations from arXiv 2504.03947: any teacher; the student that ranks the dev queries best is kept, not the last one.
The loss is the weighted mean negative log-likelihood per answer token of a batch; the prompt carries none. All that is
drawn comes from the seed and the number of the step, so that a resumed run ends as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from whyrank.checkpoint import CARD_NAME, Card, read_card
from whyrank.errors import InputError, OtherJob, require
from whyrank.generators.hf.attention import check_replaceable
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_model, load_tokenizer, resolve_device
from whyrank.records import Document, Judgment, Query, SearchQueries
from whyrank.search_queries import INSTRUCTION, PROMPT_VERSION, answer
from whyrank.store import JsonlAppender, content_key, read_jsonl, write_jsonl
from whyrank.template import Template
from whyrank.training.checkpoints import (
    Snapshot,
    TrainingState,
    load_state,
    remove_state,
    restore,
    save_checkpoint,
    save_state,
    snapshot_of,
)
from whyrank.training.config import DistillConfig
from whyrank.training.curves import draw_curves
from whyrank.training.dividing import check_divisible, divide, whole_weights
from whyrank.training.examples import Example, examples_of, is_teachable, search_query_examples, to_strand
from whyrank.training.lora import add_adapter, trainable_parameters
from whyrank.training.optimizers import optimizers_of
from whyrank.training.ranks import ranks
from whyrank.training.recomputing import recompute_layers
from whyrank.training.sampling import batches, frequencies, with_share
from whyrank.training.steps import Update, is_bfloat16, learning_rate_at, precision_of, update
from whyrank.training.tiny import tiny_model, tiny_tokenizer
from whyrank.training.validation import DevSet, DevValue, rank_dev

__all__ = ["METRICS_NAME", "Distilled", "Step", "distill", "student_tokenizer"]

METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "curves.svg"
ROOM_FOR_WORDS = 1024  # tokens for a template's own words


@dataclass(frozen=True, slots=True)
class Step:
    """One line of `metrics.jsonl`. `loss` is in nats per answer token (weighted, if labels weigh more), of the batch
    before the step; `num_tokens` is what the model read; `seconds` is wall time so far; `grad_norm` is the gradient's
    length before it was scaled down. `dev_ndcg` (nDCG@10) and `dev_unparsed` (share of judgments without a label) are
    there after steps that ranked the dev queries."""

    step: int
    loss: float
    learning_rate: float
    num_tokens: int
    seconds: float
    grad_norm: float = 0.0
    dev_ndcg: float | None = None
    dev_unparsed: float | None = None


@dataclass(frozen=True, slots=True)
class Distilled:
    """What training produced. The checkpoint holds the weights after `best_step`: the step that ranked the dev queries
    best, or the last one without dev queries. `num_too_long` examples were left out for their length;
    `num_search_examples` are about writing search queries, `num_examples` are the others."""

    checkpoint: Path
    num_examples: int
    num_left_out: int
    num_parameters: int
    history: tuple[Step, ...]
    num_too_long: int = 0
    num_trained_parameters: int = 0
    num_search_examples: int = 0
    best_step: int = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """All that one training needs and does not change."""

    model: PreTrainedModel
    tokens: ChatTokens
    template: Template
    config: DistillConfig
    dev: DevSet | None
    pad_id: int

    def dev_value(self, step: int) -> DevValue | None:
        """How the model ranks now, if it is time to look."""
        if self.dev is None or (step % self.config.eval_every and step < self.config.num_steps):
            return None
        with whole_weights(self.model):
            return ranks().from_main(partial(self._ranked, self.dev))

    def _ranked(self, dev: DevSet) -> DevValue:
        with precision_of(self.config, self.model.device):
            return rank_dev(self.model, self.tokens, self.template, self.config.modes[0], dev)


def distill(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    out: Path,
    config: DistillConfig = DistillConfig(),
    *,
    weights: Sequence[float] | None = None,
    search_queries: Sequence[SearchQueries] = (),
    dev: DevSet | None = None,
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
        weights: how often each judgment is drawn, in any unit; all alike by default.
        search_queries: taught beside the judgments, so that the student can write such, too; those that are not `ok`
            are left out.
        dev: ranked every `config.eval_every` steps and after the last; the best student is kept.
        on_step: called after every optimizer step.

    Raises:
        InputError: nothing to learn from, an example does not fit the model, or `out` belongs to another run.
        MissingExtra: an adapter needs peft or bitsandbytes.
        UnsupportedModel: the model cannot be packed, or not rank the dev queries.
    """
    require("matplotlib", "train")
    if config.is_divided:
        check_divisible()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    written = [text for item in search_queries for text in (INSTRUCTION + answer(item.queries),)]
    tokenizer, model = _student(judgments, queries, documents, template, config, device, written)
    tokens = ChatTokens(tokenizer)
    examples, drawn = _examples(judgments, queries, documents, template, tokens, config, weights)
    num_all = len(examples)
    kept = [i for i, e in enumerate(examples) if not config.max_tokens or len(e.ids) <= config.max_tokens]
    examples, drawn = [examples[i] for i in kept], [drawn[i] for i in kept]
    to_search = list(search_query_examples(search_queries, queries, template, tokens))
    _check([*examples, *to_search], model)
    # What is trained on, not where it came from: a judgment's key stays when its label is made anew.
    often = () if weights is None else map(repr, drawn)
    data = [*(content_key(repr(example)) for example in (*examples, *to_search)), *often, *([dev.key] if dev else [])]
    # A run that lacked memory may go on with layers that are computed again: that changes no step.
    identity = content_key(template.version, repr(replace(config, is_recomputed=False)), *data)
    trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    done = Distilled(
        checkpoint=out,
        num_examples=len(examples),
        num_left_out=sum(not is_teachable(judgment) for judgment in judgments),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        history=(),
        num_too_long=num_all - len(examples),
        num_trained_parameters=trained,
        num_search_examples=len(to_search),
    )
    history = _finished_before(out, identity)
    ranks().wait()  # before the first process changes what the others look for
    if history is None:
        drawn = frequencies([example.label for example in examples], drawn, is_balanced=config.is_balanced)
        drawn = with_share(drawn, len(to_search), config.search_query_share)
        run = _Run(model, tokens, template, config, dev, _pad_id(tokenizer))
        history = _train(run, [*examples, *to_search], drawn, out, identity, on_step)
        provenance = {"config": json.loads(json.dumps(asdict(config))), "num_examples": len(examples)}
        provenance |= {"identity": identity, "best_step": _best(history)}
        card = Card(template, config.modes, tokens.label_tokens(template), training=provenance)
        card = replace(card, search_queries=PROMPT_VERSION if to_search else "")
        if ranks().is_main:
            draw_curves(out / CURVES_NAME, _curves(history))
        save_checkpoint(out, model, tokenizer, card, config.adapter)
    return replace(done, history=history, best_step=_best(history))


def _train(
    run: _Run,
    examples: Sequence[Example],
    drawn: Sequence[float],
    out: Path,
    identity: str,
    on_step: Callable[[Step], None] | None,
) -> tuple[Step, ...]:
    """The loop; afterwards the model has the best weights."""
    model, config, is_main = run.model, run.config, ranks().is_main
    if config.is_recomputed:
        recompute_layers(model)
    if config.is_divided:
        divide(model)
    optimizers = optimizers_of(model, config)
    known = load_state(out / "state", model, optimizers, identity)
    history = [Step(**step) for step in known[0].history] if known else []
    best: Snapshot | None = known[1] if known else None
    _prepare(run)
    if is_main:
        write_jsonl(out / METRICS_NAME, history)
    clock = time.perf_counter() - (history[-1].seconds if history else 0.0)
    order = batches(examples, drawn, config, num_done=len(history))
    with JsonlAppender(out / METRICS_NAME, Step) if is_main else nullcontext() as metrics:
        for number in range(len(history), config.num_steps):
            if _is_enough(history, config):
                break
            torch.manual_seed(config.seed + number)  # dropout is then the same whether or not the run was resumed
            rate = learning_rate_at(number, config)
            strands = [to_strand(example, config.label_weight) for example in next(order)]
            found = update(model, optimizers, strands, rate, config, pad_id=run.pad_id)
            history.append(_step(number + 1, found, rate, run.dev_value(number + 1), clock))
            if metrics is not None:
                metrics.append(history[-1])
            if run.dev is not None and _best(history) == number + 1:
                best = snapshot_of(model)
            if on_step:
                on_step(history[-1])
            is_saving = (number + 1) % config.save_every == 0 and number + 1 < config.num_steps
            if is_saving and (is_main or config.is_divided):
                state = TrainingState(identity, [asdict(step) for step in history])
                save_state(out / "state", model, optimizers, state, best)
    if best is not None:
        restore(model, best)
    return tuple(history)


def _step(number: int, found: Update, rate: float, dev: DevValue | None, clock: float) -> Step:
    """A line of the log.

    Raises:
        InputError: the loss is not a number.
    """
    if not math.isfinite(found.loss):
        raise InputError(f"the loss is {found.loss} at step {number}; lower --learning-rate")
    ranked = (None, None) if dev is None else (dev.ndcg, dev.unparsed_rate)
    seconds = time.perf_counter() - clock
    return Step(number, found.loss, rate, found.num_tokens, seconds, found.grad_norm, *ranked)


def _prepare(run: _Run) -> None:
    """Put the model into training mode, with the attention that suits the device."""
    if run.dev is not None:
        check_replaceable(run.model)
    run.model.train()
    if run.model.device.type == "cpu":
        # torch's fused attention is several times slower in the backward pass on CPUs, most of all in bfloat16.
        run.model.set_attn_implementation("eager")


def _best(history: Sequence[Step]) -> int:
    """The first of the steps that ranked the dev queries best; the last step where none did."""
    ranked = [step for step in history if step.dev_ndcg is not None]
    return max(ranked, key=lambda step: (step.dev_ndcg, -step.step)).step if ranked else history[-1].step


def _is_enough(history: Sequence[Step], config: DistillConfig) -> bool:
    """Whether the last `patience` rankings were all no better than one before."""
    ranked = [step.step for step in history if step.dev_ndcg is not None]
    return bool(config.patience and ranked) and sum(step > _best(history) for step in ranked) >= config.patience


def _curves(history: Sequence[Step]) -> Mapping[str, Mapping[int, float]]:
    return {
        "loss (nats per answer token)": {step.step: step.loss for step in history},
        "gradient norm before clipping": {step.step: step.grad_norm for step in history},
        "learning rate": {step.step: step.learning_rate for step in history},
        "dev nDCG@10": {step.step: step.dev_ndcg for step in history if step.dev_ndcg is not None},
    }


def _finished_before(out: Path, identity: str) -> tuple[Step, ...] | None:
    """The history of the same training if `out` already holds its result.

    Raises:
        OtherJob: `out` holds another checkpoint.
    """
    if not (out / CARD_NAME).is_file():
        return None
    if read_card(out / CARD_NAME).training.get("identity") != identity:
        raise OtherJob(
            f"{out} holds a checkpoint trained on other data or with other options; remove it, or choose another folder"
        )
    remove_state(out / "state")
    return tuple(read_jsonl(out / METRICS_NAME, Step))


def _examples(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    tokens: ChatTokens,
    config: DistillConfig,
    weights: Sequence[float] | None,
) -> tuple[list[Example], list[float]]:
    """All examples, and how often each is drawn.

    Raises:
        InputError: there are not as many weights as judgments; and see `examples_of`.
    """
    if weights is not None and len(weights) != len(judgments):
        raise InputError(f"expected one weight per judgment ({len(judgments)}), found {len(weights)}")
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
    teachable = [i for i, judgment in enumerate(judgments) if judgment.label is not None and is_teachable(judgment)]
    return examples, [1.0 if weights is None else weights[i] for i in teachable for _ in config.modes]


def student_tokenizer(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    vocab_size: int,
    more: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """The tokenizer of a student from scratch, learned from everything that it will read and write; `more` is what that
    is beside judgments."""
    texts = [text for label in template.scale.labels for text in (template.answer(label, ""),) * len(judgments)]
    texts += [query.text for query in queries.values()]
    texts += [document.full_text for document in documents.values()]
    texts += [f" {judgment.explanation}" for judgment in judgments]
    texts += [template.prompt.task, template.prompt.query_heading, template.prompt.document_heading]
    return tiny_tokenizer([*texts, *more], vocab_size)


def _student(
    judgments: Sequence[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    config: DistillConfig,
    device: torch.device,
    more: Sequence[str],
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if config.model != "tiny":
        adapter = config.adapter
        # Weights that are not trained are only multiplied by: on a GPU they are held as they are multiplied.
        is_half = adapter.rank and device.type == "cuda" and is_bfloat16(config, device)
        dtype = torch.bfloat16 if is_half else torch.float32
        loaded = load_model(config.model, device, dtype, quantize=adapter.quantize)
        if adapter.rank:
            add_adapter(loaded, adapter, config.seed)
        return load_tokenizer(config.model), loaded
    tokenizer = student_tokenizer(judgments, queries, documents, template, config.tiny.vocab_size, more)
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
