"""Distillation: the loss by hand, a chain that resumes to the bit and exports a plain model, wrong teachers told."""

import json
import shutil

import pytest
import torch

from mvlm_core.errors import Stopped, UserError
from mvlm_core.evaluation.bits_per_byte import load_export
from mvlm_core.export.manifest import training_config, verify_folder
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.distillation import TEACHER_SHARE, TEACHERS, chain
from mvlm_core.training.run import run_training
from tests.export.exports import copy_export, seal, set_json
from tests.helpers import MODELS, StopAfter, make_loop, recipe_of, tiny_settings


@pytest.fixture
def corpus(trained):
    return trained / "corpus"


def first_loss(loop):
    batch = loop.task.batches.batch(0)
    inputs, targets, weights = map(torch.from_numpy, (batch.inputs, batch.targets, batch.weights))
    return inputs, loop.task.loss(inputs, targets, weights, 0.9)


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_the_share_of_what_teacher_and_student_say_by_their_logits(model, trained, corpus, tmp_path):
    """Against the plain forward passes of transformers; a student that is its teacher scores the teacher's entropy."""
    settings = tiny_settings(model, corpus, tmp_path, teacher=str(trained / model))
    loop = make_loop(model, settings)
    inputs, scored = first_loss(loop)
    teacher, _ = load_export(trained / model)
    with torch.no_grad():
        wanted = teacher(inputs, use_cache=False).logits.softmax(-1)
        said = loop.task.model.eval()(inputs, use_cache=False).logits.log_softmax(-1)
    soft = -(wanted * said).sum(-1).mean()
    torch.testing.assert_close(scored.parts["distillation_loss"], soft, rtol=1e-5, atol=1e-6)
    alone = make_loop(model, tiny_settings(model, corpus, tmp_path / "alone"))
    _, plain = first_loss(alone)
    expected = (1 - TEACHER_SHARE) * plain.total + TEACHER_SHARE * soft
    torch.testing.assert_close(scored.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored.train_loss, plain.train_loss)  # stays the cross-entropy of the text

    loop.task.model.load_state_dict(teacher.state_dict())
    _, same = first_loss(loop)
    entropy = torch.special.entr(wanted).sum(-1).mean()
    torch.testing.assert_close(same.parts["distillation_loss"], entropy, rtol=1e-5, atol=1e-6)


def test_the_models_of_a_chain_share_seeds_time_and_folders_out(tmp_path):
    lengths = {"max_hours": 1.1, "max_steps": 10, "num_epochs": 9.0}
    settings = tiny_settings("mvlm_gpt2", tmp_path, tmp_path, num_models=3, seed=5, **lengths)
    first, second, last = chain(settings)
    root = tmp_path / "mvlm_gpt2"
    teachers = root / "checkpoints" / "teachers"
    assert [stage.seed for stage in (first, second, last)] == [6, 7, 5]
    assert [stage.num_models for stage in (first, second, last)] == [1, 1, 1]
    assert first.output_dir == second.teacher == str(teachers / "0") and first.teacher is None
    assert second.output_dir == last.teacher == str(teachers / "1") and last.output_dir == str(root)
    assert first.no_test_score and second.no_test_score and not last.no_test_score
    assert first.max_hours + second.max_hours + last.max_hours == pytest.approx(1.1)
    assert last.max_hours == pytest.approx(3 * second.max_hours) == pytest.approx(4 * first.max_hours)
    assert (first.max_steps, second.max_steps, last.max_steps) == (3, 3, 10)
    assert (first.num_epochs, last.num_epochs) == (3, 9) and last.max_bytes is first.max_bytes is None


