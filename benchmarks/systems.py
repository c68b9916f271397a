"""The two sides of the comparison, and whether they give the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.workload import Workload
from whyrank.errors import GenerationError
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.load import DTYPES, without_progress_bars

__all__ = [
    "BASELINES",
    "SYSTEMS",
    "Agreement",
    "Answer",
    "Run",
    "compare",
    "generate",
    "load_plain",
    "open_system",
    "open_whyrank",
    "plain",
    "plain_dtype",
]

BASELINES = {"generate-1": 1, "generate-8": 8, "generate-32": 32}
SYSTEMS = ("whyrank", *BASELINES)
LARGEST_LABEL_DIFFERENCE = 1e-4
NEAR_TIE = 1e-4


@dataclass(frozen=True, slots=True)
class Answer:
    """What a document got: the generated token ids and the probability of each label."""

    tokens: tuple[int, ...]
    label_probs: tuple[float, ...]


Run = Callable[[Workload], list[Answer]]


def open_system(system: str, folder: Path, dtype: str) -> Run:
    """Load a checkpoint for one side; what comes back answers all documents of a workload, in their order."""
    return open_whyrank(folder, dtype) if system == "whyrank" else plain(load_plain(folder, dtype), system)


# ---- whyrank --------------------------------------------------------------------------------------------------


def open_whyrank(folder: Path, dtype: str) -> Run:
    """whyrank as users have it: the generator with its default settings, from requests to completions."""
    generator = HfGenerator.load(folder, device="cpu", dtype=cast(Any, dtype))

    def answers(workload: Workload) -> list[Answer]:
        found: dict[int, Answer] = {}
        for index, completion in generator.generate(workload.requests):
            if completion.error is not None:
                raise completion.error
            found[index] = _checked(Answer(completion.token_ids or (), completion.label_probs or ()), workload)
        return [found[index] for index in range(len(workload.requests))]

    return answers


# ---- transformers ---------------------------------------------------------------------------------------------


def plain_dtype(dtype: str) -> str:
    """What whyrank's dtype is held against: itself, but for int8, which transformers does not have on CPUs without
    further packages, float32."""
    return "float32" if dtype == "int8" else dtype


def load_plain(folder: Path, dtype: str) -> PreTrainedModel:
    """The checkpoint as transformers loads it, with torch's attention, on the CPU, in the dtype that `plain_dtype`
    says."""
    own = DTYPES[plain_dtype(dtype)]
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=own, attn_implementation="sdpa")
    return cast(PreTrainedModel, model.eval())


def plain(model: PreTrainedModel, system: str) -> Run:
    """`generate` with the batch size of one of `BASELINES`."""
    return lambda workload: generate(model, workload, BASELINES[system])


@torch.inference_mode()
def generate(model: PreTrainedModel, workload: Workload, batch_size: int) -> list[Answer]:
    """`model.generate` in batches of similar length, then the labels from the cache that it leaves behind."""
    answers: dict[int, Answer] = {}
    order = sorted(range(len(workload.prompts)), key=lambda i: len(workload.prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for index, answer in zip(chosen, _batch(model, workload, chosen), strict=True):
            answers[index] = _checked(answer, workload)
    return [answers[index] for index in range(len(order))]


def _batch(model: PreTrainedModel, workload: Workload, chosen: Sequence[int]) -> list[Answer]:
    ids, mask = _left_padded([workload.prompts[i] for i in chosen])
    num_prompt = ids.shape[1]
    labels = workload.endings.labels
    nodes = sorted({label[:end] for label in labels for end in range(1, len(label))})
    cache = DynamicCache(config=model.config) if nodes else None  # without either, one forward is all there is
    if workload.num_generated:
        done: Any = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=workload.num_generated,
            do_sample=False,
            return_dict_in_generate=True,
        )
        ids, cache = done.sequences, done.past_key_values
        mask = _longer(mask, ids.shape[1])
    written = ids[:, num_prompt:].tolist()
    ids = torch.cat([ids, torch.tensor([workload.endings.prompt] * len(chosen))], dim=1)
    after: dict[tuple[int, ...], Tensor] = {(): _next_log_probs(model, ids, _longer(mask, ids.shape[1]), cache)}
    if nodes:
        cast(DynamicCache, cache).activate_past_recording()  # so that a sliding window can be taken back, too
    for node in nodes:
        path = torch.cat([ids, torch.tensor([node] * len(chosen))], dim=1)
        after[node] = _next_log_probs(model, path, _longer(mask, path.shape[1]), cache)
        cast(DynamicCache, cache).crop(-len(node))
    along = [torch.stack([after[label[:end]][:, label[end]] for end in range(len(label))]) for label in labels]
    probs = torch.stack([log_probs.sum(dim=0) for log_probs in along], dim=1).exp().tolist()
    return [Answer(tuple(tokens), tuple(row)) for tokens, row in zip(written, probs, strict=True)]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _longer(mask: Tensor, length: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], length - mask.shape[1])], dim=1)


def _next_log_probs(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
    """Log-probabilities `(rows, vocabulary)` after `ids`; only what the cache does not hold yet is computed."""
    num_cached = 0 if cache is None else cache.get_seq_length()
    out = model(
        input_ids=ids[:, num_cached:],
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, num_cached:],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    return torch.log_softmax(out.logits[:, -1].double(), dim=-1)


# ---- answers --------------------------------------------------------------------------------------------------


def _checked(answer: Answer, workload: Workload) -> Answer:
    """The answer, if it is as long as it must be.

    Raises:
        GenerationError: fewer or more tokens were written, or labels are missing; the times would not compare.
    """
    expected = (workload.num_generated, len(workload.endings.labels))
    found = (len(answer.tokens), len(answer.label_probs))
    if found != expected:
        raise GenerationError(
            f"expected {expected[0]} generated tokens and {expected[1]} label probabilities, found {found[0]} and "
            f"{found[1]}: this checkpoint ends its answers early or its explanations cannot be read back"
        )
    return answer


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the answers of two systems compare, in documents.

    `num_near_ties` differ first at a place where a plain forward puts both tokens on top, less than 1e-4 apart:
    rounding may choose either. `num_mismatches` differ elsewhere, or in a label's probability by more than 1e-4.
    `largest_label_difference` is over the documents with equal tokens.
    """

    num_documents: int
    num_mismatches: int = 0
    num_near_ties: int = 0
    largest_label_difference: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_documents + other.num_documents,
            self.num_mismatches + other.num_mismatches,
            self.num_near_ties + other.num_near_ties,
            max(self.largest_label_difference, other.largest_label_difference),
        )


def compare(model: PreTrainedModel, workload: Workload, ours: Sequence[Answer], theirs: Sequence[Answer]) -> Agreement:
    """Compare document by document; `model` decides what is a near tie."""
    total = Agreement(0)
    for prompt, one, other in zip(workload.prompts, ours, theirs, strict=True):
        if one.tokens == other.tokens:
            difference = max(abs(a - b) for a, b in zip(one.label_probs, other.label_probs, strict=True))
            total += Agreement(1, int(not difference <= LARGEST_LABEL_DIFFERENCE), 0, difference)
        else:
            is_tie = _is_near_tie(model, prompt, one.tokens, other.tokens)
            total += Agreement(1, int(not is_tie), int(is_tie))
    return total


@torch.inference_mode()
def _is_near_tie(model: PreTrainedModel, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two continuations part where the two best logits are that close, by a forward of this document alone."""
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    logits = model(input_ids=torch.tensor([[*prompt, *one[:place]]]), logits_to_keep=1).logits[0, -1].float()
    best = logits.topk(2)
    is_between = {one[place], other[place]} == set(best.indices.tolist())
    return is_between and float(best.values[0] - best.values[1]) < NEAR_TIE
