"""Distillation loss: cross-entropy with the text and with a teacher's next-token distribution (arXiv 1503.02531).

Like ``cross_entropy``, it processes blocks of tokens and computes each block's gradients while its logits are in
memory, so a batch's logits are never materialized. Student and teacher may have a pointer, whose probabilities are part
of the prediction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_core.training.cross_entropy import ALIGNMENT, LEAST_ROWS, compiled_block, even_rows, rows_at_a_time

_TENSORS = 4  # of the size of a block's logits, in memory at the same time


class Prediction(NamedTuple):
    """The tensors that a model's next-token distribution is computed from.

    Attributes:
        hidden: ``[batch, seq, dim]``, the last hidden states.
        weight: ``[vocab, dim]``, the output embedding.
        pointing: for a model with a pointer, the log probability of its vocabulary ``[batch, seq]``, that of each
            context token ``[batch, seq, keys]``, and the ids of these tokens ``[batch, keys]``.
    """

    hidden: Tensor
    weight: Tensor
    pointing: tuple[Tensor, Tensor, Tensor] | None = None


def distillation_loss(
    student: Prediction,
    teacher: Prediction,
    targets: Tensor,
    teacher_share: float,
    token_weights: Tensor | None = None,
    kernel: str = "blocks",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of ``(1 − teacher_share) · weight · nll + teacher_share · cross-entropy with the teacher``, in nats.

    Args:
        student: differentiable in its hidden states, output embedding and pointer.
        teacher: gets no gradient; may have a different width.
        targets: ``[batch, seq]`` token ids.
        token_weights: ``[batch, seq]``, mean 1 over the training text; None means 1 everywhere.
        kernel: "blocks" or "compiled", as in ``linear_cross_entropy``.
    Returns:
        The loss, each token's negative log-likelihood ``[batch, seq]``, and the mean cross-entropy with the teacher.
        Only the loss is differentiable; all are at least float32.
    """
    device = student.hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student, teacher = (model._replace(hidden=model.hidden.to(dtype)) for model in (student, teacher))
    if token_weights is None:
        token_weights = torch.ones_like(targets, dtype=torch.float32)
    pointing = student.pointing or (None, None, None)
    return _DistillationLoss.apply(*student[:2], *pointing, teacher, targets, token_weights, teacher_share, kernel)


