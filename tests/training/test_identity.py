"""The identity of a run: what it consists of, and what is refused because it differs."""

from dataclasses import replace

import pytest

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import CHECKPOINTS, training_config
from mvlm_core.training.checkpoint import checkpoint_folders
from mvlm_core.training.identity import check_identity, settings_identity
from mvlm_core.training.run import run_training
from mvlm_trainer import GPT2Settings
from prioritary_mvlm import PrioritaryConfig
from tests.helpers import recipe_of, tiny_settings


def test_the_split_of_a_batch_and_the_length_are_not_part_of_the_identity():
    one = settings_identity(GPT2Settings(preset="cpu", batch_size=8, max_steps=5))
    assert one == settings_identity(GPT2Settings(preset="cpu", batch_size=4, gradient_accumulation_steps=2))
    assert one["--preset"] == "cpu" and one["--batch_size × gradient_accumulation_steps"] == 8
    other = settings_identity(GPT2Settings(preset="cpu", seed=3, batch_size=4))
    assert {name for name in one if one[name] != other[name]} == {
        "--seed",
        "--batch_size × gradient_accumulation_steps",
    }


@pytest.mark.parametrize("cls", [GPT2Settings, PrioritaryConfig])
def test_a_resume_needs_the_same_validation_text(cls):
    now = settings_identity(cls(preset="cpu"))
    check_identity("a checkpoint", now, now)
    with pytest.raises(UserError, match="a checkpoint from a different run: --validation_text was primary, now all"):
        check_identity("a checkpoint", now, settings_identity(cls(preset="cpu", validation_text="all")))


def test_a_run_that_stopped_early_continues_with_more_patience(tiny_corpus, tmp_path, caplog):
    caplog.set_level("INFO", "mvlm")
    rate = {
        "learning_rate": 1e-20,
        "eval_interval": 2,
        "max_steps": 40,
        "min_epochs": 0.0,
    }  # no evaluation is better than the first

    def steps(patience):
        settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **rate, patience=patience)
        return training_config(run_training(recipe_of("mvlm_gpt2"), settings))["results"]["steps"]

    assert steps(1) == 4 and "already finished" not in caplog.text
    assert steps(1) == 4 and "already finished" in caplog.text
    assert steps(3) == 8


def test_resume_from_is_checked_and_used_even_if_the_run_is_finished(tiny_corpus, tmp_path, caplog):
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path)
    folder = run_training(recipe_of("mvlm_gpt2"), settings)
    weights, older = (folder / "model.safetensors").read_bytes(), checkpoint_folders(folder / CHECKPOINTS)[-2]
    with pytest.raises(UserError, match="--resume_from .*: no such checkpoint folder"):
        run_training(recipe_of("mvlm_gpt2"), replace(settings, resume_from=str(tmp_path / "step-00000005")))
    caplog.set_level("INFO", "mvlm")
    run_training(recipe_of("mvlm_gpt2"), replace(settings, resume_from=str(older)))
    assert f"resuming from {older}" in caplog.text and "already finished" not in caplog.text
    assert (folder / "model.safetensors").read_bytes() == weights
