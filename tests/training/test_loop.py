"""The loop: bit-identical resuming, early stopping, limits, and golden losses."""

import json
import resource
import shutil
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch

from mvlm_core.errors import Stopped, TrainingError, UserError
from mvlm_core.training import checkpoint
from mvlm_core.training.checkpoint import checkpoint_folders, newest_checkpoint
from mvlm_core.training.history import read_history
from tests.helpers import (
    MODELS,
    DelayedThread,
    StopAfter,
    ThreadOfOneStep,
    assert_same_end,
    everything_on,
    final_state,
    make_loop,
    needs_cuda,
    tiny_settings,
)
from tests.record_golden_losses import GOLDEN, golden_losses


@pytest.mark.parametrize("model", MODELS)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(model, tiny_corpus, tmp_path):
    changes = {**everything_on(model), "max_steps": 24}
    whole = make_loop(model, tiny_settings(model, tiny_corpus, tmp_path / "a", **changes))
    whole.run(StopAfter())
    settings = tiny_settings(model, tiny_corpus, tmp_path / "b", **changes)
    for steps in (3, 7, 1):
        with pytest.raises(Stopped):
            make_loop(model, settings).run(StopAfter(steps))
    last = make_loop(model, settings)
    state = last.run(StopAfter())
    assert state.finished and state.step == 24
    assert_same_end(final_state(whole), final_state(last))
    assert [record["step"] for record in read_history(last.step_log.path)] == list(range(1, 25))


@pytest.mark.parametrize("thread", [DelayedThread, ThreadOfOneStep])
def test_background_save_holds_the_state_of_its_own_step(thread, tiny_corpus, tmp_path, monkeypatch):
    """However late the thread writes, a run resumed from its checkpoint ends the same."""
    changes = {**everything_on("simone_enhanced"), "checkpoint_interval": 3, "max_steps": 10}

    def loop(work):
        return make_loop("simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, work, **changes))

    whole = loop(tmp_path / "whole")
    whole.run(StopAfter())
    monkeypatch.setattr("mvlm_core.training.checkpointer.Thread", thread)
    killed = loop(tmp_path / "killed")
    with pytest.raises(KeyError):  # the save of step 6 is pending, and none is written on exit
        killed.run(FailAfter(8))
    assert newest_checkpoint(killed.checkpoints.root).step == 6
    last = loop(tmp_path / "killed")
    last.run(StopAfter())
    assert_same_end(final_state(whole), final_state(last))


class FailAfter(StopAfter):
    def is_set(self):
        if super().is_set():
            raise KeyError
        return False


def test_the_best_checkpoint_holds_weights_only(tiny_corpus, tmp_path):
    changes = {"eval_interval": 1, "checkpoint_interval": 4, "max_steps": 11}
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **changes)
    loop = make_loop("mvlm_gpt2", settings)
    values = iter([3.0, 2.9, 2.8, 2.7, 2.6, 2.5] + [3.0] * 9)
    weights = {}

    def evaluate():
        if loop.state.step == 6:
            weights.update({name: tensor.clone() for name, tensor in loop.task.weights().items()})
        return next(values)

    object.__setattr__(loop.task, "evaluate", evaluate)
    with pytest.raises(Stopped):
        loop.run(StopAfter(7))
    steps = lambda: [folder.name[-2:] for folder in checkpoint_folders(loop.checkpoints.root)]  # noqa: E731
    assert steps() == ["00", "04", "06", "07"]
    best = loop.checkpoints.root / "step-00000006"
    assert not (best / "optimizer.safetensors").exists()
    shutil.rmtree(loop.checkpoints.root / "step-00000007")
    assert newest_checkpoint(loop.checkpoints.root).step == 4, "nothing resumes from weights alone"
    refused = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **changes, resume_from=str(best))
    with pytest.raises(UserError, match="no optimizer state"):
        make_loop("mvlm_gpt2", refused).run(StopAfter())
    again = make_loop("mvlm_gpt2", settings)
    values = iter([2.6, 2.5] + [3.0] * 9)
    object.__setattr__(again.task, "evaluate", lambda: next(values))
    assert again.run(StopAfter()).best_step == 6
    assert steps() == ["06", "08", "11"]
    again.checkpoints.load_best(again.state)
    assert weights and all(torch.equal(tensor, weights[name]) for name, tensor in again.task.weights().items())


