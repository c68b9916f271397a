"""The optimizers of a training run.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of every weight matrix
inside the blocks; embeddings and vectors stay with AdamW. Updates are scaled to the size of AdamW's (Liu et al. 2025,
arXiv 2502.16982, section 2.2), so that both follow one learning rate.
"""

from __future__ import annotations

from torch.nn import Embedding
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from whyrank.training.config import DistillConfig
from whyrank.training.lora import trainable_parameters

__all__ = ["optimizers_of"]

BETAS = (0.9, 0.98)
SCALED = "match_rms_adamw"


def optimizers_of(model: PreTrainedModel, config: DistillConfig) -> tuple[Optimizer, ...]:
    """One optimizer, or two that share the parameters among them; their learning rate is set at every step.

    Args:
        model: each of its trainable parameters goes to exactly one optimizer.
        config: which ones, and the weight decay.
    """
    trained = [parameter for _, parameter in trainable_parameters(model)]
    if config.optimizer == "adamw":
        return (AdamW(trained, lr=0.0, betas=BETAS, weight_decay=config.weight_decay),)
    # Tables of tokens and of positions; the output matrix is one, too, whether or not it is tied to the input's.
    tables = [module for module in model.modules() if isinstance(module, Embedding)]
    embeddings = {id(module.weight) for module in (*tables, model.get_output_embeddings()) if module}
    is_matrix = {p: p.ndim == 2 and id(p) not in embeddings for p in trained}
    return (
        Muon([p for p, yes in is_matrix.items() if yes], lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn=SCALED),
        AdamW([p for p, yes in is_matrix.items() if not yes], lr=0.0, betas=BETAS, weight_decay=config.weight_decay),
    )
