"""One batch, two phases: write the explanations, then read the label distributions.

Prompts are padded on the left; a mask and explicit positions make every row independent of the others. Rows
that finish stay in the cache until half of the batch is done; then their caches are packed down to what belongs to
them, their labels are read together, and they leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from whyrank.generators import Completion, FinishReason, Request
from whyrank.generators.hf.chat import ChatTokens, Endings
from whyrank.generators.hf.labels import label_log_probs, prefixes_to_visit

__all__ = ["Row", "decode_batch"]

STOP_WINDOW = 24  # tokens at the end of an explanation that are searched for a stop after every step


@dataclass(slots=True)
class Row:
    """One request on its way through a batch.

    `num_kept` of the generated tokens belong to the explanation; where its end lies inside a token, `tail` spells the
    rest of it. `num_written` counts what the model wrote, the stop included.
    """

    index: int
    request: Request
    prompt: list[int]
    endings: Endings
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_kept: int = 0
    num_written: int = 0
    tail: tuple[int, ...] = ()
    finish: FinishReason | None = None
    random: torch.Generator | None = None


@dataclass(slots=True)
class Batch:
    """The rows that share a cache, with the mask `(rows, cached tokens)` of what each may attend to."""

    rows: list[Row]
    cache: DynamicCache
    mask: Tensor
    logits: Tensor

    def keep(self, chosen: Sequence[int]) -> Batch:
        """A batch of these rows alone; the cache is copied, the original stays usable."""
        indices = torch.tensor(chosen, device=self.mask.device)
        cache = DynamicCache()
        for layer, source in enumerate(self.cache.layers):
            held = cast(DynamicLayer, source)
            cache.update(cast(Tensor, held.keys)[indices], cast(Tensor, held.values)[indices], layer)
        return Batch([self.rows[i] for i in chosen], cache, self.mask[indices], self.logits[indices])


@torch.inference_mode()
def decode_batch(
    model: PreTrainedModel, tokens: ChatTokens, rows: list[Row], eos_ids: frozenset[int]
) -> Iterator[tuple[int, Completion]]:
    """Yield `(request index, completion)` for every row, those that finish early first.

    All rows must be of one kind: all direct or all explaining.
    """
    batch = _prefill(model, rows)
    for row in batch.rows:
        if row.request.is_direct or row.request.sampling.max_tokens == 0:
            row.finish = "stop" if row.request.is_direct else "length"
    while True:
        waiting = [i for i, row in enumerate(batch.rows) if row.finish is None]
        if len(waiting) * 2 <= len(batch.rows):
            done = [i for i, row in enumerate(batch.rows) if row.finish is not None]
            finished = batch.keep(done) if waiting else batch
            yield from _read_labels(model, tokens, finished)
            if not waiting:
                return
            batch = batch.keep(waiting)
        _choose_tokens(batch, tokens, eos_ids)
        _step(model, batch)


def _prefill(model: PreTrainedModel, rows: list[Row]) -> Batch:
    longest = max(len(row.prompt) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[i, longest - len(row.prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = DynamicCache()
    logits = _forward(model, ids, mask, cache)
    return Batch(rows, cache, mask, logits[:, -1])


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int = 1) -> Tensor:
    """Logits `(rows, keep, vocabulary)` in float32 after `ids`; `mask` covers cache and `ids`."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    )
    return cast(Tensor, out.logits).float()


def _step(model: PreTrainedModel, batch: Batch) -> None:
    last = torch.tensor([[row.generated[-1]] for row in batch.rows], device=batch.mask.device)
    batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
    batch.logits = _forward(model, last, batch.mask, batch.cache)[:, -1]


def _choose_tokens(batch: Batch, tokens: ChatTokens, eos_ids: frozenset[int]) -> None:
    """Append one token to every row; a finished row repeats its last one, which stays masked for its label."""
    log_probs = torch.log_softmax(batch.logits, dim=-1)
    greedy = log_probs.argmax(dim=-1).tolist()
    for i, row in enumerate(batch.rows):
        if row.finish is not None:
            row.generated.append(row.generated[-1] if row.generated else 0)
            continue
        token, log_prob = greedy[i], log_probs[i]
        if row.request.sampling.temperature > 0:
            token, log_prob = _sample(batch.logits[i], row)
        row.generated.append(token)
        row.num_written += 1
        if token in eos_ids:
            row.finish = "stop"
        else:
            row.logprobs.append(float(log_prob[token]))
            row.num_kept = len(row.generated)
            row.finish = _reason_to_stop(row, tokens)
        if row.finish is not None:
            _keep_explanation(row, tokens)


def _sample(logits: Tensor, row: Row) -> tuple[int, Tensor]:
    """Draw with the row's own random numbers, so that the draw does not depend on its neighbours."""
    if row.random is None:
        row.random = torch.Generator().manual_seed(row.request.sampling.seed)
    log_probs = torch.log_softmax(logits.cpu().double() / row.request.sampling.temperature, dim=-1)
    return int(torch.multinomial(log_probs.exp(), 1, generator=row.random)), log_probs


def _reason_to_stop(row: Row, tokens: ChatTokens) -> FinishReason | None:
    is_all = len(row.generated) <= STOP_WINDOW
    ending = ("\n" if is_all else "") + tokens.decode(row.generated[-STOP_WINDOW:])
    if any(stop in ending for stop in row.request.stops):
        return "stop"
    return "length" if len(row.generated) >= row.request.sampling.max_tokens else None


