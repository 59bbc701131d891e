"""Differentiable adaptive merging (DAM, Gauthier-Caron et al. 2024, section 3): layers on the
frozen weights of T experts, where each expert has a learned coefficient for each input column,

    W = sum_i W_i diag(c_i)        y = x W' = sum_i (c_i * x) W_i'

The merged weight and its gradient need not exist. With g = dL/dy and u_i = g W_i (tokens, in), the
gradients are dL/dx = sum_i c_i * u_i and dL/dc_i = sum over tokens of x * u_i: T products each way
and nothing of a weight's size. Where a batch has many tokens, it is faster to form the weight of
one layer at a time, for the length of its product alone: one product forward, two backward, and
passes over the weights. Both ways are the same sums, so they differ by rounding only.

Coefficients are float32 (or wider) whatever the dtype of the weights; sums over experts and over
tokens are at least float32. Experts get no gradient.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Materialise = Literal["auto", "always", "never"]
# Forming a weight pays from about this many outputs for each token on.
OUTPUTS_PER_TOKEN = 16


def merged_weight(weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """`sum_i c_i * W_i` over the last dimension: a linear layer's weight, an embedding, or a norm's
    vector; at least float32. Gradients reach the coefficients if this is called under autograd.

    Args:
        weights: T tensors (..., columns).
        coefficients: (T, columns), or (T, 1) for one number for each expert.
    """
    wide = _wide(weights[0].dtype)
    total = weights[0].to(wide) * coefficients[0]
    for weight, own in zip(weights[1:], coefficients[1:], strict=True):
        total = total + weight.to(wide) * own
    return total


def forms_weight(num_tokens: int, num_outputs: int, materialise: Materialise) -> bool:
    """Whether a layer forms its merged weight; `auto`: from a token for 16 outputs on."""
    if materialise == "auto":
        return OUTPUTS_PER_TOKEN * num_tokens >= num_outputs
    return materialise == "always"


def dam_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] = (),
    bias_coefficients: Tensor | None = None,
    *,
    materialise: Materialise = "auto",
) -> Tensor:
    """`sum_i W_i (c_i * x) + sum_i beta_i b_i`: (..., out) in the dtype of x.

    Args:
        x: (..., in), in the dtype of the weights.
        weights: T frozen weights (out, in).
        coefficients: (T, in).
        biases: T frozen biases (out,), or none.
        bias_coefficients: (T,), beta, where there are biases.
        materialise: whether to form the merged weight: `auto` by tokens against width.
    """
    num_outputs, num_inputs = weights[0].shape
    flat = x.reshape(-1, num_inputs)
    formed = forms_weight(len(flat), num_outputs, materialise)
    multiply = _Formed if formed else _Factored
    y: Tensor = multiply.apply(flat, coefficients, *weights)  # type: ignore[no-untyped-call]
    if bias_coefficients is not None:
        y = y + merged_weight(biases, bias_coefficients[:, None]).to(y.dtype)
    return y.view(*x.shape[:-1], num_outputs)


def dam_embedding(ids: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The rows of `sum_i E_i diag(c_i)` for some ids, without forming it: (..., hidden) in the
    embeddings' dtype.

    Args:
        ids: (...,) int64.
        weights: T frozen embeddings (vocabulary, hidden).
        coefficients: (T, hidden).
    """
    rows = [F.embedding(ids, weight) for weight in weights]
    return merged_weight(rows, coefficients).to(weights[0].dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 if the values are."""
    return torch.promote_types(dtype, torch.float32)


class _Factored(torch.autograd.Function):
    """`x, c, W_1, ..., W_T -> sum_i (c_i * x) W_i'` with x (tokens, in), by T products each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, coefficients, *weights)
        total = x.new_zeros((len(x), len(weights[0])), dtype=_wide(x.dtype))
        for weight, own in zip(weights, coefficients, strict=True):
            total += (x * own).to(x.dtype) @ weight.t()
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, *weights = ctx.saved_tensors
        wide = _wide(x.dtype)
        dx = torch.zeros_like(x, dtype=wide) if ctx.needs_input_grad[0] else None
        dc = torch.zeros_like(coefficients) if ctx.needs_input_grad[1] else None
        for place, weight in enumerate(weights):
            u = (g @ weight).to(wide)
            if dx is not None:
                dx += u * coefficients[place]
            if dc is not None:
                dc[place] = u.mul_(x).sum(0)
        return (None if dx is None else dx.to(x.dtype), dc, *(None for _ in weights))


class _Formed(torch.autograd.Function):
    """The same function by a merged weight that lives only during a product; backward forms it
    again. With G = g' x (out, in), the weight's gradient, dL/dc_i = sum over outputs of G * W_i.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, coefficients, *weights)
        return x @ merged_weight(weights, coefficients).to(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, *weights = ctx.saved_tensors
        dx = dc = None
        if ctx.needs_input_grad[0]:
            dx = g @ merged_weight(weights, coefficients).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (g.t() @ x).to(_wide(x.dtype))
            dc = torch.stack([(of_weight * weight).sum(0) for weight in weights])
            dc = dc.to(coefficients.dtype)
        return (dx, dc, *(None for _ in weights))
