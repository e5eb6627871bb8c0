"""The identity of a run: what it consists of, and what is refused because it differs."""

import shutil
from dataclasses import replace

import pytest

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import CHECKPOINTS, MANIFEST, training_config, write_manifest
from mvlm_core.files import read_json, sha256_file, write_json_atomic
from mvlm_core.training.checkpoint import checkpoint_folders
from mvlm_core.training.identity import TEACHERS_KEY, check_identity, check_settings, is_finished, settings_identity
from mvlm_core.training.run import run_training
from mvlm_trainer import GPT2Settings
from prioritary_mvlm import PrioritaryConfig
from tests.helpers import recipe_of, tiny_settings


def test_the_split_of_a_batch_the_length_and_compilation_are_not_part_of_the_identity():
    one = settings_identity(GPT2Settings(preset="cpu", batch_size=8, max_steps=5))
    assert one == settings_identity(GPT2Settings(preset="cpu", batch_size=4, gradient_accumulation_steps=2))
    assert one == settings_identity(GPT2Settings(preset="cpu", batch_size=8, no_compile=True, loss_kernel="blocks"))
    assert one["--preset"] == "cpu" and one["--batch_size × gradient_accumulation_steps"] == 8
    other = settings_identity(GPT2Settings(preset="cpu", seed=3, batch_size=4))
    assert {name for name in one if one[name] != other[name]} == {
        "--seed",
        "--batch_size × gradient_accumulation_steps",
    }


def test_a_longer_time_that_needs_more_teachers_is_refused_with_advice_for_both_commands():
    default, longer = GPT2Settings(preset="h200"), GPT2Settings(preset="h200", max_hours=2)
    recorded = settings_identity(default) | {TEACHERS_KEY: ",".join(["hash"] * (default.num_models - 1))}
    with pytest.raises(UserError) as error:
        check_settings("a model", recorded, longer, longer.num_models - 1)
    assert error.value.problems == [
        "a model from a different run: number of teachers was 3, now 7",
        "restore those values, give --num_epochs instead of --max_hours, choose another --output_dir "
        "(train_all_models.py: --work_dir), or start over with --fresh",
    ]
    epochs = GPT2Settings(preset="h200", num_epochs=36)
    check_settings("a model", recorded, epochs, epochs.num_models - 1)
    with pytest.raises(UserError, match="values, choose another --output_dir"):
        check_settings("a model", recorded, GPT2Settings(preset="h200", seed=3), 3)


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


@pytest.mark.parametrize(
    ("recorded", "changes", "finished"),
    [
        ({"steps": 12, "fixed_steps": None}, {}, True),
        ({"steps": 11, "fixed_steps": None}, {}, False),
        ({"steps": 5, "fixed_steps": 5}, {"max_hours": 1.0}, True),
        ({"steps": 5, "fixed_steps": 5}, {}, False),  # extended: no time limit any more
        ({"steps": 7, "fixed_steps": 5}, {"max_hours": 1.0}, True),  # after an extension
        ({"steps": 4, "fixed_steps": 5}, {"max_hours": 1.0}, False),
        ({"steps": 5, "fixed_steps": None}, {"max_hours": 1.0}, False),
        ({"steps": 5}, {"max_hours": 1.0}, True),  # by an older version
    ],
)
def test_a_model_is_finished_if_its_steps_or_its_time_were_reached(trained, tmp_path, recorded, changes, finished):
    export = tmp_path / "mvlm_gpt2"
    shutil.copytree(trained / "mvlm_gpt2", export, ignore=shutil.ignore_patterns("checkpoints"))
    config = read_json(export / "training_config.json")
    config["results"].pop("fixed_steps", None)
    config["results"] |= recorded
    write_json_atomic(export / "training_config.json", config)
    files = read_json(export / MANIFEST)["files"]
    write_manifest(export, "mvlm_gpt2", files | {"training_config.json": sha256_file(export / "training_config.json")})
    settings = GPT2Settings(preset="smoke", **changes)
    assert is_finished(export, config["identity"], 12, settings) is finished