def test_stop_at_the_best_step_leaves_a_resumable_checkpoint(tiny_corpus, tmp_path):
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, eval_interval=3)
    loop = make_loop("mvlm_gpt2", settings)
    with pytest.raises(Stopped):
        loop.run(StopAfter(3))
    found = newest_checkpoint(loop.checkpoints.root)
    assert found.step == 3 and found.state["for_signal_only"] and found.tensors("optimizer")


def test_larger_max_steps_continues_a_finished_run(tiny_corpus, tmp_path):
    make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)).run(StopAfter())
    longer = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=15))
    assert longer.run(StopAfter()).step == 15
    assert [record["step"] for record in read_history(longer.step_log.path)] == list(range(1, 16))
    same = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=15))
    assert same.run(StopAfter(1)).finished, "nothing is left to do"


def test_a_shorter_length_does_not_end_an_unfinished_run(tiny_corpus, tmp_path):
    with pytest.raises(Stopped):
        make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)).run(StopAfter(9))
    for max_steps in (7, 9):
        shorter = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=max_steps))
        with pytest.raises(UserError, match=f"unfinished run at step 9, which .* end at step {max_steps}: repeat"):
            shorter.run(StopAfter())
    state = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)).run(StopAfter())
    assert state.finished and state.step == 12, "nothing was lost"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "--seed was 0, now 1"),
        ({"hidden_dim": 64}, "--hidden_dim was 32, now 64"),
        ({"batch_size": 8}, "batch_size"),
    ],
)
def test_checkpoints_of_a_different_run_are_rejected(tiny_corpus, tmp_path, change, named):
    make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=3)).run(StopAfter())
    with pytest.raises(UserError, match=named):
        make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **change)).run(StopAfter())


def test_checkpoints_of_a_different_corpus_or_tokenizer_are_rejected(tiny_corpus, tmp_path):
    make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=3)).run(StopAfter())
    genesis = tiny_corpus / "bible" / "kjv" / "01-genesis.txt"
    genesis.write_text(genesis.read_text().replace("In the beginning", "At the beginning"))
    (genesis.with_suffix(".json")).unlink()
    with pytest.raises(UserError) as caught:
        make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)).run(StopAfter())
    named = "\n".join(caught.value.problems)
    assert "corpus was" in named and "tokenizer was" in named and "--fresh" in named


def test_harmless_changes_are_accepted(tiny_corpus, tmp_path):
    make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=3)).run(StopAfter())
    changes = {"log_interval": 1, "batch_size": 2, "gradient_accumulation_steps": 2, "keep_checkpoints": 3}
    state = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **changes)).run(StopAfter())
    assert (state.step, state.micro_batch) == (12, 2)


def test_resume_from_an_older_checkpoint(tiny_corpus, tmp_path):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, keep_checkpoints=9))
    loop.run(StopAfter())
    expected = final_state(loop)
    older = [folder for folder in checkpoint_folders(loop.checkpoints.root) if folder.name.endswith("5")][0]
    again = make_loop(
        "mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, keep_checkpoints=9, resume_from=str(older))
    )
    again.run(StopAfter())
    assert_same_end(expected, final_state(again))


def test_early_stopping_waits_for_patience_and_min_epochs(tiny_corpus, tmp_path):
    settings = tiny_settings(
        "mvlm_gpt2",
        tiny_corpus,
        tmp_path,
        max_steps=40,
        eval_interval=1,
        patience=2,
        keep_checkpoints=2,
    )
    loop = make_loop("mvlm_gpt2", settings)
    settings.min_epochs = loop.task.batches.epoch_at(6)
    values = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9] + [3.0] * 40)
    object.__setattr__(loop.task, "evaluate", lambda: next(values))
    state = loop.run(StopAfter())
    assert state.stopped_early and state.best_step == 2
    assert state.step == 6, "patience alone would have stopped at step 4"
    assert {folder.name[-2:] for folder in checkpoint_folders(loop.checkpoints.root)} == {"02", "05", "06"}


