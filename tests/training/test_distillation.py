"""Distillation: the loss by hand, bit-identical resuming, and refused teachers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvlm_core.errors import Stopped, UserError
from mvlm_core.evaluation.bits_per_byte import load_export
from mvlm_core.export.manifest import CHECKPOINTS, MANIFEST, TEACHERS, training_config, verify_folder
from mvlm_core.files import RunLock
from mvlm_core.training.checkpoint import checkpoint_folders, newest_checkpoint
from mvlm_core.training.distillation import (
    DISTILLATION_WEIGHT,
    draw_teacher,
    teacher_and_student_settings,
    with_time_left,
)
from mvlm_core.training.loop import TrainingLoop
from mvlm_core.training.run import run_training
from tests.export.exports import copy_export, seal, set_json
from tests.helpers import MODELS, StopAfter, make_loop, recipe_of, tiny_settings


@pytest.fixture
def corpus(trained):
    return trained / "corpus"


def first_loss(loop):
    batch = loop.task.batches.batch(0)
    inputs, targets, weights = map(torch.from_numpy, (batch.inputs, batch.targets, batch.weights))
    return inputs, loop.task.loss(inputs, targets, weights, 0.9, draw_teacher(loop.task.teachers))


@pytest.mark.parametrize("model", MODELS)
def test_distillation_loss_matches_plain_transformers_logits(model, trained, corpus, tmp_path):
    """A student identical to its teacher scores the teacher's entropy."""
    settings = tiny_settings(model, corpus, tmp_path, teacher=(str(trained / model),))
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
    expected = (1 - DISTILLATION_WEIGHT) * plain.total + DISTILLATION_WEIGHT * soft
    torch.testing.assert_close(scored.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored.train_loss, plain.train_loss)  # remains the cross-entropy of the text

    loop.task.model.load_state_dict(teacher.state_dict())
    _, same = first_loss(loop)
    entropy = torch.special.entr(wanted).sum(-1).mean()
    torch.testing.assert_close(same.parts["distillation_loss"], entropy, rtol=1e-5, atol=1e-6)


def test_teachers_and_student_divide_seeds_time_and_folders(tmp_path):
    lengths = {"max_hours": 1.2, "max_steps": 10, "num_epochs": 9.0}
    settings = tiny_settings(
        "mvlm_gpt2", tmp_path, tmp_path, num_models=3, seed=5, teacher_epochs=2.5, resume_from="x", **lengths
    )
    first, second, student = teacher_and_student_settings(settings)
    root = tmp_path / "mvlm_gpt2"
    teachers = root / "checkpoints" / "teachers"
    assert [model.seed for model in (first, second, student)] == [6, 7, 5]
    assert [model.num_models for model in (first, second, student)] == [1, 1, 1]
    assert [model.output_dir for model in (first, second, student)] == [str(p) for p in (*teachers_in(teachers), root)]
    assert first.teacher == second.teacher == ()
    assert (first.resume_from, second.resume_from, student.resume_from) == (None, None, "x")
    assert student.teacher == tuple(str(path) for path in teachers_in(teachers))
    assert first.no_test_score and second.no_test_score and not student.no_test_score
    assert first.max_hours == second.max_hours == pytest.approx(0.2), "at most"
    assert with_time_left(student, 0.1 * 3600).max_hours == pytest.approx(1.1), "a teacher stops when it is done"
    assert with_time_left(student, 2 * 3600).max_hours > 0
    assert (first.num_epochs, student.num_epochs) == (2.5, 9) and first.max_steps == student.max_steps == 10
    assert teacher_and_student_settings(replace(settings, num_epochs=1.0))[0].num_epochs == 1
    assert teacher_and_student_settings(replace(settings, num_models=1)) == [replace(settings, num_models=1)]
    untimed = replace(settings, max_hours=None)
    assert teacher_and_student_settings(untimed)[0].max_hours is None and with_time_left(untimed, 3600) == untimed


def teachers_in(folder, count=2):
    return [folder / str(number) for number in range(count)]