def _keep_explanation(row: Row, tokens: ChatTokens) -> None:
    """Settle which tokens are the explanation: those before the first stop, without the beginning of the label
    prompt, which the runtime appends itself. The context of the label is then the one of training."""
    text = tokens.decode(row.generated[: row.num_kept])
    found = [at for at in (f"\n{text}".find(stop) for stop in row.request.stops) if at >= 0]
    end = max(min(found) - 1, 0) if found else len(text)
    prompt = row.request.label_prompt
    end -= next((size for size in range(len(prompt), 0, -1) if text[:end].endswith(prompt[:size])), 0)
    if end == len(text):
        return
    shown = text
    while row.num_kept and not (len(shown) <= end and text.startswith(shown)):
        row.num_kept -= 1
        shown = tokens.decode(row.generated[: row.num_kept])
    row.tail = tokens.encode_text(text[len(shown) : end]) if len(shown) < end else ()


def _read_labels(model: PreTrainedModel, tokens: ChatTokens, batch: Batch) -> Iterator[tuple[int, Completion]]:
    """The second phase for rows that have finished; rows that need the same tokens appended go together."""
    kinds: dict[tuple[Endings, tuple[int, ...]], list[int]] = {}
    for i, row in enumerate(batch.rows):
        kinds.setdefault((row.endings, row.tail), []).append(i)
    for (endings, tail), members in kinds.items():
        group = _packed(batch, members)
        for row, log_probs in zip(group.rows, _label_log_probs(model, group, endings, tail), strict=True):
            kept = (*row.generated[: row.num_kept], *tail)
            completion = Completion(
                text=tokens.decode(kept),
                finish_reason=row.finish or "stop",
                label_probs=tuple(math.exp(p) for p in log_probs),
                token_ids=kept,
                logprobs=None if tail else tuple(row.logprobs[: row.num_kept]),
                num_prompt_tokens=len(row.prompt),
                num_completion_tokens=row.num_written,
            )
            yield row.index, completion


def _packed(batch: Batch, members: Sequence[int]) -> Batch:
    """These rows with prompt and explanation only, moved to the right end of a cache of their own.

    A masked token between explanation and label would do no harm to full attention, but it would take a place in a
    sliding window.
    """
    rows = [batch.rows[i] for i in members]
    num_prompt = batch.mask.shape[1] - len(rows[0].generated)  # all rows have taken the same number of steps
    lengths = torch.tensor([len(row.prompt) + row.num_kept for row in rows])
    ends = torch.tensor([num_prompt + row.num_kept for row in rows])
    places = torch.arange(int(lengths.max())) - int(lengths.max())
    mask = (places >= -lengths[:, None]).long().to(batch.mask.device)
    sources = (places + ends[:, None]).clamp(min=0).to(batch.mask.device)
    chosen = torch.tensor(members, device=batch.mask.device)[:, None]
    cache = DynamicCache()
    for layer, source in enumerate(batch.cache.layers):
        held = cast(DynamicLayer, source)
        keys, values = cast(Tensor, held.keys), cast(Tensor, held.values)
        cache.update(keys[chosen, :, sources].transpose(1, 2), values[chosen, :, sources].transpose(1, 2), layer)
    return Batch(rows, cache, mask, batch.logits[:0])


def _label_log_probs(
    model: PreTrainedModel, batch: Batch, endings: Endings, tail: tuple[int, ...]
) -> list[list[float]]:
    """Natural-log probability of every label for every row, from the rows' cache."""
    after: list[dict[tuple[int, ...], dict[int, float]]] = [{} for _ in batch.rows]
    mask = _visit(model, batch.cache, batch.mask, (*tail, *endings.prompt), (), endings.labels, after)
    for path in prefixes_to_visit(endings.labels):
        _visit(model, batch.cache, mask, path, path, endings.labels, after)
        batch.cache.crop(-len(path))
    return [label_log_probs(endings.labels, nodes) for nodes in after]


def _visit(
    model: PreTrainedModel,
    cache: DynamicCache,
    mask: Tensor,
    tokens: tuple[int, ...],
    path: tuple[int, ...],
    labels: tuple[tuple[int, ...], ...],
    after: list[dict[tuple[int, ...], dict[int, float]]],
) -> Tensor:
    """Append `tokens` to every row and note, in `after`, what may follow each node of `path`.

    Returns the mask with the new tokens in it.
    """
    ids = torch.tensor([tokens] * mask.shape[0], device=mask.device)
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    nodes = [path[:end] for end in range(1, len(path) + 1)] or [()]
    log_probs = torch.log_softmax(_precise(_forward(model, ids, mask, cache, keep=len(nodes))), dim=-1)
    for depth, node in enumerate(nodes):
        children = sorted(
            {label[len(node)] for label in labels if label[: len(node)] == node and len(label) > len(node)}
        )
        values = log_probs[:, depth, children].tolist()
        for row_values, row_after in zip(values, after, strict=True):
            row_after[node] = dict(zip(children, row_values, strict=True))
    return mask


def _precise(logits: Tensor) -> Tensor:
    """In float64, so that label probabilities do not depend on their company; Apple's MPS has float32 only."""
    return logits if logits.device.type == "mps" else logits.double()
