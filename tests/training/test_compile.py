"""The layers and the loss compile to few graphs without breaks, and a training step never waits for the device."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm_core.hardware import choose_hardware
from mvlm_core.training import cross_entropy
from mvlm_core.training.cost import StubTokenizer
from tests.helpers import MODELS, StopAfter, make_loop, recipe_of, tiny_settings


class Graphs(list):
    """A torch.compile backend that records the graphs and runs them unchanged."""

    def __call__(self, graph, inputs):
        self.append(graph)
        assert not any(isinstance(size, torch.SymInt) for tensor in inputs for size in getattr(tensor, "shape", ()))
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes of the code under test."""
    found, real = Graphs(), torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=found, **options))
    cross_entropy.compiled_block.cache_clear()
    yield found
    cross_entropy.compiled_block.cache_clear()
    torch.compiler.reset()


def built(model, tmp_path, *, compiled, **changes):
    settings = tiny_settings(model, tmp_path, tmp_path, num_layers=12, dropout=0.1, **changes)
    hardware = choose_hardware(device="cpu", precision="fp32")
    if compiled:
        hardware = replace(hardware, compile=True, loss_kernel="compiled")
    torch.manual_seed(0)
    made = recipe_of(model).build(settings, StubTokenizer(400), hardware)
    for module in made.modules.values():
        module.train()
    return made


def loss_and_gradients(made, sequences):
    generator = torch.Generator().manual_seed(sequences)
    ids = torch.randint(400, (sequences, 33), generator=generator)
    torch.manual_seed(1)
    loss = made.loss(ids[:, :-1], ids[:, 1:], torch.ones(sequences, 32), 0.0).total
    loss.backward()
    gradients = {}
    for prefix, module in made.modules.items():
        gradients |= {f"{prefix}.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize(("model", "layers"), [("mvlm_gpt2", 1), ("simone_enhanced", 3)])
def test_twelve_layers_compile_to_few_graphs_with_static_shapes(model, layers, graphs, tmp_path):
    """Model 2's first layer has no value residual, and its pointer is a separate graph.

    The loss is one more graph, and model 2's coherence loss another.
    """
    changes = {"coherence_weight": 0.3, "alignment_weight": 0.5} if model == "simone_enhanced" else {}
    plain, compiled = (built(model, tmp_path, compiled=each, **changes) for each in (False, True))
    for sequences in (4, 4):
        expected, found = (loss_and_gradients(each, sequences) for each in (plain, compiled))
        torch.testing.assert_close(found, expected)
        assert len(graphs) == layers + (2 if changes else 1), "and none the second time"
    loss_and_gradients(compiled, 2)
    assert len(graphs) == 2 * (layers + (2 if changes else 1)), "another micro-batch is other shapes"


def test_micro_batch_halving_does_not_hit_the_recompile_limit(graphs, tiny_corpus, tmp_path):
    """By default torch.compile gives up at a function's ninth graph, which would end the run."""
    settings = tiny_settings("simone_enhanced", tiny_corpus, tmp_path, batch_size=32)
    loop = make_loop("simone_enhanced", settings, compiled=True)
    real, tried = loop.task.loss, []

    def loss(inputs, *rest):
        tried.append(len(inputs))
        found = real(inputs, *rest)
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return found

    object.__setattr__(loop.task, "loss", loss)
    loop.gradients.find_micro_batch(loop.state, 0.0)
    assert tried == [32, 16, 8, 4, 2, 1] and loop.state.micro_batch == 1 and len(graphs) > 8


@pytest.mark.parametrize("model", MODELS)
def test_a_second_model_of_the_same_shape_compiles_nothing(model, graphs, tiny_corpus, tmp_path):
    counts = []
    for seed in range(2):
        settings = tiny_settings(model, tiny_corpus, tmp_path / str(seed), seed=seed)
        make_loop(model, settings, compiled=True).gradients.run_micro_batch(0, 0, 4, 0.0)
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[1]


class NoWaiting(TorchDispatchMode):
    """Fails when a value is read from the device, as by ``.item()`` or ``if tensor``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", MODELS)
def test_training_step_does_not_synchronize_with_the_device(model, optimizer, tiny_corpus, tmp_path):
    loop = make_loop(model, tiny_settings(model, tiny_corpus, tmp_path, optimizer=optimizer, dropout=0.1))
    stop = StopAfter()
    with NoWaiting():
        for _ in range(3):
            loop.step(stop)
        with pytest.raises(AssertionError, match="waits"):
            loop._read_metrics()


@pytest.mark.parametrize(("model", "own", "of_the_teacher"), [("mvlm_gpt2", 2, 1), ("simone_enhanced", 5, 3)])
def test_teachers_compile_to_separate_graphs(model, own, of_the_teacher, graphs, trained, tmp_path):
    """A teacher runs without gradients; student and teachers must not share one recompile limit."""
    settings = tiny_settings(model, trained / "corpus", tmp_path, teacher=(str(trained / model),))
    plain, compiled = (make_loop(model, settings, compiled=each) for each in (False, True))
    for _ in range(2):
        expected, found = (loop.gradients.run_micro_batch(0, 0, 4, 0.0)[0] for loop in (plain, compiled))
        torch.testing.assert_close(found, expected)
    assert len(graphs) == own + of_the_teacher
