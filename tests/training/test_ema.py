"""The running average by hand, and what of it a run evaluates and exports."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.ema import WeightAverage
from mvlm_core.training.run import run_training
from tests.helpers import make_loop, recipe_of, tiny_settings


def test_an_average_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = WeightAverage(layer, decay=0.75)
    expected = 0.0
    for step in range(1, 60):
        layer.weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.75, step / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.tensors()["weight"].item() == pytest.approx(expected)
    assert expected == pytest.approx(59 - 3, abs=1e-3), "three steps behind: decay / (1 - decay)"
    with average.in_module():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 59


def test_tied_weights_are_averaged_once_and_foreign_ones_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight

    average = WeightAverage(Tied(), 0.9)
    assert set(average.tensors()) == {"first.weight", "first.bias", "second.bias"}
    with pytest.raises(ValueError, match="missing or of another"):
        average.load({"first.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="shape"):
        average.load({name: torch.zeros(3) for name in average.tensors()})


@pytest.mark.parametrize("model", ["mvlm_gpt2", "simone_enhanced"])
def test_what_is_evaluated_is_what_is_exported(model, tiny_corpus, tmp_path):
    settings = tiny_settings(model, tiny_corpus, tmp_path, ema_decay=0.8, max_steps=8, eval_interval=4)
    export = run_training(recipe_of(model), settings)
    last = newest_checkpoint(export / "checkpoints")
    average, own = last.tensors("average"), last.tensors("model")
    exported = load_file(export / "model.safetensors")
    assert last.state["best_step"] == 8
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, average[name])
    assert any(not torch.allclose(average[name], own[f"model.{name}"], atol=1e-4) for name in average)

    loop = make_loop(model, settings)
    loop._resume()
    with loop.task.evaluated():
        assert loop.task.evaluate() == pytest.approx(last.state["best_bpb"], rel=1e-6)
    assert loop.task.evaluate() != pytest.approx(last.state["best_bpb"], rel=1e-4)
