"""Gradients do not depend on how the batch is split, and a micro-batch that does not fit is halved."""

import weakref

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from mvlm_core.errors import Stopped, TrainingError
from mvlm_core.monitor import memory_in_use
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.history import read_history
from tests.helpers import StopAfter, make_loop, needs_peak_reset, tiny_settings, touched

OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory")


def test_gradient_accumulation_matches_one_large_batch(tiny_corpus, tmp_path):
    curves = []
    for name, changes in (("whole", {"batch_size": 8}), ("parts", {"batch_size": 2, "gradient_accumulation_steps": 4})):
        loop = make_loop("simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, tmp_path / name, **changes))
        loop.run(StopAfter())
        curves.append([record["train_loss"] for record in read_history(loop.step_log.path)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def run_with_memory_for(limit, tiny_corpus, folder, batch_size=8, error=OUT_OF_MEMORY):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, folder, batch_size=batch_size, max_steps=6))
    real = loop.task.loss

    def loss(inputs, *rest):
        if inputs.shape[0] > limit:
            raise error
        return real(inputs, *rest)

    object.__setattr__(loop.task, "loss", loss)
    state = loop.run(StopAfter())
    return state, [record["train_loss"] for record in read_history(loop.step_log.path)]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_curve(tiny_corpus, tmp_path):
    plenty, expected = run_with_memory_for(8, tiny_corpus, tmp_path / "plenty")
    scarce, found = run_with_memory_for(3, tiny_corpus, tmp_path / "scarce")
    assert (plenty.micro_batch, scarce.micro_batch) == (8, 2)
    assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(TrainingError, match="--max_length"):
        run_with_memory_for(0, tiny_corpus, tmp_path / "none")


def test_what_is_halved_is_the_micro_batch_that_was_tried(tiny_corpus, tmp_path):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path))
    assert loop.task.batches.batch_size == 4
    loop.state.micro_batch = 32  # more than this rank's share of a step
    loop.gradients._halve(loop.state)
    assert loop.state.micro_batch == 2


def test_only_a_lack_of_memory_halves_the_micro_batch_also_inside_the_compiler(tiny_corpus, tmp_path):
    def failed(inner):
        return BackendCompilerFailed("inductor", inner, None)

    for name, error in (("memory", OUT_OF_MEMORY), ("library", RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))):
        state, _ = run_with_memory_for(3, tiny_corpus, tmp_path / name, error=failed(error))
        assert state.micro_batch == 2
    with pytest.raises(TrainingError, match=r"torch.compile failed \(ValueError: a fault\): .* add --no_compile"):
        run_with_memory_for(3, tiny_corpus, tmp_path / "fault", error=failed(ValueError("a fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        run_with_memory_for(3, tiny_corpus, tmp_path / "other", error=RuntimeError("another fault"))


def test_activations_of_a_failed_step_are_freed_before_halving(tiny_corpus, tmp_path, monkeypatch):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, batch_size=8))
    real, halve, activations, alive = loop.task.loss, loop.gradients._halve, [], []

    def loss(inputs, *rest):
        activation = torch.zeros(10)
        if inputs.shape[0] > 2:
            activations.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("out of memory")
        return real(inputs, *rest)

    def halve_and_look(state):
        alive.extend(activation() is not None for activation in activations)
        halve(state)

    object.__setattr__(loop.task, "loss", loss)
    monkeypatch.setattr(loop.gradients, "_halve", halve_and_look)
    loop.gradients.find_micro_batch(loop.state, 0.0)
    loop.state.micro_batch = 8
    loop.step(StopAfter())
    assert len(activations) == 4 and loop.state.micro_batch == 2 and not any(alive)


def test_a_late_out_of_memory_error_halves_the_micro_batch_for_good(tiny_corpus, tmp_path):
    def loop(folder):
        return make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, folder, batch_size=8, max_steps=10))

    whole, scarce = loop(tmp_path / "whole"), loop(tmp_path / "scarce")
    whole.run(StopAfter())
    real = scarce.task.loss

    def loss(inputs, *rest):
        if scarce.state.step == 5 and inputs.shape[0] > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(inputs, *rest)

    object.__setattr__(scarce.task, "loss", loss)
    with pytest.raises(Stopped):
        scarce.run(StopAfter(7))
    again = loop(tmp_path / "scarce")
    assert again.run(StopAfter()).micro_batch == 4
    curves = [[record["train_loss"] for record in read_history(each.step_log.path)] for each in (whole, again)]
    assert curves[0][:5] == curves[1][:5] and curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_micro_batch_trial_does_not_affect_training(tiny_corpus, tmp_path):
    found = []
    for trial in (True, False):
        loop = make_loop(
            "simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, tmp_path / str(trial), dropout=0.2)
        )
        if not trial:
            loop.gradients.find_micro_batch = lambda state, progress: None
        loop.run(StopAfter())
        weights = newest_checkpoint(loop.checkpoints.root).tensors("model")
        found.append((weights, [record["train_loss"] for record in read_history(loop.step_log.path)]))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


@needs_peak_reset
def test_peak_memory_is_that_of_the_steps_not_of_a_trial_that_did_not_fit(tiny_corpus, tmp_path):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, batch_size=8, max_steps=2))
    loop.hardware.release()
    real, size, before = loop.task.loss, 512 * 2**20, memory_in_use()

    def loss(inputs, *rest):
        if inputs.shape[0] > 4:
            touched(size).close()
            raise OUT_OF_MEMORY
        return real(inputs, *rest)

    object.__setattr__(loop.task, "loss", loss)
    assert loop.run(StopAfter()).micro_batch == 4
    assert before <= loop.peak_memory() < before + size / 2
