"""The background writer saves a snapshot of the tensors, one save at a time, and reports its errors."""

import threading
from types import SimpleNamespace

import pytest
import torch

from mvlm_core.errors import TrainingError
from mvlm_core.training import checkpointer
from mvlm_core.training.checkpointer import CheckpointWriter
from mvlm_core.training.run import run_training
from tests.helpers import MODELS, make_loop, needs_cuda, recipe_of, tiny_settings


def test_tensors_are_snapshotted_when_the_write_starts():
    writer, go, written = CheckpointWriter(), threading.Event(), []
    weight = torch.zeros(4, 3).t()

    def write(tensors):
        assert go.wait(10)
        written.append(tensors["model"]["w"])

    for step in range(1, 4):
        weight.fill_(step)
        writer.start({"model": {"w": weight}}, write)
        assert not writer.ended
        weight.fill_(-1)
        go.set()
        writer.wait()
        go.clear()
    assert [float(one.unique()) for one in written] == [1, 2, 3]


def test_writes_do_not_overlap():
    writer, running, most, lock = CheckpointWriter(), 0, 0, threading.Lock()

    def write(_tensors):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.05)
        with lock:
            running -= 1

    for _ in range(4):
        writer.start({"model": {"w": torch.ones(2)}}, write)
    writer.wait()
    assert (running, most) == (0, 1)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("anything else")])
def test_write_errors_are_raised_once_by_wait(error):
    def write(_tensors):
        raise error

    writer = CheckpointWriter()
    writer.start({"model": {"w": torch.ones(2)}}, write)
    with pytest.raises(type(error), match=str(error)):
        writer.wait()
    writer.wait()
    assert not writer.ended


@needs_cuda
def test_cuda_snapshot_ignores_later_work_on_the_stream():
    writer, written = CheckpointWriter(), []
    weight = torch.ones(64 << 20, device="cuda")
    writer.start({"model": {"w": weight}}, lambda tensors: written.append(tensors["model"]["w"].sum().item()))
    weight.zero_()
    writer.wait()
    assert written == [64 << 20]


@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_would_fill_the_disk_is_refused_before_it_starts(model, tiny_corpus, tmp_path, monkeypatch):
    settings = tiny_settings(model, tiny_corpus, tmp_path, max_steps=6, checkpoint_interval=2, keep_checkpoints=1000)
    task = make_loop(model, settings).task
    weights = sum(tensor.nbytes for tensor in task.weights().values())
    needed = 5 * (weights + task.optimizers.state_bytes) + 2 * weights

    def run(free):
        disk = SimpleNamespace(disk_usage=lambda _path: SimpleNamespace(free=free))
        monkeypatch.setattr(checkpointer, "shutil", disk)  # only there: writing a checkpoint checks the disk as well
        return run_training(recipe_of(model), settings)

    with pytest.raises(TrainingError, match="GB more for checkpoints and its export: free some space"):
        run(needed - 1)
    folder = run(needed)
    stored = sum(file.stat().st_size for pattern in ("checkpoints/step-*/*", "*") for file in folder.glob(pattern))
    assert 0.5 * needed < stored < 1.2 * needed, "besides tensors, a few files of text and plots"
    settings.max_steps = 7
    with pytest.raises(TrainingError, match="GB of disk are free"):
        run(0)  # what the checkpoints of the first run occupy is counted