@pytest.mark.parametrize("model", MODELS)
def test_a_chain_interrupted_in_its_last_model_ends_with_the_same_bits(model, corpus, tmp_path):
    values = {"num_models": 2, "dropout": 0.1, "max_steps": 8}
    whole = run_training(recipe_of(model), tiny_settings(model, corpus, tmp_path / "a", **values))
    other = tiny_settings(model, corpus, tmp_path / "b", **values)
    shutil.copytree(whole / TEACHERS, tmp_path / "b" / model / TEACHERS)
    with pytest.raises(Stopped):
        make_loop(model, chain(other)[-1]).run(StopAfter(3))
    folder = run_training(recipe_of(model), other)
    expected, found = (newest_checkpoint(place / "checkpoints").tensors("model") for place in (whole, folder))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)

    teacher, student = (training_config(place, "identity", "results") for place in (whole / TEACHERS / "0", whole))
    assert teacher["results"]["test_bpb"] is None and student["results"]["test_bpb"] < 8
    config = training_config(whole)
    assert config["settings"]["seed"] == other.seed, "a rerun of the job compares it"
    assert student["results"]["parameters"] == teacher["results"]["parameters"], "the export is one plain model"
    assert not verify_folder(whole)
    history = json.loads((whole / "training_history.json").read_text())
    together = history[-1]["seconds"] + teacher["results"]["seconds"]
    assert student["results"]["seconds"] == pytest.approx(together, abs=1.0), "the time of both"
    assert "distillation_loss" in history[0]


def test_a_finished_chain_trains_nothing_again(corpus, tmp_path, caplog):
    settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, num_models=2, max_steps=4)
    folder = run_training(recipe_of("mvlm_gpt2"), settings)
    before = (folder / "model.safetensors").read_bytes()
    caplog.set_level("INFO", "mvlm")
    assert run_training(recipe_of("mvlm_gpt2"), settings) == folder
    assert caplog.text.count("already finished") == 2
    assert (folder / "model.safetensors").read_bytes() == before


def test_fresh_trains_the_whole_chain_again_and_keeps_its_teacher(corpus, tmp_path):
    def run(**changes):
        settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, num_models=2, max_steps=4, **changes)
        return run_training(recipe_of("mvlm_gpt2"), settings)

    folder = run()
    first, teacher = (folder / "model.safetensors").read_bytes(), folder / TEACHERS / "0"
    changed = teacher.stat().st_mtime_ns
    assert run(fresh=True, seed=1) == folder
    assert (folder / "model.safetensors").read_bytes() != first and teacher.stat().st_mtime_ns > changed
    assert not verify_folder(teacher) and not verify_folder(folder)


def test_a_teacher_that_does_not_fit_is_refused_with_every_reason(trained, corpus, tmp_path):
    def problems(model="mvlm_gpt2", **changes):
        settings = tiny_settings(model, corpus, tmp_path, **{"teacher": str(trained / "mvlm_gpt2")} | changes)
        with pytest.raises(UserError) as error:
            run_training(recipe_of(model), settings)
        assert not (tmp_path / model).exists(), "nothing is written before the teacher is known to be good"
        return error.value.problems

    two = problems(vocab_size=390, max_length=64)
    assert len(two) == 2 and "different tokenizer" in two[0] and "32 tokens, shorter than 64" in two[1]
    assert "no such folder or archive" in problems(teacher=str(tmp_path / "none"))[0]
    damaged = copy_export(trained / "mvlm_gpt2", tmp_path / "damaged")
    set_json(damaged / "training_config.json", "tokenizer", sha256="0")
    assert "SHA-256 differs" in problems(teacher=str(damaged))[0]
    seal(damaged)
    assert "different tokenizer" in problems(teacher=str(damaged))[0]
    assert "different tokenizer" in problems("simone_enhanced")[0]


def test_another_teacher_is_another_run(trained, corpus, tmp_path):
    """Its checkpoint is not resumed, and a finished model is not taken for that of this one."""
    model = "mvlm_gpt2"
    run_training(recipe_of(model), tiny_settings(model, corpus, tmp_path, max_steps=4))
    with pytest.raises(UserError, match="--teacher, its manifest was None"):
        run_training(
            recipe_of(model), tiny_settings(model, corpus, tmp_path, max_steps=4, teacher=str(trained / model))
        )
