"""The training loss: degenerate outputs lower none of its parts."""

import pytest
import torch

from prioritary_mvlm.advanced_losses import ComprehensiveTrainingLoss
from prioritary_mvlm.advanced_tokenizer import AdvancedBPETokenizer
from simone_transformer import EnhancedSIMONEConfig, EnhancedSIMONEModel

CONTEXT, VOCABULARY = 32, 400
PARTS = {"alignment_weight": 0.5, "coherence_weight": 0.5}


@pytest.fixture(scope="module")
def sequences(real_text):
    """Real text as ``[rows, context + 1]`` token IDs of a tokenizer trained on it."""
    tokenizer = AdvancedBPETokenizer.train(real_text, VOCABULARY)
    ids = torch.tensor([number for text in real_text for number in tokenizer.encode(text)])
    return ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


def make(**weights):
    torch.manual_seed(0)
    config = EnhancedSIMONEConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    return EnhancedSIMONEModel(config), ComprehensiveTrainingLoss(64, **weights)


def parts_on(model, loss, rows):
    hidden, pointer_output = model.hidden_states(rows[:, :-1])
    weights = torch.ones(rows.shape[0], CONTEXT)
    result = loss(hidden, model.lm_head.weight, rows[:, 1:], weights, progress=0.0, pointer_output=pointer_output)
    return {name: value.item() for name, value in result.parts.items()}, result.total


def train(model, loss, rows, steps=400):
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=5e-3)
    for step in range(steps):
        batch = rows[(step * 16) % (len(rows) - 16) :][:16]
        _, total = parts_on(model, loss, batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained(sequences):
    model, loss = make(**PARTS)
    train(model, loss, sequences[:-64])
    return model, loss


@torch.no_grad()
def unigram_entropy(targets):
    counts = torch.bincount(targets.flatten(), minlength=VOCABULARY).float()
    return torch.special.entr(counts / counts.sum()).sum().item()


def test_constant_output_has_a_higher_loss_than_a_trained_model(sequences, trained):
    """The best context-free output is the token frequencies; a trained model is better in every part."""
    model, loss = trained
    rows = sequences[-64:]
    with torch.no_grad():
        honest, _ = parts_on(model, loss, rows)
        frequencies = torch.bincount(rows[:, 1:].flatten(), minlength=VOCABULARY).float() + 1e-3
        head = torch.zeros(VOCABULARY, 64)
        head[:, 0] = (frequencies / frequencies.sum()).log()
        constant = torch.zeros(len(rows), CONTEXT, 64)
        constant[..., 0] = 1
        cheat = loss(constant, head, rows[:, 1:], torch.ones(len(rows), CONTEXT), 0.0)
    entropy = unigram_entropy(rows[:, 1:])
    assert cheat.parts["accuracy_loss"] == pytest.approx(entropy, abs=0.02)
    assert set(honest) == {"accuracy_loss", "alignment_loss", "coherence_loss"}
    for name, value in honest.items():
        assert value < cheat.parts[name].item() - 0.05, name


@pytest.mark.parametrize("bias", [-30.0, 30.0], ids=["shut", "open"])
def test_saturated_gates_increase_every_part_of_the_loss(sequences, trained, bias):
    model, loss = trained
    rows = sequences[-64:]
    with torch.no_grad():
        honest, _ = parts_on(model, loss, rows)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for layer in model.layers:
            for head in (layer.attention.policy_head, layer.attention.memory_head):
                if head is not None:
                    head.weight.zero_()
                    head.bias.fill_(bias)
        cheat, _ = parts_on(model, loss, rows)
        model.load_state_dict(saved)
    for name in honest:
        assert cheat[name] > honest[name] + 0.01, name


def test_a_model_that_repeats_its_input_has_a_higher_loss(sequences, trained):
    """A model trained to repeat its input is worse in every part than one trained on real text."""
    model, loss = trained
    repeater, repeater_loss = make(**PARTS)
    repeated = sequences[:, :1].repeat(1, CONTEXT + 1)
    train(repeater, repeater_loss, repeated, steps=80)
    with torch.no_grad():
        honest, _ = parts_on(model, loss, sequences[-64:])
        cheat, _ = parts_on(repeater, repeater_loss, sequences[-64:])
        own_game, _ = parts_on(repeater, repeater_loss, repeated[:64])
    assert own_game["accuracy_loss"] < honest["accuracy_loss"], "it did learn to repeat"
    for name in honest:
        assert cheat[name] > honest[name] + 0.5, name


def test_alignment_loss_is_weighted_per_document(sequences):
    model, loss = make(accuracy_weight=0.0, alignment_weight=1.0)
    rows = sequences[:8]
    weights = torch.linspace(0, 2, 8)[:, None].expand(8, CONTEXT)
    hidden, pointer_output = model.hidden_states(rows[:, :-1])
    result = loss(hidden, model.lm_head.weight, rows[:, 1:], weights, 0.0, pointer_output)
    nll = torch.nn.functional.cross_entropy(
        model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    ).view(8, CONTEXT)
    assert result.total.item() == pytest.approx((nll * weights).mean().item(), rel=1e-5)
    assert result.parts["alignment_loss"].item() == pytest.approx(result.total.item(), rel=1e-5)
    assert result.train_loss.item() == pytest.approx(nll.mean().item(), rel=1e-5)


def test_coherence_loss_predicts_the_second_next_token_and_decays_to_zero(sequences):
    model, loss = make(coherence_weight=0.4, coherence_until=0.5)
    rows = sequences[:4]
    hidden, _ = model.hidden_states(rows[:, :-1])
    head = model.lm_head.weight
    expected = torch.nn.functional.cross_entropy((hidden[:, :-1] @ head.T).flatten(0, 1), rows[:, 2:].flatten()).item()

    def at(progress):
        return loss(hidden, head, rows[:, 1:], torch.ones(4, CONTEXT), progress)

    assert at(0.0).parts["coherence_loss"].item() == pytest.approx(expected, rel=1e-5)
    plain = at(0.5)
    assert "coherence_loss" not in plain.parts
    for progress, weight in ((0.0, 0.4), (0.25, 0.2)):
        assert at(progress).total.item() == pytest.approx(plain.total.item() + weight * expected, rel=1e-5)


def test_invalid_loss_weights_are_refused():
    with pytest.raises(ValueError, match="negative"):
        ComprehensiveTrainingLoss(8, coherence_weight=-1)
    with pytest.raises(ValueError, match="next-token"):
        ComprehensiveTrainingLoss(8, accuracy_weight=0.0, alignment_weight=0.0)
