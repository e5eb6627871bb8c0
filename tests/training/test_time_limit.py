"""``--max_hours``: the length of a run is fixed once, kept through interruptions, and reached in time."""

from dataclasses import asdict

import pytest

from mvlm_core.errors import Stopped, UserError
from mvlm_core.training import checkpoint as checkpoints
from mvlm_core.training.history import read_history
from mvlm_core.training.state import LoopState
from mvlm_core.training.time_limit import steps_within
from tests.helpers import (
    MODELS,
    ImmediateThread,
    StopAfter,
    assert_same_end,
    final_state,
    make_loop,
    tiny_settings,
)

# Seconds on the clock of these tests; a step is cheaper once model 2's coherence loss has faded.
STEP, FADED_STEP, EVALUATION, CHECKPOINT = 4.0, 3.0, 7.0, 5.0


@pytest.fixture
def clocked_loop(tiny_corpus, monkeypatch):
    """``clocked_loop(model, folder, **changes)``: a ten-minute loop with a clock that its own work advances."""
    now = [0.0]
    save = checkpoints.save_checkpoint

    def slow_save(*arguments):
        now[0] += CHECKPOINT
        return save(*arguments)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow_save)
    monkeypatch.setattr("mvlm_core.training.checkpointer.Thread", ImmediateThread)  # saving advances the clock too

    def make(model, folder, **changes):
        own = {"coherence_weight": 0.3} if model == "simone_enhanced" else {}
        values = {"max_steps": None, "max_hours": 1 / 6, "eval_interval": 20, "checkpoint_interval": 15}
        settings = tiny_settings(model, tiny_corpus, folder, **{**values, **own, "dropout": 0.1, **changes})
        loop = make_loop(model, settings)
        loss, evaluate = loop.task.loss, loop.task.evaluate

        def slow_loss(inputs, targets, weights, progress, teacher):
            now[0] += FADED_STEP if own and progress >= 0.5 else STEP
            return loss(inputs, targets, weights, progress, teacher)

        def slow_evaluation():
            now[0] += EVALUATION
            return evaluate()

        object.__setattr__(loop.task, "loss", slow_loss)
        object.__setattr__(loop.task, "evaluate", slow_evaluation)
        loop.clock = lambda: now[0]
        return loop

    make.now = now
    return make


@pytest.mark.parametrize("model", MODELS)
def test_run_ends_in_time_and_resumes_bit_identically(model, clocked_loop, tmp_path):
    whole = clocked_loop(model, tmp_path / "whole")
    state = whole.run(StopAfter())
    taken = clocked_loop.now[0] - CHECKPOINT - STEP  # the first checkpoint and the trial precede the first step
    assert state.finished and state.fixed_steps == state.step and 10 <= state.fixed_at <= 16
    assert taken == pytest.approx(600, rel=0.03) and taken <= 600 + EVALUATION + CHECKPOINT
    for steps in (1, 40, 30):  # before the length is fixed, and twice after
        with pytest.raises(Stopped):
            clocked_loop(model, tmp_path / "parts").run(StopAfter(steps))
    # The limit is now a tenth of what it was; the fixed length must not change.
    parts = clocked_loop(model, tmp_path / "parts", max_hours=1 / 60)
    parts.run(StopAfter())
    assert_same_end(final_state(whole), final_state(parts))


@pytest.mark.parametrize("parts", [(5, 5), (8, 1), (2, 7)], ids=str)
def test_interruptions_while_timing_steps_do_not_change_the_run(clocked_loop, tmp_path, parts):
    def run_in_parts(folder, *steps):
        for count in steps:
            with pytest.raises(Stopped):
                clocked_loop("mvlm_gpt2", folder).run(StopAfter(count))
        return final_state(clocked_loop("mvlm_gpt2", folder))

    whole = run_in_parts(tmp_path / "whole", 20)
    assert sum(parts) < whole[3]["fixed_at"] == 12 and whole[3]["fixed_steps"] > 100
    assert_same_end(whole, run_in_parts(tmp_path / "parts", *parts, 20 - sum(parts)))


