"""The layers that differ from GPT-2's: RMSNorm and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normalise(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` at root mean square 1 in ``dtype``, and its scale ``[..., 1]`` in float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square()
    scale = torch.rsqrt(square / x.shape[-1] + eps)
    return (x * scale).to(dtype), scale


class _RMSNorm(torch.autograd.Function):
    """The norm in the requested type, with a backward pass that reads memory few times.

    ``F.rms_norm`` would return a float32 residual stream in float32, for autocast to cast once for each matrix that
    reads it, and its backward pass takes up to four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normalised, scale = _normalise(x, eps, dtype)
        ctx.save_for_backward(normalised, weight, scale)
        ctx.input_dtype = x.dtype
        return normalised * weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normalised, weight, scale = ctx.saved_tensors
        gain = weight.to(gradient.dtype)
        product = gradient * normalised
        # Summed in float32 at least: a product with one column is a slow kernel and rounds to the gradient's type.
        along = (product * gain).sum(-1, keepdim=True, dtype=scale.dtype) / gain.shape[0]
        grad_x = (gradient * gain - normalised * along) * scale
        return grad_x.to(ctx.input_dtype), product.flatten(0, -2).sum(0, dtype=weight.dtype), None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which ``x`` is multiplied with a matrix: autocast's where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned gain (Zhang & Sennrich, arXiv 1910.07467).

    Shapes: ``[..., dim]`` to ``[..., dim]``, in ``dtype``, or in the type that ``product_dtype`` gives.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or product_dtype(x)
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps, dtype)
        return _normalise(x, self.eps, dtype)[0] * self.weight.to(dtype)  # the same bits, without the call's cost


def swiglu_width(ff_dim: int) -> int:
    """SwiGLU's inner width with the parameters of a classic feed-forward layer of width ``ff_dim``.

    Three matrices instead of two, so two thirds of the width (Shazeer, arXiv 2002.05202), rounded up to a multiple of
    64 for the matrix kernels.
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
