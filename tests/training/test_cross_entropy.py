"""The blockwise loss equals PyTorch's over full logits: value, gradients, weights, z-loss."""

import pytest
import torch
import torch.nn.functional as F

from mvlm_core.training.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_full_logits(rows, z_loss, weighted):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 8, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    targets = torch.randint(50, (3, 11), generator=generator)
    token_weights = torch.rand(3, 11, generator=generator) if weighted else None

    loss, nll = linear_cross_entropy(hidden, weight, targets, token_weights, z_loss, block_rows=rows)
    (loss * 3).backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T
    expected_nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 11)
    scale = torch.ones(3, 11) if token_weights is None else token_weights
    expected = (scale * (expected_nll + z_loss * logits.logsumexp(-1).square())).mean()
    (expected * 3).backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], weight.grad, rtol=1e-4, atol=1e-6)


def test_no_gradient_is_formed_when_none_is_wanted():
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert not loss.requires_grad


def test_a_target_that_could_not_be_less_likely_still_has_a_loss_and_a_gradient():
    hidden = torch.full((2, 4), 10.0, requires_grad=True)
    weight = torch.stack([torch.full((4,), value) for value in (30.0, 0.0, -30.0)]).requires_grad_()
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([2, 0]))
    loss.backward()
    assert nll.tolist() == [2400.0, 0.0] and float(loss.detach()) == 1200.0
    assert torch.equal(hidden.grad[0], torch.full((4,), 30.0)) and torch.equal(hidden.grad[1], torch.zeros(4))


def test_under_autocast_the_products_are_in_its_precision():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    rounded, _ = linear_cross_entropy(hidden.detach().bfloat16(), weight.detach(), targets)
    assert float(loss.detach()) == float(rounded) and hidden.grad.dtype == weight.grad.dtype == torch.float32
