# Copyright (c) 2026 The SIM-ONE Training authors. SPDX-License-Identifier: MIT
"""The layers that replace GPT-2's: RMSNorm and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normalize(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``x`` scaled to RMS 1 in ``dtype``, and the scale ``[..., 1]`` in float32 or wider."""
    accumulate_dtype = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype).square()
    scale = torch.rsqrt(square / x.shape[-1] + eps)
    return (x * scale).to(dtype), scale


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in the requested dtype, with a backward pass that makes few passes over memory.

    ``F.rms_norm`` returns float32 for a float32 residual stream, which autocast then casts once per matrix product, and
    its backward pass takes up to four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normalized, scale = _normalize(x, eps, dtype)
        ctx.save_for_backward(normalized, weight, scale)
        ctx.input_dtype = x.dtype
        return normalized * weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normalized, weight, scale = ctx.saved_tensors
        gain = weight.to(gradient.dtype)
        product = gradient * normalized
        # Sum in float32 or wider: a matrix-vector product would be slow and would round to the gradient's dtype.
        along = (product * gain).sum(-1, keepdim=True, dtype=scale.dtype) / gain.shape[0]
        grad_x = (gradient * gain - normalized * along) * scale
        return grad_x.to(ctx.input_dtype), product.flatten(0, -2).sum(0, dtype=weight.dtype), None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix products with ``x``: autocast's if enabled, otherwise that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """Root mean square normalization with a learned gain (Zhang & Sennrich, arXiv 1910.07467).

    Shapes: ``[..., dim]`` to ``[..., dim]``, in ``dtype`` (default: ``product_dtype(x)``).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or product_dtype(x)
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps, dtype)
        return _normalize(x, self.eps, dtype)[0] * self.weight.to(dtype)  # bit-identical, without autograd overhead


def swiglu_width(ff_dim: int) -> int:
    """Return the SwiGLU width that matches the parameter count of a two-matrix feed-forward layer of width ``ff_dim``.

    SwiGLU has three matrices, so two thirds of the width (Shazeer, arXiv 2002.05202), rounded up to a multiple of 64
    for the matrix kernels.
    """
    return -(-2 * ff_dim // (3 * 64)) * 64


class SwiGLU(nn.Module):
    """Gated feed-forward layer ``down(silu(gate(x)) * up(x))``, without biases (Shazeer, arXiv 2002.05202).

    Shapes: ``[..., dim]`` to ``[..., dim]``.
    """

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim, bias=False)
        self.up_proj = nn.Linear(dim, inner_dim, bias=False)
        self.down_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
