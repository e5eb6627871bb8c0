"""Distillation loss: value and gradients against autograd in float64, in blocks, compiled, and at extreme logits."""

import pytest
import torch

import mvlm_core.training.distillation_loss as module
from mvlm_core.training.distillation_loss import Prediction, distillation_loss
from simone_transformer.rope_attention import PointerOutput

BATCH, SEQ, VOCAB, DIM = 3, 5, 70, 8  # 70 entries: padded to 128


def prediction(seed, width, pointer, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    pointer_output = None
    if pointer:  # a softmax over a sentinel and the tokens so far
        scores = draw(BATCH, SEQ, SEQ + 1).detach()
        hidden = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)
        log = scores.masked_fill(torch.nn.functional.pad(hidden, (1, 0)), torch.finfo(dtype).min).log_softmax(-1)
        ids = torch.randint(9, (BATCH, SEQ), generator=generator)  # few distinct ids: positions with the same id add up
        pointer_output = log[..., 0].requires_grad_(), log[..., 1:].requires_grad_(), ids
    return Prediction(draw(BATCH, SEQ, width), draw(VOCAB, width), pointer_output)


def log_probabilities(model):
    logits = model.hidden @ model.weight.t()
    return logits.log_softmax(-1) if model.pointer_output is None else PointerOutput(*model.pointer_output).mix(logits)


def differentiable(model):
    return [model.hidden, model.weight, *(model.pointer_output or ())[:2]]


@pytest.mark.parametrize("rows", [100, 4, 1])
@pytest.mark.parametrize("pointers", [(False, False), (True, True), (True, False), (False, True)])
def test_loss_and_gradients_match_autograd(rows, pointers, monkeypatch):
    monkeypatch.setattr(module, "MIN_ROWS", rows)
    monkeypatch.setattr(module, "rows_at_a_time", lambda *_shape: 1)
    student, teacher = prediction(0, DIM, pointers[0]), prediction(1, 2 * DIM, pointers[1])
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(9, (BATCH, SEQ), generator=generator)
    weights = torch.rand(BATCH, SEQ, generator=generator, dtype=torch.float64)
    said, wanted = log_probabilities(student), log_probabilities(teacher).detach().exp()
    text = -said.gather(-1, targets[..., None]).squeeze(-1)
    from_teacher = -(wanted * said).sum(-1)
    expected = (0.4 * weights * text + 0.6 * from_teacher).mean()

    loss, nll, soft = distillation_loss(student, teacher, targets, 0.6, weights)
    torch.testing.assert_close((loss, nll, soft), (expected, text, from_teacher.mean()), rtol=1e-12, atol=0)
    parameters = differentiable(student)
    found, by_hand = (torch.autograd.grad(3 * total, parameters) for total in (loss, expected))
    torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-15)
    assert not nll.requires_grad and not soft.requires_grad


@pytest.mark.parametrize("pointer", [False, True])
def test_compiled_kernel_matches_blocks(pointer):
    student, teacher = (prediction(seed, DIM, pointer, torch.float32) for seed in (0, 1))
    targets = torch.randint(9, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))
    results = [distillation_loss(student, teacher, targets, 0.7, kernel=kernel) for kernel in ("blocks", "compiled")]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, differentiable(student)) for loss, _, _ in results]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pointer", [False, True])
def test_loss_and_gradients_stay_finite_when_probabilities_underflow(pointer):
    """The student is sure of a wrong token; its gradient still points to the right one."""
    student, teacher = (prediction(seed, DIM, pointer, torch.float32) for seed in (0, 1))
    with torch.no_grad():
        student.weight.mul_(200)
    targets = (student.hidden @ student.weight.t()).argmin(-1)
    loss, nll, soft = distillation_loss(student, teacher, targets, 0.7)
    gradients = torch.autograd.grad(loss, differentiable(student))
    assert all(torch.isfinite(value).all() for value in (loss, nll, soft, *gradients))
    assert nll.min() > 80
    logits = student.hidden @ student.weight.t()
    towards = torch.autograd.grad(logits.gather(-1, targets[..., None]).sum(), student.hidden)[0]
    assert (gradients[0] * towards).sum() < 0, "a step against the gradient raises the targets' logits"
