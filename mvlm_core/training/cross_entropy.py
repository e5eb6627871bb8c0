"""Fused linear cross-entropy: the next-token loss from hidden states, without materializing a batch's logits.

Logits are computed in blocks by one of two kernels with the same result: "blocks" reuses its buffers and is faster on a
CPU; "compiled" lets torch.compile fuse everything after the matmul into one pass, which on a memory-bound GPU moves
less than half as many bytes (counted in tests/training/test_cross_entropy.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of logits per block: small enough for a CPU's last-level cache, or small compared with a GPU's memory.
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
MIN_ROWS = 128  # per block, or dim / 2 if larger: each block reads the output matrix and its gradient once
ALIGNMENT = 64  # pad the output matrix to a multiple of this many rows: kernels are slow at GPT-2's 50,257


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients while a block's logits are in memory, so the backward pass recomputes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        rows: int,
        kernel: str,
        log_vocab_prob: Tensor | None,
        log_other: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = targets.numel()
        vocab = weight.shape[0]
        padded = -(-vocab // ALIGNMENT) * ALIGNMENT  # in matmuls only: weights and gradients keep their shape
        matrix = weight.to(hidden.dtype)
        matrix = matrix if padded == vocab else F.pad(matrix, (0, 0, 0, padded - vocab))
        exact = torch.promote_types(hidden.dtype, torch.float32)  # sums over the vocabulary need at least float32
        token_weights = token_weights.to(exact)
        nll = torch.empty(count, dtype=exact, device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), weight.new_zeros(padded, weight.shape[1])
        score = (
            compiled_block(_score_block) if kernel == "compiled" else _BufferedBlocks(hidden, min(rows, count), padded)
        )
        rows = even_rows(count, rows) if kernel == "compiled" else rows
        responsibility = torch.ones_like(nll)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            nll[part], gradient = score(hidden[part], matrix, targets[part], vocab)
            if log_vocab_prob is not None and log_other is not None:
                own = log_vocab_prob[part] - nll[part]
                nll[part] = -torch.logaddexp(own, log_other[part])
                responsibility[part] = (own + nll[part]).exp()
            # d/dlogits of w·nll is w·(p − onehot): per-row factors are applied to the narrow matrices instead of the
            # logits.
            scale = (token_weights[part, None] / count * responsibility[part, None]).to(hidden.dtype)
            torch.mul(gradient @ matrix, scale, out=grad_hidden[part])
            scaled = hidden[part] * scale
            if scaled.dtype == grad_weight.dtype:
                torch.addmm(grad_weight, gradient.t(), scaled, out=grad_weight)
            else:
                grad_weight += gradient.t() @ scaled
        grad_vocab = grad_other = None
        if log_vocab_prob is not None:
            grad_vocab, grad_other = (
                -token_weights * responsibility / count,
                token_weights * (responsibility - 1) / count,
            )
        ctx.save_for_backward(grad_hidden, grad_weight[:vocab], grad_vocab, grad_other)
        ctx.mark_non_differentiable(nll)
        return (token_weights * nll).sum() / count, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *mixture = ctx.saved_tensors
        grads = (None if gradient is None else gradient * grad_loss for gradient in mixture)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss, *[None] * 4, *grads


class _BufferedBlocks:
    """Scores blocks with PyTorch's own kernels, reusing one pair of buffers: each new allocation of this size would
    cause page faults."""

    def __init__(self, hidden: Tensor, rows: int, padded: int) -> None:
        self.logits = hidden.new_empty(rows, padded)
        self.probabilities = torch.empty_like(self.logits, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def __call__(self, hidden: Tensor, matrix: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        """Like ``_score_block``, but the gradient is only valid until the next call."""
        target, exact = targets[:, None], self.probabilities.dtype
        logits = torch.mm(hidden, matrix.t(), out=self.logits[: len(target)])
        logits[:, vocab:] = -torch.inf
        # softmax is the fastest pass over the logits. The log-partition comes from the most likely token, whose
        # probability is at least 1 / vocab, so its logarithm is finite; that of the target's may not be.
        probabilities = torch.softmax(logits, dim=-1, dtype=exact, out=self.probabilities[: len(target)])
        log_partition = logits.amax(dim=1).to(exact) - probabilities.amax(dim=1).log()
        nll = log_partition - logits.gather(1, target).squeeze(1)
        minus_one = torch.full_like(target, -1, dtype=exact)
        return nll, probabilities.scatter_add_(1, target, minus_one).to(hidden.dtype)


def _score_block(hidden: Tensor, matrix: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient of a block of tokens; has no side effects, so that it can be compiled.

    Args:
        hidden: ``[rows, dim]``.
        matrix: ``[padded, dim]``; only the first ``vocab`` rows are tokens.
    Returns:
        Negative log-likelihood ``[rows]`` in at least float32, and the gradient of the logits ``[rows, padded]`` up to
        a per-row factor.
    """
    logits = (hidden @ matrix.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    columns = torch.arange(matrix.shape[0], device=hidden.device)
    if vocab < matrix.shape[0]:
        logits = torch.where(columns < vocab, logits, -torch.inf)
    # In this form the compiler recognizes an online softmax and computes maximum and sum in one pass.
    largest = logits.amax(dim=1, keepdim=True)
    log_partition = (logits - largest).exp().sum(dim=1, keepdim=True).log() + largest
    target = targets[:, None]
    nll = (log_partition - logits.gather(1, target)).squeeze(1)
    gradient = (logits - log_partition).exp() - (columns == target).to(logits.dtype)
    return nll, gradient.to(hidden.dtype)


@cache
def compiled_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of one block of tokens, once per process."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def even_rows(count: int, max_rows: int) -> int:
    """Rows per block so that all blocks have the same size near ``max_rows`` if possible: each size is recompiled."""
    fewest = -(-count // max_rows)
    return next((count // blocks for blocks in range(fewest, 2 * fewest) if count % blocks == 0), max_rows)


def rows_at_a_time(vocab: int, dim: int, device: str) -> int:
    """Rows of logits that ``linear_cross_entropy`` computes at a time on this device type."""
    return max(MIN_ROWS, dim // 2, _BLOCK_BYTES.get(device, 64 << 20) // (4 * vocab))


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
        hidden: ``[..., dim]``; under autocast cast to its dtype, as in any linear layer.
        weight: ``[vocab, dim]``, the output embedding.
        targets: ``[...]`` token ids.
        token_weights: ``[...]``, mean 1 over the training text; None means 1 everywhere.
        block_rows: maximum rows of logits computed at a time; by default chosen for the device.
        kernel: "blocks" or "compiled" (see the module docstring).
        mixture: if the softmax is one component of a two-component mixture: the log weight of the softmax, and the
            log of the other component's weighted target probability, both ``[...]``.
    Returns:
        The loss (nats per token, differentiable) and each token's negative log-likelihood in nats (detached, at least
        float32).
    """
    flat, device = hidden.reshape(-1, hidden.shape[-1]), hidden.device.type
    if torch.is_autocast_enabled(device):  # a final norm in float32 must not make the largest matmul float32
        flat = flat.to(torch.get_autocast_dtype(device))
    flat_targets = targets.reshape(-1)
    if token_weights is None:
        token_weights = torch.ones_like(flat_targets, dtype=torch.float32)
    rows = block_rows or rows_at_a_time(weight.shape[0], weight.shape[1], device)
    log_vocab_prob, log_other = (None, None) if mixture is None else (part.reshape(-1) for part in mixture)
    loss, nll = _LinearCrossEntropy.apply(
        flat, weight, flat_targets, token_weights.reshape(-1), rows, kernel, log_vocab_prob, log_other
    )
    return loss, nll.view(targets.shape)