def test_total_steps_follow_the_tightest_limit(tiny_corpus, tmp_path):
    def steps(**limits):
        settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **{"max_steps": None, **limits})
        return make_loop("mvlm_gpt2", settings).length.total

    assert steps() == steps(max_bytes=190_000), "the preset's own limit"
    assert steps(max_tokens=128 * 7) == 7
    assert steps(max_tokens=128 * 7, max_steps=5) == 5
    batches = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)).task.batches
    assert steps(num_epochs=2) == round(2 * batches.sequences_per_epoch / 4)
    assert steps(max_bytes=20_000) == round(20_000 / batches.store.bytes_per_token / 128)


def test_warmup_is_a_share_of_the_run_and_shorter_than_it(tiny_corpus, tmp_path):
    def loop(**changes):
        return make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **changes))

    assert loop(max_steps=1000).length.warmup == 100 and loop(warmup_steps=11).length.warmup == 11
    with pytest.raises(UserError, match="not shorter than the run of 12 steps"):
        loop(warmup_steps=12)


@pytest.mark.parametrize("model", MODELS)
def test_golden_losses(model, tiny_corpus, tmp_path):
    """The first 20 losses as recorded by ``python -m tests.record_golden_losses``: refactoring must not change them."""
    golden = json.loads(GOLDEN.read_text())
    losses = golden_losses(model, tiny_corpus, tmp_path)
    assert losses == pytest.approx(golden[model], rel=golden["relative_tolerance"])


@contextmanager
def files_at_most(size):
    """No file may grow beyond ``size`` bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_skips_a_checkpoint_and_training_continues(tiny_corpus, tmp_path, caplog):
    whole = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path / "a", max_steps=24))
    whole.run(StopAfter())
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path / "b", max_steps=24))

    class FullForAWhile(StopAfter):
        def is_set(self):
            self.asked += 1
            if self.asked == 3:
                self.full = files_at_most(100)
                self.full.__enter__()
            if self.asked == 14:
                assert newest_checkpoint(loop.checkpoints.root).step == 0, "the one before is intact"
                self.full.__exit__(None, None, None)
            return False

    assert loop.run(FullForAWhile()).finished
    assert "no checkpoint at step 5" in caplog.text and "cannot write the history" in caplog.text
    assert final_state(loop)[2:] == final_state(whole)[2:]
    assert torch.equal(*(final_state(each)[0]["model.transformer.wpe.weight"] for each in (whole, loop)))


def scored(loop, *values):
    """Let the loop's evaluations return these values."""
    values = iter(values)
    object.__setattr__(loop.task, "evaluate", lambda: next(values))
    return loop


def test_if_the_best_weights_cannot_be_saved_the_best_before_is_kept(tiny_corpus, tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint

    def fails_once(root, step, tensors, state):
        if step == 6:
            raise OSError("no space left")
        return save(root, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", fails_once)
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=12, eval_interval=3, checkpoint_interval=100)
    loop = scored(make_loop("mvlm_gpt2", settings), 1.3, 1.2, 1.4, 1.5)
    state = loop.run(StopAfter())
    assert (state.best_step, state.best_bpb) == (3, 1.3)
    loop.checkpoints.load_best(loop.state)
    state.best_step, loop.checkpoints.saved_step, loop._best_before = 9, 9, (None, None)
    with pytest.raises(TrainingError, match="cannot write a checkpoint"):
        loop._handle_failed_save(OSError("no space left"))


@pytest.mark.parametrize(("steps", "best"), [(6, 3), (9, 9)])
def test_continuing_in_another_folder_forgets_a_best_step_that_is_not_there(steps, best, tiny_corpus, tmp_path, caplog):
    values = {"eval_interval": 3, "checkpoint_interval": 100}
    first = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path / "a", **values, max_steps=steps)
    first = scored(make_loop("mvlm_gpt2", first), *([1.0, 2.0] if best == 3 else [2.0, 1.5, 1.0]))
    assert first.run(StopAfter()).best_step == best
    newest = newest_checkpoint(first.checkpoints.root).folder
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path / "b", **values, max_steps=12, resume_from=str(newest))
    loop = scored(make_loop("mvlm_gpt2", settings), *([4.0, 5.0] if best == 3 else [4.0]))
    (loop.checkpoints.root / f"step-{best:08d}").mkdir(parents=True)  # of another run
    caplog.set_level("INFO", "mvlm")
    assert loop.run(StopAfter()).best_step == steps + 3
    assert "the next evaluation counts as the best" in caplog.text
    loop.checkpoints.load_best(loop.state)


def test_without_intact_best_weights_a_finished_run_exports_the_last_ones(tiny_corpus, tmp_path, caplog):
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=6, eval_interval=3, checkpoint_interval=3)
    first = scored(make_loop("mvlm_gpt2", settings), 1.0, 2.0)
    assert first.run(StopAfter()).best_step == 3
    weights = first.checkpoints.root / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(TrainingError, match="the best checkpoint is damaged: .* run the same command again"):
        first.checkpoints.load_best(first.state)
    caplog.set_level("INFO", "mvlm")
    again = scored(make_loop("mvlm_gpt2", settings), 2.0)
    state = again.run(StopAfter())
    assert (state.step, state.best_step, state.best_bpb) == (6, 6, 2.0) and "missing or damaged" in caplog.text
    again.checkpoints.load_best(again.state)


def test_a_checkpoint_that_can_no_longer_be_read_is_reported_in_one_sentence(tiny_corpus, tmp_path, monkeypatch):
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)
    with pytest.raises(Stopped):
        make_loop("mvlm_gpt2", settings).run(StopAfter(3))
    monkeypatch.setattr(checkpoint, "load_file", Mock(side_effect=OSError("input/output error")))
    with pytest.raises(TrainingError, match="model.safetensors cannot be read: input/output error"):
        make_loop("mvlm_gpt2", settings).run(StopAfter())


def test_disk_without_space_is_reported_before_the_first_step(tiny_corpus, tmp_path):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path))
    with files_at_most(100), pytest.raises(TrainingError, match="cannot write a checkpoint.*free some space"):
        loop.run(StopAfter())
    assert loop.state.step == 0


@pytest.mark.parametrize(("model", "optimizer"), [("mvlm_gpt2", "muon"), ("simone_enhanced", "adamw")])
def test_resume_is_exact_around_an_epoch_boundary(model, optimizer, tiny_corpus, tmp_path):
    """With the optimizer that is not the model's default; stops before, at and after the boundary."""
    changes = {**everything_on(model), "optimizer": optimizer, "max_length": 256, "max_steps": 30, "eval_interval": 6}

    def loop(work):
        return make_loop(model, tiny_settings(model, tiny_corpus, work, **changes))

    whole = loop(tmp_path / "whole")
    edge = next(step for step in range(1, 30) if whole.task.batches.epoch_at(step) >= 1)
    assert 4 < edge < 27
    whole.run(StopAfter())
    for steps in (edge - 1, 1, 1):
        with pytest.raises(Stopped):
            loop(tmp_path / "parts").run(StopAfter(steps))
    parts = loop(tmp_path / "parts")
    parts.run(StopAfter())
    assert_same_end(final_state(whole), final_state(parts))


@needs_cuda
@pytest.mark.parametrize("model", MODELS)
def test_resume_is_exact_on_cuda_with_deterministic(model, tiny_corpus, tmp_path, monkeypatch):
    """Compiled, and in bf16 if the GPU supports it, like a real run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "placeholder")  # so that monkeypatch undoes the value set below
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    changes = {**everything_on(model), "device": "cuda", "precision": "auto", "deterministic": True}
    try:
        whole = make_loop(model, tiny_settings(model, tiny_corpus, tmp_path / "a", **changes))
        whole.hardware.apply()
        whole.run(StopAfter())
        with pytest.raises(Stopped):
            make_loop(model, tiny_settings(model, tiny_corpus, tmp_path / "b", **changes)).run(StopAfter(5))
        torch.compiler.reset()  # another process compiles again
        parts = make_loop(model, tiny_settings(model, tiny_corpus, tmp_path / "b", **changes))
        parts.run(StopAfter())
        assert_same_end(final_state(whole)[:2], final_state(parts)[:2])  # the history also has the GPU's load
    finally:
        torch.use_deterministic_algorithms(False)