def test_steps_before_the_length_is_fixed_do_not_depend_on_it(clocked_loop, tmp_path):
    histories = []
    for folder, hours in (("long", 1 / 12), ("short", 1 / 15)):
        loop = clocked_loop("simone_enhanced", tmp_path / folder, max_hours=hours, lr_schedule="linear")
        state = loop.run(StopAfter())
        histories.append((state.fixed_at, state.fixed_steps, read_history(loop.step_log.path)))
    (_, longer, one), (until, shorter, two) = histories
    assert shorter < longer
    for name in ("train_loss", "learning_rate", "coherence_loss"):
        assert [record[name] for record in one[:until]] == [record[name] for record in two[:until]]
    rates = [record["learning_rate"] / loop.settings.learning_rate for record in two]
    assert rates[: until + 3] == pytest.approx([step / 50 for step in range(1, until + 4)]), "no jump when it is fixed"
    assert rates[-1] == pytest.approx(1 / (shorter - until)), "the schedule reaches its end"


def test_max_steps_can_end_the_run_before_max_hours(clocked_loop, tmp_path):
    loop = clocked_loop("mvlm_gpt2", tmp_path, max_steps=60)
    state = loop.run(StopAfter())
    assert state.step == 60 and state.fixed_at == 8, "a tenth of the steps is enough"
    assert state.fixed_steps > 60 and loop.length.total == 60
    untimed = clocked_loop("mvlm_gpt2", tmp_path / "untimed", max_steps=60, max_hours=None)
    untimed.run(StopAfter())
    histories = [read_history(run.step_log.path) for run in (loop, untimed)]
    for name in ("train_loss", "learning_rate"):
        one, two = ([record[name] for record in history] for history in histories)
        assert one == two, "time that suffices changes nothing"


def test_max_hours_shortens_a_run_that_has_another_limit(clocked_loop, tmp_path):
    loop = clocked_loop("mvlm_gpt2", tmp_path, max_steps=1000)
    state = loop.run(StopAfter())
    assert state.step == state.fixed_steps < 200
    rates = [record["learning_rate"] / loop.settings.learning_rate for record in read_history(loop.step_log.path)]
    assert max(rates) == pytest.approx(0.98, abs=0.01) and rates[-1] == pytest.approx(0.1, abs=0.02)


def test_steps_within_matches_step_by_step_counting():
    pace = {"step": 2, "evaluation": 7, "checkpoint": 5, "eval_interval": 4, "checkpoint_interval": 5}
    for done in (0, 3, 4, 10):
        for seconds in (0, 14, 33, 34, 100, 777):
            # Step by step, with an evaluation at the end as well.
            total, spent = done, 0.0
            while True:
                step = total + 1
                spent += 2 + 12 * (step % 4 == 0) + 5 * (step % 5 == 0)
                if spent + 12 * (step % 4 > 0) > seconds:
                    break
                total = step
            assert steps_within(seconds, done, **pace) == max(done + 1, total), (done, seconds)


def test_a_run_with_max_hours_is_not_cut_short_without_it(clocked_loop, tmp_path):
    with pytest.raises(Stopped):
        clocked_loop("mvlm_gpt2", tmp_path).run(StopAfter(30))
    with pytest.raises(UserError, match="repeat the length it was started with"):
        clocked_loop("mvlm_gpt2", tmp_path, max_hours=None, max_steps=20).run(StopAfter())


def test_a_run_without_max_hours_is_not_ended_by_the_hours_it_has_taken(clocked_loop, tmp_path):
    with pytest.raises(Stopped):
        clocked_loop("mvlm_gpt2", tmp_path, max_hours=None, max_steps=400).run(StopAfter(200))
    with pytest.raises(UserError, match=r"step 200, which these settings would end at once, after more than 0\.167 h"):
        clocked_loop("mvlm_gpt2", tmp_path, max_steps=400).run(StopAfter())


def test_damaged_time_budget_fields_are_refused():
    for damaged in ({"spent": 3}, {"fixed_steps": "many"}, {"fixed_at": -1}):
        with pytest.raises(ValueError):
            LoopState.of(asdict(LoopState()) | damaged)
