"""CPU workers: exact sums, the curve of one process, exact resume, no process left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from mvlm_core.errors import Stopped, TrainingFailed, UserError
from mvlm_core.training import cpu_workers
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.cpu_workers import fork
from mvlm_core.training.history import read_history
from mvlm_core.training.run import run_training
from tests.helpers import REPOSITORY, TINY, StopAfter, make_loop, recipe_of, tiny_settings


def in_ranks(world, work):
    """What ``work(ranks)`` gives in the parent; a child that fails there ends with exit code 1."""
    ranks = fork(world)
    try:
        return work(ranks)
    finally:
        ranks.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_the_sums_and_the_same_bits_on_all_ranks(dtype, monkeypatch):
    monkeypatch.setattr(cpu_workers, "_SHARED_BYTES", 4096)  # so that a sum goes through it in many pieces

    def work(ranks):
        def mine(rank):
            generator = torch.Generator().manual_seed(rank)
            return [torch.randn(3, 1000, generator=generator, dtype=dtype), torch.full((), float(rank), dtype=dtype)]

        found = mine(ranks.rank)
        ranks.sum_on_device(found)
        expected = [sum(parts) for parts in zip(*(mine(rank) for rank in range(3)), strict=True)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        bits = [ranks.share(found[0]), found[0]]  # the parent's, and this rank's
        differing = ranks.sum_numbers(float(not torch.equal(*bits)))
        shared = ranks.share_tensors({"x": torch.arange(5)} if ranks.is_main else {})
        missing = ranks.sum_numbers(float(not torch.equal(shared["x"], torch.arange(5))))
        return differing, missing, ranks.sum_numbers(ranks.rank, 0.5)

    assert in_ranks(3, work) == ([0.0], [0.0], [3.0, 1.5])


def test_a_child_that_dies_ends_the_run():
    def work(ranks):
        if not ranks.is_main:
            os._exit(9)
        with pytest.raises(TrainingFailed, match="a process of this run died"):
            ranks.wait()
        return True

    assert in_ranks(2, work)


@pytest.mark.parametrize("model", ["mvlm_gpt2", "simone_enhanced"])
def test_two_processes_give_the_curve_of_one(model, tiny_corpus, tmp_path):
    histories = []
    for processes in (1, 2):
        settings = tiny_settings(model, tiny_corpus, tmp_path / str(processes), processes=processes)
        folder = run_training(recipe_of(model), settings)
        histories.append(read_history(folder / "training_history.jsonl"))
    one, two = histories
    assert [record["bytes"] for record in one] == [record["bytes"] for record in two], "each token once"
    assert [r["train_loss"] for r in two] == pytest.approx([r["train_loss"] for r in one], abs=2e-4)
    assert two[-1]["validation_bpb"] == pytest.approx(one[-1]["validation_bpb"], abs=2e-4)


def command(corpus, work, **changes):
    values = TINY | {"data_dir": corpus, "output_dir": work / "out", "cache_dir": work / "cache", "processes": 2}
    flags = [f"--{name}={value}" for name, value in (values | changes).items() if name != "quiet"]
    return [sys.executable, REPOSITORY / "SIM-ONE Training/enhanced_train.py", *flags, "--quiet"]


def started(corpus, work, steps, wait_for):
    """A run of so many steps that has come to step ``wait_for``, and its child's process."""
    program = subprocess.Popen(command(corpus, work, max_steps=steps), stderr=subprocess.PIPE, text=True)
    history = work / "out" / "training_history.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (history.exists() and len(history.read_text().splitlines()) >= wait_for):
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.05)
    (child,) = psutil.Process(program.pid).children()
    return program, child


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_to_the_bit(tiny_corpus, tmp_path):
    program, child = started(tiny_corpus, tmp_path / "a", 400, wait_for=4)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 128 + signal.SIGTERM, program.stderr.read()
    assert not child.is_running()
    stopped_at = newest_checkpoint(tmp_path / "a/out/checkpoints").step
    assert 4 <= stopped_at < 400
    ends = []
    for work, steps in (("a", 15), ("b", stopped_at + 15)):
        changes = {"max_steps": 400, "output_dir": str(tmp_path / work / "out"), "processes": 2}
        settings = tiny_settings("simone_enhanced", tiny_corpus, tmp_path / work, **changes)

        def train(ranks, settings=settings, steps=steps):
            with pytest.raises(Stopped):
                make_loop("simone_enhanced", settings, ranks).run(StopAfter(steps))

        in_ranks(2, train)
        ends.append(newest_checkpoint(tmp_path / work / "out/checkpoints"))
    assert ends[0].step == ends[1].step == stopped_at + 15
    for name in ("model", "optimizer"):
        first, second = (end.tensors(name) for end in ends)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_neither_outlives_the_other(victim, tiny_corpus, tmp_path):
    program, child = started(tiny_corpus, tmp_path, 100_000, wait_for=4)
    (program if victim == "parent" else child).kill()
    if victim == "child":
        assert program.wait(60) == 1
        assert "a process of this run died" in program.stderr.read()
    program.wait(60)
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()


def test_where_there_is_something_better_it_is_refused(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="without torchrun"):
        run_training(recipe_of("mvlm_gpt2"), tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, processes=2))
