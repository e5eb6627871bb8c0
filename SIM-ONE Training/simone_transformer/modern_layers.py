"""The layers that differ from GPT-2's: RMSNorm and SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned gain (Zhang & Sennrich, arXiv 1910.07467).

    Shapes: ``[..., dim]`` to ``[..., dim]``, in the input's type.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def swiglu_width(ff_dim: int) -> int:
    """SwiGLU's inner width that spends what a classic feed-forward layer of width ``ff_dim`` spends.

    Three matrices instead of two, so two thirds of the width (Shazeer, arXiv 2002.05202), rounded up to a multiple
    of 64, which matrix kernels like.
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
