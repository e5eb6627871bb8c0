"""The record of each step: its fields and its timings."""

import itertools
import math
from functools import partial

import pytest
import torch

from mvlm_core.errors import Stopped
from mvlm_core.training.history import read_history
from tests.helpers import DelayedThread, StopAfter, make_loop, tiny_settings


def test_seconds_are_wall_time_and_speed_counts_steps_only(tiny_corpus, tmp_path, monkeypatch):
    """With a clock on which an evaluation and a save take 10 s each, a step a few milliseconds."""
    ticks, now = itertools.count(), [0.0]
    monkeypatch.setattr("mvlm_core.training.checkpointer.Thread", DelayedThread)

    def loop():
        loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, checkpoint_interval=2))
        evaluate, write = loop.task.evaluate, loop.checkpoints._write

        def wait(do, *values):
            now[0] += 10
            return do(*values)

        object.__setattr__(loop.task, "evaluate", partial(wait, evaluate))
        loop.checkpoints._write = partial(wait, write)
        loop.clock = lambda: now[0] + next(ticks) / 1000
        return loop

    with pytest.raises(Stopped):
        loop().run(StopAfter(7))
    now[0] += 1000  # between the two processes, which does not count
    state = loop().run(StopAfter())
    records = read_history(tmp_path / "mvlm_gpt2" / "training_history.jsonl")
    times = [0.0] + [record["seconds"] for record in records]
    # It evaluates after steps 4, 8 and 12, and waits for a save at the next: for 2 at 4, 4 at 6, 6 at 7, 8 at 10.
    gaps = [round(times[step] - times[step - 1]) for step in range(1, 13)]
    assert gaps == [0, 0, 0, 0, 20, 0, 10, 10, 10, 0, 10, 0]
    assert all(before < after for before, after in zip(times, times[1:], strict=False))
    assert round(state.seconds) == round(times[12]) + 20, "the last evaluation, and the wait for the save of step 10"
    assert state.step_seconds < 1
    assert all(1000 < record["tokens_per_second"] < 128_000 for record in records)
    assert 1000 < state.tokens / state.step_seconds < 128_000


def test_history_records_the_contract_fields(tiny_corpus, tmp_path):
    loop = make_loop("simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, tmp_path, coherence_weight=0.3))
    loop.run(StopAfter())
    records = read_history(loop.step_log.path)
    wanted = {
        "step",
        "epoch",
        "tokens",
        "bytes",
        "seconds",
        "train_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
    }
    for record in records:
        assert wanted <= record.keys() and None not in record.values()
        assert record["tokens"] == record["step"] * 4 * 32
        assert ("validation_bpb" in record) == (record["step"] % 4 == 0)
        assert ("coherence_loss" in record) == (record["step"] <= 6)
    assert records[0]["train_loss"] == pytest.approx(math.log(400), abs=0.3)
    assert records[-1]["train_loss"] < records[0]["train_loss"] - 0.05
    sizes = [record["bytes"] for record in records]
    assert sizes == sorted(sizes) and 1.2 < sizes[-1] / records[-1]["tokens"] < 4


def test_steps_that_are_read_together_share_their_time(tiny_corpus, tmp_path):
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path))
    for step, started, seconds in ((1, 10.0, 2.0), (2, 12.0, 1.0), (3, 13.0, 3.0)):
        metrics = {"train_loss": torch.tensor(5.0), "skipped": torch.tensor(0.0)}
        loop.step_log.add({"step": step}, metrics, started, seconds)
    assert loop.step_log.read(loop.state, clock=lambda: 99.0) is None
    loop.step_log.write()
    records = read_history(loop.step_log.path)
    assert [record["seconds"] for record in records] == [12.0, 14.0, 16.0]
    assert {record["tokens_per_second"] for record in records} == {3 * 4 * 32 / 6} and loop.state.step_seconds == 6
