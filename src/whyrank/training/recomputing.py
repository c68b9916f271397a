"""Less memory for longer prompts: layers keep their input, and compute the rest again for gradients.

What a layer computes on the way has to stay until the backward pass reaches it: several times what goes in, and on CPUs
the weights of attention beside it. With `recompute_layers` only the input of every layer stays, and one layer at a time
is computed a second time (Chen et al., arXiv 1604.06174), for about a third more work. torch.utils.checkpoint does it;
transformers' own switch acts in training mode only, and refinement keeps models out of it, for the sake of dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf.attention import attention_by

__all__ = ["recompute_layers"]


def recompute_layers(model: PreTrainedModel) -> None:
    """Have a model's layers computed again for their gradients, from now on; passes without gradients stay as they are.

    Losses and gradients are the same, dropout included. Copies made of the model afterwards would run this one's
    layers: copy first.

    Raises:
        UnsupportedModel: no layer of it says that it can be computed twice.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModel(
            f"expected layers that can be computed again, found none in {model.config.model_type}; "
            "leave --recompute out"
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward, model)


def _recomputed(plain: Callable[..., Any], model: PreTrainedModel) -> Callable[..., Any]:
    """A layer's `forward`, which keeps its arguments only."""

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        usual = model.config._attn_implementation  # the backward pass comes when it may be another one

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), attention_by(model, usual)

        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward
