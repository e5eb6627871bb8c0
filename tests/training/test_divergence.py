"""Divergence: a non-finite step is skipped, a diverged run is rolled back, and an idle guard changes nothing."""

import math

import pytest
import torch

from mvlm_core.errors import Stopped, TrainingError
from mvlm_core.training.checkpoint import checkpoint_folders
from mvlm_core.training.divergence import GuardState
from mvlm_core.training.history import read_history
from mvlm_core.training.optimizer import build_optimizers
from mvlm_core.training.run_length import RunLength
from tests.helpers import (
    MODELS,
    DelayedThread,
    StopAfter,
    assert_same_end,
    everything_on,
    final_state,
    make_loop,
    tiny_settings,
)


def breaking_loop(model, corpus, work, breaks, **changes):
    """A real run whose loss is multiplied by ``breaks(step, learning rate)``."""
    settings = tiny_settings(model, corpus, work, **{"dropout": 0.1, **changes})
    loop = make_loop(model, settings)
    real = loop.task.loss

    def loss(*arguments):
        result = real(*arguments)
        factor = breaks(loop.state.step + 1, loop.task.optimizers.groups()[0]["lr"])
        return type(result)(result.total * factor, result.train_loss * factor, result.parts)

    object.__setattr__(loop.task, "loss", loss)
    return loop


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_step_leaves_weights_and_optimizer_unchanged(model, value, tiny_corpus, tmp_path):
    def weights_after(steps, breaks):
        loop = breaking_loop(model, tiny_corpus, tmp_path / f"{steps}", breaks, max_steps=12)
        with pytest.raises(Stopped):
            loop.run(StopAfter(steps))
        return final_state(loop)

    before = weights_after(5, lambda step, rate: 1.0)
    after = weights_after(6, lambda step, rate: value if step == 6 else 1.0)
    assert_same_end(before[:2], after[:2])
    assert after[3]["guard"]["skipped"] == 1 and after[3]["guard"]["trouble_since"] == 6
    last = after[2][-1]
    assert last["skipped"] is True and "train_loss" not in last and last["step"] == 6


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_finite_steps_are_bit_identical_with_and_without_the_guard(kind):
    def train(found_inf):
        torch.manual_seed(3)
        layers = torch.nn.ModuleList([torch.nn.Embedding(40, 48), torch.nn.Linear(48, 64), torch.nn.Linear(64, 40)])
        optimizers = build_optimizers(
            layers.named_parameters(), kind=kind, learning_rate=0.02, weight_decay=0.1, embedding_names=("0.",)
        )
        for _ in range(20):
            ids = torch.randint(0, 40, (16,))
            hidden = layers[1](layers[0](ids)).tanh()
            torch.nn.functional.cross_entropy(layers[2](hidden), ids.roll(1)).backward()
            optimizers.step(found_inf)
            optimizers.zero_grad()
        return list(layers.parameters())

    for with_guard, without in zip(train(torch.zeros(())), train(None), strict=True):
        assert torch.equal(with_guard, without)


def test_divergence_is_rolled_back_identically_with_and_without_interruptions(tiny_corpus, tmp_path, monkeypatch):
    """NaN from step 8 on at the full rate: rolled back to the checkpoint of step 5, continued at half the rate.

    That checkpoint is still being written at that time.
    """
    monkeypatch.setattr("mvlm_core.training.checkpointer.Thread", DelayedThread)
    monkeypatch.setattr(RunLength, "learning_rate_scale", lambda *_: 1.0)

    def run(work, *stops):
        def breaks(step, rate):
            return math.nan if step >= 8 and rate > 0.55 * full(step) else 1.0

        changes = {"max_steps": 20, "warmup_steps": 1, "eval_interval": 20}
        make = lambda: breaking_loop("mvlm_gpt2", tiny_corpus, work, breaks, **changes)  # noqa: E731
        for steps in stops:
            with pytest.raises(Stopped):
                make().run(StopAfter(steps))
        loop = make()
        assert loop.run(StopAfter()).finished
        return final_state(loop)

    def full(step):
        return tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path).learning_rate

    whole = run(tmp_path / "whole")
    guard = whole[3]["guard"]
    assert guard["rollbacks"] == 1 and guard["rate_factor"] == 0.5 and guard["skipped"] >= 5
    assert [record["step"] for record in whole[2]] == list(range(1, 21)), "each step once"
    rates = [record["learning_rate"] for record in whole[2]]
    assert rates[4] == 2 * rates[5] == 2 * rates[19]
    for stops in ((7,), (7, 2, 3, 4)):
        assert_same_end(whole, run(tmp_path / f"stopped{len(stops)}", *stops))