class _DistillationLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        log_share: Tensor | None,
        log_tokens: Tensor | None,
        ids: Tensor | None,
        teacher: Prediction,
        targets: Tensor,
        token_weights: Tensor,
        teacher_share: float,
        kernel: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pointing = None if log_share is None or log_tokens is None or ids is None else (log_share, log_tokens, ids)
        student, taught = _Rows(Prediction(hidden, weight, pointing)), _Rows(teacher)
        count, vocab = targets.numel(), weight.shape[0]
        rows = max(LEAST_ROWS, rows_at_a_time(vocab, weight.shape[1], hidden.device.type) // _TENSORS)
        score = _score_block
        if kernel == "compiled":
            rows, score = even_rows(count, rows), compiled_block(_score_block)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        flat_targets, text_weights = targets.reshape(-1), (1 - teacher_share) * token_weights.reshape(-1).to(exact)
        nll, soft = (torch.empty(count, dtype=exact, device=hidden.device) for _ in range(2))
        grad_hidden, grad_weight = torch.empty_like(student.hidden), weight.new_zeros(student.matrix.shape)
        grad_pointing = [torch.empty_like(tensor) for tensor in student.pointing[:2]] if student.pointing else []
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            nll[part], soft[part], grad_logits, pointer = score(
                student[part], taught[part], flat_targets[part], text_weights[part], teacher_share, vocab
            )
            torch.mm(grad_logits, student.matrix, out=grad_hidden[part])
            grad_weight += grad_logits.t() @ student.hidden[part]
            for gradient, value in zip(grad_pointing, pointer or (), strict=True):
                gradient[part] = value
        ctx.save_for_backward(grad_hidden.view_as(hidden), grad_weight[:vocab], *grad_pointing)
        ctx.targets_shape = targets.shape
        loss, nll, soft = (text_weights * nll + teacher_share * soft).mean(), nll.view(targets.shape), soft.mean()
        ctx.mark_non_differentiable(nll, soft)
        return loss, nll, soft

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        scale, shape = grad_loss / ctx.targets_shape.numel(), ctx.targets_shape
        hidden, weight, *pointing = (gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
        pointing = [gradient.view(*shape, *gradient.shape[1:]) for gradient in pointing] or [None, None]
        return hidden, weight, *pointing, *[None] * 6


class _Rows:
    """A ``Prediction`` with batch and sequence flattened; slicing it yields arguments for ``_score_block``."""

    def __init__(self, model: Prediction) -> None:
        self.sequence = model.hidden.shape[1]
        self.hidden = model.hidden.flatten(0, 1)
        padding = -model.weight.shape[0] % ALIGNMENT
        self.matrix = F.pad(model.weight.to(self.hidden.dtype), (0, 0, 0, padding))
        self.pointing = None
        if model.pointing is not None:
            log_share, log_tokens, ids = model.pointing
            self.pointing = log_share.flatten(), log_tokens.flatten(0, 1), ids

    def __getitem__(self, part: slice) -> Prediction:
        pointing = self.pointing
        if pointing is not None:
            log_share, log_tokens, ids = pointing
            sequences = torch.arange(part.start, part.stop, device=ids.device) // self.sequence
            pointing = log_share[part], log_tokens[part], ids[sequences]
        return Prediction(self.hidden[part], self.matrix, pointing)


def _distribution(model: Prediction, vocab: int) -> tuple[Tensor, Tensor]:
    """Return the vocabulary's part of the probabilities and their total, both ``[rows, padded]``, at least float32.

    Probabilities are clamped to the smallest normal number, so that logarithms and quotients stay finite.
    """
    logits = model.hidden @ model.weight.t()
    if vocab < model.weight.shape[0]:
        logits[:, vocab:] = -torch.inf
    exact = torch.promote_types(logits.dtype, torch.float32)
    own = logits.softmax(-1, dtype=exact)
    if model.pointing is None:
        own = own.clamp_(min=torch.finfo(exact).tiny)
        return own, own
    log_share, log_tokens, ids = model.pointing
    own = own.mul_(log_share.to(exact).exp()[:, None]).clamp_(min=torch.finfo(exact).tiny)
    return own, own.scatter_add(1, ids, log_tokens.to(exact).exp())


def _score_block(
    student: Prediction, teacher: Prediction, targets: Tensor, text_weights: Tensor, teacher_share: float, vocab: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Compute losses and gradients of a block of tokens; has no side effects, so that it can be compiled.

    Let T be the weighted target distribution (text and teacher), P the student's, and p the vocabulary's part of P.
    With r = p / P, the gradient of −Σ T log P is p · (Σ T r) / Σ p − T r for the logits, −Σ T r for the vocabulary's
    log probability, and −T / P times its probability for a context token's log probability.

    Args:
        student, teacher: with batch and sequence flattened: ``[rows, dim]``, ``[padded, dim]``, and for the pointer
            ``[rows]``, ``[rows, keys]`` and ``[rows, keys]``.
    Returns:
        ``nll`` and cross-entropy with the teacher, each ``[rows]``; the gradient of the logits ``[rows, padded]`` in
        the hidden states' dtype, and those of the pointer's first two tensors.
    """
    column = targets[:, None]
    wanted = _distribution(teacher, vocab)[1]
    own, probabilities = _distribution(student, vocab)
    nll = -probabilities.gather(1, column).squeeze(1).log()
    soft = -(wanted * probabilities.log()).sum(1)
    wanted = (wanted * teacher_share).scatter_add_(1, column, text_weights[:, None])
    if student.pointing is None:
        gradient = own * wanted.sum(1, keepdim=True) - wanted
        return nll, soft, gradient.to(student.hidden.dtype), None
    log_share, log_tokens, ids = student.pointing
    ratio = wanted.div_(probabilities)
    grad_tokens = -ratio.gather(1, ids) * log_tokens.exp()
    explained = ratio.mul_(own)
    total = explained.sum(1)
    gradient = own.mul_((total / log_share.exp())[:, None]).sub_(explained)
    return nll, soft, gradient.to(student.hidden.dtype), (-total, grad_tokens)
