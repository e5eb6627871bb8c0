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

from mvlm_core.training.cross_entropy import ALIGNMENT, MIN_ROWS, compiled_block, even_rows, rows_at_a_time

_TENSORS = 4  # of the size of a block's logits, in memory at the same time


class Prediction(NamedTuple):
    """The tensors that a model's next-token distribution is computed from.

    Attributes:
        hidden: ``[batch, seq, dim]``, the last hidden states.
        weight: ``[vocab, dim]``, the output embedding.
        pointer_output: for a model with a pointer, the log probability of its vocabulary ``[batch, seq]``, that of each
            context token ``[batch, seq, keys]``, and the ids of these tokens ``[batch, keys]``.
    """

    hidden: Tensor
    weight: Tensor
    pointer_output: tuple[Tensor, Tensor, Tensor] | None = None


def distillation_loss(
    student: Prediction,
    teacher: Prediction,
    targets: Tensor,
    distillation_weight: float,
    token_weights: Tensor | None = None,
    kernel: str = "blocks",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of ``(1 − w) · token weight · nll + w · cross-entropy with the teacher`` in nats.

    Args:
        student: differentiable in its hidden states, output embedding and pointer.
        teacher: gets no gradient; may have a different width.
        targets: ``[batch, seq]`` token ids.
        distillation_weight: ``w`` above.
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
    pointer_output = student.pointer_output or (None, None, None)
    return _DistillationLoss.apply(
        *student[:2], *pointer_output, teacher, targets, token_weights, distillation_weight, kernel
    )


class _DistillationLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        log_vocab_prob: Tensor | None,
        log_token_probs: Tensor | None,
        ids: Tensor | None,
        teacher: Prediction,
        targets: Tensor,
        token_weights: Tensor,
        distillation_weight: float,
        kernel: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pointer_output = None
        if log_vocab_prob is not None and log_token_probs is not None and ids is not None:
            pointer_output = log_vocab_prob, log_token_probs, ids
        student, teacher_prediction = _Rows(Prediction(hidden, weight, pointer_output)), _Rows(teacher)
        count, vocab = targets.numel(), weight.shape[0]
        rows = max(MIN_ROWS, rows_at_a_time(vocab, weight.shape[1], hidden.device.type) // _TENSORS)
        score = _score_block
        if kernel == "compiled":
            rows, score = even_rows(count, rows), compiled_block(_score_block)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        flat_targets = targets.reshape(-1)
        text_weights = (1 - distillation_weight) * token_weights.reshape(-1).to(exact)
        nll, soft = (torch.empty(count, dtype=exact, device=hidden.device) for _ in range(2))
        grad_hidden, grad_weight = torch.empty_like(student.hidden), weight.new_zeros(student.matrix.shape)
        grad_pointer = (
            [torch.empty_like(tensor) for tensor in student.pointer_output[:2]] if student.pointer_output else []
        )
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            nll[part], soft[part], grad_logits, pointer = score(
                student[part],
                teacher_prediction[part],
                flat_targets[part],
                text_weights[part],
                distillation_weight,
                vocab,
            )
            torch.mm(grad_logits, student.matrix, out=grad_hidden[part])
            grad_weight += grad_logits.t() @ student.hidden[part]
            for gradient, value in zip(grad_pointer, pointer or (), strict=True):
                gradient[part] = value
        ctx.save_for_backward(grad_hidden.view_as(hidden), grad_weight[:vocab], *grad_pointer)
        ctx.targets_shape = targets.shape
        loss = (text_weights * nll + distillation_weight * soft).mean()
        nll = nll.view(targets.shape)
        soft = soft.mean()
        ctx.mark_non_differentiable(nll, soft)
        return loss, nll, soft

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        scale, shape = grad_loss / ctx.targets_shape.numel(), ctx.targets_shape
        hidden, weight, *pointer = (gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
        pointer = [gradient.view(*shape, *gradient.shape[1:]) for gradient in pointer] or [None, None]
        return hidden, weight, *pointer, *[None] * 6


class _Rows:
    """A ``Prediction`` with batch and sequence flattened; slicing it yields arguments for ``_score_block``."""

    def __init__(self, model: Prediction) -> None:
        self.sequence = model.hidden.shape[1]
        self.hidden = model.hidden.flatten(0, 1)
        padding = -model.weight.shape[0] % ALIGNMENT
        self.matrix = F.pad(model.weight.to(self.hidden.dtype), (0, 0, 0, padding))
        self.pointer_output = None
        if model.pointer_output is not None:
            log_vocab_prob, log_token_probs, ids = model.pointer_output
            self.pointer_output = log_vocab_prob.flatten(), log_token_probs.flatten(0, 1), ids

    def __getitem__(self, part: slice) -> Prediction:
        pointer_output = self.pointer_output
        if pointer_output is not None:
            log_vocab_prob, log_token_probs, ids = pointer_output
            sequences = torch.arange(part.start, part.stop, device=ids.device) // self.sequence
            pointer_output = log_vocab_prob[part], log_token_probs[part], ids[sequences]
        return Prediction(self.hidden[part], self.matrix, pointer_output)


def _distribution(model: Prediction, vocab: int) -> tuple[Tensor, Tensor]:
    """Return the vocabulary's part of the probabilities and their total, both ``[rows, padded]``, at least float32.

    Probabilities are clamped to the smallest normal number, so that logarithms and quotients stay finite.
    """
    logits = model.hidden @ model.weight.t()
    if vocab < model.weight.shape[0]:
        logits[:, vocab:] = -torch.inf
    exact = torch.promote_types(logits.dtype, torch.float32)
    vocab_probs = logits.softmax(-1, dtype=exact)
    if model.pointer_output is None:
        vocab_probs = vocab_probs.clamp_(min=torch.finfo(exact).tiny)
        return vocab_probs, vocab_probs
    log_vocab_prob, log_token_probs, ids = model.pointer_output
    vocab_probs = vocab_probs.mul_(log_vocab_prob.to(exact).exp()[:, None]).clamp_(min=torch.finfo(exact).tiny)
    return vocab_probs, vocab_probs.scatter_add(1, ids, log_token_probs.to(exact).exp())


def _score_block(
    student: Prediction,
    teacher: Prediction,
    targets: Tensor,
    text_weights: Tensor,
    distillation_weight: float,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Compute losses and gradients of a block of tokens; has no side effects, so that it can be compiled.

    Let T be the weighted target distribution (text and teacher), P the student's, and p the vocabulary's part of P.
    With r = p / P, the gradient of −Σ T log P is p · (Σ T r) / Σ p − T r for the logits, −Σ T r for the vocabulary's
    log probability, and −T / P times its probability for a context token's log probability. In the code, T, P and p are
    ``target_probs``, ``student_probs`` and ``vocab_probs``, and T r is ``vocab_targets``.

    Args:
        student, teacher: with batch and sequence flattened: ``[rows, dim]``, ``[padded, dim]``, and for the pointer
            ``[rows]``, ``[rows, keys]`` and ``[rows, keys]``.
    Returns:
        ``nll`` and cross-entropy with the teacher, each ``[rows]``; the gradient of the logits ``[rows, padded]`` in
        the hidden states' dtype, and those of the pointer's first two tensors.
    """
    column = targets[:, None]
    target_probs = _distribution(teacher, vocab)[1]
    vocab_probs, student_probs = _distribution(student, vocab)
    nll = -student_probs.gather(1, column).squeeze(1).log()
    soft = -(target_probs * student_probs.log()).sum(1)
    target_probs = (target_probs * distillation_weight).scatter_add_(1, column, text_weights[:, None])
    if student.pointer_output is None:
        gradient = vocab_probs * target_probs.sum(1, keepdim=True) - target_probs
        return nll, soft, gradient.to(student.hidden.dtype), None
    log_vocab_prob, log_token_probs, ids = student.pointer_output
    ratio = target_probs.div_(student_probs)
    grad_tokens = -ratio.gather(1, ids) * log_token_probs.exp()
    vocab_targets = ratio.mul_(vocab_probs)
    total = vocab_targets.sum(1)
    gradient = vocab_probs.mul_((total / log_vocab_prob.exp())[:, None]).sub_(vocab_targets)
    return nll, soft, gradient.to(student.hidden.dtype), (-total, grad_tokens)