@pytest.mark.parametrize("model", MODELS)
def test_rollback_distrusts_the_weights_of_the_first_bad_step_and_clears_the_optimizer(
    model, tiny_corpus, tmp_path, monkeypatch
):
    """NaN from step 6 on: its loss was computed with the weights of step 5, so the run starts over, at half the rate.

    It then equals a run with half the rate.
    """
    monkeypatch.setattr(RunLength, "learning_rate_scale", lambda *_: 1.0)
    changes = {"max_steps": 12, "eval_interval": 20, "weight_decay": 0.0}
    usual = tiny_settings(model, tiny_corpus, tmp_path)
    rates = [name for name in ("learning_rate", "adamw_learning_rate") if hasattr(usual, name)]
    full = usual.learning_rate
    broken = breaking_loop(
        model, tiny_corpus, tmp_path / "a", lambda step, rate: math.nan if step > 5 and rate == full else 1.0, **changes
    )
    assert broken.run(StopAfter()).guard.rollbacks == 1
    halved = {name: getattr(usual, name) / 2 for name in rates}
    slow = breaking_loop(model, tiny_corpus, tmp_path / "b", lambda step, rate: 1.0, **changes, **halved)
    slow.run(StopAfter())
    assert_same_end(final_state(broken)[:2], final_state(slow)[:2])


def test_rollback_to_the_end_of_a_shorter_run_continues_to_the_new_end(tiny_corpus, tmp_path, caplog):
    def run(steps, factor):
        loop = breaking_loop("mvlm_gpt2", tiny_corpus, tmp_path, factor, max_steps=steps, warmup_steps=1)
        return loop.run(StopAfter())

    assert run(12, lambda step, rate: 1.0).finished
    seen = set()

    def breaks(step, rate):
        again = step in seen
        seen.add(step)
        return math.nan if 14 <= step < 19 and not again else 1.0

    state = run(24, breaks)
    assert (state.step, state.finished, state.guard.rollbacks) == (24, True, 1)
    assert "rolled back to step 12" in caplog.text


def test_training_fails_after_three_rollbacks(tiny_corpus, tmp_path):
    loop = breaking_loop(
        "mvlm_gpt2", tiny_corpus, tmp_path, lambda step, rate: math.nan if step > 6 else 1.0, max_steps=40
    )
    with pytest.raises(TrainingError, match="after 3 rollbacks: start over with --fresh and a lower --learning_rate"):
        loop.run(StopAfter())
    assert checkpoint_folders(loop.checkpoints.root), "what was good is still there"
    assert all(record.get("skipped", False) == (record["step"] > 6) for record in read_history(loop.step_log.path))


def test_sustained_spikes_trigger_a_rollback_and_single_ones_do_not():
    noise = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(400, generator=noise)).tolist()
    calm = GuardState()
    assert not any(calm.observe(step, loss, False) for step, loss in enumerate(losses, 1))
    calm.observe(401, 9.0, False)
    assert calm.trouble_since == 401 and calm.observe(402, 3.0, False) is None and calm.trouble_since is None
    verdicts = [calm.observe(step, 4.5, False) for step in range(500, 560)]
    assert verdicts.index(next(v for v in verdicts if v)) == 49
    assert calm.trouble_since == 500 and "stayed above" in verdicts[49]


@pytest.mark.parametrize(("loss", "skipped"), [(9.0, False), (math.nan, True)])
def test_trouble_since_is_the_first_step_of_a_streak(loss, skipped):
    guard = GuardState()
    for step in range(1, 201):
        guard.observe(step, 3.0, False)
    for step in (201, 202, 203):
        guard.observe(step, loss, skipped)
    assert guard.trouble_since == 201, "a checkpoint of step 201 or later is no place to return to"
    guard.observe(204, 3.0, False)
    assert guard.trouble_since is None


def test_falling_loss_triggers_no_rollback():
    guard = GuardState()
    assert not any(guard.observe(step, 8 * 0.99**step + 1, False) for step in range(1, 600))


@pytest.mark.parametrize("model", MODELS)
def test_guard_state_is_restored_on_resume(model, tiny_corpus, tmp_path):
    changes = {**everything_on(model), "max_steps": 10}
    nan_at = lambda step, rate: math.nan if step in (3, 4, 7) else 1.0  # noqa: E731
    whole = breaking_loop(model, tiny_corpus, tmp_path / "a", nan_at, **changes)
    whole.run(StopAfter())
    with pytest.raises(Stopped):
        breaking_loop(model, tiny_corpus, tmp_path / "b", nan_at, **changes).run(StopAfter(4))
    again = breaking_loop(model, tiny_corpus, tmp_path / "b", nan_at, **changes)
    again.run(StopAfter())
    assert final_state(whole)[2:] == final_state(again)[2:]
    assert final_state(again)[3]["guard"]["skipped"] == 3
