"""Model 1's own training forward pass matches transformers' GPT-2."""

from types import SimpleNamespace

import pytest
import torch

import mvlm_trainer
from mvlm_core.hardware import choose_hardware


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    settings = mvlm_trainer.GPT2Settings(
        preset="smoke", hidden_dim=48, num_heads=4, ff_dim=192, num_layers=3, max_length=32, dropout=0.0, device="cpu"
    )
    tokenizer = SimpleNamespace(vocab_size=300, start_id=299)
    built = mvlm_trainer.build(settings, tokenizer, choose_hardware(device="cpu", precision="fp32"))
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return built


def test_logits_match_transformers_gpt2(built):
    ids = torch.randint(0, 300, (3, 32))
    with torch.no_grad():
        ours = mvlm_trainer.hidden_states(built.model.eval(), ids) @ built.model.lm_head.weight.T
        theirs = built.model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gradients_match_transformers_gpt2(built):
    model, ids = built.model.train(), torch.randint(0, 300, (2, 32))
    built.loss(ids[:, :-1], ids[:, 1:], torch.ones(2, 31), 0.0).total.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    model.zero_grad()


def test_dropout_is_on_in_training_only(built):
    config = built.model.config
    config.resid_pdrop = config.embd_pdrop = 0.5
    for block in built.model.transformer.h:
        block.mlp.dropout.p = 0.5
    ids = torch.randint(0, 300, (1, 32))
    with torch.no_grad():
        train = [mvlm_trainer.hidden_states(built.model.train(), ids) for _ in range(2)]
        evaluated = [mvlm_trainer.hidden_states(built.model.eval(), ids) for _ in range(2)]
    config.resid_pdrop = config.embd_pdrop = 0.0
    assert not torch.allclose(*train) and torch.equal(*evaluated)
