"""Both training forwards compile without a graph break, and a training step never waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mvlm_trainer
from mvlm_core.hardware import choose_hardware
from mvlm_core.training.cost import TokenizerShape
from tests.helpers import MODELS, StopAfter, make_loop, recipe_of, tiny_settings


@pytest.mark.parametrize("model", MODELS)
def test_the_forward_is_one_graph_of_static_shapes(model, tmp_path):
    settings = tiny_settings(model, tmp_path, tmp_path, dropout=0.1)
    hardware = choose_hardware(device="cpu", precision="fp32")
    network = recipe_of(model).build(settings, TokenizerShape(400), hardware).model.train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        assert not any(isinstance(size, torch.SymInt) for tensor in inputs for size in getattr(tensor, "shape", ()))
        return graph.forward

    def forward(ids):
        if model == "mvlm_gpt2":
            return mvlm_trainer.hidden_states(network, ids)
        return network.hidden_states(ids)

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for seed in (1, 2):
        ids = torch.randint(400, (4, 32), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(0)
        expected = forward(ids)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(ids), expected)
    assert len(graphs) == 1


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read off the device, as ``.item()`` and every ``if tensor`` do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_does_not_wait_for_the_device(model, optimizer, tiny_corpus, tmp_path):
    loop = make_loop(model, tiny_settings(model, tiny_corpus, tmp_path, optimizer=optimizer, dropout=0.1))
    stop = StopAfter()
    with NoWaiting():
        for _ in range(3):
            loop._step(stop)
        with pytest.raises(AssertionError, match="waits"):
            loop._flush(bar=None)
