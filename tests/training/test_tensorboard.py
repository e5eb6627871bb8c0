"""TensorBoard scalars match the history, and their errors do not stop training."""

import logging

import pytest

from mvlm_core.export.manifest import TENSORBOARD
from mvlm_core.training.history import read_history
from mvlm_core.training.run import run_training
from mvlm_core.training.tensorboard import TensorBoardWriter
from tests.helpers import StopAfter, make_loop, tiny_settings


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_scalars_match_the_history(tiny_corpus, tmp_path):
    from prioritary_mvlm.enhanced_trainer import RECIPE

    folder = run_training(RECIPE, tiny_settings("simone_enhanced", tiny_corpus, tmp_path, tensorboard=True))
    history, found = read_history(folder / "training_history.jsonl"), scalars(folder / TENSORBOARD)
    assert len(history) == 12
    for name in ("train_loss", "validation_bpb", "learning_rate", "grad_norm", "tokens_per_second"):
        wanted = {record["step"]: pytest.approx(record[name], rel=1e-6) for record in history if name in record}
        assert found[name] == wanted


def test_repeated_steps_replace_earlier_scalars(tmp_path):
    events = TensorBoardWriter(tmp_path)
    events.add([{"step": step, "train_loss": 5.0} for step in (1, 2, 3)])
    events.add([{"step": 2, "train_loss": 4.0}])  # rolled back: step 3 has not been repeated
    assert scalars(tmp_path)["train_loss"] == {1: 5.0, 2: 4.0}
    TensorBoardWriter(tmp_path).add([{"step": 1, "train_loss": 3.0}])  # and in another process after a resume
    assert scalars(tmp_path)["train_loss"] == {1: 3.0}


def test_tensorboard_errors_are_logged_once_and_do_not_stop_training(tiny_corpus, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mvlm"), "propagate", True)
    loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, tensorboard=True))
    (loop.step_log.path.parent / TENSORBOARD).write_text("in the way")
    assert loop.run(StopAfter()).step == 12
    assert caplog.text.count("training continues without") == 1


def test_missing_tensorboard_package_is_logged_and_writes_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mvlm"), "propagate", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    TensorBoardWriter(tmp_path).add([{"step": 1, "train_loss": 5.0}])
    assert "pip install tensorboard" in caplog.text and not list(tmp_path.iterdir())