@pytest.mark.parametrize("model", MODELS)
def test_each_micro_batch_draws_one_teacher_reproducibly(model, trained, corpus, tmp_path):
    """With two teachers each micro-batch has the loss of one of them, chosen by the micro-batch's seed."""
    other = run_training(recipe_of(model), tiny_settings(model, corpus, tmp_path / "other", seed=7))
    places = [str(trained / model), str(other)]

    def losses(*teachers):
        loop = make_loop(model, tiny_settings(model, corpus, tmp_path / "student", teacher=teachers, dropout=0.0))
        return [loop.gradients.run_micro_batch(0, first, 1, 0.9)[0]["distillation_loss"].item() for first in range(8)]

    alone = [losses(place) for place in places]
    together = losses(*places)
    assert together == losses(*places)
    drawn = [min((0, 1), key=lambda teacher: abs(alone[teacher][i] - loss)) for i, loss in enumerate(together)]
    assert set(drawn) == {0, 1}
    assert together == pytest.approx([alone[teacher][i] for i, teacher in enumerate(drawn)], rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_interrupted_student_resumes_bit_identically(model, corpus, tmp_path):
    values = {"num_models": 3, "dropout": 0.1, "max_steps": 8}
    whole = run_training(recipe_of(model), tiny_settings(model, corpus, tmp_path / "a", **values))
    other = tiny_settings(model, corpus, tmp_path / "b", **values)
    shutil.copytree(whole / TEACHERS, tmp_path / "b" / model / TEACHERS)
    with pytest.raises(Stopped):
        make_loop(model, teacher_and_student_settings(other)[-1]).run(StopAfter(3))
    folder = run_training(recipe_of(model), other)
    expected, found = (newest_checkpoint(place / "checkpoints").tensors("model") for place in (whole, folder))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)

    teacher, student = (training_config(place, "identity", "results") for place in (whole / TEACHERS / "0", whole))
    assert teacher["results"]["test_bpb"] is None and student["results"]["test_bpb"] < 8
    assert teacher["results"]["memorization"] is None and student["results"]["memorization"]["train"]
    config = training_config(whole)
    assert config["settings"]["seed"] == other.seed, "a rerun of the job compares it"
    assert student["results"]["parameters"] == teacher["results"]["parameters"], "the export is one plain model"
    assert not verify_folder(whole)
    history = json.loads((whole / "training_history.json").read_text())
    teachers = [training_config(place)["results"]["seconds"] for place in teachers_in(whole / TEACHERS)]
    own = newest_checkpoint(whole / "checkpoints").state["seconds"]
    assert student["results"]["seconds"] == pytest.approx(own + sum(teachers)) and own >= history[-1]["seconds"]
    assert "distillation_loss" in history[0]


def test_rerun_of_finished_teacher_and_student_trains_nothing(corpus, tmp_path, caplog):
    settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, num_models=2, max_steps=4)
    folder = run_training(recipe_of("mvlm_gpt2"), settings)
    before = (folder / "model.safetensors").read_bytes()
    caplog.set_level("INFO", "mvlm")
    for name in ("step-00000002.superseded", ".deleting-step-00000001"):
        (folder / TEACHERS / "0" / CHECKPOINTS / name).mkdir()
    assert run_training(recipe_of("mvlm_gpt2"), settings) == folder
    assert caplog.text.count("already finished") == 2
    assert checkpoint_folders(folder / CHECKPOINTS) and not list((folder / TEACHERS).rglob("*step-*")), (
        "they cost 1 GB each"
    )
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_a_student_without_its_teachers_is_kept_or_refused_before_they_are_trained_again(corpus, tmp_path, lost):
    settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, num_models=3, max_steps=4)
    folder = run_training(recipe_of("mvlm_gpt2"), settings)
    teacher = folder / TEACHERS / "1"
    shutil.rmtree(teacher) if lost == "removed" else (teacher / "model.safetensors").write_bytes(b"")
    before = (folder / MANIFEST).read_bytes(), teacher.exists()
    assert run_training(recipe_of("mvlm_gpt2"), settings) == folder, "it is finished"
    with pytest.raises(UserError, match="its teachers are no longer in .*teachers, or damaged: put them back"):
        run_training(recipe_of("mvlm_gpt2"), replace(settings, max_steps=8))
    assert ((folder / MANIFEST).read_bytes(), teacher.exists()) == before
    assert verify_folder(teacher) and not verify_folder(folder)


def test_a_student_trains_longer_with_the_teachers_it_has(corpus, tmp_path):
    """Teachers that time has shortened must not be trained again when the student is to be longer."""

    def trained_for(steps):
        values = {"num_models": 2, "max_steps": steps, "teacher_epochs": 100.0}
        folder = run_training(recipe_of("mvlm_gpt2"), tiny_settings("mvlm_gpt2", corpus, tmp_path, **values))
        return training_config(folder)["results"]["steps"], (folder / TEACHERS / "0" / MANIFEST).stat().st_mtime_ns

    (before, made), (after, kept) = trained_for(4), trained_for(8)
    assert (before, after) == (4, 8) and made == kept


