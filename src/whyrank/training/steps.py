"""One optimizer step: the loss of a batch, in as many passes as memory asks for, and what becomes of its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from whyrank.training.config import DistillConfig
from whyrank.training.dividing import clip_gradients, num_idle_passes
from whyrank.training.packing import Strand, continuation_log_probs, pack
from whyrank.training.ranks import ranks

__all__ = ["Update", "is_bfloat16", "learning_rate_at", "precision_of", "separate_log_probs", "update"]


@dataclass(frozen=True, slots=True)
class Update:
    """What a step did. `loss` is the weighted mean in nats per scored token, `grad_norm` the gradient's before it was
    scaled down, `num_tokens` what the model read."""

    loss: float
    grad_norm: float
    num_tokens: int


def update(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    strands: Sequence[Strand],
    rate: float,
    config: DistillConfig,
    *,
    pad_id: int = 0,
) -> Update:
    """One step of all optimizers, on the weighted mean of the scored tokens' negative log-likelihoods; of several
    processes each reads its share of the batch.

    Args:
        model: in training mode.
        optimizers: together they hold what is trained.
        strands: the batch; at least one token is scored.
        rate: learning rate of this step.
        config: `is_packed`, `max_pass_tokens`, `max_grad_norm` and `precision`.
        pad_id: fills rows up where the batch is not packed.
    """
    together = ranks()
    total = sum(sum(strand.weights) for strand in strands)
    loss, num_tokens = 0.0, 0
    parts = list(_passes(together.share(strands), config.max_pass_tokens))
    num_idle = num_idle_passes(model, len(parts))
    for part in parts:
        log_probs, num_read = _read(model, part, config, pad_id)
        weights = torch.tensor([w for strand in part for w in strand.weights if w], device=log_probs.device)
        share = -(weights * log_probs).sum() / total
        share.backward()
        loss += share.item()
        num_tokens += num_read
    for _ in range(num_idle):
        (0.0 * _read(model, strands[:1], config, pad_id)[0].sum()).backward()
    trained = [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    together.sum_gradients(trained)
    loss, num_read_by_all = together.sums(loss, num_tokens)
    norm = clip_gradients(trained, config.max_grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Update(loss, norm, int(num_read_by_all))


def _read(model: PreTrainedModel, part: Sequence[Strand], config: DistillConfig, pad_id: int) -> tuple[Tensor, int]:
    """Log-probabilities of the scored tokens, and how many tokens the model read for them."""
    with precision_of(config, model.device):
        if config.is_packed:
            batch = pack(part, model.device)
            return continuation_log_probs(model, batch), batch.num_tokens
        return separate_log_probs(model, part, pad_id), sum(len(strand.ids) for strand in part)


def separate_log_probs(model: PreTrainedModel, strands: Sequence[Strand], pad_id: int = 0) -> Tensor:
    """What `continuation_log_probs` gives for the packed strands, from one row for each, padded on the left.

    Padding on the left lines the answers up at the end, so that only the last positions need logits. For architectures
    that cannot be packed, and to measure what packing is worth.
    """
    longest = max(len(strand.ids) for strand in strands)
    ids = torch.full((len(strands), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(strands), longest), dtype=torch.long)
    is_scored = torch.zeros((len(strands), longest), dtype=torch.bool)
    for row, strand in enumerate(strands):
        start = longest - len(strand.ids)
        ids[row, start:] = torch.tensor(strand.ids)
        mask[row, start:] = 1
        is_scored[row, start:] = torch.tensor(strand.weights) != 0
    num_last = longest - int(is_scored.any(dim=0).nonzero()[0]) + 1
    ids, mask, is_scored = (tensor.to(model.device) for tensor in (ids, mask, is_scored))
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=num_last,
    )
    wanted = is_scored[:, longest - num_last + 1 :]
    logits = cast(Tensor, output.logits)[:, :-1][wanted].float()
    return -cross_entropy(logits, ids[:, longest - num_last + 1 :][wanted], reduction="none")


def learning_rate_at(step: int, config: DistillConfig) -> float:
    """Linear rise over the warm-up, the peak until `decay_fraction` of the steps is left, then linear decay.

    Step 0 is the first; no step has rate 0.
    """
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    num_decay = max(1, round(config.num_steps * config.decay_fraction))
    return config.learning_rate * min(1.0, (config.num_steps - step) / num_decay)


def is_bfloat16(config: DistillConfig, device: torch.device) -> bool:
    """Whether matrices are multiplied in bfloat16: as asked for, or where the hardware does."""
    is_fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return config.precision == "bfloat16" or (config.precision == "auto" and is_fast)


def precision_of(config: DistillConfig, device: torch.device) -> torch.autocast | nullcontext[None]:
    """The context in which a model is run during training."""
    return torch.autocast(device.type, torch.bfloat16) if is_bfloat16(config, device) else nullcontext()


def _passes(strands: Sequence[Strand], max_tokens: int) -> Iterator[Sequence[Strand]]:
    """Consecutive strands of at most so many tokens together; one that is longer goes by itself."""
    if sum(len(strand.ids) for strand in strands) > max_tokens:
        strands = sorted(strands, key=lambda strand: strand.ids)  # what shares a beginning stays together
    part: list[Strand] = []
    for strand in strands:
        if part and sum(len(other.ids) for other in part) + len(strand.ids) > max_tokens:
            yield part
            part = []
        part.append(strand)
    if part:
        yield part
