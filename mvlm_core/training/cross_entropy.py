"""Next-token loss straight from hidden states: the logits of a whole batch never exist at once.

They are formed block by block, each by one of two kernels of the same numbers: "blocks" reuses its buffers and is the
faster one on a CPU; "compiled" lets torch.compile make one pass of what follows the product, which on a GPU, where
memory is the limit, moves less than half of the bytes (counted in tests/training/test_cross_entropy.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A block of logits that fits a CPU's last-level cache, or that is small next to a GPU's memory.
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
_LEAST_ROWS = 128  # of a block, or half the width: the output matrix and its gradient are read once per block
_ALIGNMENT = 64  # pad the output matrix to a multiple of so many rows: kernels are slow at GPT-2's 50,257


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are computed while a block's logits exist, so the backward pass recomputes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        rows: int,
        kernel: str,
        log_share: Tensor | None,
        log_other: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = targets.numel()
        vocab = weight.shape[0]
        padded = -(-vocab // _ALIGNMENT) * _ALIGNMENT  # in the products only: weights and gradients keep their rows
        matrix = weight.to(hidden.dtype)
        matrix = matrix if padded == vocab else F.pad(matrix, (0, 0, 0, padded - vocab))
        exact = torch.promote_types(hidden.dtype, torch.float32)  # sums over the vocabulary need float32 at least
        token_weights = token_weights.to(exact)
        nll = torch.empty(count, dtype=exact, device=hidden.device)
        wanted = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = weight.new_zeros(padded, weight.shape[1]) if wanted else None
        score = _compiled_block() if kernel == "compiled" else _BufferedBlocks(hidden, min(rows, count), padded)
        rows = _even_rows(count, rows) if kernel == "compiled" else rows
        responsibility = torch.ones_like(nll)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            nll[part], gradient = score(hidden[part], matrix, targets[part], vocab, wanted)
            if log_share is not None and log_other is not None:
                own = log_share[part] - nll[part]
                nll[part] = -torch.logaddexp(own, log_other[part])
                responsibility[part] = (own + nll[part]).exp()
            if gradient is None or grad_hidden is None or grad_weight is None:
                continue
            # d/dlogits of w·nll is w·(p − onehot): factors that are constant along a row are applied to the narrow
            # matrices, not to the logits.
            scale = (token_weights[part, None] / count * responsibility[part, None]).to(hidden.dtype)
            torch.mul(gradient @ matrix, scale, out=grad_hidden[part])
            scaled = hidden[part] * scale
            if scaled.dtype == grad_weight.dtype:
                torch.addmm(grad_weight, gradient.t(), scaled, out=grad_weight)
            else:
                grad_weight += gradient.t() @ scaled
        grad_share = grad_other = None
        if log_share is not None:
            grad_share, grad_other = (
                -token_weights * responsibility / count,
                token_weights * (responsibility - 1) / count,
            )
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight[:vocab], grad_share, grad_other)
        ctx.mark_non_differentiable(nll)
        return (token_weights * nll).sum() / count, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *mixture = ctx.saved_tensors
        grads = (None if gradient is None else gradient * grad_loss for gradient in mixture)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss, *[None] * 4, *grads


class _BufferedBlocks:
    """Scores blocks with PyTorch's own kernels, in one pair of buffers for all of them: newly allocated memory of this
    size is page-faulted in every time."""

    def __init__(self, hidden: Tensor, rows: int, padded: int) -> None:
        self.logits = hidden.new_empty(rows, padded)
        self.probabilities = torch.empty_like(self.logits, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def __call__(
        self, hidden: Tensor, matrix: Tensor, targets: Tensor, vocab: int, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As ``_score_block``; the gradient is valid until the next block."""
        target, exact = targets[:, None], self.probabilities.dtype
        logits = torch.mm(hidden, matrix.t(), out=self.logits[: len(target)])
        logits[:, vocab:] = -torch.inf
        # softmax is the fastest pass over the logits; the likeliest token's probability is at least 1 / vocab, so its
        # logarithm is always finite, which the target's may not be.
        probabilities = torch.softmax(logits, dim=-1, dtype=exact, out=self.probabilities[: len(target)])
        log_partition = logits.amax(dim=1).to(exact) - probabilities.amax(dim=1).log()
        nll = log_partition - logits.gather(1, target).squeeze(1)
        if not wanted:
            return nll, None
        minus_one = torch.full_like(target, -1, dtype=exact)
        return nll, probabilities.scatter_add_(1, target, minus_one).to(hidden.dtype)