def test_fresh_retrains_teacher_and_student(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        settings = tiny_settings("mvlm_gpt2", corpus, Path("relative"), num_models=2, max_steps=4, **changes)
        return run_training(recipe_of("mvlm_gpt2"), settings)

    folder = run()
    first, teacher = (folder / "model.safetensors").read_bytes(), folder / TEACHERS / "0"
    changed = teacher.stat().st_mtime_ns
    assert run(fresh=True, seed=1) == folder
    assert (folder / "model.safetensors").read_bytes() != first and teacher.stat().st_mtime_ns > changed
    assert not verify_folder(teacher) and not verify_folder(folder)


def test_fresh_with_fewer_models_deletes_the_other_teachers(corpus, tmp_path):
    def run(**changes):
        settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, max_steps=2, **changes)
        return run_training(recipe_of("mvlm_gpt2"), settings)

    def teachers():
        return sorted(path.name for path in (folder / TEACHERS).glob("*"))

    folder = run(num_models=4)
    assert teachers() == ["0", "1", "2"]
    run(num_models=3, fresh=True)
    assert teachers() == ["0", "1"]
    run(fresh=True, teacher=(str(folder / TEACHERS / "1"),))
    assert teachers() == ["1"] and not verify_folder(folder / TEACHERS / "1") and not verify_folder(folder)


def test_interrupted_fresh_run_resumes_without_the_old_student(corpus, tmp_path, monkeypatch):
    """--fresh clears the student's folder before the first teacher is trained."""

    def run(**changes):
        settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, num_models=2, max_steps=4, **changes)
        return run_training(recipe_of("mvlm_gpt2"), settings)

    def stopped(*_):
        raise Stopped(15)

    folder = run()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLoop, "run", stopped)
        run(fresh=True, seed=1)
    assert not training_config(folder) and not list(folder.glob("checkpoints/step-*"))
    assert training_config(run(seed=1), "settings")["settings"]["seed"] == 1


def test_output_folder_is_locked_while_a_teacher_is_trained(corpus, tmp_path):
    settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, num_models=2, max_steps=4)
    folder = Path(settings.output_dir)
    with RunLock(folder), pytest.raises(UserError, match="in use by process"):
        run_training(recipe_of("mvlm_gpt2"), settings)
    assert not (folder / TEACHERS / "0" / "checkpoints").exists()


def test_dry_run_is_refused_if_the_run_would_be(corpus, tmp_path, capsys):
    def run(**changes):
        return run_training(
            recipe_of("mvlm_gpt2"), tiny_settings("mvlm_gpt2", corpus, tmp_path, max_steps=4, **changes)
        )

    run()
    run(dry_run=True)
    assert "training steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="number of teachers was 0, now 2"):
        run(dry_run=True, num_models=3)
    run(dry_run=True, num_models=3, fresh=True)


def test_unsuitable_teachers_are_refused_with_every_reason(trained, corpus, tmp_path):
    def problems(model="mvlm_gpt2", **changes):
        settings = tiny_settings(model, corpus, tmp_path, **{"teacher": (str(trained / "mvlm_gpt2"),)} | changes)
        with pytest.raises(UserError) as error:
            run_training(recipe_of(model), settings)
        assert not (tmp_path / model).exists(), "nothing is written before the teacher is known to be good"
        return error.value.problems

    two = problems(vocab_size=390, max_length=64)
    assert len(two) == 2 and "different tokenizer" in two[0] and "32 tokens, shorter than --max_length 64" in two[1]
    assert "no such folder or archive" in problems(teacher=(str(tmp_path / "none"),))[0]
    damaged = copy_export(trained / "mvlm_gpt2", tmp_path / "damaged")
    set_json(damaged / "training_config.json", "tokenizer", sha256="0")
    assert "SHA-256 differs" in problems(teacher=(str(damaged),))[0]
    seal(damaged)
    assert "different tokenizer" in problems(teacher=(str(damaged),))[0]
    assert "different tokenizer" in problems("simone_enhanced")[0]


def test_finished_run_without_the_teacher_is_rejected(trained, corpus, tmp_path):
    """A model trained without the teacher is not taken for the result of this run."""
    model = "mvlm_gpt2"
    run_training(recipe_of(model), tiny_settings(model, corpus, tmp_path, max_steps=4))
    with pytest.raises(UserError, match="number of teachers was 0, now 1"):
        run_training(
            recipe_of(model), tiny_settings(model, corpus, tmp_path, max_steps=4, teacher=(str(trained / model),))
        )


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_teachers_is_refused_before_teachers_are_trained(finished, corpus, tmp_path):
    alone = tiny_settings("mvlm_gpt2", corpus, tmp_path, max_steps=4)
    if finished:
        run_training(recipe_of("mvlm_gpt2"), alone)
    else:
        with pytest.raises(Stopped):
            make_loop("mvlm_gpt2", alone).run(StopAfter(2))
    with pytest.raises(UserError) as error:
        settings = tiny_settings("mvlm_gpt2", corpus, tmp_path, max_steps=4, num_models=3, dropout=0.3)
        run_training(recipe_of("mvlm_gpt2"), settings)
    assert "number of teachers was 0, now 2" in str(error.value) and "--dropout was" in str(error.value)
    assert not (tmp_path / "mvlm_gpt2" / TEACHERS).exists()
