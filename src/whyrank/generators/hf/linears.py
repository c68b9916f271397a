"""Linear layers whose weights are laid out for the CPU once, when a model is loaded.

torch multiplies by weights as they come from the checkpoint, and rearranges them in every call. For the few rows of a
decoding step that costs about half as much as the product itself. oneDNN can keep its own arrangement instead, apply
the activation of a gated MLP while the product is still in the processor's registers, and multiply 8-bit integers.

Only products are narrow, and keys and values are kept in bfloat16 with them; prompts' attention is multiplied so, too,
where that is faster (`attention_loops.py`), everything else is float32. 8-bit weights have one scale per output, 8-bit
rows one scale each, found when they come (Dettmers et al. 2022, arXiv 2208.07339, without its outlier columns); their
products are summed as 32-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whyrank.errors import UnsupportedModel
from whyrank.generators.hf.kernels import LARGEST, ZERO, Activation, gated_rows, quantize_rows
from whyrank.generators.hf.norms import compile_norms

__all__ = ["GatedMlp", "Int8Linear", "PackedLinear", "is_available", "is_narrow", "pack"]

ROWS_EXPECTED = 32  # what the arrangement is chosen for; other numbers of rows are right, too
ROWS_AT_ONCE = 256  # of an MLP with 8-bit weights
NUM_PROBED = 4  # rows that a replaced MLP is tried with


class _Laid(torch.nn.Module):
    """A linear layer in an arrangement of its own, which no checkpoint could hold."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.is_narrow = linear.weight.dtype == torch.bfloat16 or isinstance(self, Int8Linear)

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise UnsupportedModel("a model whose weights are laid out for ranking cannot be saved; copy its checkpoint")


class PackedLinear(_Laid):
    """`torch.nn.Linear` in oneDNN's arrangement: products in float32 or bfloat16, results in float32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_EXPECTED)

    def forward(self, rows: Tensor) -> Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return self._with("none", rows.to(self._weight.dtype)).float()

    def gated(self, activation: Activation, up: PackedLinear, down: PackedLinear, rows: Tensor) -> Tensor:
        """`down(activation(self(rows)) * up(rows))`; between the products their precision is kept."""
        rows = rows.to(self._weight.dtype)
        gate = self._with(activation, rows)
        product = torch.ops.mkldnn._linear_pointwise.binary(rows, gate, up._weight, up._bias, "mul")
        return down.forward(cast(Tensor, product))

    def _with(self, activation: Activation | Literal["none"], rows: Tensor) -> Tensor:
        variant = "tanh" if activation == "gelu" else ""
        found = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, activation, [], variant)
        return cast(Tensor, found)


class Int8Linear(_Laid):
    """`torch.nn.Linear` with 8-bit weights, for float32 rows."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        self._scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        small = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(small, [ROWS_EXPECTED, self.in_features])
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def forward(self, rows: Tensor) -> Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return self._scaled(*quantize_rows(rows))

    def gated(self, activation: Activation, up: Int8Linear, down: Int8Linear, rows: Tensor) -> Tensor:
        """`down(activation(self(rows)) * up(rows))`, for some rows at a time, so that products stay in the caches."""
        found = rows.new_empty((*rows.shape[:-1], down.out_features), dtype=torch.float32)
        for some, place in zip(rows.split(ROWS_AT_ONCE, dim=-2), found.split(ROWS_AT_ONCE, dim=-2), strict=True):
            down._scaled(*self._gated(activation, up, some), out=place)
        return found

    def _gated(self, activation: Activation, up: Int8Linear, rows: Tensor) -> tuple[Tensor, Tensor]:
        small, scales = quantize_rows(rows)
        if self._bias is None and up._bias is None:
            return gated_rows(activation, self._times(small), up._times(small), scales)
        ones = torch.ones_like(scales)
        return gated_rows(activation, self._scaled(small, scales), up._scaled(small, scales), ones)

    def _times(self, small: Tensor) -> Tensor:
        """The product with 8-bit rows, which still has to be multiplied by their scales."""
        flat: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(small.flatten(0, -2), 1.0, ZERO, self._weight, self._scales, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return flat.view(*small.shape[:-1], -1)

    def _scaled(self, small: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
        found = self._times(small)
        found = torch.mul(found, scales, out=found if out is None else out)
        return found if self._bias is None else found.add_(self._bias)


class GatedMlp(torch.nn.Module):
    """`down(activation(gate(rows)) * up(rows))`, the MLP of Llama and most of its successors."""

    gate_proj: PackedLinear
    up_proj: PackedLinear
    down_proj: PackedLinear

    def __init__(self, mlp: torch.nn.Module, activation: Activation) -> None:
        super().__init__()
        self._activation = activation
        for name in ("gate_proj", "up_proj", "down_proj"):  # of one kind, packed or 8-bit
            self.add_module(name, mlp.get_submodule(name))

    def forward(self, rows: Tensor) -> Tensor:
        """`(…, hidden size)` to the same shape."""
        return self.gate_proj.gated(self._activation, self.up_proj, self.down_proj, rows)


def is_available(*, int8: bool) -> bool:
    """Whether this build of torch has the products for this machine, and they are right.

    Processors without instructions of their own for 8-bit products add pairs of them in 16 bits, where large values
    overflow unnoticed. So the largest there are are multiplied.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return not int8 or _has_exact_int8()


@cache
def _has_exact_int8() -> bool:
    linear = torch.nn.Linear(64, 32, bias=False)
    torch.nn.init.ones_(linear.weight)
    with torch.inference_mode():
        try:
            found = Int8Linear(linear)(torch.ones(2, 64))
        except (NotImplementedError, RuntimeError):
            return False
    return bool(torch.allclose(found, torch.full((2, 32), 64.0)))


def is_narrow(model: PreTrainedModel) -> bool:
    """Whether a model's products have been made narrower than float32, here and on a CPU."""
    return any(isinstance(module, _Laid) and module.is_narrow for module in model.modules())


def pack(model: PreTrainedModel, *, int8: bool = False) -> int:
    """Replace a model's linear layers in place, and free their weights; returns how many were replaced.

    An output matrix that is also the embedding is copied. Norms are compiled, and an MLP is fused, where the same rows
    give the same results.
    Models on other devices or in float16 are left alone (float16 weights can become 8-bit ones).
    """
    packable = (torch.float32, torch.bfloat16, *([torch.float16] if int8 else []))
    if model.device.type != "cpu" or model.dtype not in packable or not is_available(int8=int8):
        return 0
    chosen = list(_linears(model))
    for parent, name, linear in chosen:
        setattr(parent, name, Int8Linear(linear) if int8 else PackedLinear(linear))
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, rows: rows.float())
    for parameter in model.parameters():
        if parameter is not embedding.weight:
            parameter.data = parameter.data.float()
    compile_norms(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(parent, name, fused)
    return len(chosen)


def _linears(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                yield parent, name, child


def _fused(mlp: torch.nn.Module) -> GatedMlp | None:
    """The same MLP with its activation inside the products, if it is one of those that can be."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up = parts[:2]
    if not all(isinstance(part, _Laid) for part in parts) or type(gate) is not type(up):
        return None
    assert isinstance(gate, _Laid)
    rows = torch.linspace(-2, 2, NUM_PROBED * gate.in_features).view(NUM_PROBED, -1)
    tolerance = 0.02 if gate.is_narrow else 1e-5
    with torch.inference_mode():
        wanted = mlp(rows)
        for activation in get_args(Activation):
            fused = GatedMlp(mlp, activation)
            if (fused(rows) - wanted).abs().max() <= wanted.abs().max() * tolerance:
                return fused
    return None
