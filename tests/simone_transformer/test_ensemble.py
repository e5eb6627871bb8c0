"""Ensembles of model 2: mean probabilities, causal, cached, trained apart, and loaded from an export."""

import json

import pytest
import torch
from transformers import StaticCache

from mvlm_core.errors import Stopped
from mvlm_core.evaluation.bits_per_byte import load_export
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.run import run_training
from prioritary_mvlm.advanced_losses import mean_loss
from prioritary_mvlm.enhanced_trainer import RECIPE
from simone_transformer import EnhancedSIMONEEnsemble, EnhancedSIMONEEnsembleConfig
from tests.helpers import StopAfter, make_loop, tiny_settings
from tests.simone_transformer.test_model import make_model, tokens

MODELS, LAYERS = 3, 2


def make_ensemble(**changes):
    """An ensemble whose models differ as much as those of ``make_model`` with other seeds."""
    config = make_model(**changes).config
    sizes = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    sizes |= {"num_models": MODELS, "num_hidden_layers": MODELS * LAYERS}
    ensemble = EnhancedSIMONEEnsemble(EnhancedSIMONEEnsembleConfig(**sizes)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.3)
    return ensemble


@torch.no_grad()
def test_its_logits_are_the_logarithm_of_the_mean_probability():
    ensemble, ids = make_ensemble(), tokens(2, 12)
    each = [member(ids, use_cache=False).logits.softmax(-1) for member in ensemble.members]
    found = ensemble(ids, use_cache=False).logits
    torch.testing.assert_close(found.exp(), torch.stack(each).mean(0), rtol=0, atol=1e-6)
    assert not torch.allclose(each[0], each[1], atol=1e-2), "all models are the same"


@torch.no_grad()
def test_each_model_has_layers_of_its_own_in_any_cache():
    ensemble, ids = make_ensemble(), tokens(2, 24)
    whole = ensemble(ids, use_cache=False).logits
    for cache in (None, StaticCache(config=ensemble.config, max_cache_len=40)):
        parts = []
        for begin, end in ((0, 9), (9, 15), (15, 16), (16, 24)):
            output = ensemble(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert len(cache.layers) == MODELS * LAYERS
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_is_causal_and_generates_the_same_with_padding_on_the_left():
    ensemble, ids = make_ensemble(), tokens(1, 10)
    changed = ids.clone()
    changed[:, 6:] = tokens(1, 4, seed=9)
    assert torch.equal(ensemble(ids).logits[:, :6], ensemble(changed).logits[:, :6])
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = ensemble.generate(ids, use_cache=False, **greedy)[:, 10:]
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)), dim=1)
    assert torch.equal(ensemble.generate(padded, attention_mask=mask, **greedy)[:, 15:], expected)


@torch.no_grad()
def test_every_model_gives_traces_and_gets_new_tokens():
    ensemble, ids = make_ensemble(), tokens(1, 10)
    traces = ensemble(ids, output_traces=True).traces
    assert len(traces) == MODELS * LAYERS
    alone = ensemble.members[1](ids, use_cache=False, output_traces=True).traces
    torch.testing.assert_close(traces[LAYERS], alone[0])
    ensemble.resize_token_embeddings(310)
    assert ensemble(ids).logits.shape[-1] == ensemble.config.vocab_size == 310


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_and_loaded_weights_give_the_same_logits(tied, tmp_path):
    ensemble, ids = make_ensemble(tie_word_embeddings=tied), tokens(1, 8)
    ensemble.save_pretrained(tmp_path)
    again = EnhancedSIMONEEnsemble.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, ensemble(ids).logits)
    assert again.num_parameters() == ensemble.num_parameters()


def test_layers_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="5 layers do not split among 2 models"):
        EnhancedSIMONEEnsemble(EnhancedSIMONEEnsembleConfig(vocab_size=300, num_hidden_layers=5, num_models=2))


def test_each_model_is_trained_by_its_own_loss_alone(tiny_corpus, tmp_path):
    """The gradient of each model is that of the same weights trained alone, by its share of the mean."""
    loop = make_loop("simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, tmp_path, num_models=2))
    ensemble = loop.task.modules["model"]
    batch = loop.task.batches.batch(0)
    inputs, targets, weights = map(torch.from_numpy, (batch.inputs, batch.targets, batch.weights))
    loop.task.loss(inputs, targets, weights, 0.0).total.backward()
    member, score = ensemble.members[1], loop.task.modules["loss"][1]
    together = {name: parameter.grad.clone() for name, parameter in member.named_parameters()}
    ensemble.zero_grad()
    hidden, pointing = member.hidden_states(inputs)
    alone = mean_loss([score(hidden, member.lm_head.weight, targets, weights, 0.0, pointing)])
    alone.total.backward()
    for name, parameter in member.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad / 2, rtol=1e-5, atol=1e-8)
    assert all(parameter.grad is None for parameter in ensemble.members[0].parameters())


def test_an_ensemble_is_trained_stopped_continued_exported_and_loaded(tiny_corpus, tmp_path):
    """Stopped in the middle it ends with the same weights, and the export holds all models."""
    values = {"num_models": 2, "dropout": 0.1, "max_steps": 8, "output_head": "tied"}
    whole = make_loop("simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, tmp_path / "a", **values))
    whole.run(StopAfter())
    settings = tiny_settings("simone_enhanced", tiny_corpus, tmp_path / "b", **values)
    with pytest.raises(Stopped):
        make_loop("simone_enhanced", settings).run(StopAfter(3))
    folder = run_training(RECIPE, settings)
    expected, found = (
        newest_checkpoint(place / "checkpoints").tensors("model") for place in (tmp_path / "a/simone_enhanced", folder)
    )
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    model, _ = load_export(folder)
    assert type(model).__name__ == "EnhancedSIMONEEnsemble" and len(model.members) == 2
    config = json.loads((folder / "training_config.json").read_text())
    results = config["results"]
    assert results["parameters"] == model.num_parameters()
    assert abs(results["test_bpb"] - results["validation_bpb"]) < 0.5, "what is loaded is not what was trained"


def test_one_process_loads_an_ensemble_and_a_single_model(trained, tiny_corpus, tmp_path):
    """By the same code, in either order: neither takes the other's class."""
    folder = run_training(RECIPE, tiny_settings("simone_enhanced", tiny_corpus, tmp_path, num_models=2, max_steps=2))
    for place, name in ((folder, "Ensemble"), (trained / "simone_enhanced", "Model"), (folder, "Ensemble")):
        model, _ = load_export(place)
        assert type(model).__name__ == f"EnhancedSIMONE{name}"