def _score_block(
    hidden: Tensor, matrix: Tensor, targets: Tensor, vocab: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses and gradient of a block of tokens, without side effects, to be compiled.

    Args:
        hidden: ``[rows, dim]``.
        matrix: ``[padded, dim]``, of whose rows the first ``vocab`` are tokens.
        wanted: whether the gradient is.
    Returns:
        Negative log-likelihood ``[rows]``, in float32 at least, and the gradient for the logits ``[rows, padded]``, but
        for a factor to each row.
    """
    logits = (hidden @ matrix.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    columns = torch.arange(matrix.shape[0], device=hidden.device)
    if vocab < matrix.shape[0]:
        logits = torch.where(columns < vocab, logits, -torch.inf)
    # In this form the compiler knows the maximum and the sum as a softmax's and finds both in one pass.
    largest = logits.amax(dim=1, keepdim=True)
    log_partition = (logits - largest).exp().sum(dim=1, keepdim=True).log() + largest
    target = targets[:, None]
    nll = (log_partition - logits.gather(1, target)).squeeze(1)
    if not wanted:
        return nll, None
    gradient = (logits - log_partition).exp() - (columns == target).to(logits.dtype)
    return nll, gradient.to(hidden.dtype)


@cache
def _compiled_block() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_score_block, fullgraph=True, dynamic=False)


def _even_rows(count: int, most: int) -> int:
    """Rows of blocks of one size, where there is one near ``most``: each further size would be compiled anew."""
    fewest = -(-count // most)
    return next((count // blocks for blocks in range(fewest, 2 * fewest) if count % blocks == 0), most)


def rows_at_a_time(vocab: int, dim: int, device: str) -> int:
    """How many rows of logits ``linear_cross_entropy`` computes at a time on this kind of device."""
    return max(_LEAST_ROWS, dim // 2, _BLOCK_BYTES.get(device, 64 << 20) // (4 * vocab))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    block_rows: int | None = None,
    kernel: str = "blocks",
    mixture: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: ``[..., dim]``; under autocast multiplied in its precision, as in any linear layer.
        weight: ``[vocab, dim]``, the output embedding.
        targets: ``[...]`` token numbers.
        token_weights: ``[...]``, mean 1 over the training text; None means 1 everywhere.
        block_rows: rows of logits computed at a time, at most; by default chosen for the device.
        kernel: "blocks" or "compiled" (see above).
        mixture: where the softmax is one of two sources of the prediction: logs of its share, and of the probability
            that the other one gives to the target, both ``[...]``.
    Returns:
        The loss (nats per token, differentiable) and each token's negative log-likelihood in nats (detached, at least
        float32).
    """
    flat, device = hidden.reshape(-1, hidden.shape[-1]), hidden.device.type
    if torch.is_autocast_enabled(device):  # a final norm in float32 must not make the largest product float32
        flat = flat.to(torch.get_autocast_dtype(device))
    flat_targets = targets.reshape(-1)
    if token_weights is None:
        token_weights = torch.ones_like(flat_targets, dtype=torch.float32)
    rows = block_rows or rows_at_a_time(weight.shape[0], weight.shape[1], device)
    share, other = (None, None) if mixture is None else (part.reshape(-1) for part in mixture)
    loss, nll = _LinearCrossEntropy.apply(
        flat, weight, flat_targets, token_weights.reshape(-1), rows, kernel, share, other
    )
    return loss, nll.view(targets.shape)
